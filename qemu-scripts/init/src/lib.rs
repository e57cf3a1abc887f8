// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host and the agent in the guest say to each other.
//!
//! The channel is a virtio-serial port named [`PORT_NAME`]. Each message is a frame: its length as a little-endian `u32`,
//! then the message as postcard encodes it. Host and guest are always built from the same tree, so there is no version.
//!
//! Knows nothing of VMs, of GPUs or of how a command is run.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Name of the virtio-serial port, as QEMU is told it and as the guest finds it in sysfs.
pub const PORT_NAME: &str = "farfault.agent";

/// What the kernel's command line tells the init, as `KEY=VALUE`.
pub const MODE_KEY: &str = "farfault_init.mode";

/// The folder of the modules in the guest.
pub const MODULES: &str = "/lib/modules";

/// Where the driver lies in the guest.
pub const DRIVER_PATH: &str = "/lib/modules/farfault.ko";

/// Where the kernel's mock device lies, in a guest that has it.
pub const MOCK_PATH: &str = "/lib/modules/test_hmm.ko";

/// No frame is longer; output is sent in pieces far below it.
const MAX_FRAME: u32 = 1 << 20;

/// Names one command for as long as the agent runs.
pub type Id = u32;

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Starts a command.
    Run(Command),
    /// Bytes for a command's standard input; none means its end.
    Stdin {
        /// Which command.
        id: Id,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A signal for a command's whole process group.
    Signal {
        /// Which command.
        id: Id,
        /// The signal's number.
        signal: i32,
    },
    /// A command's terminal has a new size.
    Resize {
        /// Which command.
        id: Id,
        /// The new size.
        size: TerminalSize,
    },
    /// Ends the VM.
    PowerOff,
}

/// One command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Chosen by the host, never used twice.
    pub id: Id,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment, beside the agent's own.
    pub env: Vec<(String, String)>,
    /// A terminal for the command; without one it gets pipes.
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The guest is up.
    Hello {
        /// What went wrong on the way, if anything.
        problems: Vec<String>,
    },
    /// A command wrote something.
    Output {
        /// Which command.
        id: Id,
        /// Where to.
        stream: Stream,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A command has ended and its output is complete.
    Ended {
        /// Which command.
        id: Id,
        /// How.
        outcome: Outcome,
    },
}

/// Where a command wrote to. A terminal has only [`Stream::Stdout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// It could not be started, for this reason.
    NotStarted(String),
}

/// Writes one message.
///
/// # Errors
/// Those of the channel.
pub fn send<T: Serialize>(mut channel: impl Write, message: &T) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|&length| length <= MAX_FRAME);
    let length = length.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes", body.len()),
        )
    })?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    channel.write_all(&frame)
}

/// Reads one message; `None` when the channel ended between two.
///
/// # Errors
/// Those of the channel, an end within a message, and bytes that are none.
pub fn receive<T: DeserializeOwned>(mut channel: impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match channel.read(&mut length)? {
        0 => return Ok(None),
        read => channel.read_exact(length.get_mut(read..).unwrap_or_default())?,
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes"),
        ));
    }
    let mut body = vec![0; length as usize];
    channel.read_exact(&mut body)?;
    postcard::from_bytes(&body)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Reply {
        Reply::Output {
            id: 7,
            stream: Stream::Stderr,
            data: vec![0, 255, b'\n'],
        }
    }

    #[test]
    fn receive_after_send_gives_the_same_message() {
        let mut channel = Vec::new();
        send(&mut channel, &output()).unwrap();
        send(
            &mut channel,
            &Reply::Ended {
                id: 7,
                outcome: Outcome::Exited(3),
            },
        )
        .unwrap();
        let mut reader = channel.as_slice();
        assert_eq!(receive(&mut reader).unwrap(), Some(output()));
        let ended = receive(&mut reader).unwrap();
        assert_eq!(
            ended,
            Some(Reply::Ended {
                id: 7,
                outcome: Outcome::Exited(3)
            })
        );
        assert_eq!(receive::<Reply>(&mut reader).unwrap(), None);
    }

    #[test]
    fn receive_cut_within_a_message_is_an_error() {
        let mut channel = Vec::new();
        send(&mut channel, &output()).unwrap();
        for length in 1..channel.len() {
            assert!(receive::<Reply>(&channel[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn receive_of_a_length_beyond_the_limit_is_an_error() {
        let error = receive::<Reply>([255; 8].as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
