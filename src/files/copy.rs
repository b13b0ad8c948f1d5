//! Copying one entry from one directory to another: content with its holes, owner, mode, attributes, times.
//!
//! There are two ways. [`entry`] and [`dress`] give a copy what they may and go on without the rest, as mv(1) does.
//! With [`exactly`] and [`dress_exactly`], what cannot be given is a failure, for who is to have the same afterwards.

use super::error::FileError;
use super::tree::{Node, kind, open_regular_below, permissions, proc_path, reopen};
use super::walk::GoOn;
use super::xattr;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Statx, StatxTimestamp, Timespec, Timestamps, Uid,
    chownat, copy_file_range, fchmod, fchown, ftruncate, futimens, ioctl_ficlone, makedev, mknodat, openat,
    readlinkat, seek, sendfile, symlinkat, utimensat,
};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// What is copied with one call, between two looks at whether anybody still wants it; bytes.
const COPY_BYTES: usize = 8 << 20;
/// What is compared at once; bytes.
const COMPARE_BYTES: usize = 128 << 10;

/// The call that failed, and why. `ECANCELED` stands for work that nobody wants any more.
pub(crate) type Failed = (&'static str, Errno);

fn named(call: &'static str) -> impl Fn(Errno) -> Failed {
    move |errno| (call, errno)
}

/// Copies what is no directory, as far as that is allowed.
pub(crate) fn entry(
    from_dir: &OwnedFd,
    from_name: &OsStr,
    source: &Statx,
    to_dir: &OwnedFd,
    to_name: &OsStr,
    go_on: &GoOn<'_>,
) -> Result<(), Failed> {
    match kind(source) {
        FileType::RegularFile => {
            let from = open_regular_below(from_dir, from_name.as_encoded_bytes()).map_err(named("open"))?;
            let to = create(to_dir, to_name)?;
            content(&from, &to, go_on).map_err(named("copy_file_range"))?;
            dress(&from, &to, source).map_err(named("fchmod"))
        }
        FileType::Symlink => {
            let target = readlinkat(from_dir, from_name, Vec::new()).map_err(named("readlinkat"))?;
            symlinkat(target, to_dir, to_name).map_err(named("symlinkat"))?;
            dress_named(to_dir, to_name, source, false).map_err(named("utimensat"))
        }
        _ => {
            special(source, to_dir, to_name)?;
            dress_named(to_dir, to_name, source, true).map_err(named("fchmodat"))
        }
    }
}

/// What an exact copy has that is not simply the original's.
pub(crate) struct Like<'a> {
    pub(crate) mode: Mode,
    /// Which attributes are the original's; others are left as they are.
    pub(crate) carries: &'a dyn Fn(&CStr) -> bool,
}

/// An exact copy.
pub(crate) struct Copied {
    /// Of content.
    pub(crate) bytes: u64,
    /// A regular file, as it was opened for writing.
    pub(crate) file: Option<File>,
}

/// Copies what is no directory, exactly. When it fails, what there is of the copy stays.
pub(crate) fn exactly(
    from: &Node,
    to_dir: &OwnedFd,
    to_name: &OsStr,
    like: &Like<'_>,
    go_on: &GoOn<'_>,
) -> Result<Copied, Failed> {
    match kind(&from.stat) {
        FileType::RegularFile => {
            let original = open_quietly(&from.fd).map_err(named("open"))?;
            let copy = create(to_dir, to_name)?;
            // File systems that share blocks between files do it in no time; most cannot, and say so at once.
            let bytes = match ioctl_ficlone(&copy, &original) {
                Ok(()) => from.stat.stx_size.min(from.stat.stx_blocks * 512),
                Err(_) => content(&original, &copy, go_on).map_err(named("copy_file_range"))?,
            };
            dress_exactly(&original, &copy, &from.stat, like)?;
            return Ok(Copied { bytes, file: Some(copy) });
        }
        FileType::Symlink => {
            let target = readlinkat(&from.fd, "", Vec::new()).map_err(named("readlinkat"))?;
            symlinkat(target, to_dir, to_name).map_err(named("symlinkat"))?;
        }
        _ => special(&from.stat, to_dir, to_name)?,
    }
    dress_held_exactly(from, to_dir, to_name, like)?;
    Ok(Copied { bytes: 0, file: None })
}

