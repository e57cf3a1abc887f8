// SPDX-License-Identifier: MIT OR Apache-2.0
//! The asking end of the control socket.

use super::{Request, Response};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long the device may take for one step of its answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// More than the device ever answers.
const MAX_RESPONSE: u64 = 256 << 20;

/// Why a question got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error(
        "cannot reach a device at {path}: {source}; give the path that farfault-device was started with as --control",
        path = path.display()
    )]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or took too long.
    #[error("the device at {path} did not answer: {source}; does it still run?", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else listens there, or another version.
    #[error("{path} answered something else than a Farfault device of this version: {source}", path = path.display())]
    Format {
        /// Where.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The device says no.
    #[error("the device refused: {0}")]
    Refused(String),
}

/// Asks the device whose control socket is at `path`.
pub fn ask(path: &Path, request: Request) -> Result<serde_json::Value, ClientError> {
    let io = |source| ClientError::Io {
        path: path.into(),
        source,
    };
    let format = |source| ClientError::Format {
        path: path.into(),
        source,
    };

    let mut stream = UnixStream::connect(path).map_err(|source| ClientError::Connect {
        path: path.into(),
        source,
    })?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(io)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(io)?;

    let mut line = serde_json::to_vec(&request).map_err(format)?;
    line.push(b'\n');
    stream.write_all(&line).map_err(io)?;

    let mut answer = Vec::new();
    BufReader::new(stream)
        .take(MAX_RESPONSE)
        .read_until(b'\n', &mut answer)
        .map_err(io)?;
    match serde_json::from_slice(&answer).map_err(format)? {
        Response::Ok(value) => Ok(value),
        Response::Error(why) => Err(ClientError::Refused(why)),
    }
}
