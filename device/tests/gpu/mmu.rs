// SPDX-License-Identifier: MIT OR Apache-2.0
//! The page walk against an oracle that knows the manual and nothing of the code.

use farfault_device::gpu::{mmu::walk, vram::Vram};
use farfault_protocol::{
    address::{GpuVa, VramAddr},
    event::{Access, FaultCause},
    pte::Location,
};
use proptest::{collection::vec, prelude::*, sample::select};
use std::sync::atomic::{AtomicBool, Ordering};

const VRAM: u64 = 4 << 20;
/// Tables are in the first pages: few enough for loops to be common.
const TABLES: u64 = 6;
const ROOT: u64 = 0x1000;

/// Memory as an array of words: only pages with tables.
type Words = Vec<u64>;

/// Where an address leads, or the number of the cause: 1 not present, 2 read-only, 3 not atomic,
/// 4 bad entry, 5 bad address. Marks what it used.
fn oracle(words: &mut Words, va: u64, access: u8) -> Result<(bool, u64), u8> {
    if va >= 1 << 48 {
        return Err(5);
    }
    let indices = [va >> 39, va >> 30, va >> 21, va >> 12].map(|i| i % 512);
    let mut table = ROOT;
    for (depth, index) in indices.into_iter().enumerate() {
        let at = (table / 8 + index) as usize;
        // Pages of VRAM beyond the tables are all zero.
        let entry = words.get(at).copied().unwrap_or(0);
        let bit = |n: u32| entry & (1 << n) != 0;
        if !bit(0) {
            return Err(1);
        }
        let address = entry & 0x000f_ffff_ffff_f000;
        let page_size = match depth {
            3 => 0x1000,
            2 if bit(3) => 0x20_0000,
            _ => {
                if entry & !0x000f_ffff_ffff_f001 != 0 || address + 0x1000 > VRAM {
                    return Err(4);
                }
                table = address;
                continue;
            }
        };
        let unknown = if depth == 3 {
            0xfff0_0000_0000_0f88
        } else {
            0xfff0_0000_0000_0f80
        };
        let inside = bit(4) || address + page_size <= VRAM;
        if entry & unknown != 0 || address % page_size != 0 || !inside {
            return Err(4);
        }
        if access >= 2 && !bit(1) {
            return Err(2);
        }
        if access == 3 && !bit(2) {
            return Err(3);
        }
        words[at] |= if access >= 2 { 0x60 } else { 0x20 };
        return Ok((bit(4), address + va % page_size));
    }
    unreachable!("the last level is a leaf");
}

fn entry() -> impl Strategy<Value = u64> {
    let table = (0..TABLES).prop_map(|page| page << 12 | 1);
    let leaf = (
        0..0x80u64,
        select(vec![0, 0x3ff000, 0x20_0000, 0x40_0000, 0xf_ffff_ffe0_0000]),
    )
        .prop_map(|(bits, address)| bits | address | 1);
    let odd = (any::<u64>(), 0..TABLES).prop_map(|(bits, page)| {
        // One stray bit.
        page << 12 | 1 | 1 << (bits % 64)
    });
    prop_oneof![6 => table, 6 => leaf, 2 => odd, 1 => any::<u64>()]
}

/// Addresses that meet the entries written below: each index is 0 to 3, or 511.
fn address() -> impl Strategy<Value = u64> {
    let index = || select(vec![0u64, 1, 2, 3, 511]);
    let low = (index(), index(), index(), index(), 0..0x1000u64)
        .prop_map(|(a, b, c, d, o)| a << 39 | b << 30 | c << 21 | d << 12 | o);
    prop_oneof![9 => low, 1 => any::<u64>()]
}

#[test]
fn entry_cleared_by_the_driver_during_walks_stays_clear() {
    let vram = Vram::new(VRAM).unwrap();
    let word = |at| vram.word(VramAddr::new(at)).unwrap();
    for (entry, table) in [(ROOT, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
        word(entry).store(table | 1, Ordering::Relaxed);
    }
    let leaf = word(0x4000);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let _ = walk::translate(&vram, VramAddr::new(ROOT), GpuVa::new(0), Access::Read);
            }
        });
        // The times differ, for the walk to be anywhere.
        let wait = |times| (0..times).for_each(|_| std::hint::spin_loop());
        for round in 0..100_000 {
            leaf.store(3, Ordering::SeqCst);
            wait(round % 61);
            leaf.store(0, Ordering::SeqCst);
            wait(100);
            if leaf.load(Ordering::SeqCst) != 0 {
                done.store(true, Ordering::Relaxed);
                panic!("a walk wrote to an entry that is not valid");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn walk_agrees_with_the_oracle(
        entries in vec((0..TABLES, select(vec![0u64, 1, 2, 3, 511]), entry()), 1..30),
        accesses in vec((address(), select(vec![1u8, 2, 3])), 1..20),
    ) {
        let vram = Vram::new(VRAM).unwrap();
        let mut words: Words = vec![0; (TABLES * 512) as usize];
        for (table, index, value) in entries {
            let at = table * 512 + index;
            words[at as usize] = value;
            vram.word(VramAddr::new(at * 8)).unwrap().store(value, Ordering::Relaxed);
        }
        for (va, access) in accesses {
            let expected = oracle(&mut words, va, access);
            let kind = Access::from_raw(access).unwrap();
            let got = walk::translate(&vram, VramAddr::new(ROOT), GpuVa::new(va), kind)
                .map(|leaf| {
                    let offset = va & (leaf.page_size() - 1);
                    match leaf.pte.location() {
                        Location::Vram(a) => (false, a.get() + offset),
                        Location::System(a) => (true, a.get() + offset),
                    }
                })
                .map_err(FaultCause::raw);
            prop_assert_eq!(got, expected, "va {:#x} access {}", va, access);
        }
        let memory: Words = (0..TABLES * 512)
            .map(|at| vram.word(VramAddr::new(at * 8)).unwrap().load(Ordering::Relaxed))
            .collect();
        prop_assert!(memory == words, "another bit was changed, or one was not");
    }
}
