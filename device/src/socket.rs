// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unix sockets that the process listens on: made for the owner only, removed at the end.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A process listens there.
    #[error("{path} is in use: another process listens there; end it, or choose another path", path = .0.display())]
    InUse(PathBuf),
    /// Something is there that must not be removed.
    #[error("{path} exists and is no socket; remove it, or choose another path", path = .0.display())]
    NotASocket(PathBuf),
    /// The system says no.
    #[error("cannot listen on {path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket's name in the file system, removed on drop.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    /// Device and inode: only what this process made is removed.
    identity: (u64, u64),
}

/// Listens on `path`, with mode 0600. A socket that a dead process left is replaced. Who sees the name can
/// connect: the socket has another one until it listens.
///
/// The process's umask should be 0177, or there is a moment in which others may connect.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketPath), SocketError> {
    let io = |source| SocketError::Io {
        path: path.into(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                log::debug!(
                    "{} is left from a process that is gone: replaced",
                    path.display()
                );
                fs::remove_file(path).map_err(io)?;
            }
            Ok(_) => return Err(SocketError::InUse(path.into())),
            Err(error) => return Err(io(error)),
        },
        Ok(_) => return Err(SocketError::NotASocket(path.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let unnamed = tempfile::Builder::new()
        .prefix(".")
        .make_in(folder, |path| UnixListener::bind(path))
        .map_err(io)?;
    fs::set_permissions(unnamed.path(), fs::Permissions::from_mode(0o600)).map_err(io)?;
    let metadata = fs::symlink_metadata(unnamed.path()).map_err(io)?;
    let listener = match unnamed.persist_noclobber(path) {
        Ok(listener) => listener,
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(SocketError::InUse(path.into()));
        }
        Err(error) => return Err(io(error.error)),
    };
    let socket = SocketPath {
        path: path.into(),
        identity: (metadata.dev(), metadata.ino()),
    };
    Ok((listener, socket))
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        let removed = if ours {
            fs::remove_file(&self.path)
        } else {
            Ok(())
        };
        if let Err(error) = removed {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn socket_is_private_and_removed_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpu.sock");
        let (_listener, socket) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn socket_that_is_seen_can_be_connected_to() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..200 {
            let path = folder.path().join(format!("{round}.sock"));
            let seen = path.clone();
            let client = std::thread::spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(30);
                while !seen.exists() && Instant::now() < deadline {
                    std::hint::spin_loop();
                }
                UnixStream::connect(seen)
            });
            let _listener = listen(&path).unwrap();
            client.join().unwrap().unwrap();
        }
        // And nothing else is left.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn socket_of_a_dead_process_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpu.sock");
        drop(UnixListener::bind(&path).unwrap());
        listen(&path).unwrap();
    }

    #[test]
    fn socket_in_use_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpu.sock");
        let _first = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(SocketError::InUse(_))));
    }

    #[test]
    fn file_in_place_of_the_socket_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpu.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
