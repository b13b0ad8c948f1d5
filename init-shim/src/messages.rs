//! What daemon, launcher and init say to each other. Plain data; every field says its unit.
//!
//! ```text
//! daemon ── Launch + Plan ──► launcher ── (fork) ──► init
//! daemon ◄── Launched | Refused ── launcher
//! daemon ◄── Assembled | Failed ── init          once
//! daemon ── Start ──► init ── Started | NotStarted ──► daemon
//! daemon ◄── Exited ── init                      for each program started
//! daemon ── Attach | Seal | Replace ──► init ── Attached ──► daemon     unanswered before Assembled
//! ```

use crate::Failure;
use rustix::fd::OwnedFd;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::Arc;

/// To the launcher: fork a sandbox. The packet carries the encoded [`Plan`] behind this header, which the
/// launcher passes on unread. Descriptors: init's end of its channel, then the cgroup directory if
/// `into_cgroup`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Launch {
    /// Be born in a new user namespace.
    pub user_namespace: bool,
    /// Be born in the cgroup whose directory is attached.
    pub into_cgroup: bool,
}

/// The launcher's answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Launched {
    /// The sandbox's init runs; its pidfd is attached.
    Running {
        /// init's pid as the daemon numbers it.
        pid: i32,
        /// Wall time of the clone3 call; microseconds.
        clone_us: u32,
    },
    /// clone3 failed.
    Refused(Failure),
}

/// Everything init sets up before it can start programs, in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The id mapping of a new user namespace; `None` when there is none.
    pub id_map: Option<IdMap>,
    /// A cgroup namespace rooted at the session's own cgroup.
    pub cgroup_namespace: bool,
    /// What network the sandbox sees.
    pub network: Network,
    /// uts host name.
    pub hostname: Option<String>,
    /// Mounts, in order. The first may be on `/`; else the root starts as an empty tmpfs.
    pub mounts: Vec<MountStep>,
    /// How many mounts the daemon makes meanwhile, which come with [`Request::Attach`]: those that steps await, and then
    /// those to be attached after all steps.
    pub awaited_mounts: usize,
    /// `/proc/self/oom_score_adj` of init and all programs, -1000 to 1000 (proc_pid_oom_score_adj(5)).
    pub oom_score_adj: i16,
}

/// One line each of uid_map and gid_map (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// The uid seen inside.
    pub inside_uid: u32,
    /// The uid outside that it stands for: execd's own.
    pub outside_uid: u32,
    /// The gid seen inside.
    pub inside_gid: u32,
    /// The gid outside that it stands for: execd's own.
    pub outside_gid: u32,
}

/// What network the sandbox sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// The daemon's own network namespace.
    Shared,
    /// A new network namespace with the loopback interface up.
    Loopback,
}

/// One mount. Sources are paths in the daemon's view, resolved beforehand: a symbolic link found in one is
/// refused. Destinations are resolved inside the new root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountStep {
    /// A bind mount, nosuid.
    Bind {
        /// Host path.
        source: PathBuf,
        /// Where it appears.
        dest: PathBuf,
        /// Set `ro` on it and on every mount beneath.
        read_only: bool,
        /// Take the mounts beneath `source` along.
        recursive: bool,
    },
    /// An overlay whose lower layer is a host directory.
    Overlay {
        /// Host directory.
        lower: PathBuf,
        /// Where changes go.
        upper: Upper,
        /// Where it appears.
        dest: PathBuf,
    },
    /// A mount that the daemon has made; it comes with [`Request::Attach`], in the order of these steps.
    Awaited {
        /// Where it appears.
        dest: PathBuf,
    },
    /// An empty tmpfs, nosuid and nodev.
    Tmpfs {
        /// Where it appears.
        dest: PathBuf,
        /// Mode of its root directory.
        mode: u32,
        /// `size=`, bytes.
        bytes_max: u64,
        /// `nr_inodes=`.
        inodes_max: u64,
    },
    /// One tmpfs for all the private directories of a sandbox, since making a file system costs several times
    /// what a bind mount does. It is parked on `dest`, which a later step has to cover.
    Scratch {
        /// A directory that a later step mounts over, such as /proc.
        dest: PathBuf,
        /// `size=`, bytes.
        bytes_max: u64,
        /// `nr_inodes=`.
        inodes_max: u64,
    },
    /// An empty directory of the scratch tmpfs, nosuid and nodev.
    Private {
        /// Where it appears.
        dest: PathBuf,
        /// Mode of the directory.
        mode: u32,
    },
    /// A minimal /dev in the scratch tmpfs: null zero full random urandom tty, a private devpts and shm.
    Dev {
        /// Where it appears.
        dest: PathBuf,
    },
    /// A fresh procfs of the sandbox's PID namespace.
    Proc {
        /// Where it appears.
        dest: PathBuf,
        /// All of it read-only: what lies outside the processes' directories is the whole machine's, modes and
        /// owners included.
        read_only: bool,
        /// Entries covered by something empty.
        masked: Vec<String>,
    },
    /// Covers a path with an empty, unwritable directory (of the scratch tmpfs) or file; a path that does not exist is left alone.
    Mask {
        /// What to cover.
        dest: PathBuf,
    },
    /// The control directory of the shell protocol: a small tmpfs, read-only inside, writable through the
    /// descriptor that init sends to the daemon.
    Control {
        /// Where it appears.
        dest: PathBuf,
        /// `size=`, bytes.
        bytes_max: u64,
    },
}

impl MountStep {
    /// Where the step mounts.
    pub fn dest(&self) -> &std::path::Path {
        match self {
            Self::Bind { dest, .. }
            | Self::Overlay { dest, .. }
            | Self::Awaited { dest }
            | Self::Tmpfs { dest, .. }
            | Self::Scratch { dest, .. }
            | Self::Private { dest, .. }
            | Self::Dev { dest }
            | Self::Proc { dest, .. }
            | Self::Mask { dest }
            | Self::Control { dest, .. } => dest,
        }
    }