/// Opens a held file for reading, without leaving a trace in its times where that is allowed.
pub(crate) fn open_quietly(held: &OwnedFd) -> Result<File, Errno> {
    match reopen(held, OFlags::RDONLY | OFlags::NOATIME) {
        Err(Errno::PERM) => reopen(held, OFlags::RDONLY),
        opened => opened,
    }
}

fn create(dir: &OwnedFd, name: &OsStr) -> Result<File, Failed> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map(File::from).map_err(named("openat"))
}

fn special(source: &Statx, to_dir: &OwnedFd, to_name: &OsStr) -> Result<(), Failed> {
    let device = makedev(source.stx_rdev_major, source.stx_rdev_minor);
    mknodat(to_dir, to_name, kind(source), Mode::RUSR | Mode::WUSR, device).map_err(named("mknodat"))
}

/// Copies data and leaves holes (lseek(2), SEEK_DATA); the bytes of data.
pub(crate) fn content(from: &File, to: impl AsFd, go_on: &GoOn<'_>) -> Result<u64, Errno> {
    let size = seek(from, SeekFrom::End(0))?;
    let (mut at, mut bytes) = (0, 0);
    while at < size {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = seek(from, SeekFrom::Hole(data))?;
        seek(from, SeekFrom::Start(data))?;
        seek(&to, SeekFrom::Start(data))?;
        at = data;
        while at < end {
            if go_on().is_err() {
                return Err(Errno::CANCELED);
            }
            let length = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            match copy_some(from, &to, length)? {
                // It has become shorter.
                0 => {
                    ftruncate(&to, at)?;
                    return Ok(bytes);
                }
                copied => {
                    at += copied as u64;
                    bytes += copied as u64;
                }
            }
        }
    }
    ftruncate(&to, size)?;
    Ok(bytes)
}

/// Whether two files hold the same, holes being zeros.
pub(crate) fn is_same_content(one: &File, other: &File, go_on: &GoOn<'_>) -> Result<bool, Errno> {
    let size = seek(one, SeekFrom::End(0))?;
    if seek(other, SeekFrom::End(0))? != size {
        return Ok(false);
    }
    let mut buffers = [vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]];
    let [left, right] = &mut buffers;
    let mut at = 0;
    while at < size {
        go_on().map_err(|_| Errno::CANCELED)?;
        // Where both have a hole there is nothing to look at.
        at = next_data(one, at, size)?.min(next_data(other, at, size)?);
        let length = usize::try_from(size - at).unwrap_or(COMPARE_BYTES).min(COMPARE_BYTES);
        let (Some(left), Some(right)) = (left.get_mut(..length), right.get_mut(..length)) else { break };
        let read = one.read_exact_at(left, at).and_then(|()| other.read_exact_at(right, at));
        match read {
            Ok(()) if left == right => at += length as u64,
            Ok(()) => return Ok(false),
            // One has become shorter.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }
    Ok(true)
}

fn next_data(file: &File, at: u64, size: u64) -> Result<u64, Errno> {
    match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => Ok(size),
        found => found,
    }
}

