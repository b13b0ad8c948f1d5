//! Removing files, and whole trees as `rm -rf` does.

use super::error::{Call, Class, FileError};
use super::path::RootedPath;
use super::tree::{DIRECTORY, Last, Worker, kind, open_below, split_below, stat_entry, unlink};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use std::ffi::{CString, OsStr};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

/// Bytes of directory entries that are read at once.
const ENTRIES_BYTES: usize = 32 * 1024;
/// The longest path below a descriptor that is used; a tree may be deeper than the kernel takes paths. Bytes.
const BELOW_BYTES_MAX: usize = 2048;
/// How often a path has to begin anew at a descriptor within one tree; each takes stack.
const LEVELS_MAX: usize = 128;
/// How often a directory is emptied again that somebody goes on filling.
const SWEEPS: u32 = 8;

impl Worker<'_> {
    /// Removes what is no directory.
    ///
    /// # Errors
    /// [`super::Class::NotFound`], and [`super::Class::Invalid`] for a directory.
    pub fn remove_file(&self, text: &str) -> Result<(), FileError> {
        let path = self.path(text)?;
        let (parent, name) = self.entry(&path)?;
        unlink(&parent, &name, AtFlags::empty()).call("unlinkat", &path)
    }

    /// Whether [`Worker::remove_file`] makes sense, without doing anything.
    ///
    /// # Errors
    /// As there.
    pub fn check_remove_file(&self, text: &str) -> Result<(), FileError> {
        let path = self.path(text)?;
        let node = self.node(&path, Last::Keep)?;
        match kind(&node.stat) {
            FileType::Directory => Err(FileError::invalid(&path, "is a directory")),
            _ => Ok(()),
        }
    }

    /// Removes a directory and everything in it, as far as that can be done. One that is not there is fine.
    ///
    /// # Errors
    /// [`super::Class::Invalid`] for what is no directory; what stands in the way of removing the rest.
    pub fn remove_directory(&self, text: &str) -> Result<(), FileError> {
        let path = self.path(text)?;
        let node = match self.node_if_any(&path, Last::Keep) {
            // Below a file there is none, either.
            Err(error) if error.errno() == Some(Errno::NOTDIR) => None,
            found => found?,
        };
        let Some(node) = node else { return Ok(()) };
        if kind(&node.stat) != FileType::Directory {
            return Err(FileError::invalid(&path, "is no directory"));
        }
        let (parent, name) = self.entry(&path)?;
        self.remove_tree(&parent, &name, &path)
    }

    /// Removes an entry of a directory, whatever it is.
    pub(super) fn remove_tree(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        path: &RootedPath,
    ) -> Result<(), FileError> {
        self.remove_at(parent, name, path, 0)
    }

    fn remove_at(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        path: &RootedPath,
        level: usize,
    ) -> Result<(), FileError> {
        if level > LEVELS_MAX {
            return Err(FileError::invalid(path, "is nested too deeply; remove what is deep in it first"));
        }
        let mut sweeps = 0;
        loop {
            match remove_entry(parent, name) {
                Ok(()) => return Ok(()),
                Err(Errno::NOTEMPTY) if sweeps < SWEEPS => {
                    let dir = open_below(parent, name.as_bytes(), DIRECTORY, Mode::empty());
                    self.empty(dir.call("openat2", path)?, path, level)?;
                    sweeps += 1;
                }
                Err(errno) => return Err(errno).call("unlinkat", path),
            }
        }
    }

    /// Removes what is in a directory, as far as that can be done; the first failure, if there was one.
    fn empty(&self, base: OwnedFd, path: &RootedPath, level: usize) -> Result<(), FileError> {
        let mut emptying =
            Emptying { worker: self, base, path, level, stack: vec![(Vec::new(), false)], failed: None };
        while let Some((below, emptied)) = emptying.stack.pop() {
            self.go_on()?;
            let step = if emptied { emptying.leave(&below) } else { emptying.enter(below) };
            if let Err(error) = step {
                if error.class() == Class::Cancelled {
                    return Err(error);
                }
                emptying.failed.get_or_insert(error);
            }
        }
        emptying.failed.map_or(Ok(()), Err)
    }
}

/// A directory that is being emptied.
struct Emptying<'a> {
    worker: &'a Worker<'a>,
    base: OwnedFd,
    path: &'a RootedPath,
    level: usize,
    /// Directories below it that are still to be emptied, and those that have been and are to go.
    stack: Vec<(Vec<u8>, bool)>,
    failed: Option<FileError>,
}

impl Emptying<'_> {
    fn failure(&self, call: &'static str, below: &[u8], errno: Errno) -> FileError {
        FileError::Call { call, path: self.path.join(OsStr::from_bytes(below)).to_string(), errno }
    }

    fn leave(&self, below: &[u8]) -> Result<(), FileError> {
        let (parent, name) = split_below(below);
        let parent = open_below(&self.base, parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        match parent.and_then(|parent| unlink(parent, name, AtFlags::REMOVEDIR)) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failure("unlinkat", below, errno)),
        }
    }

    fn enter(&mut self, below: Vec<u8>) -> Result<(), FileError> {
        if !below.is_empty() {
            self.stack.push((below.clone(), true));
        }
        let dir = match open_below(&self.base, &below, DIRECTORY, Mode::empty()) {
            Ok(dir) => dir,
            // Gone, or something else by now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            Err(errno) => return Err(self.failure("openat2", &below, errno)),
        };
        super::tree::refuse_kernel(&dir, self.path)?;
        for (name, is_dir) in names(&dir).map_err(|errno| self.failure("getdents64", &below, errno))? {
            let mut full = below.clone();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(name.as_bytes());
            if is_dir && full.len() < BELOW_BYTES_MAX {
                self.stack.push((full, false));
                continue;
            }
            let removed = if is_dir {
                let path = self.path.join(OsStr::from_bytes(&below));
                self.worker.remove_at(&dir, OsStr::from_bytes(name.as_bytes()), &path, self.level + 1)
            } else {
                match unlink(&dir, OsStr::from_bytes(name.as_bytes()), AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => Ok(()),
                    // It has become a directory meanwhile.
                    Err(Errno::ISDIR) => {
                        self.stack.push((full, false));
                        Ok(())
                    }
                    Err(errno) => Err(self.failure("unlinkat", &full, errno)),
                }
            };
            if let Err(error) = removed {
                self.failed.get_or_insert(error);
            }
        }
        Ok(())
    }
}

/// Removes a file or an empty directory.
fn remove_entry(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match unlink(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlink(parent, name, AtFlags::REMOVEDIR),
        // What Linux answers without the right to unlink directories, which nobody has (unlink(2)).
        Err(Errno::PERM) if is_directory(parent, name) => unlink(parent, name, AtFlags::REMOVEDIR),
        done => done,
    }
}

fn is_directory(parent: &OwnedFd, name: &OsStr) -> bool {
    stat_entry(parent, name).is_ok_and(|stat| kind(&stat) == FileType::Directory)
}

/// The entries of a directory, and whether each is one.
pub(crate) fn names(dir: &OwnedFd) -> Result<Vec<(CString, bool)>, Errno> {
    let mut names = Vec::new();
    let mut buffer = vec![MaybeUninit::uninit(); ENTRIES_BYTES];
    let mut entries = RawDir::new(dir.as_fd(), &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let is_dir = match entry.file_type() {
            FileType::Unknown => stat_entry(dir, name).is_ok_and(|stat| kind(&stat) == FileType::Directory),
            known => known == FileType::Directory,
        };
        names.push((name.to_owned(), is_dir));
    }
    Ok(names)
}
