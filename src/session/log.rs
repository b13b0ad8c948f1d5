//! What a background run writes, kept on the daemon's side in a file without a name. Its positions are those of all
//! that was ever written; beyond a size the beginning gives its blocks back, so that an endless log ends in its newest
//! part and not in its oldest.

use rustix::fd::OwnedFd;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, fallocate, memfd_create, open};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much a log keeps (api 2.7); bytes.
pub const LOG_BYTES_MAX: u64 = 16 << 20;
/// Blocks are given back in steps of this; bytes.
const STEP_BYTES: u64 = 1 << 20;

/// A log.
#[derive(Debug)]
pub struct Log {
    file: File,
    extent: Mutex<Extent>,
}

/// What of all that was written is there; positions in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Extent {
    start: u64,
    end: u64,
}

/// A part of a log.
#[derive(Debug)]
pub struct Part {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The position behind them.
    pub next: u64,
}

impl Log {
    /// An empty log on the file system of `dir`, or in memory where that is not possible.
    ///
    /// # Errors
    /// `EMFILE` and `ENFILE`.
    pub(super) fn new(dir: Option<&Path>) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let on_disk: Option<OwnedFd> = dir.and_then(|dir| open(dir, flags, Mode::from(0o600)).ok());
        let file = match on_disk {
            Some(file) => file,
            None => memfd_create("execd-log", MemfdFlags::CLOEXEC)?,
        };
        Ok(Self { file: file.into(), extent: Mutex::default() })
    }

    /// Appends. For one writer.
    ///
    /// # Errors
    /// `ENOSPC` and its kin; the position does not advance then.
    pub(super) fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let Extent { start, end } = *self.extent();
        self.file.write_all_at(bytes, end)?;
        let end = end + bytes.len() as u64;
        let mut kept_from = start;
        if end - start > LOG_BYTES_MAX + STEP_BYTES {
            kept_from = (end - LOG_BYTES_MAX) / STEP_BYTES * STEP_BYTES;
        }
        // Before the hole is made, so that who reads it can tell.
        *self.extent() = Extent { start: kept_from, end };
        if kept_from > start {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where the file system cannot, the log takes more room than it should and reads the same.
            let _ = fallocate(&self.file, punch, start, kept_from - start);
        }
        Ok(())
    }

    /// The positions between which there is something to read from `cursor` on, at most [`LOG_BYTES_MAX`] of it.
    pub fn range(&self, cursor: u64) -> std::ops::Range<u64> {
        let Extent { start, end } = *self.extent();
        let from = cursor.clamp(start, end);
        from..end.min(from + LOG_BYTES_MAX)
    }

    /// What was written from position `cursor` on, at most `bytes_max`; from the oldest on that is kept, where that is
    /// behind `cursor`.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn read(&self, cursor: u64, bytes_max: u64) -> io::Result<Part> {
        let Extent { start, end } = *self.extent();
        let from = cursor.clamp(start, end);
        let length = (end - from).min(bytes_max);
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, from)?;
        // What was given back meanwhile reads as zeros.
        let lost = self.extent().start.saturating_sub(from).min(length);
        bytes.drain(..usize::try_from(lost).map_err(io::Error::other)?);
        Ok(Part { bytes, next: from + length })
    }

    fn extent(&self) -> MutexGuard<'_, Extent> {
        self.extent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_log_is_read_from_any_position() {
        let log = Log::new(None).unwrap();
        assert_eq!(log.read(7, 100).unwrap().next, 0);
        log.append(b"one\ntwo\n").unwrap();
        let part = log.read(4, 100).unwrap();
        assert_eq!((part.bytes.as_slice(), part.next), (b"two\n".as_slice(), 8));
        assert_eq!(log.read(100, 100).unwrap().next, 8);
    }

    #[test]
    fn an_endless_log_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        for dir in [None, Some(dir.path())] {
            let log = Log::new(dir).unwrap();
            let mut written = 0_u64;
            for number in 0..40_u8 {
                log.append(&vec![number; 1_000_000]).unwrap();
                written += 1_000_000;
            }
            let part = log.read(0, LOG_BYTES_MAX).unwrap();
            assert!(part.bytes.len() as u64 >= LOG_BYTES_MAX && part.next <= written);
            assert_eq!(log.read(written - 1, 100).unwrap().bytes, [39]);
            let kept = log.file.metadata().unwrap().blocks() * 512;
            assert!(kept <= LOG_BYTES_MAX + 3 * STEP_BYTES, "{kept}");
        }
    }
}
