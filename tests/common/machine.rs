//! The machine as seen from outside any session: processes, descriptors, mounts, cgroup directories.

use procfs::process::{Process, all_processes};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Known {
    pub(crate) pid: i32,
    started: u64,
}

impl Known {
    /// A zombie is dead: who reaps it is the business of the machine's own init.
    pub(crate) fn is_alive(self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        stat.is_ok_and(|stat| stat.starttime == self.started && stat.state != 'Z')
    }
}

/// The living children of a process.
pub(crate) fn children(pid: i32) -> Vec<Known> {
    let stats = all_processes().unwrap().flatten().filter_map(|process| process.stat().ok());
    let children = stats.filter(|stat| stat.ppid == pid && stat.state != 'Z');
    children.map(|stat| Known { pid: stat.pid, started: stat.starttime }).collect()
}

/// All living processes below a process.
pub(crate) fn descendants(pid: i32) -> Vec<Known> {
    let mut found = children(pid);
    let mut next = 0;
    while let Some(known) = found.get(next).copied() {
        found.extend(children(known.pid));
        next += 1;
    }
    found
}

/// Zombies that a process has not waited for.
pub(crate) fn zombies(pid: i32) -> usize {
    let stats = all_processes().unwrap().flatten().filter_map(|process| process.stat().ok());
    stats.filter(|stat| stat.ppid == pid && stat.state == 'Z').count()
}

pub(crate) fn descriptors(pid: i32) -> usize {
    Process::new(pid).unwrap().fd_count().unwrap()
}

/// Memory of a process; kilobytes.
pub(crate) fn resident_kb(pid: i32) -> u64 {
    let status = Process::new(pid).and_then(|process| process.status());
    status.ok().and_then(|status| status.vmrss).unwrap_or(0)
}

/// Mounts of the host's namespace, which the tests share with the daemon.
pub(crate) fn mounts(pid: i32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count()
}

/// Names in a folder.
pub(crate) fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Sessions that have something in a folder of uppers; what begins with a dot is the daemon's own.
pub(crate) fn uppers(folder: &Path) -> Vec<String> {
    names(folder).into_iter().filter(|name| !name.starts_with('.')).collect()
}

/// The daemon's directory in the cgroup v2 tree, where that is mounted.
pub(crate) fn cgroup_of_daemon(pid: i32) -> Option<PathBuf> {
    let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned();
    let mounts = Process::myself().ok()?.mountinfo().ok()?;
    let mut trees = mounts.into_iter().filter(|mount| mount.fs_type == "cgroup2" && mount.root == "/");
    let path = trees.next()?.mount_point.join(own).join(format!("execd-{pid}"));
    path.is_dir().then_some(path)
}

/// How many directories there are in a folder, at any depth.
pub(crate) fn directories(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.map(|entry| 1 + directories(&entry.path())).sum()
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Whether a program can be found on this machine.
pub(crate) fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}
