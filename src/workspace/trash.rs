//! What is on its way out: large trees are moved here in no time, and removed by a thread of their own.
//!
//! What is in an upper was made by code that nobody trusts: it may be nested deeper than any stack or path reaches.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

/// Its name below `upper_root`.
const TRASH: &str = ".trash";
/// How directories begin that were moved up in it; no session is called so.
const MOVED_PREFIX: &str = ".moved-";

/// The trash of an `upper_root`. An interrupted removal is finished after the next start.
#[derive(Debug)]
pub(super) struct Trash {
    folder: PathBuf,
    /// Rings when there is something in it.
    bell: mpsc::Sender<()>,
    /// What takes long to drop.
    drops: mpsc::Sender<Box<dyn Send>>,
}

impl Trash {
    pub(super) fn open(upper_root: &Path) -> io::Result<Self> {
        let folder = upper_root.join(TRASH);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let (bell, rung) = mpsc::channel();
        let _ = bell.send(());
        let emptied = folder.clone();
        let thread = std::thread::Builder::new().name("trash".into());
        thread.spawn(move || keep_emptying(&emptied, &rung))?;
        let (drops, dropped) = mpsc::channel::<Box<dyn Send>>();
        let thread = std::thread::Builder::new().name("drops".into());
        thread.spawn(move || dropped.into_iter().for_each(drop))?;
        Ok(Self { folder, bell, drops })
    }

    /// Whether this entry of `upper_root` is the trash.
    pub(super) fn is_called(name: &std::ffi::OsStr) -> bool {
        name == TRASH
    }

    /// Takes a file or directory away.
    ///
    /// # Errors
    /// Those of rename(2).
    pub(super) fn take(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        match fs::rename(path, self.folder.join(name)) {
            // One of that name is being removed already.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                fs::rename(path, self.folder.join(moved_name()))?;
            }
            done => done?,
        }
        let _ = self.bell.send(());
        Ok(())
    }

    /// Drops something where nobody waits for it, after what was given before.
    pub(super) fn drop_later(&self, thing: impl Send + 'static) {
        let _ = self.drops.send(Box::new(thing));
    }
}

fn moved_name() -> String {
    format!("{MOVED_PREFIX}{}", uuid::Uuid::new_v4())
}

/// Empties the trash whenever there is something in it, for as long as it is used.
fn keep_emptying(trash: &Path, rung: &mpsc::Receiver<()>) {
    while rung.recv().is_ok() {
        while rung.try_recv().is_ok() {}
        if let Err(error) = empty(trash) {
            tracing::error!(path = %trash.display(), %error, "the trash could not be emptied; tried again later");
        }
    }
}

/// Removes everything in a directory. A directory in a directory that is not empty is moved up into the trash itself
/// before, so neither paths nor this program's stack get deeper than two levels.
fn empty(trash: &Path) -> io::Result<()> {
    loop {
        let mut found = false;
        for entry in fs::read_dir(trash)? {
            let entry = entry?;
            found = true;
            if !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path())?;
                continue;
            }
            // A plain user cannot look into directories that say so, its own included (overlayfs' work has none).
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o700));
            for inner in fs::read_dir(entry.path())? {
                let inner = inner?;
                if !inner.file_type()?.is_dir() {
                    fs::remove_file(inner.path())?;
                } else if fs::remove_dir(inner.path()).is_err() {
                    let _ = fs::set_permissions(inner.path(), fs::Permissions::from_mode(0o700));
                    fs::rename(inner.path(), trash.join(moved_name()))?;
                }
            }
            fs::remove_dir(entry.path())?;
        }
        if !found {
            return Ok(());
        }
    }
}
