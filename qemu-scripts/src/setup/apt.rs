// SPDX-License-Identifier: MIT OR Apache-2.0
//! Debian packages, resolved and downloaded by the host's apt with a configuration, lists and an (empty) status of our
//! own: nothing of the host's changes, no root is needed, and an interrupted download goes on where it stopped.
//!
//! Does not install: what a package contains is unpacked by the steps that need it.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Error, Result, paths,
    process::{bound, output, run_logged},
    versions::{Debian, VERSIONS},
};

/// What `apt-get` says when a name cannot be resolved or nobody answers.
const NO_NETWORK: [&str; 4] = [
    "Temporary failure resolving",
    "Could not resolve",
    "Could not connect",
    "Network is unreachable",
];

/// Names a mirror of Debian where the host's apt does not, or another than that.
const MIRROR: &str = "FARFAULT_MIRROR";

/// A private apt in a folder.
#[derive(Debug)]
pub(crate) struct Apt {
    folder: PathBuf,
    log: PathBuf,
}

impl Apt {
    /// Writes the configuration and fetches the package lists.
    pub(crate) fn new(folder: &Path, log: PathBuf) -> Result<Self> {
        let apt = Self {
            folder: folder.to_path_buf(),
            log,
        };
        for part in [
            "state/lists/partial",
            "cache/archives/partial",
            "none/partial",
        ] {
            paths::create_dir(&folder.join(part))?;
        }
        let debian = &VERSIONS.debian;
        let mirror = env::var(MIRROR).ok().or_else(host_mirror).ok_or_else(|| {
            Error::unfit(
                "this machine's apt configuration names no mirror of Debian",
                format!("the same command with {MIRROR}=ADDRESS, the address of one"),
            )
        })?;
        if !Path::new(&debian.keyring).exists() {
            return Err(Error::unfit(
                format!("Debian's keys are not at {}", debian.keyring),
                "apt-get install debian-archive-keyring",
            ));
        }
        paths::write_atomically(&folder.join("status"), b"")?;
        paths::write_atomically(
            &folder.join("sources.list"),
            sources(debian, &mirror).as_bytes(),
        )?;
        paths::write_atomically(&folder.join("preferences"), preferences(debian).as_bytes())?;
        let transport = host_transport_settings()?;
        paths::write_atomically(
            &folder.join("apt.conf"),
            configuration(folder, &transport).as_bytes(),
        )?;
        apt.run(
            "fetching Debian's package lists",
            &["update", "--error-on=any"],
        )?;
        Ok(apt)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Downloads packages with all that they depend on; returns the archives.
    pub(crate) fn download_with_dependencies(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        let archives = self.folder.join("cache/archives");
        // Only what belongs to this list may get into the result, not what an earlier one has left; and apt lists what it
        // would download, so for the whole list it must not see what it has.
        let none = format!(
            "Dir::Cache::archives={}",
            self.folder.join("none").display()
        );
        let options = ["-q", "-y", "-o", &none, "--print-uris", "install"];
        let listed = output(
            self.command(options.iter().chain(&as_str(packages))),
            "resolving packages",
        );
        let listed = listed.map_err(|error| self.outdated(&error))?;
        self.run(
            "downloading packages",
            &[&["-y", "--download-only", "install"], &as_str(packages)[..]].concat(),
        )?;
        let names: Vec<&str> = listed.lines().filter_map(archive_name).collect();
        Ok(names.into_iter().map(|name| archives.join(name)).collect())
    }

    /// Downloads packages alone; returns the archives in the order of their names.
    pub(crate) fn download_only(&self, packages: &[String], into: &Path) -> Result<Vec<PathBuf>> {
        paths::create_dir(into)?;
        let mut command = self.command(["-q", "download"].iter().chain(&as_str(packages)));
        command.current_dir(into);
        run_logged(command, "downloading the kernel's packages", &self.log)
            .map_err(|error| self.outdated(&error))?;
        let mut archives = Vec::new();
        for entry in fs::read_dir(into).map_err(Error::io(into.display().to_string()))? {
            archives.push(entry.map_err(Error::io(into.display().to_string()))?.path());
        }
        archives.sort();
        Ok(archives)
    }

    fn run(&self, what: &str, arguments: &[&str]) -> Result<()> {
        run_logged(self.command(["-q"].iter().chain(arguments)), what, &self.log).map_err(|error| match error {
            Error::Tool { ref tail, .. } if NO_NETWORK.iter().any(|text| tail.contains(text)) => Error::unfit(
                format!("{what}: Debian's mirror cannot be reached (log: {})", self.log.display()),
                "connect this machine to the network, or set apt's proxy, and repeat the command",
            ),
            other => other,
        })
    }

    /// A package that cannot be had is most likely one that Debian has replaced by a newer version.
    fn outdated(&self, error: &Error) -> Error {
        Error::unfit(
            format!("{error}\n  (log: {})", self.log.display()),
            "if Debian has replaced a package: name its successor in qemu-scripts/versions.toml",
        )
    }

    fn command<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Command {
        let mut command = bound("apt-get");
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8")
            .args(arguments);
        command
    }
}

fn as_str(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

/// The file's name in a line of `--print-uris`: `'URI' NAME SIZE HASH`.
fn archive_name(line: &str) -> Option<&str> {
    line.strip_prefix('\'')?.split_whitespace().nth(1)
}

fn sources(debian: &Debian, mirror: &str) -> String {
    [&debian.suite, &debian.backports]
        .map(|suite| {
            format!(
                "deb [arch=amd64 signed-by={}] {mirror} {suite} main\n",
                debian.keyring
            )
        })
        .concat()
}

fn preferences(debian: &Debian) -> String {
    let packages: Vec<String> = debian
        .from_backports
        .iter()
        .map(|source| format!("src:{source}"))
        .collect();
    format!(
        "Package: {}\nPin: release n={}\nPin-Priority: 990\n",
        packages.join(" "),
        debian.backports
    )
}

fn configuration(folder: &Path, transport: &str) -> String {
    let folder = folder.display();
    format!(
        r#"{transport}
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "{folder}/preferences";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
"#
    )
}

/// Proxies and the like; the rest of the host's configuration is about the host.
fn host_transport_settings() -> Result<String> {
    let mut command = bound("apt-config");
    command.arg("dump");
    let dump = output(command, "reading apt's configuration")?;
    let wanted = ["Acquire::http", "Acquire::https", "Acquire::ftp"];
    let lines = dump
        .lines()
        .filter(|line| wanted.iter().any(|prefix| line.starts_with(prefix)));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// The mirror that a Debian host itself uses.
fn host_mirror() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok()?;
    let value = |key: &str| {
        let line = release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    if value("ID")? != "debian" {
        return None;
    }
    let suite = value("VERSION_CODENAME")?;
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        match file.extension()?.to_str()? {
            "sources" => mirror_in_deb822(&text, &suite),
            "list" => mirror_in_list(&text, &suite),
            _ => None,
        }
    })
}

fn is_usable(uri: &str) -> bool {
    uri.starts_with("http://") || uri.starts_with("https://")
}

/// The first mirror of a suite in a `.list` file: `deb [options] URI SUITE COMPONENT…`.
fn mirror_in_list(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (is_usable(uri) && words.next()? == suite && words.any(|component| component == "main"))
            .then(|| uri.to_owned())
    })
}

