//! Moving, as mv(1) does: by renaming, and by copying where the kernel cannot rename (`EXDEV`), which is between
//! mounts, and for directories in the lower of an overlay.
//!
//! A copy is made beside its destination under a passing name and renamed when it is complete. It has the modes,
//! owners, times, attributes, links and holes of the original, as far as the session may give them.

use super::copy;
use super::error::{Call, FileError};
use super::path::RootedPath;
use super::stage::{PARENT_MODE, random_name};
use super::tree::{
    FileId, Worker, identity, kind, open_below, refuse_kernel, rename, split_below, stat, stat_entry, unlink,
};
use super::walk::{Order, Walk};
use rustix::fd::OwnedFd;
use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Statx, accessat, linkat, mkdirat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

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
            return copy::entry(from_dir, from_name, source, to_dir, to_name, &|| self.go_on())
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
            copy::entry(&from_dir, name, &stat, &to_dir, name, &|| self.go_on())
                .map_err(|(call, errno)| at(call)(errno))?;
        }
        // Last, and from below: filling a directory changes its times, and its mode may forbid it.
        for below in directories.iter().rev() {
            self.go_on()?;
            let of = |base: &OwnedFd| open_below(base, below, super::tree::DIRECTORY, Mode::empty());
            let path = path.join(OsStr::from_bytes(below));
            let (from, to) = (of(walk.base()).call("openat2", &path)?, of(to).call("openat2", &path)?);
            copy::dress(&from, &to, &stat(&from, &path)?).call("fchmod", &path)?;
        }
        Ok(())
    }
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
