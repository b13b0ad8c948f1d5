//! What is told about a file.

use super::error::FileError;
use super::path::RootedPath;
use super::tree::{Last, Worker, kind};
use rustix::fs::{FileType, Statx, StatxFlags, StatxTimestamp};
use std::time::{Duration, SystemTime};

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO, socket or device.
    Other,
}

/// What is told about a file.
#[derive(Debug, Clone)]
pub struct FileInfo {
    /// As it was asked for, or absolute where it was found.
    pub path: String,
    /// What it is; of a link, the link.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Of its content.
    pub modified_at: SystemTime,
    /// Of the file, where the file system notes it; else of its last change in any respect.
    pub created_at: SystemTime,
    /// The user's name as the session has it, or the number.
    pub owner: String,
    /// The group's name as the session has it, or the number.
    pub group: String,
    /// The nine permission bits.
    pub mode: u32,
}

impl Worker<'_> {
    /// What there is at a path.
    ///
    /// # Errors
    /// [`super::Class::NotFound`] and its kin.
    pub fn info(&self, text: &str) -> Result<FileInfo, FileError> {
        let path = self.path(text)?;
        let node = self.node(&path, Last::Keep)?;
        Ok(self.describe(text.to_owned(), &node.stat))
    }

    /// Whether there is something at a path; the failure where there is not.
    pub(super) fn require(&self, path: &RootedPath) -> Result<(), FileError> {
        self.node(path, Last::Keep).map(drop)
    }

    pub(super) fn describe(&self, path: String, stat: &Statx) -> FileInfo {
        // Some file systems say that they note it and then have nothing.
        let has_birth = stat.stx_mask & StatxFlags::BTIME.bits() != 0 && stat.stx_btime.tv_sec != 0;
        let (accounts, ids) = (self.accounts(), self.tree.ids());
        FileInfo {
            path,
            kind: match kind(stat) {
                FileType::RegularFile => Kind::File,
                FileType::Directory => Kind::Directory,
                FileType::Symlink => Kind::Symlink,
                _ => Kind::Other,
            },
            size: stat.stx_size,
            modified_at: time(&stat.stx_mtime),
            created_at: time(if has_birth { &stat.stx_btime } else { &stat.stx_ctime }),
            owner: accounts.user(ids.uid_inside(stat.stx_uid)),
            group: accounts.group(ids.gid_inside(stat.stx_gid)),
            mode: u32::from(stat.stx_mode) & 0o777,
        }
    }
}

/// Times before the epoch, and beyond what can be counted, end there.
/// The octal digits of a mode, as a decimal number: 0o644 is 644.
pub fn octal_digits(mode: u32) -> u32 {
    (0..4).rev().fold(0, |digits, place| digits * 10 + (mode >> (3 * place) & 7))
}

pub(super) fn time(time: &StatxTimestamp) -> SystemTime {
    let since = Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec);
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}
