//! The writable layers of overlays.
//!
//! ```text
//! upper_root/                 mode 0700, locked by the execd that uses it
//!     <session id>/           one for each session with persistent overlays
//!         record.json         what a later execd has to know
//!         image               a file system with the folders below (image.rs), or else the folders themselves
//!         0/upper 0/work      one pair for each overlay
//!     .images/                images that are ready for use
//!     .trash/                 on its way out
//! ```
//!
//! Where uppers lie is decided once for a session (`home.rs`); all its persistent overlays share that place and its limit.
//! Whatever is not kept is moved to the trash (`trash.rs`), so that deleting a session answers at once, and an interrupted
//! removal is finished at the next start.

use super::home::{Home, Keeper, Limit, Tier};
use super::image::Images;
use super::record::Record;
use super::retained::Retained;
use super::session_uppers::{SessionUppers, Wanted};
use super::timestamp::Timestamp;
use super::trash::Trash;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};
use uuid::Uuid;

/// Between two looks for uppers that have been kept long enough, and at what all of them hold.
const TEND_INTERVAL: Duration = Duration::from_secs(1);
/// The pause after a measurement is so many times what that took.
const MEASURE_PAUSE: u32 = 9;
/// What has to be free where uppers are, or else the largest cannot be written to any more: this part, at most so many
/// bytes.
const FREE_PART: u64 = 50;
const FREE_BYTES: u64 = 1 << 30;
/// How long uppers are kept at least that a commit has been cut off in.
const HALF_COMMITTED_KEPT: Duration = Duration::from_secs(24 * 3600);
/// How long another execd may take to let go of `upper_root`, and between two looks.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(3);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// What all uppers are made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For the persistent overlays of one session; 0 bytes for none.
    pub persistent: Limit,
    /// For the others of one session.
    pub ephemeral: Limit,
}

/// All uppers.
#[derive(Debug)]
pub struct Uppers {
    pub(super) root: PathBuf,
    pub(super) limits: Limits,
    pub(super) images: Result<Arc<Images>, String>,
    directories: Result<(), String>,
    pub(super) memory: Result<(), String>,
    /// What all uppers held when last measured; bytes.
    used_bytes: AtomicU64,
    pub(super) trash: Trash,
    live: Mutex<Vec<Weak<SessionUppers>>>,
    retained: Mutex<BTreeMap<Uuid, Arc<Retained>>>,
    _lock: File,
}

/// Why a session has to be kept from writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Excess {
    /// It holds more than this.
    #[error("its uppers hold more than {} bytes or {} inodes", .0.bytes, .0.inodes)]
    OfSession(Limit),
    /// All hold more than this together, and it the most of them; bytes.
    #[error("all uppers hold more than {0} bytes together, and its own the most of them")]
    OfAll(u64),
    /// There is hardly any room where the uppers are, and it holds the most of them.
    #[error("the disk of all uppers is nearly full, and its own hold the most of them")]
    OfDisk,
}

/// A tier, and whether there is one of that kind.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Rung {
    /// Which.
    pub tier: Tier,
    /// Who sees to it that its limit is kept to.
    pub limited_by: Keeper,
    /// Whether it is used.
    pub available: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
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

/// Why kept uppers are not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Somebody reads or commits them.
    #[error("the uppers are in use")]
    InUse,
    /// The file system.
    #[error("remove the uppers")]
    Io(#[from] io::Error),
}

impl Uppers {
    /// Makes the directory if need be, locks it, finds out which tiers there are, and sorts what an earlier execd left
    /// into what is kept and what is removed.
    ///
    /// # Errors
    /// See [`UppersError`].
    pub fn open(root: &Path, limits: Limits, tiers: &[Tier]) -> Result<Arc<Self>, UppersError> {
        let failed = |error| UppersError::Io(root.into(), error);
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
        let root = root.canonicalize().map_err(failed)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        let lock = File::open(&root).map_err(failed)?;
        await_lock(&lock).map_err(|_| UppersError::InUse(root.clone()))?;
        let may = |tier| {
            let is_wanted = tiers.contains(&tier);
            is_wanted.then_some(()).ok_or_else(|| format!("{tier:?} is not among upper_tiers").to_lowercase())
        };
        let uppers = Arc::new(Self {
            limits,
            images: may(Tier::Image).and_then(|()| images(&root, limits)),
            directories: may(Tier::Directory).and_then(|()| directories(&root)),
            memory: Home::memory(limits.ephemeral).map(drop).map_err(|error| error.to_string()),
            used_bytes: AtomicU64::new(0),
            trash: Trash::open(&root).map_err(failed)?,
            live: Mutex::default(),
            retained: Mutex::default(),
            root,
            _lock: lock,
        });
        uppers.recover().map_err(failed)?;
        if let Ok(images) = &uppers.images {
            let images = Arc::clone(images);
            let thread = std::thread::Builder::new().name("images".into());
            thread.spawn(move || images.keep_ready()).map_err(failed)?;
        }
        let tended = Arc::downgrade(&uppers);
        let thread = std::thread::Builder::new().name("uppers".into());
        thread.spawn(move || keep_tending(&tended)).map_err(failed)?;
        Ok(uppers)
    }