/// The first mirror of a suite in a `.sources` file, whose stanzas have fields `Types`, `URIs`, `Suites`, `Components`.
fn mirror_in_deb822(text: &str, suite: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines
        .split(|line| line.trim().is_empty())
        .find_map(|stanza| {
            let field = |name: &str| {
                let mut values = Vec::new();
                let mut inside = false;
                for line in stanza {
                    if line.starts_with([' ', '\t']) {
                        if inside {
                            values.extend(line.split_whitespace());
                        }
                    } else if let Some((key, value)) = line.split_once(':') {
                        inside = key.trim().eq_ignore_ascii_case(name);
                        if inside {
                            values.extend(value.split_whitespace());
                        }
                    }
                }
                values
            };
            let enabled = !field("Enabled")
                .iter()
                .any(|value| value.eq_ignore_ascii_case("no"));
            let wanted = enabled
                && field("Types").contains(&"deb")
                && field("Suites").contains(&suite)
                && field("Components").contains(&"main");
            let uri = field("URIs").into_iter().find(|uri| is_usable(uri))?;
            wanted.then(|| uri.to_owned())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_in_list_with_options_is_found() {
        let text = "# deb http://no.example/debian bookworm main\n\
                    deb-src http://no.example/debian bookworm main\n\
                    deb http://security.example/debian-security bookworm-security main\n\
                    deb [arch=amd64 signed-by=/k.gpg] https://yes.example/debian bookworm contrib main\n";
        assert_eq!(
            mirror_in_list(text, "bookworm").as_deref(),
            Some("https://yes.example/debian")
        );
        assert_eq!(mirror_in_list(text, "trixie"), None);
    }

    #[test]
    fn mirror_in_deb822_with_several_stanzas_is_the_enabled_one_of_the_suite() {
        let text = "Types: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n\
                    \n\
                    Types: deb deb-src\n# a comment\nURIs: http://yes.example/debian\nSuites: bookworm\n bookworm-updates\n\
                    Components: main\n\
                    \n\
                    Types: deb\nURIs: http://security.example/\nSuites: bookworm-security\nComponents: main\n";
        assert_eq!(
            mirror_in_deb822(text, "bookworm").as_deref(),
            Some("http://yes.example/debian")
        );
        assert_eq!(
            mirror_in_deb822(text, "bookworm-updates").as_deref(),
            Some("http://yes.example/debian")
        );
        assert_eq!(mirror_in_deb822(text, "sid"), None);
    }

    #[test]
    fn mirror_in_deb822_that_is_a_file_is_passed_over() {
        let text = "Types: deb\nURIs: file:/srv/debian\nSuites: trixie\nComponents: main\n";
        assert_eq!(mirror_in_deb822(text, "trixie"), None);
    }

    #[test]
    fn archive_name_of_a_line_of_uris_is_its_second_word() {
        let line = "'http://deb.example/pool/z/zstd_1.deb' zstd_1%3a5_amd64.deb 635000 SHA256:abc";
        assert_eq!(archive_name(line), Some("zstd_1%3a5_amd64.deb"));
        assert_eq!(archive_name("Reading package lists..."), None);
    }

    #[test]
    fn preferences_pin_only_what_comes_from_backports() {
        let text = preferences(&VERSIONS.debian);
        assert!(
            text.contains("src:qemu") && !text.contains("rustc"),
            "{text}"
        );
    }
}
