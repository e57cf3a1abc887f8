// SPDX-License-Identifier: MIT OR Apache-2.0
//! `versions.toml`: everything that set-up takes from outside, in the versions that were tried.

use std::sync::LazyLock;

use serde::Deserialize;

/// The file, parsed.
pub static VERSIONS: LazyLock<Versions> = LazyLock::new(|| {
    // The file is part of this program and a test parses it, so this is no input that could be wrong at run time.
    toml::from_str(include_str!("../versions.toml")).expect("versions.toml is well-formed")
});

/// See the comments in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct Versions {
    pub debian: Debian,
    pub toolbox: Toolbox,
    pub kernel: Kernel,
    pub debug_kernel: DebugKernel,
    pub disks: Disks,
    pub space: Space,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct Debian {
    pub keyring: String,
    pub suite: String,
    pub backports: String,
    pub from_backports: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct Toolbox {
    pub packages: Vec<String>,
    pub rustc: String,
    pub qemu: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct Kernel {
    pub release: String,
    pub series: String,
    pub packages: Vec<String>,
    pub local_version: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct DebugKernel {
    pub packages: Vec<String>,
    pub steps: u64,
    pub needed_mib: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct Disks {
    pub packages: Vec<String>,
    pub modules: Vec<String>,
    pub needed_mib: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the file itself explains each entry")]
pub struct Space {
    pub needed_mib: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_file_of_this_tree_parses_and_agrees_with_itself() {
        let kernel = &VERSIONS.kernel;
        assert!(kernel.release.starts_with(&format!("{}.", kernel.series)));
        assert!(kernel.release.ends_with(&kernel.local_version));
        assert!(
            kernel
                .packages
                .contains(&format!("linux-binary-{}", kernel.release))
        );
        assert!(
            kernel
                .packages
                .contains(&format!("linux-source-{}", kernel.series))
        );
        assert!(
            VERSIONS
                .disks
                .packages
                .contains(&format!("linux-modules-{}", kernel.release))
        );
    }
}
