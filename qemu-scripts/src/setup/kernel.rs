// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's kernel, and a folder to build modules for it in: any of the three, and how the stock one is made ready.
//!
//! The stock kernel is not compiled: the image is Debian's own. Its packages lack the metadata that Rust modules need, so that is made
//! from the kernel's source with the very configuration and the very rustc of the image (`modules_prepare`). Layouts of
//! kernel structures follow from the configuration, and this kernel has no symbol versions that would catch a difference;
//! so the configuration that results is compared with Debian's, option by option.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result, paths,
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

/// Options that make a kernel several times slower.
const SLOW: [&str; 2] = ["CONFIG_KASAN", "CONFIG_PROVE_LOCKING"];

/// How much more time everything has on such a kernel.
const SLOWNESS: u32 = 6;

/// What a kernel with KASAN has on its command line: with page tables of five levels, an interrupt at a certain point of its
/// boot gives a false report (`docs/kernel-findings.md`).
const KASAN_ARGUMENTS: [&str; 1] = ["no5lvl"];

/// Where the toolbox has the source of Rust's core library.
pub(crate) const RUST_LIB_SRC: &str = "RUST_LIB_SRC=/usr/lib/rustlib/src/rust/library";

/// A kernel that can be booted and that modules can be built for.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// A name for the folder of what is built for it, so that what is built for two kernels never mixes.
    pub name: String,
    /// As `uname -r` says it.
    pub release: String,
    /// What QEMU boots.
    pub image: PathBuf,
    /// Prepared build folder.
    pub build: PathBuf,
    /// The source that the build folder refers to.
    pub source: PathBuf,
    /// The compiler that built the kernel, and so has to build its modules.
    pub compiler: Compiler,
    /// Words that it needs on its command line.
    pub arguments: &'static [&'static str],
    /// Time limits of what happens in the guest are multiplied by this.
    pub slowness: u32,
}

/// What builds a kernel's C.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compiler {
    /// gcc, by the name of its program.
    Gcc(String),
    /// clang, with LLVM's linker and tools.
    Llvm,
}

impl Compiler {
    /// The one of a configuration.
    fn of(config: &str) -> Self {
        if value_of(config, "CONFIG_CC_IS_CLANG") == Some("y") {
            return Self::Llvm;
        }
        let cc = value_of(config, "CONFIG_CC_VERSION_TEXT")
            .and_then(|text| text.trim_matches('"').split(' ').next());
        Self::Gcc(cc.unwrap_or("gcc").to_owned())
    }

    /// How make is told of it.
    pub(crate) fn make_argument(&self) -> String {
        match self {
            Self::Gcc(program) => format!("CC={program}"),
            Self::Llvm => "LLVM=1".to_owned(),
        }
    }
}

impl Kernel {
    /// Reads what a build folder says of itself.
    pub(crate) fn in_folder(name: &str, build: &Path, image: PathBuf) -> Result<Self> {
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
        let source = fs::canonicalize(build.join("source")).unwrap_or_else(|_| build.to_path_buf());
        if !image.exists() {
            return Err(Error::unfit(
                format!("kernel {release} has no image at {}", image.display()),
                format!("make -C {} bzImage", build.display()),
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            release,
            image,
            build: build.to_path_buf(),
            source,
            compiler: Compiler::of(&config),
            arguments: if value_of(&config, "CONFIG_KASAN") == Some("y") {
                &KASAN_ARGUMENTS
            } else {
                &[]
            },
            slowness: if SLOW
                .iter()
                .any(|option| value_of(&config, option) == Some("y"))
            {
                SLOWNESS
            } else {
                1
            },
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

/// Debian's kernel, in the folder of its step.
pub(crate) fn stock(folder: &Path) -> Result<Kernel> {
    Kernel::in_folder("stock", &folder.join("build"), folder.join("vmlinuz"))
}

/// A kernel that somebody has built in this folder.
pub(crate) fn own(build: &Path) -> Result<Kernel> {
    let build = fs::canonicalize(build).map_err(|error| {
        Error::unfit(
            format!("the kernel's build folder {}: {error}", build.display()),
            "--kernel stock, --kernel debug, or --kernel with the folder in which a kernel was built",
        )
    })?;
    let mut hasher = DefaultHasher::new();
    build.hash(&mut hasher);
    let name = format!("own-{:016x}", hasher.finish());
    Kernel::in_folder(&name, &build, build.join("arch/x86/boot/bzImage"))
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
    paths::create_dir(&build)?;
    unpack_source(toolbox, folder, &packages, &source, &LEFT_OUT, log)?;
    step.done();

    let step = Progress::start("kernel: preparing the build of modules");
    let debians = modules.join("config");
    copy(&debians, &build.join(".config"))?;
    let config = fs::read_to_string(&debians).map_err(Error::io(debians.display().to_string()))?;
    let compiler = Compiler::of(&config);
    for target in ["olddefconfig", "modules_prepare"] {
        let mut make = toolbox.make(&source, &[folder]);
        make.arg(format!("O={}", build.display()))
            .arg(compiler.make_argument())
            .arg(format!("LOCALVERSION={}", wanted.local_version))
            .arg(RUST_LIB_SRC)
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

/// Unpacks the kernel's source out of Debian's package of it, which is unpacked in `packages`, below `folder`.
pub(crate) fn unpack_source(
    toolbox: &Toolbox,
    folder: &Path,
    packages: &Path,
    into: &Path,
    left_out: &[&str],
    log: &Path,
) -> Result<()> {
    paths::create_dir(into)?;
    let archive = packages
        .join("usr/src")
        .join(format!("linux-source-{}.tar.xz", VERSIONS.kernel.series));
    let mut tar = toolbox.command("tar", folder, &[folder]);
    tar.args([
        "--extract",
        "--no-same-owner",
        "--strip-components=1",
        "--directory",
    ])
    .arg(into);
    tar.args(
        left_out
            .iter()
            .map(|pattern| format!("--exclude={pattern}")),
    )
    .arg("--file")
    .arg(&archive);
    run_logged(tar, "unpacking the kernel's source", log)
}

/// How many things are built at a time.
pub(crate) fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The host's own kernel of the right series, where Rust modules can be built for it.
pub(crate) fn on_host() -> Result<Kernel> {
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
        match Kernel::in_folder("host", &build, image.clone()) {
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

pub(crate) fn value_of<'a>(config: &'a str, option: &str) -> Option<&'a str> {
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
    fn compiler_of_a_configuration_is_the_one_that_it_names() {
        let gcc = "CONFIG_CC_VERSION_TEXT=\"x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0\"\nCONFIG_CC_IS_GCC=y\n";
        assert_eq!(
            Compiler::of(gcc).make_argument(),
            "CC=x86_64-linux-gnu-gcc-14"
        );
        let clang =
            "CONFIG_CC_VERSION_TEXT=\"Debian clang version 19.1.7 (3+b1)\"\nCONFIG_CC_IS_CLANG=y\n";
        assert_eq!(Compiler::of(clang).make_argument(), "LLVM=1");
    }

    #[test]
    fn value_of_an_option_is_not_that_of_a_longer_name() {
        assert_eq!(
            value_of("CONFIG_RUST_X=n\nCONFIG_RUST=y\n", "CONFIG_RUST"),
            Some("y")
        );
    }
}
