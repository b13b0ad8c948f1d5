//! Notices when the kernel kills for lack of memory.
//!
//! The counter is that of execd's memory cgroup, which its sessions share, or else the whole machine's (`oom_kill` in
//! /proc/vmstat, kernel 4.13). So what is known is that there was such a kill at the time. Together with a run that ended
//! by SIGKILL, which execd did not send, that is the cause in all likelihood.

use crate::sandbox::cgroup::memory_kill_counters;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks while nobody asks: how much earlier than a run a kill may have been that is put down to it.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

const MACHINE_COUNTER: &str = "/proc/vmstat";

/// The time of the last kill.
#[derive(Debug)]
pub(super) struct OomWatch {
    counter: PathBuf,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    kills: Option<u64>,
    last: Option<Instant>,
}

impl OomWatch {
    /// Finds the counter that says most about execd's own sessions.
    pub(super) fn new() -> Self {
        let counter = memory_kill_counters().into_iter().find(|path| read(path).is_some());
        let counter = counter.unwrap_or_else(|| MACHINE_COUNTER.into());
        Self { counter, seen: Mutex::default() }
    }

    /// Reads the counter.
    pub(super) fn look(&self) {
        let now = read(&self.counter);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if now > seen.kills {
            // The first look only finds out where the counter is.
            seen.last = seen.kills.and(Some(Instant::now()));
            seen.kills = now;
        }
    }

    /// Whether the kernel has killed for lack of memory since then.
    pub(super) fn struck_since(&self, then: Instant) -> bool {
        self.look();
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).last.is_some_and(|last| last >= then)
    }
}

fn read(counter: &Path) -> Option<u64> {
    kills(&std::fs::read_to_string(counter).ok()?)
}

fn kills(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_found() {
        assert_eq!(kills("nr_free_pages 1\noom_kill 42\nx 3\n"), Some(42));
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), Some(7));
        assert_eq!(kills("drop_pagecache 0\n"), None);
        let watch = OomWatch::new();
        watch.look();
        assert!(!watch.struck_since(Instant::now()));
    }
}
