// SPDX-License-Identifier: MIT OR Apache-2.0
//! Settings of the guest's kernel that a case changes: files of `/proc/sys` and `/sys`, which all cases of a
//! VM share, so they are put back.

use anyhow::{Context, Result, ensure};
use std::fs;

/// Files and what they said before; they say so again when this is dropped.
#[derive(Default)]
pub(crate) struct Tunables(Vec<(String, String)>);

impl Tunables {
    /// Sets files of a folder.
    pub(crate) fn set(folder: &str, settings: &[(&str, &str)]) -> Result<Self> {
        let mut before = Self::default();
        for (name, value) in settings {
            before.also(&format!("{folder}/{name}"), value)?;
        }
        Ok(before)
    }

    /// Sets one more.
    pub(crate) fn also(&mut self, path: &str, value: &str) -> Result<()> {
        let before = fs::read_to_string(path).with_context(|| path.to_owned())?;
        fs::write(path, value).with_context(|| format!("{value} to {path}"))?;
        self.0.push((path.to_owned(), before.trim().to_owned()));
        Ok(())
    }
}

impl Drop for Tunables {
    fn drop(&mut self) {
        for (path, value) in self.0.iter().rev() {
            if let Err(error) = fs::write(path, value) {
                eprintln!("{path} is not {value} again: {error}");
            }
        }
    }
}

/// So many huge pages in the kernel's pool.
pub(crate) fn huge_page_pool(pages: u32) -> Result<Tunables> {
    const FOLDER: &str = "/proc/sys/vm";
    const NAME: &str = "nr_hugepages";
    let tunables = Tunables::set(FOLDER, &[(NAME, &pages.to_string())])
        .context("the guest's kernel has no hugetlb")?;
    let have: u32 = fs::read_to_string(format!("{FOLDER}/{NAME}"))?
        .trim()
        .parse()?;
    ensure!(
        have >= pages,
        "the kernel found {have} huge pages for the pool, and {pages} are wanted"
    );
    Ok(tunables)
}