    /// Which tiers there are, the preferred one first.
    pub fn ladder(&self) -> [Rung; 3] {
        let rung = |tier: Tier, state: Result<(), String>| Rung {
            tier,
            limited_by: tier.keeper(),
            available: state.is_ok(),
            reason: state.err(),
        };
        [
            rung(Tier::Image, self.images.as_ref().map(drop).map_err(Clone::clone)),
            rung(Tier::Directory, self.directories.clone()),
            rung(Tier::Memory, self.memory.clone()),
        ]
    }

    /// What all uppers held some seconds ago; bytes.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// What the persistent overlays of one session may hold, unless it asks for less.
    pub fn limit(&self) -> Limit {
        self.limits.persistent
    }

    /// Where they are, links resolved.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Has images made ready for the next sessions.
    pub fn refill(&self) {
        if let Ok(images) = &self.images {
            images.refill();
        }
    }

    /// Where the persistent uppers of such a session would lie.
    pub fn tier(&self, wanted: &Wanted<'_>) -> Tier {
        // overlayfs wants its layers apart (ELOOP).
        let apart = !wanted.lowers.iter().any(|lower| self.root.starts_with(lower));
        let directory = self.directories.is_ok() && apart;
        let is_limited = self.limits.persistent.bytes > 0 || wanted.limit.is_some();
        if self.images.is_ok() && !wanted.userns && (is_limited || !directory) {
            Tier::Image
        } else if directory {
            Tier::Directory
        } else {
            Tier::Memory
        }
    }

    /// Begins with the uppers of a session, which has none yet.
    pub fn session(self: &Arc<Self>, id: Uuid, wanted: &Wanted<'_>) -> Arc<SessionUppers> {
        let uppers = Arc::new(SessionUppers::new(Arc::clone(self), id, wanted));
        lock(&self.live).push(Arc::downgrade(&uppers));
        uppers
    }

    /// Sessions that hold more than they may and that nothing has stopped so far, and why. What is told was true at the
    /// last measurement.
    pub fn excesses(&self, total_max: u64) -> Vec<(Uuid, Excess)> {
        let live = self.live();
        let over = |uppers: &&Arc<SessionUppers>| {
            let (limit, used) = (uppers.limit_of_session(), uppers.used());
            let is_beyond = used.bytes > limit.bytes || used.inodes > limit.inodes;
            uppers.tier() == Tier::Directory && limit.bytes > 0 && is_beyond
        };
        let mut excesses: Vec<_> = live
            .iter()
            .filter(over)
            .map(|uppers| (uppers.id(), Excess::OfSession(uppers.limit_of_session())))
            .collect();
        let largest = |is_meant: &dyn Fn(Tier) -> bool| {
            let meant = live.iter().filter(|uppers| is_meant(uppers.tier()));
            meant.max_by_key(|uppers| uppers.used().bytes).map(|uppers| uppers.id())
        };
        if total_max > 0 && self.used_bytes() > total_max {
            let id = largest(&|tier| tier != Tier::Memory);
            excesses.extend(id.map(|id| (id, Excess::OfAll(total_max))));
        }
        // Images have room that the file system beneath may not have, and what is written to them then would be lost.
        if self.is_disk_full() {
            excesses.extend(largest(&|tier| tier == Tier::Image).map(|id| (id, Excess::OfDisk)));
        }
        excesses
    }

    fn is_disk_full(&self) -> bool {
        rustix::fs::statvfs(&self.root).is_ok_and(|stat| {
            let (size, free) = (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize);
            free < (size / FREE_PART).min(FREE_BYTES)
        })
    }

    fn live(&self) -> Vec<Arc<SessionUppers>> {
        let mut live = lock(&self.live);
        live.retain(|uppers| uppers.strong_count() > 0);
        live.iter().filter_map(Weak::upgrade).collect()
    }