    /// What the step is for, for a message.
    pub fn describe(&self) -> String {
        let dest = self.dest().display();
        match self {
            Self::Bind { source, .. } if source == self.dest() => format!("bind {dest}"),
            Self::Bind { source, .. } => format!("bind {} on {dest}", source.display()),
            Self::Overlay { .. } => format!("mount overlay on {dest}"),
            Self::Awaited { .. } => format!("attach {dest}"),
            Self::Tmpfs { .. } | Self::Scratch { .. } => format!("mount tmpfs on {dest}"),
            Self::Private { .. } => format!("make a private {dest}"),
            Self::Dev { .. } => format!("build the devices in {dest}"),
            Self::Proc { .. } => format!("mount proc on {dest}"),
            Self::Mask { .. } => format!("mask {dest}"),
            Self::Control { .. } => format!("mount the control directory on {dest}"),
        }
    }
}

/// The writable layer of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Upper {
    /// Two host directories on one file system; they outlive the sandbox.
    Directory {
        /// `upperdir=`
        upper: PathBuf,
        /// `workdir=`
        work: PathBuf,
    },
    /// A tmpfs that dies with the sandbox.
    Tmpfs {
        /// `size=`, bytes.
        bytes_max: u64,
        /// `nr_inodes=`.
        inodes_max: u64,
    },
    /// Directories that the daemon holds, on a file system that may be mounted nowhere. init never hears of them: the
    /// daemon makes the overlay itself.
    #[serde(skip)]
    Held(HeldUpper),
}

/// The directories `upper` and `work` below one that is held.
#[derive(Debug, Clone)]
pub struct HeldUpper(pub Arc<OwnedFd>);

impl PartialEq for HeldUpper {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for HeldUpper {}

/// To init.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Start a program. Descriptors: stdin, stdout, stderr, then the cgroup directory if `into_cgroup`.
    Start {
        /// The daemon's name for it in later events.
        id: u32,
        /// What to start.
        program: Program,
        /// Be born in the cgroup whose directory is attached.
        into_cgroup: bool,
    },
    /// Attach mounts that the daemon has made, in order. Descriptors: one detached mount for each. What the plan
    /// awaits is answered by `Assembled` or `Failed`, everything after that by `Attached`.
    Attach {
        /// Where they go.
        places: Vec<Place>,
    },
    /// Make mounts read-only, in order; answered by `Attached`. `EBUSY` when somebody has a file of one open for writing.
    Seal {
        /// Where they are.
        dests: Vec<PathBuf>,
    },
    /// Attach mounts, as with `Attach`, in the place of those that are there. Nothing has changed when the answer is
    /// [`Event::NotReplaced`].
    Replace {
        /// Where they go.
        places: Vec<Place>,
    },
}

/// Where a detached mount goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where it appears.
    pub dest: PathBuf,
    /// Whether its root is a directory.
    pub is_directory: bool,
}

/// From init.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The plan is carried out. Descriptors: the root directory (`O_PATH`), the mount namespace, then the
    /// control directory if `has_control`.
    Assembled {
        /// Whether a control directory is attached.
        has_control: bool,
        /// From before clone3 to here; microseconds.
        since_clone_us: u32,
    },
    /// A step of the plan failed; init ends.
    Failed(Failure),
    /// The program has been executed; its pidfd is attached.
    Started {
        /// As in [`Request::Start`].
        id: u32,
        /// Which of [`Program::commands`] it was.
        command: usize,
        /// From before clone3 of the sandbox to the call of execve; microseconds.
        since_clone_us: u32,
    },
    /// A step before the exec failed, or every command did.
    NotStarted {
        /// As in [`Request::Start`].
        id: u32,
        /// The step.
        failure: Failure,
    },
    /// What became of an [`Request::Attach`], [`Request::Seal`] or [`Request::Replace`].
    Attached(Result<(), Failure>),
    /// Mounts cannot be replaced; they are as they were.
    NotReplaced(Failure),
    /// The program has ended.
    Exited {
        /// As in [`Request::Start`].
        id: u32,
        /// How.
        status: ExitStatus,
    },
}

/// How a program ended (wait(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// The number a shell would put into `$?`.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// A program and all it is born with. Nothing else is inherited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Tried in order until one can be executed. When empty, the process goes through every step up to exec
    /// and then exits 0, which is how a probe finds out whether a machine can do all that.
    pub commands: Vec<Command>,
    /// `NAME=value`.
    pub environment: Vec<CString>,
    /// Working directory.
    pub cwd: PathBuf,
    /// A session of its own, without controlling terminal (setsid(2)).
    pub new_session: bool,
    /// Who it runs as.
    pub identity: Identity,
    /// The capabilities that remain in every set a uid 0 program has; bit n is capability number n.
    pub capabilities: u64,
    /// The seccomp filter; empty for none.
    pub seccomp: Vec<Instruction>,
    /// Whether the filter lets through all that follows it, so that it can be installed while init mounts.
    pub seccomp_early: bool,
}

/// An executable and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// What to execute.
    pub path: CString,
    /// `argv`, its own name first.
    pub argv: Vec<CString>,
}

/// Ids as the sandbox sees them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Real, effective and saved user id.
    pub uid: u32,
    /// Real, effective and saved group id.
    pub gid: u32,
    /// Whether setresuid(2) and its kin are to be called; not in a user namespace, where the mapping did it.
    pub switch: bool,
}

/// One instruction of a classic BPF program (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when true.
    pub jt: u8,
    /// Instructions to skip when false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}
