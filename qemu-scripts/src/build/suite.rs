// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's own HMM selftests and the mock device that they are written for, from the kernel's source, unmodified:
//! `tools/testing/selftests/mm/hmm-tests.c` and `lib/test_hmm.c`. Only the commands that run them build them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Error, Paths, Result,
    build::{Program, module},
    paths,
    process::run_logged,
    progress::Progress,
    setup::{Setup, Step, kernel::fingerprint},
};

/// The program's name in the guest's `/bin`.
pub const PROGRAM: &str = "hmm-tests";

const FOLDER: &str = "tools/testing/selftests/mm";
const SOURCES: [&str; 3] = ["hmm-tests.c", "vm_util.c", "hugepage_settings.c"];
const FLAGS: [&str; 5] = [
    "-static",
    "-Wall",
    "-O2",
    "-U_FORTIFY_SOURCE",
    "-D_GNU_SOURCE=",
];
const LIBRARIES: [&str; 3] = ["-lrt", "-lpthread", "-lm"];

/// What the mock device is made of; the kernel's own Makefile has it among everything else of its folder.
const MOCK_SOURCES: [&str; 2] = ["test_hmm.c", "test_hmm_uapi.h"];
const MOCK_KBUILD: &str = "obj-m := test_hmm.o\n";

/// The suite and its mock device.
#[derive(Debug, Clone)]
pub struct Suite {
    /// `hmm-tests`.
    pub program: Program,
    /// `test_hmm.ko`.
    pub module: PathBuf,
}

/// Builds both.
///
/// # Errors
/// The kernel's source is not there, or does not compile.
pub fn suite(paths: &Paths, setup: &Setup) -> Result<Suite> {
    Ok(Suite {
        program: program(paths, setup)?,
        module: mock(paths, setup)?,
    })
}

fn program(paths: &Paths, setup: &Setup) -> Result<Program> {
    let source = &setup.kernel.source;
    let folder = source.join(FOLDER);
    let mut stamp = format!("{FLAGS:?}{LIBRARIES:?}\n");
    for name in SOURCES {
        stamp.push_str(&fingerprint_of_kernels(&folder.join(name))?);
        stamp.push('\n');
    }
    let step = Step::new(paths.for_kernel(&setup.kernel).join("suite"), &[&stamp]);
    let program = step.folder().join(PROGRAM);
    step.ensure(|output| {
        let progress = Progress::start("guest: compiling the kernel's hmm-tests");
        let mut visible = setup.kernel.folders();
        visible.push(output);
        let mut gcc = setup.toolbox.command("gcc", &folder, &visible);
        gcc.args(FLAGS);
        for include in ["", "tools/testing/selftests", "tools/include"] {
            gcc.arg("-I").arg(source.join(include));
        }
        gcc.arg("-o").arg(&program).args(SOURCES).args(LIBRARIES);
        let log = output.join("log");
        run_logged(gcc, "compiling the kernel's hmm-tests", &log)?;
        progress.done();
        Ok(())
    })?;
    Ok(Program {
        name: PROGRAM.to_owned(),
        path: program,
    })
}

/// The mock device, out of tree: no kernel that is fit for use has it.
fn mock(paths: &Paths, setup: &Setup) -> Result<PathBuf> {
    let folder = paths.for_kernel(&setup.kernel).join("test_hmm");
    let source = folder.join("source");
    paths::create_dir(&source)?;
    for name in MOCK_SOURCES {
        let original = setup.kernel.source.join("lib").join(name);
        fingerprint_of_kernels(&original)?;
        let content = fs::read(&original).map_err(Error::io(original.display().to_string()))?;
        write_if_different(&source.join(name), &content)?;
    }
    write_if_different(&source.join("Kbuild"), MOCK_KBUILD.as_bytes())?;
    let output = folder.join("output");
    let what = "guest: building the kernel's test_hmm.ko";
    module::make(what, setup, &folder, "source", &output, &[])?;
    Ok(output.join("test_hmm.ko"))
}

fn fingerprint_of_kernels(file: &Path) -> Result<String> {
    fingerprint(file).map_err(|error| {
        Error::unfit(
            format!("the kernel's selftests cannot be built: {error}"),
            "use a kernel whose whole source is there: --kernel stock or debug, or one of your own that was built from it",
        )
    })
}

/// make goes by times, so a file that stays the same is left alone.
fn write_if_different(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    paths::write_atomically(path, content)
}
