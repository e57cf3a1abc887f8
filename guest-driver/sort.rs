// SPDX-License-Identifier: GPL-2.0
//! Sorting of short lists that are nearly in order already.
//!
//! `core`'s sorting of this toolchain ends in a panic that objtool does not know to be without
//! return, and warns about at each build.

/// Sorts by insertion: linear for a list in order, quadratic for one in reverse.
pub(crate) fn sort_by_key<T: Copy, K: Ord>(list: &mut [T], key: impl Fn(&T) -> K) {
    for sorted in 1..list.len() {
        let (head, tail) = list.split_at_mut(sorted);
        let (Some(last), Some(next)) = (head.last(), tail.first()) else {
            continue;
        };
        if key(last) <= key(next) {
            continue;
        }
        let at = head.partition_point(|item| key(item) <= key(next));
        if let Some(unsorted) = list.get_mut(at..=sorted) {
            unsorted.rotate_right(1);
        }
    }
}
