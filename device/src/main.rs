// SPDX-License-Identifier: MIT OR Apache-2.0
//! `farfault-device`: the virtual GPU as a process, and the commands that look into it.

use clap::Parser;
use farfault_device::{
    cli::{Cli, Client, Command, Serve, Switch, Topic},
    control_socket::{self, Request},
    server,
};
use std::{
    error::Error,
    io::{self, Write},
    process::ExitCode,
};

fn main() -> ExitCode {
    let result = match Cli::parse() {
        Cli {
            command: Some(Command::Stats(client)),
            ..
        } => show(&client, Request::Stats),
        Cli {
            command:
                Some(Command::Inspect {
                    client,
                    topic,
                    context,
                }),
            ..
        } => show(&client, request(topic, context)),
        Cli {
            command: Some(Command::Copies { client, state }),
            ..
        } => show(
            &client,
            Request::Copies {
                on: state == Switch::On,
            },
        ),
        Cli {
            command: Some(Command::Poison { client, address }),
            ..
        } => show(&client, Request::Poison { address }),
        Cli {
            serve: Some(options),
            ..
        } => serve(&options),
        // clap prints the help instead of returning neither.
        Cli {
            command: None,
            serve: None,
        } => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farfault-device: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Serve) -> Result<(), Box<dyn Error>> {
    start_log(options.verbose);
    end_on_panic();
    // Sockets are the owner's alone from the moment they exist.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    Ok(server::serve(options)?)
}

fn show(client: &Client, request: Request) -> Result<(), Box<dyn Error>> {
    let answer = control_socket::ask(&client.control, request)?;
    let mut out = io::stdout().lock();
    let written = if client.json {
        writeln!(out, "{answer}")
    } else {
        control_socket::print(&answer, &mut out)
    };
    match written {
        // Whoever reads, as `head` does, has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn request(topic: Topic, context: Option<u32>) -> Request {
    match topic {
        Topic::Contexts => Request::Contexts,
        // clap demands the number.
        Topic::PageTable => Request::PageTable {
            context: context.unwrap_or_default(),
        },
        Topic::Tlb => Request::Tlb,
        Topic::Vram => Request::Vram,
        Topic::Faults => Request::Faults,
        Topic::Jobs => Request::Jobs,
    }
}

fn start_log(verbose: u8) {
    // virtio-queue logs what a guest does wrong without any limit; the transport does it itself.
    let filter = match verbose {
        0 => "info,virtio_queue=off",
        1 => "debug,virtio_queue=off",
        _ => "trace",
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(filter)).init();
}

/// A panic is a bug of the device. Ending at once is what its driver can handle: it sees a GPU that
/// is lost, and not one with half its threads.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}
