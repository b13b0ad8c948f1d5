//! The control directory of a session, as the daemon sees it: a small tmpfs that is writable here and
//! read-only inside. Code and input of a run are files in it; output, status and carried-over state come back
//! through FIFOs, which can be opened for writing on a read-only mount but neither removed nor replaced.

use super::dialect::name;
use crate::sandbox::profile::CONTROL_DIR;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, mknodat, openat, unlinkat};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// The directory.
#[derive(Debug)]
pub(super) struct ControlDir {
    dir: OwnedFd,
    /// The code of a run; kept open, since every run rewrites it.
    code: File,
}

impl ControlDir {
    pub(super) fn new(dir: OwnedFd) -> io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let code = openat(&dir, name::CODE, flags, Mode::from(0o444))?.into();
        Ok(Self { dir, code })
    }

    /// Replaces the code of a run. A shell reads all of it before it executes any, so it can be rewritten in
    /// place.
    pub(super) fn put_code(&self, code: &[u8]) -> io::Result<()> {
        self.code.set_len(0)?;
        self.code.write_all_at(code, 0)
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
        let file = openat(&self.dir, name, flags, Mode::from(0o444))?;
        File::from(file).write_all(content)
    }

    /// Puts a new FIFO in place of `name` and opens it for reading.
    pub(super) fn fifo(&self, name: &str) -> io::Result<OwnedFd> {
        self.remove(name)?;
        // Writable for whatever uid the session's programs take on, readable for none of them.
        mknodat(&self.dir, name, FileType::Fifo, Mode::from(0o622), 0)?;
        Ok(openat(&self.dir, name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Opens a FIFO of ours for writing.
    pub(super) fn writer(&self, name: &str) -> io::Result<OwnedFd> {
        Ok(openat(&self.dir, name, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Removes a file; one that is not there is fine.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
