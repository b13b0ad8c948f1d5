//! The control directory of a session, as the daemon sees it: a small tmpfs that is writable here and
//! read-only inside. Code and input of a run are files in it; output, status and carried-over state come back
//! through FIFOs, which can be opened for writing on a read-only mount but neither removed nor replaced.

use crate::sandbox::profile::CONTROL_DIR;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, mknodat, openat, unlinkat};
use rustix::io::Errno;
use std::io::{self, Write};

/// The directory.
#[derive(Debug)]
pub(super) struct ControlDir(OwnedFd);

impl ControlDir {
    pub(super) fn new(dir: OwnedFd) -> Self {
        Self(dir)
    }

    /// How `name` is called inside.
    pub(super) fn path(name: &str) -> String {
        format!("{CONTROL_DIR}/{name}")
    }

    /// Puts a new file in place of `name`. What still reads the old one, such as a background process its
    /// input, keeps what it had.
    pub(super) fn put(&self, name: &str, content: &[u8]) -> io::Result<()> {
        self.remove(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.0, name, flags, Mode::from(0o444))?;
        std::fs::File::from(file).write_all(content)
    }

    /// Puts a new FIFO in place of `name` and opens it for reading.
    pub(super) fn fifo(&self, name: &str) -> io::Result<OwnedFd> {
        self.remove(name)?;
        // Writable for whatever uid the session's programs take on, readable for none of them.
        mknodat(&self.0, name, FileType::Fifo, Mode::from(0o622), 0)?;
        Ok(openat(&self.0, name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Opens a FIFO of ours for writing.
    pub(super) fn writer(&self, name: &str) -> io::Result<OwnedFd> {
        Ok(openat(&self.0, name, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
