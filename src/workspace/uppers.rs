//! The writable layers of persistent overlays: one directory per session below `upper_root`.
//!
//! ```text
//! upper_root/                 mode 0700, locked by the execd that uses it
//!     <session id>/0/upper    one pair per overlay of the session
//!     <session id>/0/work
//!     .trash/                 on its way out
//! ```
//!
//! Removing is a rename into the trash and then a walk, so that however large an upper is, deleting a session
//! answers at once and an interrupted removal is finished at the next start.

use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

const TRASH: &str = ".trash";
/// Between two measurements of what all uppers hold.
const MEASURE_INTERVAL: Duration = Duration::from_secs(5);

/// The directory of all uppers.
#[derive(Debug)]
pub struct Uppers {
    root: PathBuf,
    /// Whether directories here can be the upper of an overlay at all; not on overlayfs (a container's own
    /// root file system), where sessions then use a tmpfs.
    usable: bool,
    /// What all uppers held when last measured; bytes.
    used_bytes: AtomicU64,
    _lock: File,
}

/// The uppers of one session; removed when dropped.
#[derive(Debug)]
pub struct SessionUppers {
    uppers: Arc<Uppers>,
    name: String,
    count: usize,
}

/// One upper and its work directory.
#[derive(Debug)]
pub struct UpperPaths {
    /// `upperdir=`
    pub upper: PathBuf,
    /// `workdir=`
    pub work: PathBuf,
}

/// Why `upper_root` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UppersError {
    /// Another execd uses it.
    #[error("{} is in use by another execd; give each its own upper_root", .0.display())]
    InUse(PathBuf),
    /// It cannot be made or opened.
    #[error("prepare {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

impl Uppers {
    /// Makes the directory if need be, locks it, and removes what an earlier execd left.
    ///
    /// # Errors
    /// See [`UppersError`].
    pub fn open(root: &Path) -> Result<Arc<Self>, UppersError> {
        let failed = |error| UppersError::Io(root.into(), error);
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
        let root = root.canonicalize().map_err(failed)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        let lock = File::open(&root).map_err(failed)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| UppersError::InUse(root.clone()))?;
        let usable = !is_on_overlayfs(&root);
        let uppers = Arc::new(Self { usable, root, used_bytes: AtomicU64::new(0), _lock: lock });
        uppers.remove_leftovers().map_err(failed)?;
        let measured = Arc::downgrade(&uppers);
        std::thread::Builder::new()
            .name("upper-usage".into())
            .spawn(move || keep_measuring(&measured))
            .map_err(failed)?;
        Ok(uppers)
    }

    /// What all uppers held some seconds ago; bytes.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Where they are, links resolved.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether overlays can have their upper here.
    pub fn usable(&self) -> bool {
        self.usable
    }

    /// Starts a session's directory.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn session(self: &Arc<Self>, name: &str) -> io::Result<SessionUppers> {
        DirBuilder::new().mode(0o700).create(self.root.join(name))?;
        Ok(SessionUppers { uppers: Arc::clone(self), name: name.into(), count: 0 })
    }

    fn remove_leftovers(&self) -> io::Result<()> {
        let trash = self.root.join(TRASH);
        DirBuilder::new().recursive(true).mode(0o700).create(&trash)?;
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if entry.file_name() != TRASH {
                fs::rename(entry.path(), trash.join(entry.file_name()))?;
            }
        }
        // A large upper must not hold up the start.
        std::thread::Builder::new().name("trash".into()).spawn(move || empty(&trash)).map(drop)
    }
}

impl SessionUppers {
    /// Makes one more upper, whose root has mode and owner of `lower`, since an overlay's root shows them.
    ///
    /// # Errors
    /// Those of mkdir(2) and chown(2).
    pub fn allocate(&mut self, lower: &Path) -> io::Result<UpperPaths> {
        let parent = self.uppers.root.join(&self.name).join(self.count.to_string());
        self.count += 1;
        let paths = UpperPaths { upper: parent.join("upper"), work: parent.join("work") };
        for dir in [&paths.upper, &paths.work] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let lower = fs::metadata(lower)?;
        // A plain user can only have a lower of another owner mapped as it is; the upper then stays its own.
        match chown(&paths.upper, Some(lower.uid()), Some(lower.gid())) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
            _ => {}
        }
        fs::set_permissions(&paths.upper, fs::Permissions::from_mode(lower.mode() & 0o7777))?;
        Ok(paths)
    }
}

impl Drop for SessionUppers {
    fn drop(&mut self) {
        let trash = self.uppers.root.join(TRASH).join(&self.name);
        let removed =
            fs::rename(self.uppers.root.join(&self.name), &trash).and_then(|()| fs::remove_dir_all(&trash));
        if let Err(error) = removed {
            tracing::error!(session = self.name, %error, "an upper could not be removed; tried again at the next start");
        }
    }
}

/// Walking large trees takes long, so it happens beside the creation of sessions, which only look at the result.
fn keep_measuring(uppers: &Weak<Uppers>) {
    loop {
        std::thread::sleep(MEASURE_INTERVAL);
        let Some(uppers) = uppers.upgrade() else { return };
        uppers.used_bytes.store(tree_bytes(&uppers.root), Ordering::Relaxed);
    }
}

/// Bytes allocated below `dir`; what vanishes meanwhile does not count.
fn tree_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => tree_bytes(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

fn empty(trash: &Path) {
    let entries = fs::read_dir(trash).into_iter().flatten().flatten();
    for entry in entries {
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::error!(path = %entry.path().display(), %error, "a leftover upper could not be removed");
        }
    }
}

fn is_on_overlayfs(path: &Path) -> bool {
    const OVERLAYFS_SUPER_MAGIC: i64 = 0x794C_7630;
    rustix::fs::statfs(path).is_ok_and(|stat| i128::from(stat.f_type) == i128::from(OVERLAYFS_SUPER_MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uppers_look_like_their_lower_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let lower = dir.path().join("lower");
        fs::create_dir(&lower).unwrap();
        fs::set_permissions(&lower, fs::Permissions::from_mode(0o1751)).unwrap();
        let root = dir.path().join("uppers");
        let uppers = Uppers::open(&root).unwrap();
        assert!(matches!(Uppers::open(&root), Err(UppersError::InUse(_))));
        let mut session = uppers.session("one").unwrap();
        let paths = session.allocate(&lower).unwrap();
        assert_eq!(fs::metadata(&paths.upper).unwrap().mode() & 0o7777, 0o1751);
        assert_ne!(session.allocate(&lower).unwrap().upper, paths.upper);
        drop(session);
        let left = || fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(left(), [TRASH]);
        std::mem::forget(uppers.session("crashed").unwrap());
        drop(uppers);
    }

    #[test]
    fn what_a_dead_execd_left_is_removed_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("dead/0/upper/x")).unwrap();
        fs::create_dir_all(dir.path().join(".trash/older/0/upper")).unwrap();
        Uppers::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let trash = dir.path().join(TRASH);
        for _ in 0..500 {
            if fs::read_dir(&trash).unwrap().count() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the trash is still full");
    }
}
