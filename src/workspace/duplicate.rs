//! Copies an upper, for a session that goes on from where another is. The copy means to overlayfs what the original does:
//! whiteouts and all of its marks are carried over as they are.

use super::site::is_in;
use crate::files::copy::{self, Like, dress_exactly, failed_at};
use crate::files::error::{Call, FileError};
use crate::files::tree::{
    DIRECTORY, FileId, Node, identity, kind, open_below, permissions, split_below, stat, stat_entry,
};
use crate::files::walk::{BELOW_BYTES_MAX, GoOn, Order, Walk};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, linkat, mkdirat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Copies what is in a directory, and the directory's own attributes, into an empty one; the bytes of content. Messages
/// have paths below the two.
///
/// # Errors
/// When anything cannot be copied in full; what there is by then stays.
pub fn duplicate(from: BorrowedFd<'_>, to: BorrowedFd<'_>, go_on: &GoOn<'_>) -> Result<u64, FileError> {
    let to = open_below(to, b"", DIRECTORY, Mode::empty()).call("openat2", "/")?;
    let from = open_below(from, b"", DIRECTORY, Mode::empty()).call("openat2", "/")?;
    let mut copying = Copying { to, go_on, links: HashMap::new(), directories: vec![Vec::new()], bytes: 0 };
    let examine = |seen: crate::files::walk::Seen<'_>| stat_entry(seen.dir, seen.name).map(Some);
    let mut walk = Walk::new(from, Order::Names, usize::MAX, examine);
    while let Some(step) = walk.next(go_on) {
        let (below, stat) = step?;
        copying.leave_until(walk.base(), Some(&below))?;
        copying.copy(walk.base(), below, &stat)?;
    }
    copying.leave_until(walk.base(), None)?;
    Ok(copying.bytes)
}

/// A copy that is going on.
struct Copying<'a> {
    to: OwnedFd,
    go_on: &'a GoOn<'a>,
    /// Where the first name is of what has several.
    links: HashMap<FileId, Vec<u8>>,
    /// Those that the walk is in, from the root down.
    directories: Vec<Vec<u8>>,
    bytes: u64,
}

const LOOKUP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY);

impl Copying<'_> {
    fn copy(&mut self, from: &OwnedFd, below: Vec<u8>, stat: &Statx) -> Result<(), FileError> {
        let (parent, name) = split_below(&below);
        let path = shown(&below);
        let to = open_below(&self.to, parent, LOOKUP, Mode::empty()).call("openat2", &path)?;
        if kind(stat) == FileType::Directory {
            if below.len() >= BELOW_BYTES_MAX {
                return Err(FileError::invalid(path, "is nested too deeply to be copied"));
            }
            mkdirat(&to, name, Mode::RWXU).call("mkdirat", &path)?;
            self.directories.push(below);
            return Ok(());
        }
        let from = open_below(from, parent, LOOKUP, Mode::empty()).call("openat2", &path)?;
        let held = match copy::hold(&from, name) {
            // Gone since.
            Err(Errno::NOENT) => return Ok(()),
            held => held.call("openat", &path)?,
        };
        let node = Node { stat: crate::files::tree::stat(&held, &path)?, fd: held };
        if kind(&node.stat) != kind(stat) {
            return Ok(());
        }
        if node.stat.stx_nlink > 1 {
            if self.link(&node.stat, &to, name).call("linkat", &path)? {
                return Ok(());
            }
            self.links.insert(identity(&node.stat), below.clone());
        }
        let like = Like { mode: permissions(&node.stat), carries: &|_| true };
        let copied = copy::exactly(&node, &to, name, &like, self.go_on).map_err(failed_at(&path))?;
        self.bytes += copied.bytes;
        Ok(())
    }

    /// Gives what has been copied under another name this one; whether it could be.
    fn link(&self, stat: &Statx, to: &OwnedFd, name: &OsStr) -> Result<bool, Errno> {
        let Some(first) = self.links.get(&identity(stat)) else { return Ok(false) };
        let (first_dir, first_name) = split_below(first);
        let first_dir = open_below(&self.to, first_dir, LOOKUP, Mode::empty())?;
        match linkat(first_dir, first_name, to, name, AtFlags::empty()) {
            // overlayfs has one whiteout with very many names, which may be too many here.
            Err(Errno::MLINK) => Ok(false),
            done => done.map(|()| true),
        }
    }

    /// Ends with the directories that an entry is not in: filling one changes its times, and its mode may forbid it.
    fn leave_until(&mut self, from: &OwnedFd, below: Option<&[u8]>) -> Result<(), FileError> {
        while let Some(directory) =
            self.directories.pop_if(|dir| below.is_none_or(|below| !is_in(dir, below)))
        {
            (self.go_on)()?;
            let path = shown(&directory);
            let open = |base: &OwnedFd| open_below(base, &directory, DIRECTORY, Mode::empty());
            let to = open(&self.to).call("openat2", &path)?;
            let from = match open(from) {
                // Gone since.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                from => from.call("openat2", &path)?,
            };
            let stat = stat(&from, &path)?;
            let like = Like { mode: permissions(&stat), carries: &|_| true };
            dress_exactly(&from, &to, &stat, &like).map_err(failed_at(&path))?;
        }
        Ok(())
    }
}

