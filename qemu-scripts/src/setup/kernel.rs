// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's kernel, and a folder to build modules for it in.
//!
//! No kernel is compiled: the image is Debian's own. Its packages lack the metadata that Rust modules need, so that is made
//! from the kernel's source with the very configuration and the very rustc of the image (`modules_prepare`). Layouts of
//! kernel structures follow from the configuration, and this kernel has no symbol versions that would catch a difference;
//! so the configuration that results is compared with Debian's, option by option.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    Error, Options, Result, paths,
    process::{output, run_logged},
    progress::Progress,
    setup::{
        apt::Apt,
        step::Step,
        toolbox::{Toolbox, unpack},
    },
    versions::VERSIONS,
};

/// Parts of the source that no module build reads.
const LEFT_OUT: [&str; 10] = [
    "*/Documentation/*/*",
    "*/arch/*.dts*",
    "*/drivers/*.c",
    "*/drivers/gpu/*.h",
    "*/drivers/media/*.h",
    "*/drivers/net/*.h",
    "*/fs/*.c",
    "*/net/*.c",
    "*/sound/*.[ch]",
    "*/tools/*.json",
];

/// Options that may differ from Debian's: they tell who signs and what the build is called, never a layout.
const MAY_DIFFER: [&str; 5] = [
    "CONFIG_BUILD_SALT",
    "CONFIG_MODULE_SIG_",
    "CONFIG_SYSTEM_",
    "CONFIG_OPENSSL_",
    "CONFIG_PAHOLE_",
];

/// A kernel that can be booted and that modules can be built for.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What QEMU boots.
    pub image: PathBuf,
    /// Prepared build folder.
    pub build: PathBuf,
    /// The source that the build folder refers to.
    pub source: PathBuf,
    /// The compiler that built the kernel.
    pub cc: String,
}

impl Kernel {
    /// Reads what a build folder says of itself.
    fn in_folder(build: &Path, image: PathBuf) -> Result<Self> {
        let read = |path: &str| {
            let path = build.join(path);
            fs::read_to_string(&path).map_err(|error| {
                Error::unfit(
                    format!("{}: {error}", path.display()),
                    format!(
                        "make -C {} modules_prepare, with the kernel's own rustc",
                        build.display()
                    ),
                )
            })
        };
        let release = read("include/config/kernel.release")?.trim().to_owned();
        let config = read("include/config/auto.conf")?;
        for option in [
            "CONFIG_RUST",
            "CONFIG_HMM_MIRROR",
            "CONFIG_DEVICE_PRIVATE",
            "CONFIG_VIRTIO_PCI",
            "CONFIG_MODULES",
        ] {
            if value_of(&config, option) != Some("y") {
                return Err(Error::unfit(
                    format!("kernel {release} has no {option}=y"),
                    "use a kernel that has",
                ));
            }
        }
        let cc = value_of(&config, "CONFIG_CC_VERSION_TEXT")
            .and_then(|text| text.trim_matches('"').split(' ').next());
        let source = fs::canonicalize(build.join("source")).unwrap_or_else(|_| build.to_path_buf());
        if !image.exists() {
            return Err(Error::unfit(
                format!("kernel {release} has no image at {}", image.display()),
                format!("make -C {} bzImage", build.display()),
            ));
        }
        Ok(Self {
            release,
            image,
            build: build.to_path_buf(),
            source,
            cc: cc.unwrap_or("gcc").to_owned(),
        })
    }

    /// Folders that a module build has to see.
    #[must_use]
    pub fn folders(&self) -> Vec<&Path> {
        if self.source == self.build {
            vec![&self.build]
        } else {
            vec![&self.build, &self.source]
        }
    }
}

/// The step that makes Debian's kernel ready; it depends on the toolbox.
pub(crate) fn step(cache: &Path, toolbox: &Step) -> Step {
    let fixed = format!("{:#?}{LEFT_OUT:#?}", VERSIONS.kernel);
    Step::new(cache.join("kernel"), &[&fixed, toolbox.stamp()])
}