    /// Finds out what everybody holds; how long that took.
    fn measure(&self) -> Duration {
        let began = Instant::now();
        let mut bytes = self.live().iter().map(|uppers| uppers.measure().bytes).sum::<u64>();
        bytes += self.retained().iter().map(|retained| retained.used_bytes()).sum::<u64>();
        self.used_bytes.store(bytes, Ordering::Relaxed);
        began.elapsed()
    }

    /// Those of sessions that have ended, by the time of their end.
    pub fn retained(&self) -> Vec<Arc<Retained>> {
        let mut all: Vec<_> = lock(&self.retained).values().cloned().collect();
        all.sort_by_cached_key(|retained| {
            let record = retained.record();
            (record.ended, record.session)
        });
        all
    }

    /// Those of one session that has ended.
    pub fn retained_of(&self, session: Uuid) -> Option<Arc<Retained>> {
        lock(&self.retained).get(&session).cloned()
    }

    /// Removes them.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn remove(&self, retained: &Retained) -> Result<(), RemoveError> {
        let mut is_removed = retained.in_use.try_write().map_err(|_| RemoveError::InUse)?;
        *is_removed = true;
        if lock(&self.retained).remove(&retained.record().session).is_some() {
            self.trash.take(&retained.folder)?;
        }
        Ok(())
    }

    fn recover(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name();
            if Trash::is_called(&name) || Images::is_called(&name) {
                continue;
            }
            let is_its_own = |record: &Record| name.to_str() == Some(&*record.session.to_string());
            let left = match Record::read(&entry.path()) {
                Ok(record) if is_its_own(&record) && (record.retain_seconds > 0 || record.committing) => {
                    self.retain(record, entry.path())
                }
                _ => self.trash.take(&entry.path()),
            };
            if let Err(error) = left {
                let path = entry.path();
                tracing::error!(path = %path.display(), %error, "leftover uppers can be neither kept nor removed");
            }
        }
        Ok(())
    }

    pub(super) fn retain(&self, mut record: Record, folder: PathBuf) -> io::Result<()> {
        if record.ended.is_none() {
            record.ended = Some(Timestamp::now());
            if record.committing {
                record.retain_seconds = record.retain_seconds.max(HALF_COMMITTED_KEPT.as_secs());
            }
            record.write(&folder)?;
        }
        let session = record.session;
        lock(&self.retained).insert(session, Arc::new(Retained::new(record, folder)));
        Ok(())
    }

    fn expire(&self) {
        let now = SystemTime::now();
        let expired = |retained: &Arc<Retained>| retained.record().expires().is_some_and(|at| at <= now);
        for retained in self.retained().iter().filter(|retained| expired(retained)) {
            let session = retained.record().session;
            match self.remove(retained) {
                Ok(()) => tracing::info!(%session, "the uppers of a session have been kept long enough"),
                // They are looked at again.
                Err(RemoveError::InUse) => {}
                Err(error) => tracing::error!(%session, %error, "kept uppers could not be removed"),
            }
        }
    }
}

impl Drop for Uppers {
    fn drop(&mut self) {
        if let Ok(images) = &self.images {
            images.stop();
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One that has been killed may still be on its way out.
fn await_lock(lock: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(LOCK_INTERVAL),
            done => return Ok(done?),
        }
    }
}

fn images(root: &Path, limits: Limits) -> Result<Arc<Images>, String> {
    // An image has to have a size, also where only those have one whose session asks for it.
    let usual = if limits.persistent.bytes == 0 { limits.ephemeral } else { limits.persistent };
    Images::open(root, usual).map(Arc::new).map_err(|error| error.to_string())
}

fn directories(root: &Path) -> Result<(), String> {
    const OVERLAYFS_SUPER_MAGIC: i64 = 0x794C_7630;
    let stat = rustix::fs::statfs(root).map_err(|errno| format!("statfs: {errno}"))?;
    if i128::from(stat.f_type) == i128::from(OVERLAYFS_SUPER_MAGIC) {
        return Err(format!(
            "{} is on overlayfs, which cannot hold an upper; mount a volume there",
            root.display()
        ));
    }
    Ok(())
}

/// Walking large trees takes long, so it happens beside the creation of sessions, which only look at the result.
fn keep_tending(uppers: &Weak<Uppers>) {
    let mut pause = TEND_INTERVAL;
    loop {
        std::thread::sleep(pause);
        let Some(uppers) = uppers.upgrade() else { return };
        uppers.expire();
        pause = (uppers.measure() * MEASURE_PAUSE).max(TEND_INTERVAL);
    }
}
