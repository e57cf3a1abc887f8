// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's whole file system: an uncompressed cpio archive (`newc`), which the kernel unpacks into memory.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use cpio::newc::{self, ModeFileType};
use farfault_init::MODULES;

use crate::{
    Error, Paths, Result,
    build::Program,
    paths,
    process::{bound, output},
    setup::{Setup, kernel::fingerprint},
};

/// The init, by the name of its program.
const INIT: &str = "farfault-init";

const FOLDERS: [&str; 11] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "var",
];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n";
const GROUP: &str = "root:x:0:\nuser:x:1000:\n";
const PROFILE: &str = "PATH=/bin\nHOME=/root\nPS1='guest:\\w# '\nexport PATH HOME PS1\n";

/// Writes the archive of this name, unless the one that is there was made from the same files.
///
/// # Errors
/// A file cannot be read, or the archive not be written.
pub fn initramfs(
    paths: &Paths,
    setup: &Setup,
    name: &str,
    modules: &[PathBuf],
    programs: &[Program],
) -> Result<PathBuf> {
    let folder = paths.for_kernel(&setup.kernel);
    let archive = folder.join(format!("{name}.cpio"));
    let stamp_path = folder.join(format!("{name}.stamp"));
    let busybox = setup.toolbox.busybox();
    let mut stamp = format!("{FOLDERS:?}{PASSWD}{GROUP}{PROFILE}\n");
    let sources = programs
        .iter()
        .map(|program| &program.path)
        .chain(modules)
        .chain([&busybox]);
    for source in sources {
        stamp.push_str(&fingerprint(source)?);
        stamp.push('\n');
    }
    if archive.exists() && fs::read_to_string(&stamp_path).is_ok_and(|old| old == stamp) {
        return Ok(archive);
    }
    let mut command = bound(&busybox);
    command.arg("--list");
    let applets = output(command, "busybox")?;
    let content =
        pack(&busybox, &applets, modules, programs).map_err(Error::io("packing the initramfs"))?;
    paths::remove(&stamp_path)?;
    paths::write_atomically(&archive, &content)?;
    paths::write_atomically(&stamp_path, stamp.as_bytes())?;
    Ok(archive)
}

fn pack(
    busybox: &Path,
    applets: &str,
    modules: &[PathBuf],
    programs: &[Program],
) -> io::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in FOLDERS {
        archive.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    archive.add(
        "etc/passwd",
        ModeFileType::Regular,
        0o644,
        PASSWD.as_bytes(),
    )?;
    archive.add("etc/group", ModeFileType::Regular, 0o644, GROUP.as_bytes())?;
    archive.add(
        "etc/profile",
        ModeFileType::Regular,
        0o644,
        PROFILE.as_bytes(),
    )?;
    archive.add_file("bin/busybox", busybox)?;
    for applet in applets.split_whitespace().filter(|name| *name != "busybox") {
        archive.add(
            &format!("bin/{applet}"),
            ModeFileType::Symlink,
            0o777,
            b"busybox",
        )?;
    }
    for program in programs {
        if program.name == INIT {
            archive.add_file("init", &program.path)?;
        } else {
            archive.add_file(&format!("bin/{}", program.name), &program.path)?;
        }
    }
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.add_file(
            &format!("{}/{name}", MODULES.trim_start_matches('/')),
            module,
        )?;
    }
    newc::trailer(archive.bytes)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, kind: ModeFileType, mode: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        self.entries += 1;
        let entry = newc::Builder::new(name)
            .ino(self.entries)
            .nlink(1)
            .mode(mode)
            .set_mode_file_type(kind);
        let mut writer = entry.write(&mut self.bytes, size);
        writer.write_all(content)?;
        writer.finish().map(drop)
    }

    fn add_file(&mut self, name: &str, source: &Path) -> io::Result<()> {
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", source.display()))
        };
        let mode = fs::metadata(source).map_err(named)?.permissions().mode() & 0o777;
        let content = fs::read(source).map_err(named)?;
        self.add(name, ModeFileType::Regular, mode, &content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pack_of_init_driver_and_a_program_puts_each_where_the_guest_looks() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let programs = ["farfault-init", "svm"].map(|name| Program {
            name: name.to_owned(),
            path: file(name),
        });
        let packed = pack(
            &file("busybox"),
            "busybox\nsh\n",
            &[file("farfault.ko"), file("test_hmm.ko")],
            &programs,
        )
        .unwrap();

        let mut found = Vec::new();
        let mut rest = packed.as_slice();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let name = reader.entry().name().to_owned();
            let mut content = String::new();
            io::Read::read_to_string(&mut reader, &mut content).unwrap();
            found.push((name, content));
            rest = reader.finish().unwrap();
        }
        for (name, content) in [
            ("init", "farfault-init"),
            ("bin/svm", "svm"),
            ("bin/sh", "busybox"),
            ("bin/busybox", "busybox"),
            ("lib/modules/farfault.ko", "farfault.ko"),
            ("lib/modules/test_hmm.ko", "test_hmm.ko"),
            ("proc", ""),
        ] {
            assert!(
                found.contains(&(name.to_owned(), content.to_owned())),
                "{name} in {found:?}"
            );
        }
    }
}
