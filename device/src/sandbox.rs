// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the process gives up before it serves anybody ([0014](../../docs/adr/0014-the-device-gives-up-what-it-does-not-need.md)).
//!
//! Two fences. A seccomp filter lets through only the system calls that a running device makes: no
//! file is opened, nothing executed, nobody connected to, no other process gets a signal; what is not
//! on the list fails with `EPERM`. Landlock leaves, of the whole file system, the right to remove the
//! sockets, and forbids signals and abstract sockets to the outside once more. Both hold for the thread
//! that sets them up and for all that it makes later, and cannot be taken back.
//!
//! A kernel or processor that lacks one of them is no error. Knows neither GPU nor transport.

use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::{collections::BTreeMap, env, path::Path, process};

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Landlock.
    #[error("cannot give up the file system: {0}; --no-sandbox runs without")]
    Files(#[from] landlock::RulesetError),
    /// A socket's folder.
    #[error("cannot give up the file system but for the sockets: {0}; --no-sandbox runs without")]
    Folder(#[from] landlock::PathFdError),
    /// seccomp.
    #[error("cannot give up system calls: {0}; --no-sandbox runs without")]
    Calls(#[from] seccompiler::Error),
    /// The filter.
    #[error("cannot make the filter of system calls: {0}; --no-sandbox runs without")]
    Filter(#[from] seccompiler::BackendError),
}

/// The newest rights that are known here; the kernel takes those of them that it knows.
const LANDLOCK: ABI = ABI::V6;

/// What any device needs: memory, threads, waiting, what is open already, and its end.
const CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Older forms of some of these, where the processor has them.
#[cfg(target_arch = "x86_64")]
const OLD_CALLS: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_epoll_wait,
    libc::SYS_lstat,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_stat,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD_CALLS: &[libc::c_long] = &[];

/// Calls that are let through with this first or second argument only: a thread's name, and a file
/// that shall not block.
const CALLS_WITH: &[(libc::c_long, u8, u64)] = &[
    (libc::SYS_prctl, 0, libc::PR_SET_NAME as u64),
    (libc::SYS_ioctl, 1, libc::FIONBIO),
];

/// Fences in the calling thread, and all threads that it makes from now on. `sockets` are the files
/// that they may remove.
pub fn enter<'a>(sockets: impl IntoIterator<Item = &'a Path>) -> Result<(), SandboxError> {
    give_up_files(sockets)?;
    give_up_calls(process::id())
}

fn give_up_files<'a>(sockets: impl IntoIterator<Item = &'a Path>) -> Result<(), SandboxError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    for socket in sockets {
        let folder = socket.parent().filter(|path| !path.as_os_str().is_empty());
        let folder = PathFd::new(folder.unwrap_or(Path::new(".")))?;
        rules = rules.add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?;
    }
    let status = rules.restrict_self()?;
    log::debug!("landlock: {:?}", status.ruleset);
    Ok(())
}

/// Signals are for threads of process `pid` only: an abort is one.
fn give_up_calls(pid: u32) -> Result<(), SandboxError> {
    let Ok(target) = env::consts::ARCH.try_into() else {
        log::debug!("seccomp: no filter for {}", env::consts::ARCH);
        return Ok(());
    };
    let calls = CALLS.iter().chain(OLD_CALLS);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.map(|&call| (call, vec![])).collect();
    let signal = (libc::SYS_tgkill, 0, u64::from(pid));
    for &(call, argument, value) in CALLS_WITH.iter().chain([&signal]) {
        let equal =
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        rules.insert(call, vec![SeccompRule::new(vec![equal])?]);
    }
    let filter: BpfProgram = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        target,
    )?
    .try_into()?;
    seccompiler::apply_filter(&filter)?;
    log::debug!(
        "seccomp: {} system calls are left",
        CALLS.len() + OLD_CALLS.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::{c_int, c_void, siginfo_t};
    use std::{
        fs::{self, File},
        io::{self, ErrorKind},
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::net::{UnixListener, UnixStream},
        process::Command,
        sync::{
            atomic::{AtomicBool, Ordering},
            mpsc,
        },
        thread,
    };
    use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

    fn assert_refused<T>(what: &str, result: io::Result<T>) {
        match result {
            Ok(_) => panic!("{what} is let through"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}"),
        }
    }

    /// In a thread of its own, as nobody comes out again.
    fn inside(act: impl FnOnce() + Send + 'static) {
        thread::spawn(act).join().expect("what is tried inside");
    }

    #[test]
    fn forbidden_thing_inside_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "x").unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let program = Command::new("true").spawn();
        program
            .expect("a program can be run outside")
            .wait()
            .unwrap();
        inside(move || {
            enter([socket.as_path()]).unwrap();
            assert_refused("opening a file", File::open(&path));
            assert_refused("opening memory", File::open("/proc/self/mem"));
            assert_refused("making a file", File::create(path.with_extension("new")));
            assert_refused("making a folder", fs::create_dir(path.with_extension("d")));
            assert_refused("renaming", fs::rename(&path, path.with_extension("2")));
            assert_refused("running a program", Command::new("true").spawn());
            assert_refused("connecting", UnixStream::connect(&socket));
            assert_refused("connecting by TCP", TcpStream::connect("127.0.0.1:1"));
            assert_refused("listening", TcpListener::bind("127.0.0.1:0"));
            assert_refused("sending", UdpSocket::bind("127.0.0.1:0"));
            drop(listener);
        });
    }

    #[test]
    fn needed_thing_inside_is_let_through() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let client = UnixStream::connect(&socket).unwrap();
        inside(move || {
            enter([socket.as_path()]).unwrap();
            thread::Builder::new()
                .name("named".into())
                .spawn(|| drop(vec![1u8; 8 << 20]))
                .unwrap()
                .join()
                .unwrap();
            listener.accept().unwrap();
            client.set_nonblocking(true).unwrap();
            fs::remove_file(&socket).unwrap();
        });
    }

    #[test]
    fn file_elsewhere_inside_cannot_be_removed() {
        let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = other.path().join("file");
        fs::write(&file, "x").unwrap();
        let landlock = fs::read_to_string("/sys/kernel/security/lsm")
            .is_ok_and(|modules| modules.contains("landlock"));
        if !landlock {
            println!("this kernel has no landlock: nothing to see");
            return;
        }
        inside(move || {
            enter([ours.path().join("socket").as_path()]).unwrap();
            assert_refused("removing a file", fs::remove_file(&file));
        });
    }

    static SIGNALLED: AtomicBool = AtomicBool::new(false);

    extern "C" fn note_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        SIGNALLED.store(true, Ordering::SeqCst);
    }

    /// Signals a thread of this process from inside of a sandbox that takes process `pid` for its own;
    /// whether the signal came.
    fn signal_comes(pid: u32) -> bool {
        SIGNALLED.store(false, Ordering::SeqCst);
        let (end, wait) = mpsc::channel::<()>();
        let receiver = thread::spawn(move || wait.recv());
        inside(move || {
            give_up_calls(pid).unwrap();
            receiver.kill(SIGRTMIN()).unwrap();
            drop(end);
            // What was sent arrives before the thread ends.
            let _ended = receiver.join().unwrap();
        });
        SIGNALLED.load(Ordering::SeqCst)
    }

    #[test]
    fn signal_inside_reaches_the_own_process_only() {
        register_signal_handler(SIGRTMIN(), note_signal).unwrap();
        assert!(signal_comes(process::id()));
        assert!(!signal_comes(process::id() + 1));
    }
}
