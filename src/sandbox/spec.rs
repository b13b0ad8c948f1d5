//! What a sandbox is, as plain data. General enough for a bubblewrap-style command line: namespaces, an
//! ordered list of mounts, an identity, an environment, capabilities, a filter, a host name, a folder.

use super::seccomp::Filter;
use execd_init_shim::messages::{IdMap, MountStep, Network};
use rustix::thread::CapabilitySet;
use std::ffi::CString;
use std::path::PathBuf;

/// A sandbox: its surroundings, and what every program in it is born with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    /// Namespaces beyond those every sandbox has (mount, pid, uts, ipc).
    pub namespaces: Namespaces,
    /// Carried out in this order.
    pub mounts: Vec<MountStep>,
    /// Further ones, after those. They are made on this side while init is busy with the others, which
    /// [`super::profile::split`] says the conditions of.
    pub late_mounts: Vec<MountStep>,
    /// uts host name.
    pub hostname: Option<String>,
    /// See proc_pid_oom_score_adj(5); above the daemon's own.
    pub oom_score_adj: i16,
    /// Ids as seen inside.
    pub uid: u32,
    /// Ids as seen inside.
    pub gid: u32,
    /// What uid 0 programs keep; bit n is capability number n.
    pub capabilities: u64,
    /// What programs may not call.
    pub seccomp: Filter,
    /// `NAME=value`.
    pub environment: Vec<CString>,
    /// Where programs start.
    pub cwd: PathBuf,
    /// Programs get a session of their own and no controlling terminal.
    pub new_session: bool,
}

/// The namespaces that are optional.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces {
    /// A user namespace, with the one id that is mapped.
    pub user: Option<IdMap>,
    /// The daemon's network, or loopback only.
    pub network: Network,
    /// A cgroup namespace.
    pub cgroup: bool,
}

/// The capabilities a uid 0 program keeps (capabilities(7)): what package managers and file work need, none
/// that reaches beyond the sandbox's own files, ids and processes.
pub const ROOT_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::NET_BIND_SERVICE);
