// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM with GPUs in it, and the harness's hold on it.
//!
//! Everything that belongs to a VM is a child of this process: QEMU, and one device process for each GPU. Dropping the
//! [`Vm`] ends them all, and so does this process's end, however it comes. Every wait has a limit. Logs stay unless
//! [`Vm::shutdown`] found all well.

mod agent;
mod attached;
mod config;
mod console;
mod disks;
mod gpu;
mod qemu;
mod qmp;
mod run_folder;

use std::{
    fs::File,
    os::{fd::AsFd, unix::net::UnixListener, unix::net::UnixStream},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use farfault_init::{DRIVER_PATH, MOCK_PATH, Request};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::Signal,
};
use serde_json::json;
use tempfile::TempDir;

pub use agent::{GuestProcess, Output};
pub use attached::Attach;
pub use config::{Config, Driver};
pub use console::KnownReport;
pub use gpu::Gpu;
pub use qmp::Qmp;

pub(crate) use qemu::quoted;

use crate::{
    Error, Prepared, Result,
    process::{bound, spawn, tail, wait_until},
    vm::{
        agent::{Agent, Launch},
        console::Console,
        qemu::{
            GPU_DRIVER, Host, MAX_GPUS, Spec, command_line, gpu_chardev, gpu_id, gpu_properties,
        },
        run_folder::{RunFolder, socket_folder},
    },
};

const LOAD_LIMIT: Duration = Duration::from_secs(60);
const POWER_OFF_LIMIT: Duration = Duration::from_secs(60);
/// The attention button alone takes five seconds.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    // Dropped in this order: QEMU first, or it would complain about GPUs that vanish under it.
    qemu: Qemu,
    gpus: Vec<Option<Gpu>>,
    agent: Agent,
    qmp: Qmp,
    console: Console,
    folder: RunFolder,
    sockets: TempDir,
    config: Config,
    device: std::path::PathBuf,
    slowness: u32,
}

#[derive(Debug)]
struct Qemu {
    child: Child,
    log: std::path::PathBuf,
}

impl Vm {
    /// Starts GPUs and VM, waits for the guest, loads the driver.
    ///
    /// # Errors
    /// Any of this fails or takes too long; the logs are kept then.
    pub fn boot(prepared: &Prepared, config: &Config) -> Result<Self> {
        if config.gpus + config.spare_slots > MAX_GPUS {
            return Err(Error::vm(format!(
                "a VM has room for {MAX_GPUS} GPUs and spare slots together"
            )));
        }
        let folder = RunFolder::new(&prepared.paths.runs(), &config.name, &config.repeat())?;
        let sockets = socket_folder()?;
        let mut gpus = Vec::new();
        for index in 0..config.gpus {
            let log = folder.file(&format!("device{index}.log"));
            let device = &prepared.artifacts.device;
            gpus.push(Some(Gpu::start(
                device,
                sockets.path(),
                index,
                &config.device_arguments(index, &config.vram),
                log,
            )?));
        }
        gpus.resize_with(config.gpus + config.spare_slots, || None);

        let (console, log) = (folder.file("console.log"), folder.file("qemu.log"));
        File::create(&console).map_err(Error::io(console.display().to_string()))?;
        let (agent_path, qmp_path) = (
            sockets.path().join("agent.sock"),
            sockets.path().join("qmp.sock"),
        );
        let (agent, qmp) = (Listener::new(&agent_path)?, Listener::new(&qmp_path)?);
        let host = Host::Harness {
            console: &console,
            agent: &agent_path,
            qmp: &qmp_path,
        };
        let line = command_line(&Spec {
            host,
            gpus: gpus
                .iter()
                .flatten()
                .map(|gpu| gpu.socket().to_path_buf())
                .collect(),
            disks: disks::files(prepared, config, &folder)?,
            ..spec(
                prepared,
                config,
                &config.kernel_args(&prepared.setup.kernel),
            )
        });
        let mut qemu = Qemu::start(&line, log)?;
        let slowness = prepared.setup.kernel.slowness;
        let deadline = Instant::now() + config.boot_limit * slowness;
        let qmp = Qmp::new(connection(&qmp, deadline, &mut qemu)?)?;
        let agent = Agent::new(connection(&agent, deadline, &mut qemu)?)?;
        let console = Console::new(console, config.known_reports);
        let device = prepared.artifacts.device.clone();
        let mut vm = Self {
            qemu,
            gpus,
            agent,
            qmp,
            console,
            folder,
            sockets,
            config: config.clone(),
            device,
            slowness,
        };
        vm.wait_for_boot(0)?;
        Ok(vm)
    }

