//! Removing trees of a lower. They may be nested deeper than any stack or path reaches: a directory in a directory that is
//! not empty is moved up before, so nothing here gets deeper than two levels.

use crate::files::copy::hold;
use crate::files::error::{Call, FileError};
use crate::files::remove::names;
use crate::files::stage::random_name;
use crate::files::tree::{DIRECTORY, open_below, proc_path, rename, unlink};
use crate::files::walk::GoOn;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Removes an entry of a directory, whatever it is; nothing is fine. `path` is what messages call it.
pub(super) fn clear(parent: &OwnedFd, name: &OsStr, path: &Path, go_on: &GoOn<'_>) -> Result<(), FileError> {
    match remove(parent, name) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        done => return done.call("unlinkat", path),
    }
    let top = open(parent, name).call("openat2", path)?;
    while sweep(&top, path, go_on)? {}
    remove(parent, name).call("unlinkat", path)
}

/// Removes what is in a directory, and moves up what cannot be removed yet; whether there was anything.
fn sweep(top: &OwnedFd, path: &Path, go_on: &GoOn<'_>) -> Result<bool, FileError> {
    let mut found = false;
    // Opened anew, since a descriptor remembers how far it has been read.
    let listing = open_below(top, b"", DIRECTORY, Mode::empty()).call("openat2", path)?;
    for (name, _) in names(&listing).call("getdents64", path)? {
        go_on()?;
        found = true;
        let name = os(&name);
        match remove(top, name) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            done => {
                done.call("unlinkat", path)?;
                continue;
            }
        }
        let inner = open(top, name).call("openat2", path)?;
        for (name, _) in names(&inner).call("getdents64", path)? {
            go_on()?;
            match remove(&inner, os(&name)) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    rename(&inner, os(&name), top, random_name()).call("renameat", path)?;
                }
                done => done.call("unlinkat", path)?,
            }
        }
        match remove(top, name) {
            // Somebody goes on filling it; the next sweep finds it again.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            done => done.call("unlinkat", path)?,
        }
    }
    Ok(found)
}

fn os(name: &CStr) -> &OsStr {
    OsStr::from_bytes(name.to_bytes())
}

/// Removes a file or an empty directory.
fn remove(dir: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match unlink(dir, name, AtFlags::empty()) {
        // The second is what POSIX has for directories, and what who may do nothing else gets as well.
        Err(denied @ (Errno::ISDIR | Errno::PERM)) => match unlink(dir, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTDIR) => Err(denied),
            Err(Errno::NOENT) => Ok(()),
            done => done,
        },
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}

/// Opens a directory that is to go; its owner may forbid himself to look into it.
fn open(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    match open_below(parent, name.as_bytes(), DIRECTORY, Mode::empty()) {
        Err(Errno::ACCESS) => {
            rustix::fs::chmod(proc_path(&hold(parent, name)?), Mode::RWXU)?;
            open_below(parent, name.as_bytes(), DIRECTORY, Mode::empty())
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tree::stat_entry;
    use rustix::fs::mkdirat;
    use std::fs::File;

    #[test]
    fn what_no_path_reaches_is_removed_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("tree/wide/x")).unwrap();
        std::fs::write(dir.path().join("canary"), "").unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("tree/wide/link")).unwrap();
        let base: OwnedFd = File::open(dir.path()).unwrap().into();
        let mut deepest = open_below(&base, b"tree", DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..5000 {
            mkdirat(&deepest, "d", Mode::from(0o755)).unwrap();
            deepest = open_below(&deepest, b"d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(deepest);
        clear(&base, OsStr::new("tree"), Path::new("/tree"), &|| Ok(())).unwrap();
        assert_eq!(stat_entry(&base, "tree").unwrap_err(), Errno::NOENT);
        assert!(dir.path().join("canary").exists());
        clear(&base, OsStr::new("tree"), Path::new("/tree"), &|| Ok(())).unwrap();
    }
}