/// The kernel that the options ask for; Debian's is the one in `folder`.
pub(crate) fn find(options: &Options, toolbox: &Toolbox, folder: &Path) -> Result<Kernel> {
    if let Some(build) = &options.kernel {
        let build = fs::canonicalize(build).map_err(Error::io(build.display().to_string()))?;
        return Kernel::in_folder(&build, build.join("arch/x86/boot/bzImage"));
    }
    match toolbox {
        Toolbox::Debian(_) => Kernel::in_folder(&folder.join("build"), folder.join("vmlinuz")),
        Toolbox::Host => find_on_host(),
    }
}

/// Fills the kernel's folder.
pub(crate) fn fill(folder: &Path, toolbox: &Toolbox, apt: &Apt, log: &Path) -> Result<()> {
    let wanted = &VERSIONS.kernel;
    let step = Progress::start(format!("kernel {}: fetching", wanted.release));
    let packages = folder.join("packages");
    for archive in apt.download_only(&wanted.packages, &packages)? {
        unpack(&archive, &packages, &["./usr".to_owned()], log)?;
        paths::remove(&archive)?;
    }
    let modules = packages.join("usr/lib/modules").join(&wanted.release);
    let headers = packages
        .join("usr/src")
        .join(format!("linux-headers-{}", wanted.release));
    rename(&modules.join("vmlinuz"), &folder.join("vmlinuz"))?;
    step.done();

    let step = Progress::start("kernel: unpacking the parts of its source that modules need");
    let (source, build) = (folder.join("source"), folder.join("build"));
    paths::create_dir(&source)?;
    paths::create_dir(&build)?;
    let archive = packages
        .join("usr/src")
        .join(format!("linux-source-{}.tar.xz", wanted.series));
    let mut tar = toolbox.command("tar", folder, &[folder]);
    tar.args([
        "--extract",
        "--no-same-owner",
        "--strip-components=1",
        "--directory",
    ])
    .arg(&source);
    tar.args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")))
        .arg("--file")
        .arg(&archive);
    run_logged(tar, "unpacking the kernel's source", log)?;
    step.done();

    let step = Progress::start("kernel: preparing the build of modules");
    let debians = modules.join("config");
    copy(&debians, &build.join(".config"))?;
    let cc = fs::read_to_string(&debians).map_err(Error::io(debians.display().to_string()))?;
    let cc = value_of(&cc, "CONFIG_CC_VERSION_TEXT")
        .unwrap_or("gcc")
        .trim_matches('"');
    for target in ["olddefconfig", "modules_prepare"] {
        let mut make = toolbox.command("make", &source, &[folder]);
        make.arg(format!("O={}", build.display()))
            .arg(format!("CC={}", cc.split(' ').next().unwrap_or("gcc")))
            .arg(format!("LOCALVERSION={}", wanted.local_version))
            .arg("RUST_LIB_SRC=/usr/lib/rustlib/src/rust/library")
            .arg(format!("-j{}", jobs()))
            .arg(target);
        run_logged(
            make,
            &format!("preparing the build of modules (make {target})"),
            log,
        )?;
        if target == "olddefconfig" {
            check_configuration(&debians, &build.join(".config"))?;
        }
    }
    rename(
        &headers.join("Module.symvers"),
        &build.join("Module.symvers"),
    )?;
    paths::remove(&packages)?;
    step.done();
    Ok(())
}