/// Copies on from where both files are; as much as one call does.
fn copy_some(from: &File, to: impl AsFd, length: usize) -> Result<usize, Errno> {
    match copy_file_range(from, None, &to, None, length) {
        // Two file systems, or one that cannot.
        Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {}
        done => return done,
    }
    match sendfile(&to, from, None, length) {
        // Then it goes through memory of this process.
        Err(Errno::INVAL | Errno::NOSYS) => {}
        done => return done,
    }
    let mut buffer = vec![0; length.min(256 * 1024)];
    let read = rustix::io::read(from, &mut buffer)?;
    let mut rest = buffer.get(..read).unwrap_or_default();
    while !rest.is_empty() {
        let written = rustix::io::write(&to, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(read)
}

/// Gives a copy what its original has: owner, mode, attributes, times, in the order in which they undo each other.
pub(crate) fn dress(from: impl AsFd, to: impl AsFd, source: &Statx) -> Result<(), Errno> {
    let kept = give_owner(to.as_fd(), "", source, AtFlags::EMPTY_PATH);
    fchmod(&to, mode(source, kept))?;
    xattr::copy(&from, &to);
    futimens(&to, &times(source))
}

/// The same for what cannot be opened. Nobody else knows its name, which is random, or lies below one.
fn dress_named(dir: &OwnedFd, name: &OsStr, source: &Statx, with_mode: bool) -> Result<(), Errno> {
    let kept = give_owner(dir.as_fd(), name, source, AtFlags::SYMLINK_NOFOLLOW);
    if with_mode {
        let held = hold(dir, name)?;
        rustix::fs::chmod(proc_path(&held), mode(source, kept))?;
    }
    utimensat(dir, name, &times(source), AtFlags::SYMLINK_NOFOLLOW)
}

/// Gives a copy all that its original has, or fails. A new owner takes set-id bits and capabilities away, and a list of
/// access rights changes the mode; so the mode comes after both.
pub(crate) fn dress_exactly(
    from: impl AsFd,
    to: impl AsFd,
    source: &Statx,
    like: &Like<'_>,
) -> Result<(), Failed> {
    let (uid, gid) = owner(source);
    fchown(&to, Some(uid), Some(gid)).map_err(named("fchown"))?;
    xattr::equate(&from, &to, true, like.carries)?;
    fchmod(&to, like.mode).map_err(named("fchmod"))?;
    if like.mode.contains(Mode::SGID) {
        require_mode(&to, like.mode)?;
    }
    futimens(&to, &times(source)).map_err(named("utimensat"))
}

/// The same for what cannot be opened.
fn dress_held_exactly(from: &Node, dir: &OwnedFd, name: &OsStr, like: &Like<'_>) -> Result<(), Failed> {
    let held = hold(dir, name).map_err(named("openat"))?;
    let (uid, gid) = owner(&from.stat);
    chownat(&held, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH).map_err(named("fchownat"))?;
    xattr::equate(&from.fd, &held, true, like.carries)?;
    // Links have no mode of their own.
    if kind(&from.stat) != FileType::Symlink {
        rustix::fs::chmod(proc_path(&held), like.mode).map_err(named("fchmodat"))?;
    }
    utimensat(dir, name, &times(&from.stat), AtFlags::SYMLINK_NOFOLLOW).map_err(named("utimensat"))
}

/// Who may not have files of a group that set its id is not told so by the kernel (chmod(2)).
pub(crate) fn require_mode(file: impl AsFd, wanted: Mode) -> Result<(), Failed> {
    let now = rustix::fs::fstat(file).map_err(named("fstat"))?;
    if now.st_mode & 0o7777 == wanted.as_raw_mode() { Ok(()) } else { Err(("fchmod", Errno::PERM)) }
}

pub(crate) fn hold(dir: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Whether the owner could be given; mv(1) goes on without.
fn give_owner(dir: impl AsFd, name: impl rustix::path::Arg, source: &Statx, flags: AtFlags) -> bool {
    let (uid, gid) = owner(source);
    chownat(dir, name, Some(uid), Some(gid), flags).is_ok()
}

pub(crate) fn owner(stat: &Statx) -> (Uid, Gid) {
    (Uid::from_raw(stat.stx_uid), Gid::from_raw(stat.stx_gid))
}

/// Set-uid bits are for the owner they were meant for.
fn mode(source: &Statx, owner_kept: bool) -> Mode {
    let mode = permissions(source);
    if owner_kept { mode } else { mode - (Mode::SUID | Mode::SGID) }
}

pub(crate) fn times(stat: &Statx) -> Timestamps {
    let spec = |time: &StatxTimestamp| Timespec { tv_sec: time.tv_sec, tv_nsec: time.tv_nsec.into() };
    Timestamps { last_access: spec(&stat.stx_atime), last_modification: spec(&stat.stx_mtime) }
}

/// Names the path that a copy failed at.
pub(crate) fn failed_at(path: impl AsRef<std::path::Path>) -> impl FnOnce(Failed) -> FileError {
    move |(call, errno)| match errno {
        Errno::CANCELED => FileError::Cancelled,
        errno => FileError::Call { call, path: path.as_ref().display().to_string(), errno },
    }
}
