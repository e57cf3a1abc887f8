// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every command understands, from the command line or the environment.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{Args, Parser, ValueEnum};

/// Where the tools come from, what runs the VM, and where things are kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Options {
    /// Where QEMU, the kernel and the compilers come from
    #[arg(
        long,
        global = true,
        env = "FARFAULT_TOOLBOX",
        value_enum,
        default_value_t
    )]
    pub toolbox: ToolboxChoice,
    /// What runs the guest's code; auto takes KVM where a kernel really boots under it
    #[arg(
        long,
        global = true,
        env = "FARFAULT_ACCEL",
        value_enum,
        default_value_t
    )]
    pub accel: AccelChoice,
    /// Folder for the toolbox and the kernel [default: farfault in the user's cache folder]
    #[arg(long, global = true, env = "FARFAULT_CACHE", value_name = "FOLDER")]
    pub cache: Option<PathBuf>,
    /// The guest's kernel: `stock` is Debian's own; `debug` is one with KASAN and lockdep, built once (it takes long);
    /// anything else is the build folder of a kernel of one's own, with its image in it
    #[arg(
        long,
        global = true,
        env = "FARFAULT_KERNEL",
        value_name = "stock|debug|FOLDER",
        default_value = "stock"
    )]
    pub kernel: KernelChoice,
}

/// Where the tools come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ToolboxChoice {
    /// A Debian 13 of our own in the cache folder
    #[default]
    Debian,
    /// This machine's own tools and kernel, if they fit
    Host,
}

/// What runs the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum AccelChoice {
    /// Whichever works
    #[default]
    Auto,
    /// The CPU itself
    Kvm,
    /// QEMU's translator
    Tcg,
}

/// Which kernel the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum KernelChoice {
    /// The one that the toolbox's distribution has built
    #[default]
    Stock,
    /// The one with checks, built once and kept in the cache
    Debug,
    /// One that somebody has built in this folder
    Folder(PathBuf),
}

impl From<OsString> for KernelChoice {
    fn from(text: OsString) -> Self {
        match text.to_str() {
            Some("stock") => Self::Stock,
            Some("debug") => Self::Debug,
            _ => Self::Folder(text.into()),
        }
    }
}

impl KernelChoice {
    /// As the command line of a process in any folder reads it.
    fn as_argument(&self) -> PathBuf {
        match self {
            Self::Stock => "stock".into(),
            Self::Debug => "debug".into(),
            Self::Folder(folder) => from_anywhere(folder),
        }
    }
}

/// A path that a process with another working folder understands too.
fn from_anywhere(path: &Path) -> PathBuf {
    // It fails for an empty path only, and that means nothing anywhere.
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

impl Options {
    /// The options as the environment gives them, for programs with a command line of their own.
    ///
    /// # Errors
    /// A variable has a value that is none of the possible ones.
    pub fn from_env() -> Result<Self, clap::Error> {
        #[derive(Parser)]
        #[command(name = "environment")]
        struct OnlyOptions {
            #[command(flatten)]
            options: Options,
        }
        OnlyOptions::try_parse_from(["environment"]).map(|parsed| parsed.options)
    }

    /// The environment from which [`Options::from_env`] gets the same options.
    #[must_use]
    pub fn to_env(&self) -> Vec<(&'static str, PathBuf)> {
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value()
                .map(|value| PathBuf::from(value.get_name()))
                .unwrap_or_default()
        };
        let mut variables = vec![
            (
                "FARFAULT_TOOLBOX",
                name(&|| self.toolbox.to_possible_value()),
            ),
            ("FARFAULT_ACCEL", name(&|| self.accel.to_possible_value())),
            ("FARFAULT_KERNEL", self.kernel.as_argument()),
        ];
        variables.extend(
            self.cache
                .as_deref()
                .map(|folder| ("FARFAULT_CACHE", from_anywhere(folder))),
        );
        variables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        #[derive(Parser)]
        struct OnlyOptions {
            #[command(flatten)]
            options: Options,
        }
        let line = ["xtask"].iter().chain(arguments);
        OnlyOptions::try_parse_from(line).unwrap().options
    }

    #[test]
    fn kernel_choice_of_a_name_is_that_kernel_and_of_anything_else_a_folder() {
        assert_eq!(options(&["--kernel", "stock"]).kernel, KernelChoice::Stock);
        assert_eq!(options(&["--kernel", "debug"]).kernel, KernelChoice::Debug);
        assert_eq!(
            options(&["--kernel", "./debug"]).kernel,
            KernelChoice::Folder("./debug".into())
        );
    }

    #[test]
    fn to_env_of_a_relative_folder_holds_in_every_folder() {
        let variables = options(&["--kernel", "build", "--cache", "cache"]).to_env();
        for (name, value) in [("FARFAULT_KERNEL", "build"), ("FARFAULT_CACHE", "cache")] {
            let wanted = std::env::current_dir().unwrap().join(value);
            assert!(variables.contains(&(name, wanted)), "{variables:?}");
        }
    }
}
