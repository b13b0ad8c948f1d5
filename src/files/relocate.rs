//! Moving, as mv(1) does: by renaming, and by copying where the kernel cannot rename (`EXDEV`), which is between
//! mounts, and for directories in the lower of an overlay.
//!
//! A copy is made beside its destination under a passing name and renamed when it is complete. It has the modes,
//! owners, times, attributes, links and holes of the original, as far as the session may give them.

use super::error::{Call, FileError};
use super::path::RootedPath;
use super::stage::{PARENT_MODE, random_name};
use super::tree::{
    FileId, Worker, identity, kind, open_below, open_regular_below, permissions, refuse_kernel, rename,
    split_below, stat, stat_entry, unlink,
};
use super::walk::{Order, Walk};
use super::xattr;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    Access, AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Statx, StatxTimestamp, Timespec, Timestamps, Uid,
    accessat, chownat, copy_file_range, fchmod, ftruncate, futimens, linkat, makedev, mkdirat, mknodat,
    openat, readlinkat, seek, symlinkat, utimensat,
};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

/// What is copied with one call, between two looks at whether anybody still wants it; bytes.
const COPY_BYTES: usize = 8 << 20;

impl Worker<'_> {
    /// Moves a file or a directory; what is at the destination is replaced, directories on the way there are made.
    ///
    /// # Errors
    /// When there is nothing, or when something at the destination cannot be replaced by this.
    pub fn relocate(&self, from: &str, to: &str) -> Result<(), FileError> {
        let (from, to) = (self.path(from)?, self.path(to)?);
        let (from_dir, from_name) = self.entry(&from)?;
        let source = stat_entry(&from_dir, &from_name).call("statx", &from)?;
        let (to_parent, to_name) = to.split()?;
        let to_dir = self.make_directories(&to_parent, PARENT_MODE)?;
        if is_other_name_of(&source, &from_dir, &from_name, &to_dir, &to_name) {
            // To the kernel this is nothing to do (rename(2)).
            return unlink(&from_dir, &from_name, AtFlags::empty()).call("unlinkat", &from);
        }
        match rename(&from_dir, &from_name, &to_dir, &to_name) {
            Err(Errno::XDEV) => {}
            done => return done.call("renameat", &to),
        }
        // It is to go from where it was, too; better to know that before there are two.
        accessat(&from_dir, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)
            .call("faccessat2", &from)?;
        let passing = OsString::from(random_name());
        let copied = self
            .copy(&from_dir, &from_name, &source, &to_dir, &passing, &from)
            .and_then(|()| rename(&to_dir, &passing, &to_dir, &to_name).call("renameat", &to));
        if let Err(error) = copied {
            // Whatever the reason was, also that nobody wants it any more: it does not stay.
            self.insist();
            let _ = self.remove_tree(&to_dir, &passing, &to);
            return Err(error);
        }
        self.remove_tree(&from_dir, &from_name, &from)
    }

    /// Whether [`Worker::relocate`] makes sense, without doing anything.
    ///
    /// # Errors
    /// As there.
    pub fn check_relocate(&self, from: &str, to: &str) -> Result<(), FileError> {
        self.path(to)?.split()?;
        self.require(&self.path(from)?)
    }

    fn copy(
        &self,
        from_dir: &OwnedFd,
        from_name: &OsStr,
        source: &Statx,
        to_dir: &OwnedFd,
        to_name: &OsStr,
        path: &RootedPath,
    ) -> Result<(), FileError> {
        if kind(source) != FileType::Directory {
            return self
                .copy_entry(from_dir, from_name, source, to_dir, to_name)
                .map_err(|(call, errno)| FileError::Call { call, path: path.to_string(), errno });
        }
        let open = |dir: &OwnedFd, name: &OsStr| {
            open_below(dir, name.as_bytes(), super::tree::DIRECTORY, Mode::empty()).call("openat2", path)
        };
        let from = open(from_dir, from_name)?;
        refuse_kernel(&from, path)?;
        mkdirat(to_dir, to_name, Mode::RWXU).call("mkdirat", path)?;
        let to = open(to_dir, to_name)?;
        self.copy_tree(from, &to, path)
    }

    fn copy_tree(&self, from: OwnedFd, to: &OwnedFd, path: &RootedPath) -> Result<(), FileError> {
        let root = identity(&stat(to, path)?);
        let mut links: HashMap<FileId, Vec<u8>> = HashMap::new();
        let mut directories = vec![Vec::new()];
        let mut walk =
            Walk::new(from, Order::Names, usize::MAX, |seen| stat_entry(seen.dir, seen.name).map(Some));
        while let Some(step) = walk.next(&|| self.go_on()) {
            let (below, stat) = step?;
            let at = |call| {
                let path = path.join(OsStr::from_bytes(&below));
                move |errno| FileError::Call { call, path: path.to_string(), errno }
            };
            if identity(&stat) == root {
                return Err(FileError::invalid(path, "a directory cannot be moved into itself"));
            }
            let (parent, name) = split_below(&below);
            let to_dir = open_below(to, parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
                .map_err(at("openat2"))?;
            if kind(&stat) == FileType::Directory {
                mkdirat(&to_dir, name, Mode::RWXU).map_err(at("mkdirat"))?;
                directories.push(below);
                continue;
            }
            if stat.stx_nlink > 1 {
                if let Some(first) = links.get(&identity(&stat)) {
                    let (first_dir, first_name) = split_below(first);
                    let first_dir =
                        open_below(to, first_dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
                    let first_dir = first_dir.map_err(at("openat2"))?;
                    linkat(first_dir, first_name, &to_dir, name, AtFlags::empty()).map_err(at("linkat"))?;
                    continue;
                }
                links.insert(identity(&stat), below.clone());
            }
            let from_dir = open_below(walk.base(), parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
            let from_dir = from_dir.map_err(at("openat2"))?;
            self.copy_entry(&from_dir, name, &stat, &to_dir, name)
                .map_err(|(call, errno)| at(call)(errno))?;
        }
        // Last, and from below: filling a directory changes its times, and its mode may forbid it.
        for below in directories.iter().rev() {
            self.go_on()?;
            let of = |base: &OwnedFd| open_below(base, below, super::tree::DIRECTORY, Mode::empty());
            let path = path.join(OsStr::from_bytes(below));
            let (from, to) = (of(walk.base()).call("openat2", &path)?, of(to).call("openat2", &path)?);
            dress(&from, &to, &stat(&from, &path)?).call("fchmod", &path)?;
        }
        Ok(())
    }

    /// Copies what is no directory. Tells the call that failed.
    fn copy_entry(
        &self,
        from_dir: &OwnedFd,
        from_name: &OsStr,
        source: &Statx,
        to_dir: &OwnedFd,
        to_name: &OsStr,
    ) -> Result<(), (&'static str, Errno)> {
        let named = |call| move |errno| (call, errno);
        match kind(source) {
            FileType::RegularFile => {
                let from = open_regular_below(from_dir, from_name.as_bytes()).map_err(named("open"))?;
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let to = openat(to_dir, to_name, flags, Mode::RUSR | Mode::WUSR).map_err(named("openat"))?;
                self.copy_content(&from, &to).map_err(named("copy_file_range"))?;
                dress(&from, &to, source).map_err(named("fchmod"))
            }
            FileType::Symlink => {
                let target = readlinkat(from_dir, from_name, Vec::new()).map_err(named("readlinkat"))?;
                symlinkat(target, to_dir, to_name).map_err(named("symlinkat"))?;
                dress_named(to_dir, to_name, source, false).map_err(named("utimensat"))
            }
            special => {
                let device = makedev(source.stx_rdev_major, source.stx_rdev_minor);
                mknodat(to_dir, to_name, special, Mode::RUSR | Mode::WUSR, device)
                    .map_err(named("mknodat"))?;
                dress_named(to_dir, to_name, source, true).map_err(named("fchmodat"))
            }
        }
    }

    /// Copies data and leaves holes (lseek(2), SEEK_DATA).
    fn copy_content(&self, from: &File, to: &OwnedFd) -> Result<(), Errno> {
        let size = seek(from, SeekFrom::End(0))?;
        let mut at = 0;
        while at < size {
            let data = match seek(from, SeekFrom::Data(at)) {
                Ok(data) => data,
                // Nothing but a hole is left.
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(errno),
            };
            let end = seek(from, SeekFrom::Hole(data))?;
            seek(from, SeekFrom::Start(data))?;
            seek(to, SeekFrom::Start(data))?;
            at = data;
            while at < end {
                if (self.go_on()).is_err() {
                    return Err(Errno::CANCELED);
                }
                let length = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
                match copy_some(from, to, length)? {
                    // It has become shorter.
                    0 => return ftruncate(to, at),
                    copied => at += copied as u64,
                }
            }
        }
        ftruncate(to, size)
    }
}

/// Copies on from where both files are; as much as one call does.
fn copy_some(from: &File, to: &OwnedFd, length: usize) -> Result<usize, Errno> {
    match copy_file_range(from, None, to, None, length) {
        // File systems that cannot; then it goes through memory.
        Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {}
        done => return done,
    }
    let mut buffer = vec![0; length.min(256 * 1024)];
    let read = rustix::io::read(from, &mut buffer)?;
    let mut rest = buffer.get(..read).unwrap_or_default();
    while !rest.is_empty() {
        let written = rustix::io::write(to, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(read)
}

/// Whether the destination is the same file under another name.
fn is_other_name_of(
    source: &Statx,
    from: &OwnedFd,
    from_name: &OsStr,
    to: &OwnedFd,
    to_name: &OsStr,
) -> bool {
    if source.stx_nlink < 2 || kind(source) == FileType::Directory {
        return false;
    }
    let is_same = stat_entry(to, to_name).is_ok_and(|stat| identity(&stat) == identity(source));
    let is_same_name = from_name == to_name
        && matches!((stat(from, ""), stat(to, "")), (Ok(a), Ok(b)) if identity(&a) == identity(&b));
    is_same && !is_same_name
}

/// Gives a copy what its original has: owner, mode, attributes, times, in the order in which they undo each other.
fn dress(from: impl AsFd, to: impl AsFd, source: &Statx) -> Result<(), Errno> {
    let kept = give_owner(to.as_fd(), "", source, AtFlags::EMPTY_PATH);
    fchmod(&to, mode(source, kept))?;
    xattr::copy(&from, &to);
    futimens(&to, &times(source))
}

/// The same for what cannot be opened. Nobody else knows its name, which is random, or lies below one.
fn dress_named(dir: &OwnedFd, name: &OsStr, source: &Statx, with_mode: bool) -> Result<(), Errno> {
    let kept = give_owner(dir.as_fd(), name, source, AtFlags::SYMLINK_NOFOLLOW);
    if with_mode {
        let held = openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::chmod(super::tree::proc_path(&held), mode(source, kept))?;
    }
    utimensat(dir, name, &times(source), AtFlags::SYMLINK_NOFOLLOW)
}

/// Whether the owner could be given; mv(1) goes on without.
fn give_owner(dir: impl AsFd, name: impl rustix::path::Arg, source: &Statx, flags: AtFlags) -> bool {
    let (uid, gid) = (Uid::from_raw(source.stx_uid), Gid::from_raw(source.stx_gid));
    chownat(dir, name, Some(uid), Some(gid), flags).is_ok()
}

/// Set-uid bits are for the owner they were meant for.
fn mode(source: &Statx, owner_kept: bool) -> Mode {
    let mode = permissions(source);
    if owner_kept { mode } else { mode - (Mode::SUID | Mode::SGID) }
}

fn times(stat: &Statx) -> Timestamps {
    let spec = |time: &StatxTimestamp| Timespec { tv_sec: time.tv_sec, tv_nsec: time.tv_nsec.into() };
    Timestamps { last_access: spec(&stat.stx_atime), last_modification: spec(&stat.stx_mtime) }
}
