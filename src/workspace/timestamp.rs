//! Moments, as files have them.

use rustix::fs::StatxTimestamp;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};

/// A moment of the clock that files are dated with (CLOCK_REALTIME).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub sec: i64,
    /// And nanoseconds.
    pub nsec: u32,
}

impl Timestamp {
    /// The present.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { sec: since.as_secs().cast_signed(), nsec: since.subsec_nanos() }
    }

    /// For calculations.
    pub fn system_time(self) -> SystemTime {
        let since = Duration::from_secs(u64::try_from(self.sec).unwrap_or(0));
        let since = since.saturating_add(Duration::from_nanos(self.nsec.into()));
        // What no clock shows is as good as the beginning.
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

impl From<StatxTimestamp> for Timestamp {
    fn from(time: StatxTimestamp) -> Self {
        Self { sec: time.tv_sec, nsec: time.tv_nsec }
    }
}
