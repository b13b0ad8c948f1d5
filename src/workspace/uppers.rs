//! The writable layers of persistent overlays: one directory per session below `upper_root`.
//!
//! ```text
//! upper_root/                 mode 0700, locked by the execd that uses it
//!     <session id>/0/upper    one pair per overlay of the session
//!     <session id>/0/work
//!     .trash/                 on its way out
//! ```
//!
//! Removing is a rename into the trash, which one thread empties, so that however large an upper is, deleting a session
//! answers at once and an interrupted removal is finished at the next start. What is in an upper was made by code that
//! nobody trusts: it may be nested deeper than any stack or path reaches.

use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;

const TRASH: &str = ".trash";
/// How directories begin that were moved up in it; no session is called so.
const MOVED_PREFIX: &str = ".moved-";
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
    /// Rings when there is something in the trash.
    trash: mpsc::Sender<()>,
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
        let (trash, rung) = mpsc::channel();
        let uppers = Arc::new(Self { usable, root, used_bytes: AtomicU64::new(0), trash, _lock: lock });
        uppers.remove_leftovers().map_err(failed)?;
        let folder = uppers.root.join(TRASH);
        std::thread::Builder::new()
            .name("trash".into())
            .spawn(move || keep_emptying(&folder, &rung))
            .map_err(failed)?;
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
        let _ = self.trash.send(());
        Ok(())
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
        match fs::rename(self.uppers.root.join(&self.name), &trash) {
            Ok(()) => drop(self.uppers.trash.send(())),
            Err(error) => {
                tracing::error!(session = self.name, %error, "an upper could not be removed; tried again at the next start");
            }
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

/// Bytes allocated below `dir`; what vanishes meanwhile does not count, nor what lies deeper than a path reaches.
fn tree_bytes(dir: &Path) -> u64 {
    let mut bytes = 0;
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => dirs.push(entry.path()),
                Ok(metadata) => bytes += metadata.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    bytes
}

/// Empties the trash whenever there is something in it, for as long as there are uppers.
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
                    let up = trash.join(format!("{MOVED_PREFIX}{}", uuid::Uuid::new_v4()));
                    fs::rename(inner.path(), up)?;
                }
            }
            fs::remove_dir(entry.path())?;
        }
        if !found {
            return Ok(());
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
    fn an_upper_nested_beyond_all_paths_is_removed() {
        use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
        let dir = tempfile::tempdir().unwrap();
        let uppers = Uppers::open(dir.path()).unwrap();
        let mut session = uppers.session("deep").unwrap();
        let paths = session.allocate(Path::new("/")).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut deepest = openat(CWD, &paths.upper, flags, Mode::empty()).unwrap();
        for _ in 0..20_000 {
            mkdirat(&deepest, "d", Mode::from(0o755)).unwrap();
            deepest = openat(&deepest, "d", flags, Mode::empty()).unwrap();
        }
        drop((deepest, session));
        let trash = dir.path().join(TRASH);
        for _ in 0..2000 {
            if fs::read_dir(&trash).unwrap().count() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the trash is still full");
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
