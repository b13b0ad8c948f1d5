//! Removing files, and whole trees as `rm -rf` does.

use super::error::{Call, FileError};
use super::path::RootedPath;
use super::tree::{DIRECTORY, Last, Worker, kind, open_below, split_below, stat_entry};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, RawDir, unlinkat};
use rustix::io::Errno;
use std::ffi::{CString, OsStr};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

/// Bytes of directory entries that are read at once.
const ENTRIES_BYTES: usize = 32 * 1024;
/// The longest path below a descriptor that is used; a tree may be deeper than the kernel takes paths. Bytes.
const BELOW_BYTES_MAX: usize = 2048;
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
        unlinkat(&parent, &name, AtFlags::empty()).call("unlinkat", &path)
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

    /// Removes a directory and everything in it. One that is not there is fine.
    ///
    /// # Errors
    /// [`super::Class::Invalid`] for what is no directory; what stands in the way of removing the rest.
    pub fn remove_directory(&self, text: &str) -> Result<(), FileError> {
        let path = self.path(text)?;
        let Some(node) = self.node_if_any(&path, Last::Keep)? else { return Ok(()) };
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
        let mut sweeps = 0;
        loop {
            match remove_entry(parent, name) {
                Ok(()) => return Ok(()),
                Err(Errno::NOTEMPTY) if sweeps < SWEEPS => {
                    let dir = open_below(parent, name.as_bytes(), DIRECTORY, Mode::empty());
                    self.empty(dir.call("openat2", path)?, path)?;
                    sweeps += 1;
                }
                Err(errno) => return Err(errno).call("unlinkat", path),
            }
        }
    }

    /// Removes what is in a directory.
    fn empty(&self, base: OwnedFd, path: &RootedPath) -> Result<(), FileError> {
        let failed = |call, below: &[u8]| {
            let path = path.join(OsStr::from_bytes(below));
            move |errno| FileError::Call { call, path: path.to_string(), errno }
        };
        // Directories still to be emptied, and those that have been.
        let mut stack = vec![(Vec::new(), false)];
        while let Some((below, emptied)) = stack.pop() {
            self.go_on()?;
            if emptied {
                let (parent, name) = split_below(&below);
                let parent = open_below(&base, parent, DIRECTORY, Mode::empty());
                let removed = parent.and_then(|parent| unlinkat(parent, name, AtFlags::REMOVEDIR));
                match removed {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(errno) => return Err(failed("unlinkat", &below)(errno)),
                }
            }
            let dir = match open_below(&base, &below, DIRECTORY, Mode::empty()) {
                Ok(dir) => dir,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => return Err(failed("openat2", &below)(errno)),
            };
            super::tree::refuse_kernel(&dir, path)?;
            if !below.is_empty() {
                stack.push((below.clone(), true));
            }
            for (name, is_dir) in names(&dir).map_err(failed("getdents64", &below))? {
                let mut full = below.clone();
                if !full.is_empty() {
                    full.push(b'/');
                }
                full.extend_from_slice(name.as_bytes());
                if is_dir && full.len() < BELOW_BYTES_MAX {
                    stack.push((full, false));
                } else if is_dir {
                    let name = OsStr::from_bytes(name.as_bytes());
                    self.remove_tree(&dir, name, &path.join(OsStr::from_bytes(&below)))?;
                } else {
                    match unlinkat(&dir, &name, AtFlags::empty()) {
                        Ok(()) | Err(Errno::NOENT) => {}
                        // It has become a directory meanwhile.
                        Err(Errno::ISDIR) => stack.push((full, false)),
                        Err(errno) => return Err(failed("unlinkat", &full)(errno)),
                    }
                }
            }
        }
        Ok(())
    }
}

/// Removes a file or an empty directory.
fn remove_entry(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlinkat(parent, name, AtFlags::REMOVEDIR),
        // What Linux answers without the right to unlink directories, which nobody has (unlink(2)).
        Err(Errno::PERM) if is_directory(parent, name) => unlinkat(parent, name, AtFlags::REMOVEDIR),
        done => done,
    }
}

fn is_directory(parent: &OwnedFd, name: &OsStr) -> bool {
    stat_entry(parent, name).is_ok_and(|stat| kind(&stat) == FileType::Directory)
}

fn names(dir: &OwnedFd) -> Result<Vec<(CString, bool)>, Errno> {
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