/// How many things are built at a time.
pub(crate) fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The host's own kernel of the right series, where Rust modules can be built for it.
fn find_on_host() -> Result<Kernel> {
    let series = &VERSIONS.kernel.series;
    let mend = "use --toolbox debian, or name a build folder with --kernel";
    let entries = fs::read_dir("/lib/modules")
        .map_err(|error| Error::unfit(format!("/lib/modules: {error}"), mend))?;
    let mut refused = Vec::new();
    for entry in entries.flatten() {
        let release = entry.file_name().to_string_lossy().into_owned();
        if !release.starts_with(&format!("{series}.")) {
            continue;
        }
        let images = [
            entry.path().join("vmlinuz"),
            Path::new("/boot").join(format!("vmlinuz-{release}")),
        ];
        let image = images
            .iter()
            .find(|image| image.exists())
            .unwrap_or(&images[0]);
        let build = entry.path().join("build");
        if !build.join("rust/libkernel.rmeta").exists() {
            refused.push(format!("{release}: its build folder has no Rust metadata"));
            continue;
        }
        match Kernel::in_folder(&build, image.clone()) {
            Ok(kernel) => return Ok(kernel),
            Err(error) => refused.push(format!("{release}: {error}")),
        }
    }
    let found = if refused.is_empty() {
        "none of that series is installed".to_owned()
    } else {
        refused.join("; ")
    };
    Err(Error::unfit(
        format!("no kernel {series} of this machine fits: {found}"),
        mend,
    ))
}

fn check_configuration(wanted: &Path, made: &Path) -> Result<()> {
    let read =
        |path: &Path| fs::read_to_string(path).map_err(Error::io(path.display().to_string()));
    let differing = differing_options(&read(wanted)?, &read(made)?);
    if differing.is_empty() {
        return Ok(());
    }
    Err(Error::unfit(
        format!(
            "the kernel's configuration cannot be kept: {}",
            differing.join(", ")
        ),
        "add the tool that these options need to the toolbox's packages in qemu-scripts/versions.toml",
    ))
}

/// Names of the options whose values differ and may not.
fn differing_options(wanted: &str, made: &str) -> Vec<String> {
    let options = |text: &str| -> std::collections::BTreeMap<String, String> {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .filter(|(name, _)| {
                name.starts_with("CONFIG_")
                    && !MAY_DIFFER.iter().any(|prefix| name.starts_with(prefix))
            })
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    let (wanted, made) = (options(wanted), options(made));
    let differs = |name: &&String| wanted.get(*name) != made.get(*name);
    let mut names: Vec<String> = wanted
        .keys()
        .chain(made.keys())
        .filter(differs)
        .cloned()
        .collect();
    names.sort();
    names.dedup();
    names
}

fn value_of<'a>(config: &'a str, option: &str) -> Option<&'a str> {
    config
        .lines()
        .find_map(|line| line.strip_prefix(option)?.strip_prefix('='))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io(format!(
        "moving {} to {}",
        from.display(),
        to.display()
    )))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(Error::io(format!(
        "copying {} to {}",
        from.display(),
        to.display()
    )))
}

/// Text that changes whenever a file does; part of stamps that depend on it.
pub(crate) fn fingerprint(path: &Path) -> Result<String> {
    let metadata = fs::metadata(path).map_err(Error::io(path.display().to_string()))?;
    Ok(format!(
        "{} {} {}.{}",
        path.display(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec()
    ))
}

/// The release of the kernel that runs this program.
pub(crate) fn host_release() -> Result<String> {
    let mut command = crate::process::bound("uname");
    command.args(["-r", "-v"]);
    output(command, "uname").map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_options_of_a_lost_option_names_it() {
        let wanted =
            "CONFIG_A=y\nCONFIG_DEBUG_INFO_BTF=y\nCONFIG_BUILD_SALT=\"x\"\n# CONFIG_B is not set\n";
        let made = "CONFIG_A=y\n# CONFIG_DEBUG_INFO_BTF is not set\nCONFIG_MODULE_SIG_KEY=\"k\"\nCONFIG_C=m\n";
        assert_eq!(
            differing_options(wanted, made),
            ["CONFIG_C", "CONFIG_DEBUG_INFO_BTF"]
        );
    }

    #[test]
    fn value_of_an_option_is_not_that_of_a_longer_name() {
        assert_eq!(
            value_of("CONFIG_RUST_X=n\nCONFIG_RUST=y\n", "CONFIG_RUST"),
            Some("y")
        );
    }
}
