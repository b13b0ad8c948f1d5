//! Processes by pid and pidfd, as this process numbers them. A pid is a hint until a pidfd holds it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;

/// A handle to a process; `None` when there is none of that number.
pub(super) fn open_process(pid: i32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

/// Whether the process behind a pidfd has ended, waited for or not (pidfd_open(2)).
pub(super) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
}

/// The pid behind a pidfd, as this process numbers it (proc_pid_fdinfo(5)).
pub(super) fn pid_of(pidfd: &OwnedFd) -> io::Result<i32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other("fdinfo of a pidfd has no pid"))
}

/// All processes below `pid` that did not lose their parents.
pub(super) fn descendants(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(pid) = open.pop() {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let children: Vec<i32> = children.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        found.extend(&children);
        open.extend(children);
    }
    found
}