    /// The command lines for a person at a terminal: one for each device, then QEMU's.
    #[must_use]
    pub fn command_lines(prepared: &Prepared, config: &Config) -> Vec<String> {
        let folder = prepared.paths.build();
        let mut lines = Vec::new();
        let mut gpus = Vec::new();
        for index in 0..config.gpus {
            let (socket, control) = gpu::sockets_of(&folder, index);
            let mut line = vec![
                prepared.artifacts.device.clone().into_os_string(),
                "--socket".into(),
            ];
            line.extend([
                socket.clone().into_os_string(),
                "--control".into(),
                control.into_os_string(),
            ]);
            line.extend(
                config
                    .device_arguments(index, &config.vram)
                    .into_iter()
                    .map(Into::into),
            );
            lines.push(quoted(&line));
            gpus.push(socket);
        }
        let line = command_line(&Spec {
            gpus,
            ..spec(
                prepared,
                config,
                &config.kernel_args(&prepared.setup.kernel),
            )
        });
        lines.push(quoted(&line));
        lines
    }

    /// Runs a command in the guest to its end.
    ///
    /// # Errors
    /// It cannot be started or takes too long (it is killed then), or the VM is in trouble. That it fails is no error
    /// here: ask the [`Output`].
    pub fn run<S: AsRef<str>>(&mut self, argv: &[S], limit: Duration) -> Result<Output> {
        let ended = self.spawn(argv).and_then(|process| process.wait(limit));
        ended.map_err(|error| self.explain(error))
    }

    /// Starts a command in the guest, for things that go on while the host does something.
    ///
    /// # Errors
    /// The guest cannot be reached.
    pub fn spawn<S: AsRef<str>>(&self, argv: &[S]) -> Result<GuestProcess> {
        let argv = argv.iter().map(|word| word.as_ref().to_owned()).collect();
        self.agent.start(Launch {
            argv,
            ..Launch::default()
        })
    }

