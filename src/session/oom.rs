//! Notices when the kernel kills for lack of memory.
//!
//! The counter is the machine's (`oom_kill` in /proc/vmstat, kernel 4.13; kills for the limit of a memory cgroup count
//! too), so what is known is that there was such a kill at the time. Together with a run that ended by SIGKILL, which
//! execd did not send, that is the cause in all likelihood.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks while nobody asks: how much earlier than a run a kill may have been that is put down to it.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The time of the last kill.
#[derive(Debug, Default)]
pub(super) struct OomWatch(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    kills: Option<u64>,
    last: Option<Instant>,
}

impl OomWatch {
    /// Reads the counter.
    pub(super) fn look(&self) {
        let now = std::fs::read_to_string("/proc/vmstat").ok().and_then(|text| kills(&text));
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now > seen.kills {
            // The first look only finds out where the counter is.
            seen.last = seen.kills.and(Some(Instant::now()));
            seen.kills = now;
        }
    }

    /// Whether the kernel has killed for lack of memory since then.
    pub(super) fn struck_since(&self, then: Instant) -> bool {
        self.look();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last.is_some_and(|last| last >= then)
    }
}

fn kills(vmstat: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_found() {
        assert_eq!(kills("nr_free_pages 1\noom_kill 42\nx 3\n"), Some(42));
        assert_eq!(kills("drop_pagecache 0\n"), None);
        let watch = OomWatch::default();
        watch.look();
        assert!(!watch.struck_since(Instant::now()));
    }
}
