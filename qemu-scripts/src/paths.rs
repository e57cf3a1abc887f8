// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which folder holds what.
//!
//! Tools and kernel are the same for every clone and live in the cache. What is built from this tree lives in cargo's
//! target folder, so that two clones never mix and `cargo clean` cleans.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use etcetera::BaseStrategy;

use crate::{Error, Options, Result, setup::Kernel};

/// The folders of one run.
#[derive(Debug, Clone)]
pub struct Paths {
    /// This source tree.
    pub repository: PathBuf,
    /// Cargo's target folder.
    pub target: PathBuf,
    /// Toolbox and kernel, shared by all clones.
    pub cache: PathBuf,
}

impl Paths {
    /// Finds them.
    ///
    /// # Errors
    /// Cargo cannot be asked, or there is no home folder and no `--cache`.
    pub fn new(options: &Options) -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let repository = manifest.parent().unwrap_or(manifest).to_path_buf();
        let metadata = cargo_metadata::MetadataCommand::new()
            .cargo_path(cargo())
            .current_dir(&repository)
            .no_deps()
            .other_options(["--offline".to_owned()])
            .exec()
            .map_err(|error| {
                Error::unfit(
                    format!("cargo cannot read this workspace: {error}"),
                    "cargo metadata",
                )
            })?;
        let cache = match &options.cache {
            Some(folder) => {
                std::path::absolute(folder).map_err(Error::io(folder.display().to_string()))?
            }
            None => etcetera::choose_base_strategy()
                .map_err(|error| {
                    Error::unfit(
                        error.to_string(),
                        "name a folder with --cache or FARFAULT_CACHE",
                    )
                })?
                .cache_dir()
                .join("farfault"),
        };
        Ok(Self {
            repository,
            target: metadata.target_directory.into_std_path_buf(),
            cache,
        })
    }

    /// What is built from this tree beside cargo's own artifacts.
    #[must_use]
    pub fn build(&self) -> PathBuf {
        self.target.join("farfault")
    }

    /// What of that is built for one kernel.
    #[must_use]
    pub fn for_kernel(&self, kernel: &Kernel) -> PathBuf {
        self.build().join(&kernel.name)
    }

    /// Logs of VMs that failed.
    #[must_use]
    pub fn runs(&self) -> PathBuf {
        self.build().join("runs")
    }

    /// Logs of set-up's tools.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.cache.join("logs")
    }
}

/// The cargo that runs this program, or the one on the path.
pub(crate) fn cargo() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// `fs::create_dir_all` with an error that names the folder.
pub(crate) fn create_dir(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(format!("creating {}", folder.display())))
}

/// Removes a folder or a file, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Replaces a file in one step: whoever reads it sees the old or the new one.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let what = || format!("writing {}", path.display());
    let folder = path.parent().unwrap_or(Path::new("."));
    create_dir(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(what()))?;
    std::io::Write::write_all(&mut file, content).map_err(Error::io(what()))?;
    file.as_file().sync_all().map_err(Error::io(what()))?;
    file.persist(path)
        .map_err(|error| Error::io(what())(error.error))?;
    Ok(())
}