fn shown(below: &[u8]) -> PathBuf {
    Path::new("/").join(OsStr::from_bytes(below))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::commit::tests::{CHANGES, LOWER, assert_same, facts};
    use crate::workspace::layer::is_portable;
    use crate::workspace::trial::{GO_ON, Overlay, run, set_attribute};
    use rustix::fd::AsFd;
    use std::fs::{self, File};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_of_an_upper_shows_the_same_over_the_same_lower() {
        let Some(mut overlay) = Overlay::new(LOWER) else { return };
        overlay.change(CHANGES);
        overlay.change("chmod 1751 .; chown 9:8 .; touch -d '2003-03-03 03:03:03.3' .");
        set_attribute(&overlay.upper().join("locked"), c"user.overlay.note", b"value");
        set_attribute(&overlay.upper().join("to-link"), c"trusted.overlay.note", b"value");
        let seen = facts(&overlay.merged());
        run(&overlay.path(""), "mkdir copy work2");
        let open = |name: &str| -> OwnedFd { File::open(overlay.path(name)).unwrap().into() };
        let bytes = duplicate(open("upper").as_fd(), open("copy").as_fd(), GO_ON).unwrap();
        assert!((300_000..500_000).contains(&bytes), "{bytes}");
        assert_same(&facts(&overlay.upper()), &facts(&overlay.path("copy")), "the upper itself");
        let mut marks = 0;
        for entry in ["", "again", "locked", "to-link", "file-to-dir", "keep", "keep/deep"] {
            let attributes = |tree: &str| {
                let held = rustix::fs::open(
                    overlay.path(tree).join(entry),
                    OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                );
                let held = held.unwrap();
                let names = crate::files::xattr::names(&held).unwrap();
                let mut all: Vec<_> = names
                    .into_iter()
                    .map(|name| (crate::files::xattr::value(&held, &name).unwrap(), name))
                    .collect();
                all.sort();
                all
            };
            marks += attributes("copy").iter().filter(|(_, name)| !is_portable(name)).count();
            assert_eq!(attributes("upper"), attributes("copy"), "{entry}");
        }
        assert!(marks > 4);
        assert!(fs::metadata(overlay.path("copy/sparse")).unwrap().blocks() < 100);
        overlay.show("copy", "work2").unwrap();
        assert_same(&seen, &facts(&overlay.merged()), "the copy, mounted");
    }

    #[test]
    fn a_copy_that_nobody_wants_any_more_ends() {
        let Some(overlay) = Overlay::new(LOWER) else { return };
        fs::create_dir(overlay.path("copy")).unwrap();
        let open = |name: &str| -> OwnedFd { File::open(overlay.path(name)).unwrap().into() };
        let error = duplicate(open("lower").as_fd(), open("copy").as_fd(), &|| Err(FileError::Cancelled));
        assert!(matches!(error, Err(FileError::Cancelled)));
    }
}
