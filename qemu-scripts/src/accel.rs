// SPDX-License-Identifier: MIT OR Apache-2.0
//! What runs the guest's code: KVM where a kernel truly boots under it, QEMU's translator elsewhere.
//!
//! That `/dev/kvm` exists says little: there are hosts whose KVM emulates so slowly or so incompletely that no stock kernel
//! gets up. So the guest's own kernel is booted once, without an initramfs, until it panics for lack of one; that takes a
//! real KVM well under a second. The answer is kept until host or kernel change.

use std::{
    fmt, fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::{
    AccelChoice, Error, Options, Paths, Result, paths,
    process::{bound, spawn, wait_until},
    progress::{self, Progress},
    setup::{
        Setup,
        kernel::{fingerprint, host_release},
    },
};

const PROBE_LIMIT: Duration = Duration::from_secs(6);

/// The last thing that a kernel without a root file system says.
const PROBE_END: &str = "Kernel panic - not syncing: VFS";

/// What runs the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The CPU itself.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

impl Accel {
    pub(crate) fn argument(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi",
        }
    }

    /// The model of the CPU. The translator does string instructions unit by unit: a kernel that takes the CPU's word that
    /// those of bytes are fast (to zero pages, and to copy to programs) would be eight times slower there.
    pub(crate) fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "max",
            Self::Tcg => "max,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off",
        }
    }

    /// Decides, by the option or by trying.
    ///
    /// # Errors
    /// QEMU cannot be started, or the answer not be kept.
    pub fn choose(options: &Options, paths: &Paths, setup: &Setup) -> Result<Self> {
        match options.accel {
            AccelChoice::Kvm => Ok(Self::Kvm),
            AccelChoice::Tcg => Ok(Self::Tcg),
            AccelChoice::Auto => {
                let answer = kvm_works(paths, setup)?;
                Ok(if answer.is_none() {
                    Self::Kvm
                } else {
                    Self::Tcg
                })
            }
        }
    }
}

/// Why KVM cannot be used; `None` when it can.
pub(crate) fn kvm_works(paths: &Paths, setup: &Setup) -> Result<Option<String>> {
    let node = Path::new("/dev/kvm");
    if let Err(error) = fs::File::options().read(true).write(true).open(node) {
        return Ok(Some(format!("{}: {error}", node.display())));
    }
    let stamp = format!(
        "{}\n{}\n",
        host_release()?,
        fingerprint(&setup.kernel.image)?
    );
    let kept = paths.cache.join(format!("kvm-probe-{}", setup.kernel.name));
    if let Some(answer) = fs::read_to_string(&kept)
        .ok()
        .as_deref()
        .and_then(|text| text.strip_prefix(&stamp))
    {
        return Ok((!answer.is_empty()).then(|| answer.to_owned()));
    }
    let step = Progress::start("trying whether a kernel boots under KVM here");
    let answer = probe(setup)?;
    step.done();
    if let Some(reason) = &answer {
        progress::note(&format!(
            "not using KVM: {reason} (--accel kvm uses it all the same)"
        ));
    }
    paths::write_atomically(
        &kept,
        (stamp + answer.as_deref().unwrap_or_default()).as_bytes(),
    )?;
    Ok(answer)
}

fn probe(setup: &Setup) -> Result<Option<String>> {
    let what = "trying KVM";
    let folder = tempfile::tempdir().map_err(Error::io(what))?;
    let console = folder.path().join("console");
    let line = setup.toolbox.qemu();
    let (program, arguments) = line
        .split_first()
        .ok_or_else(|| Error::vm("QEMU has no command line"))?;
    let mut command = bound(program);
    command
        .args(arguments)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            "q35",
            "-m",
            "256M",
        ])
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "max",
            "-append",
            "console=ttyS0 panic=-1",
            "-kernel",
        ])
        .arg(&setup.kernel.image)
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut qemu = spawn(command).map_err(Error::io(what))?;
    let limit = PROBE_LIMIT * setup.kernel.slowness;
    let status = wait_until(&mut qemu, Instant::now() + limit).map_err(Error::io(what))?;
    if status.is_none() {
        qemu.kill()
            .and_then(|()| qemu.wait())
            .map_err(Error::io(what))?;
        return Ok(Some(format!(
            "a kernel did not boot within {} s",
            limit.as_secs()
        )));
    }
    let text = fs::read(&console).unwrap_or_default();
    let booted = String::from_utf8_lossy(&text).contains(PROBE_END);
    Ok((!booted).then(|| "a kernel did not get through its boot".to_owned()))
}