    /// What the guest's kernel has written so far.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn console(&self) -> Result<String> {
        self.console.text()
    }

    /// Fails when the kernel has reported trouble since the last check, or QEMU or a device has died.
    ///
    /// # Errors
    /// That is its point.
    pub fn check(&mut self) -> Result<()> {
        if let Some(splat) = self.console.new_splat()? {
            let what = format!(
                "the guest's kernel reports trouble ({})",
                self.console.path().display()
            );
            return Err(Error::Vm {
                what,
                details: splat,
            });
        }
        self.check_processes()
    }

    /// A GPU.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn device(&mut self, index: usize) -> Result<&mut Gpu> {
        let gpu = self.gpus.get_mut(index).and_then(Option::as_mut);
        gpu.ok_or_else(|| Error::vm(format!("the VM has no GPU {index}")))
    }

    /// Ends a GPU's process, as a crash would. The VM runs on, but QEMU may not survive what the guest does next.
    ///
    /// # Errors
    /// There is no such GPU, or the system refuses.
    pub fn kill_device(&mut self, index: usize) -> Result<()> {
        self.device(index)?.kill()
    }

    /// Stops a GPU's process in its tracks.
    ///
    /// # Errors
    /// There is no such GPU, or the system refuses.
    pub fn stop_device(&mut self, index: usize) -> Result<()> {
        self.device(index)?.stop()
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// There is no such GPU, or the system refuses.
    pub fn continue_device(&mut self, index: usize) -> Result<()> {
        self.device(index)?.signal(Signal::CONT)
    }

    /// Plugs a further GPU into a free slot and returns its number.
    ///
    /// # Errors
    /// There is no free slot, or device or QEMU refuse.
    pub fn plug_gpu(&mut self, vram: &str) -> Result<usize> {
        let index = self.gpus.iter().position(Option::is_none);
        let index = index
            .ok_or_else(|| Error::vm("all slots of the VM are taken; boot it with spare_slots"))?;
        let log = self.folder.file(&format!("device{index}.log"));
        let gpu = Gpu::start(
            &self.device,
            self.sockets.path(),
            index,
            &self.config.device_arguments(index, vram),
            log,
        )?;
        let address = json!({"type": "unix", "data": {"path": gpu.socket()}});
        let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
        self.qmp.execute(
            "chardev-add",
            &json!({"id": gpu_chardev(index), "backend": backend}),
        )?;
        let mut arguments = serde_json::Map::from_iter([("driver".to_owned(), json!(GPU_DRIVER))]);
        for (key, value) in gpu_properties(index) {
            let value = value
                .parse::<u64>()
                .map_or_else(|_| json!(value), |number| json!(number));
            arguments.insert(key.to_owned(), value);
        }
        self.qmp.execute("device_add", &arguments.into())?;
        if let Some(slot) = self.gpus.get_mut(index) {
            *slot = Some(gpu);
        }
        Ok(index)
    }

    /// Asks the guest to let go of a GPU, waits until it has, and ends the GPU's process.
    ///
    /// # Errors
    /// There is no such GPU, or the guest does not let go.
    pub fn unplug_gpu(&mut self, index: usize) -> Result<()> {
        self.device(index)?.expect_end();
        let id = gpu_id(index);
        self.qmp.execute("device_del", &json!({"id": id}))?;
        let is_it = |data: &serde_json::Value| data.get("device") == Some(&json!(id));
        let deleted =
            self.qmp
                .wait_for_event("DEVICE_DELETED", UNPLUG_LIMIT * self.slowness, is_it);
        deleted.map_err(|error| self.explain(error))?;
        self.qmp
            .execute("chardev-remove", &json!({"id": gpu_chardev(index)}))?;
        if let Some(slot) = self.gpus.get_mut(index) {
            *slot = None;
        }
        Ok(())
    }

    /// Resets the machine, as its button would, and waits for the guest again.
    ///
    /// # Errors
    /// QEMU refuses, or the guest does not come up.
    pub fn reset(&mut self) -> Result<()> {
        self.restart(|vm| vm.qmp.execute("system_reset", &json!({})))
    }

    /// Has the guest's kernel reboot at once, and waits for the guest again.
    ///
    /// # Errors
    /// The guest cannot be reached, or does not come up.
    pub fn reboot(&mut self) -> Result<()> {
        self.restart(|vm| vm.spawn(&["busybox", "reboot", "-f"]))
    }

    /// Lets `act` restart the guest; what it returns lives until the guest is up again.
    fn restart<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T>) -> Result<()> {
        let boots = self.agent.boots();
        // QEMU was told to end at a reset, so that a panic ends it; this one is wanted, and so is the second one that the
        // firmware makes of it.
        self.set_reboot_action("reset")?;
        let _acting = act(self)?;
        self.wait_for_boot(boots)?;
        self.set_reboot_action("shutdown")
    }

    fn set_reboot_action(&mut self, action: &str) -> Result<()> {
        self.qmp
            .execute("set-action", &json!({"reboot": action}))
            .map(drop)
    }

    /// QEMU's monitor.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Checks, powers off, checks again; the logs go when all was well.
    ///
    /// # Errors
    /// A check fails, or the guest does not power off.
    pub fn shutdown(mut self) -> Result<()> {
        self.check()?;
        for gpu in self.gpus.iter_mut().flatten() {
            gpu.expect_end();
        }
        self.agent.send(&Request::PowerOff)?;
        let limit = self.limit(POWER_OFF_LIMIT);
        let deadline = Instant::now() + limit;
        let status =
            wait_until(&mut self.qemu.child, deadline).map_err(Error::io("waiting for QEMU"))?;
        let Some(status) = status else {
            let error = Error::Timeout {
                what: "the guest's power-off".into(),
                limit,
                details: String::new(),
            };
            return Err(self.explain(error));
        };
        if !status.success() {
            return Err(Error::Vm {
                what: format!("QEMU ended with {status}"),
                details: tail(&self.qemu.log),
            });
        }
        if let Some(splat) = self.console.new_splat()? {
            return Err(Error::Vm {
                what: "the guest's kernel reports trouble while powering off".into(),
                details: splat,
            });
        }
        self.folder.discard();
        Ok(())
    }

    /// Ends it as it is, and keeps no logs: for one that was broken on purpose.
    pub fn give_up(mut self) {
        self.folder.discard();
    }

    fn wait_for_boot(&mut self, boots: u32) -> Result<()> {
        self.agent
            .wait_for_boot(boots, self.limit(self.config.boot_limit))
            .map_err(|error| self.explain(error))?;
        let load = match &self.config.driver {
            Driver::Load(parameters) => Some((DRIVER_PATH, parameters.clone())),
            Driver::Mock => Some((MOCK_PATH, Vec::new())),
            Driver::None => None,
        };
        if let Some((module, parameters)) = load {
            let mut argv = vec!["insmod".to_owned(), module.to_owned()];
            argv.extend(parameters);
            self.run(&argv, self.limit(LOAD_LIMIT))?
                .expect_success()
                .map_err(|error| self.explain(error))?;
        }
        if self.config.disks {
            let argv = ["sh", "-ec", disks::LOAD_MODULES];
            self.run(&argv, self.limit(LOAD_LIMIT))?
                .expect_success()
                .map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    /// A time limit for the kernel that runs.
    fn limit(&self, limit: Duration) -> Duration {
        limit * self.slowness
    }

    fn check_processes(&mut self) -> Result<()> {
        self.qemu.check()?;
        self.gpus.iter_mut().flatten().try_for_each(Gpu::check)
    }

    /// Adds to an error what may be behind it: a splat, a process that died, the console's end.
    fn explain(&mut self, error: Error) -> Error {
        let mut details = String::new();
        if let Err(cause) = self.check() {
            details = cause.to_string();
        } else {
            details.push_str("the console's end:\n");
            details.push_str(&tail(self.console.path()));
        }
        Error::Vm {
            what: error.to_string(),
            details,
        }
    }
}

/// What the command line has of preparation and configuration; for a person, and without GPUs and disks.
fn spec<'a>(prepared: &'a Prepared, config: &'a Config, kernel_args: &'a [String]) -> Spec<'a> {
    Spec {
        qemu: prepared.setup.toolbox.qemu(),
        accel: prepared.accel,
        memory_mib: config.memory_mib,
        cpus: config.cpus,
        cpu: config.cpu.as_deref().unwrap_or(prepared.accel.cpu()),
        kernel: &prepared.setup.kernel.image,
        initramfs: &prepared.artifacts.initramfs,
        kernel_args,
        host: Host::Person,
        gpus: Vec::new(),
        spare_slots: config.spare_slots,
        disks: Vec::new(),
        numa_nodes: config.numa_nodes,
    }
}

impl Qemu {
    fn start(line: &[std::ffi::OsString], log: std::path::PathBuf) -> Result<Self> {
        let (program, arguments) = line
            .split_first()
            .ok_or_else(|| Error::vm("QEMU has no command line"))?;
        let file = File::create(&log).map_err(Error::io(log.display().to_string()))?;
        let copy = file
            .try_clone()
            .map_err(Error::io(log.display().to_string()))?;
        let mut command = bound(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy);
        let child = spawn(command).map_err(Error::io(format!(
            "starting QEMU ({})",
            program.to_string_lossy()
        )))?;
        Ok(Self { child, log })
    }

    fn check(&mut self) -> Result<()> {
        match self
            .child
            .try_wait()
            .map_err(Error::io("asking after QEMU"))?
        {
            Some(status) => Err(Error::Vm {
                what: format!("QEMU has ended ({status})"),
                details: tail(&self.log),
            }),
            None => Ok(()),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("ending QEMU: {error}");
        }
    }
}

/// A socket that QEMU connects to: the harness listens before QEMU starts, so there is no race and no retry.
struct Listener(UnixListener);

impl Listener {
    fn new(path: &Path) -> Result<Self> {
        UnixListener::bind(path)
            .map(Self)
            .map_err(Error::io(format!("listening on {}", path.display())))
    }

    /// A connection, if one comes within a moment.
    fn accept(&self) -> Result<Option<UnixStream>> {
        const MOMENT: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let mut sockets = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        match poll(&mut sockets, Some(&MOMENT)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(None),
            Ok(_) => self
                .0
                .accept()
                .map(|(stream, _)| Some(stream))
                .map_err(Error::io("accepting QEMU's connection")),
            Err(error) => Err(Error::io("waiting for QEMU's connection")(error)),
        }
    }
}

fn connection(listener: &Listener, deadline: Instant, qemu: &mut Qemu) -> Result<UnixStream> {
    while Instant::now() < deadline {
        if let Some(stream) = listener.accept()? {
            return Ok(stream);
        }
        qemu.check()?;
    }
    Err(Error::Vm {
        what: "QEMU did not connect".into(),
        details: tail(&qemu.log),
    })
}
