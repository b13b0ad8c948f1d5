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

use super::clear::clear;
use super::duplicate::duplicate;
use super::home::{Home, Keeper, Limit, Place, Tier, Usage, open_directory, tree_usage};
use super::image::{Image, Images};
use super::layer::{Layer, Marks};
use super::record::{Record, RecordedOverlay};
use super::timestamp::Timestamp;
use super::trash::Trash;
use crate::files::FileError;
use execd_init_shim::messages::{HeldUpper, Upper};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Uid, chmodat, chownat, flock, mkdirat,
    openat, openat2,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
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
/// The file of an image in a session's folder.
const IMAGE: &str = "image";
/// What the names of folders end in that have taken the place of others.
const RENEWED: &str = "+";
const UPPER: &str = "upper";
const WORK: &str = "work";

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
    root: PathBuf,
    limits: Limits,
    images: Result<Arc<Images>, String>,
    directories: Result<(), String>,
    memory: Result<(), String>,
    /// What all uppers held when last measured; bytes.
    used_bytes: AtomicU64,
    trash: Trash,
    live: Mutex<Vec<Weak<SessionUppers>>>,
    retained: Mutex<BTreeMap<Uuid, Arc<Retained>>>,
    _lock: File,
}

/// What a session asks of its uppers.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Below the configured one.
    pub limit: Option<Limit>,
    /// How long the persistent ones are kept after the session's end.
    pub retain: Duration,
    /// The lowers of its persistent overlays.
    pub lowers: &'a [&'a Path],
    /// Whether its overlays are mounted in a user namespace, which only init can do.
    pub userns: bool,
}

/// One overlay of a session.
#[derive(Debug, Clone, Copy)]
pub struct Overlay<'a> {
    /// Where it is mounted inside.
    pub dest: &'a Path,
    /// The host's directory, links resolved.
    pub lower: &'a Path,
    /// Whether its upper may outlive the session's processes.
    pub persist: bool,
}

/// The uppers of one session; removed, or left to be kept, when dropped.
#[derive(Debug)]
pub struct SessionUppers {
    uppers: Arc<Uppers>,
    id: Uuid,
    tier: Tier,
    /// What the persistent ones held when last measured.
    used: Mutex<Usage>,
    wanted_limit: Option<Limit>,
    userns: bool,
    contents: Mutex<Contents>,
}

#[derive(Debug)]
struct Contents {
    record: Record,
    persistent: Option<Home>,
    ephemeral: Option<Home>,
    made: Vec<Made>,
}

/// An upper that has been made.
#[derive(Debug)]
struct Made {
    /// Of the folder.
    name: String,
    persist: bool,
    /// Has the directories `upper` and `work`; `None` when init makes it, unseen.
    folder: Option<Arc<OwnedFd>>,
    /// `O_PATH`
    lower: OwnedFd,
    dest: PathBuf,
    marks: Marks,
}

/// Empty uppers that wait to take the place of others.
#[derive(Debug)]
pub struct Renewal {
    folders: Vec<(String, Arc<OwnedFd>)>,
}

impl Renewal {
    /// The one for an overlay, by its number.
    pub fn upper(&self, index: usize) -> Option<Upper> {
        self.folders.get(index).map(|(_, folder)| Upper::Held(HeldUpper(Arc::clone(folder))))
    }
}

/// Uppers of a session that has ended.
#[derive(Debug)]
pub struct Retained {
    record: Mutex<Record>,
    folder: PathBuf,
    /// Held for writing by whoever removes them or changes their lowers; whether they have been removed.
    in_use: RwLock<bool>,
    open: Mutex<Weak<RetainedLayers>>,
}

/// The layers of a session that has ended, in reach.
#[derive(Debug)]
pub struct RetainedLayers {
    /// In the order of the record.
    pub layers: Vec<Layer>,
    /// The session's folder, where journals go.
    pub folder: OwnedFd,
    _home: Home,
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
        let tier = self.tier(wanted);
        let limit = wanted.limit.unwrap_or(self.limits.persistent);
        let record = Record::new(id, tier, limit, wanted.retain.as_secs());
        let contents = Contents { record, persistent: None, ephemeral: None, made: Vec::new() };
        let uppers = Arc::new(SessionUppers {
            uppers: Arc::clone(self),
            id,
            tier,
            wanted_limit: wanted.limit,
            userns: wanted.userns,
            used: Mutex::default(),
            contents: Mutex::new(contents),
        });
        lock(&self.live).push(Arc::downgrade(&uppers));
        uppers
    }

    /// Sessions that hold more than they may and that nothing has stopped so far, and why. What is told was true at the
    /// last measurement.
    pub fn excesses(&self, total_max: u64) -> Vec<(Uuid, Excess)> {
        let live = self.live();
        let over = |uppers: &&Arc<SessionUppers>| {
            let (limit, used) = (uppers.limit(true), uppers.used());
            let is_beyond = used.bytes > limit.bytes || used.inodes > limit.inodes;
            uppers.tier == Tier::Directory && limit.bytes > 0 && is_beyond
        };
        let mut excesses: Vec<_> = live
            .iter()
            .filter(over)
            .map(|uppers| (uppers.id, Excess::OfSession(uppers.limit(true))))
            .collect();
        let largest = |is_meant: &dyn Fn(Tier) -> bool| {
            let meant = live.iter().filter(|uppers| is_meant(uppers.tier));
            meant.max_by_key(|uppers| uppers.used().bytes).map(|uppers| uppers.id)
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
        let mut bytes = 0;
        for uppers in self.live() {
            let usage = uppers.measure();
            *lock(&uppers.used) = usage;
            bytes += usage.bytes;
        }
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

    fn retain(&self, mut record: Record, folder: PathBuf) -> io::Result<()> {
        if record.ended.is_none() {
            record.ended = Some(Timestamp::now());
            if record.committing {
                record.retain_seconds = record.retain_seconds.max(HALF_COMMITTED_KEPT.as_secs());
            }
            record.write(&folder)?;
        }
        let session = record.session;
        let record = Mutex::new(record);
        let retained = Retained { record, folder, in_use: RwLock::default(), open: Mutex::default() };
        lock(&self.retained).insert(session, Arc::new(retained));
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

impl SessionUppers {
    /// Makes one more upper, whose root has mode and owner of the lower, since an overlay's root shows them.
    ///
    /// # Errors
    /// What goes wrong, above all no room.
    pub fn allocate(&self, overlay: &Overlay<'_>) -> io::Result<Upper> {
        let mut contents = lock(&self.contents);
        let resolve = ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lower = openat2(CWD, overlay.lower, flags, Mode::empty(), resolve)?;
        let marks = if self.userns { Marks::User } else { Marks::Trusted };
        let name = contents.made.len().to_string();
        let (folder, upper) = if self.is_made_by_init(overlay.persist) {
            let Limit { bytes, inodes } = self.limit(overlay.persist);
            (None, Upper::Tmpfs { bytes_max: bytes, inodes_max: inodes })
        } else {
            let home = self.home(&mut contents, overlay.persist)?;
            let folder = Arc::new(make_pair(home, &name, &lower)?);
            let upper = if self.userns {
                let pair = self.folder(&contents.record).join(&name);
                Upper::Directory { upper: pair.join(UPPER), work: pair.join(WORK) }
            } else {
                Upper::Held(HeldUpper(Arc::clone(&folder)))
            };
            (Some(folder), upper)
        };
        if overlay.persist && self.tier != Tier::Memory {
            let recorded = RecordedOverlay {
                dest: overlay.dest.into(),
                lower: overlay.lower.into(),
                folder: name.clone(),
                marks,
            };
            contents.record.overlays.push(recorded);
            contents.record.write(&self.folder(&contents.record))?;
        }
        let Overlay { dest, persist, .. } = *overlay;
        contents.made.push(Made { name, persist, folder, lower, dest: dest.into(), marks });
        Ok(upper)
    }

    /// Makes empty uppers to take the place of those there are.
    ///
    /// # Errors
    /// What goes wrong, above all no room.
    pub fn renew(&self) -> io::Result<Renewal> {
        let contents = lock(&self.contents);
        let renew = |made: &Made| {
            let home = if made.persist { &contents.persistent } else { &contents.ephemeral };
            let home = home.as_ref().ok_or_else(|| io::Error::other("the uppers are out of reach"))?;
            let name = format!("{}{RENEWED}", made.name);
            Ok((name.clone(), Arc::new(make_pair(home, &name, &made.lower)?)))
        };
        Ok(Renewal { folders: contents.made.iter().map(renew).collect::<io::Result<_>>()? })
    }

    /// Takes them, and removes the old ones, which nothing may be mounted of any more.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn adopt(&self, renewal: Renewal) -> Result<(), FileError> {
        let own = |error: io::Error| FileError::Own(format!("renew the uppers: {error}"));
        let mut contents = lock(&self.contents);
        let Contents { record, persistent, ephemeral, made, .. } = &mut *contents;
        // Changes of the lowers are seen from now on.
        record.since = Timestamp::now();
        let mut gone = Vec::new();
        for (made, (name, folder)) in made.iter_mut().zip(renewal.folders) {
            if let Some(overlay) = record.overlays.iter_mut().find(|overlay| overlay.folder == made.name) {
                overlay.folder.clone_from(&name);
            }
            made.folder = Some(folder);
            gone.push((made.persist, std::mem::replace(&mut made.name, name)));
        }
        if !record.overlays.is_empty() {
            record.write(&self.folder(record)).map_err(own)?;
        }
        for (persist, name) in gone {
            let Some(home) = (if persist { &*persistent } else { &*ephemeral }) else { continue };
            let root = open_directory(home.root(), ".").map_err(own)?;
            clear(&root, OsStr::new(&name), Path::new(&name), &|| Ok(()))?;
        }
        Ok(())
    }

    /// How many overlays there are.
    pub fn count(&self) -> usize {
        lock(&self.contents).made.len()
    }

    /// The number of the overlay that is mounted there.
    pub fn index_of(&self, dest: &Path) -> Option<usize> {
        lock(&self.contents).made.iter().position(|made| made.dest == dest)
    }

    /// Where its persistent overlays are mounted.
    pub fn dests(&self) -> Vec<PathBuf> {
        let contents = lock(&self.contents);
        contents.made.iter().filter(|made| made.persist).map(|made| made.dest.clone()).collect()
    }

    /// Where the persistent ones lie.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// What the persistent ones may hold.
    pub fn limit_of_session(&self) -> Limit {
        self.limit(true)
    }

    /// What the persistent ones hold; in directories, what they held some seconds ago.
    pub fn used(&self) -> Usage {
        match &lock(&self.contents).persistent {
            Some(home) if home.tier() != Tier::Directory => home.usage(),
            _ => *lock(&self.used),
        }
    }

    /// What the persistent ones hold; a walk, for directories.
    fn measure(&self) -> Usage {
        let walk = {
            let contents = lock(&self.contents);
            match &contents.persistent {
                None => return Usage::default(),
                Some(Home { place: Place::Directory(_, path), .. }) => path.clone(),
                Some(home) => return home.usage(),
            }
        };
        tree_usage(&walk)
    }

    /// Since when there is the session.
    pub fn since(&self) -> Timestamp {
        lock(&self.contents).record.since
    }

    /// The layers of its overlays, those that can be reached from outside.
    ///
    /// # Errors
    /// When one cannot be opened any more.
    pub fn layers(&self) -> io::Result<Vec<Layer>> {
        let contents = lock(&self.contents);
        let reachable = contents.made.iter().filter_map(|made| Some((made, made.folder.as_ref()?)));
        reachable
            .map(|(made, folder)| {
                Ok(Layer {
                    dest: made.dest.clone(),
                    upper: open_directory(folder.as_fd(), UPPER)?,
                    lower: open_lower(&made.lower)?,
                    marks: made.marks,
                })
            })
            .collect()
    }

    /// Whether the layers of all its overlays can be reached from outside.
    pub fn are_reachable(&self) -> bool {
        lock(&self.contents).made.iter().all(|made| made.folder.is_some())
    }

    /// Makes these uppers, which are still empty, copies of those of another session with the same overlays.
    ///
    /// # Errors
    /// What goes wrong, above all no room.
    pub fn fill_from(&self, source: &Self) -> Result<(), FileError> {
        let own = |error: io::Error| FileError::Own(format!("open the layers: {error}"));
        let from = source.layers().map_err(own)?;
        let to = self.layers().map_err(own)?;
        for (from, to) in from.iter().zip(&to) {
            duplicate(from.upper.as_fd(), to.upper.as_fd(), &|| Ok(()))?;
        }
        // What the source has not seen, its copy has not either.
        let since = source.since();
        let mut contents = lock(&self.contents);
        contents.record.since = since;
        if contents.record.overlays.is_empty() {
            return Ok(());
        }
        contents.record.write(&self.folder(&contents.record)).map_err(own)
    }

    /// Drops something where nobody waits for it, but before the uppers: what is mounted of them may take long to go.
    pub fn drop_before(&self, thing: impl Send + 'static) {
        self.uppers.trash.drop_later(thing);
    }

    /// Gives up what nobody wants any more, soon; whatever still runs in the session finds its files broken. Without this,
    /// dropping a mount of it would write everything out first.
    pub fn abandon(&self) {
        let contents = lock(&self.contents);
        if let (0, Some(Home { place: Place::Image(image), .. })) =
            (contents.record.retain_seconds, &contents.persistent)
            && let Ok(root) = open_directory(&image.root, ".")
        {
            self.uppers.trash.drop_later(Abandoned(root));
        }
    }

    /// A folder of the host for what is to be remembered about these uppers, and for as long.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn notes(&self) -> io::Result<OwnedFd> {
        let folder = self.folder(&lock(&self.contents).record);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        open_directory(CWD, &folder)
    }

    /// Notes that the lowers are being changed, or no longer are: uppers that are half in their lowers are kept if this
    /// execd dies, so that somebody can go on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn note_commit(&self, is_going_on: bool) -> io::Result<()> {
        let mut contents = lock(&self.contents);
        if contents.record.overlays.is_empty() {
            // Nothing of it is there to go on with.
            return Ok(());
        }
        contents.record.committing = is_going_on;
        contents.record.write(&self.folder(&contents.record))
    }

    fn folder(&self, record: &Record) -> PathBuf {
        self.uppers.root.join(record.session.to_string())
    }

    fn is_made_by_init(&self, persist: bool) -> bool {
        let in_memory = !persist || self.tier == Tier::Memory;
        in_memory && (self.userns || self.uppers.memory.is_err())
    }

    fn limit(&self, persist: bool) -> Limit {
        let limits = &self.uppers.limits;
        if !persist {
            return limits.ephemeral;
        }
        let limit = self.wanted_limit.unwrap_or(limits.persistent);
        // Memory is never without a limit, and an image has to have a size.
        if limit.bytes == 0 && self.tier != Tier::Directory { limits.ephemeral } else { limit }
    }

    fn home<'a>(&self, contents: &'a mut Contents, persist: bool) -> io::Result<&'a Home> {
        let record = &contents.record;
        let place = if persist { &mut contents.persistent } else { &mut contents.ephemeral };
        if let Some(home) = place {
            return Ok(home);
        }
        let limit = self.limit(persist);
        let home = match (persist, self.tier) {
            (false, _) | (true, Tier::Memory) => Home::memory(limit)?,
            (true, Tier::Directory) => Home::directory(&self.make_folder(record)?)?,
            (true, Tier::Image) => {
                let images =
                    self.uppers.images.as_ref().map_err(|reason| io::Error::other(reason.clone()))?;
                let image = images.take(limit, &self.make_folder(record)?.join(IMAGE))?;
                Home::image(image)?
            }
        };
        Ok(place.insert(home))
    }

    fn make_folder(&self, record: &Record) -> io::Result<PathBuf> {
        let folder = self.folder(record);
        DirBuilder::new().mode(0o700).create(&folder)?;
        Ok(folder)
    }
}

impl Drop for SessionUppers {
    fn drop(&mut self) {
        self.abandon();
        let contents = self.contents.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (persistent, ephemeral) = (contents.persistent.take(), contents.ephemeral.take());
        // A descriptor of a file system keeps it from going.
        contents.made.clear();
        let trash = &self.uppers.trash;
        trash.drop_later(ephemeral);
        let record = contents.record.clone();
        let session = record.session;
        let folder = self.uppers.root.join(session.to_string());
        let Some(home) = persistent else {
            // Only there if something had to be remembered.
            if folder.exists()
                && let Err(error) = trash.take(&folder)
            {
                tracing::error!(%session, %error, "notes about uppers could not be removed; tried again at the next start");
            }
            return;
        };
        let is_kept = record.retain_seconds > 0 && home.tier() != Tier::Memory;
        let left = match home.place {
            Place::Memory(root) => {
                trash.drop_later(root);
                // Only there if something had to be remembered.
                if folder.exists() { trash.take(&folder) } else { Ok(()) }
            }
            place => {
                trash.drop_later(place);
                if is_kept { self.uppers.retain(record, folder) } else { trash.take(&folder) }
            }
        };
        if let Err(error) = left {
            tracing::error!(%session, %error, "uppers could not be removed or kept; tried again at the next start");
        }
    }
}

/// The root of an image whose content nobody wants any more.
struct Abandoned(OwnedFd);

impl Drop for Abandoned {
    fn drop(&mut self) {
        if let Err(error) = execd_sys::abandon_file_system(self.0.as_fd()) {
            tracing::debug!(%error, "an image could not be given up at once");
        }
    }
}

impl Retained {
    /// What is known of them.
    pub fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// Keeps them there while they are read; `None` while somebody changes their lowers, or when they are gone.
    pub fn read(&self) -> Option<RwLockReadGuard<'_, bool>> {
        self.in_use.try_read().ok().filter(|is_removed| !**is_removed)
    }

    /// Keeps everybody else away from them; `None` while somebody reads them, or when they are gone.
    pub fn write(&self) -> Option<RwLockWriteGuard<'_, bool>> {
        self.in_use.try_write().ok().filter(|is_removed| !**is_removed)
    }

    /// What they take; bytes. A walk, for directories.
    pub fn used_bytes(&self) -> u64 {
        tree_usage(&self.folder).bytes
    }

    /// Notes that the lowers are being changed, or no longer are.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn note_commit(&self, is_going_on: bool) -> io::Result<()> {
        let mut record = lock(&self.record);
        record.committing = is_going_on;
        record.write(&self.folder)
    }

    /// Brings the layers into reach. Blocks.
    ///
    /// # Errors
    /// What goes wrong, above all a lower that is gone.
    pub fn layers(&self) -> io::Result<Arc<RetainedLayers>> {
        let mut open = lock(&self.open);
        if let Some(layers) = open.upgrade() {
            return Ok(layers);
        }
        let record = self.record();
        let home = match record.tier {
            Tier::Image => {
                // Not to be taken for a lower that is gone.
                let image = Image::open(&self.folder.join(IMAGE));
                Home::image(image.map_err(|error| io::Error::other(format!("the image: {error}")))?)?
            }
            Tier::Directory | Tier::Memory => Home::directory(&self.folder)?,
        };
        let layer = |overlay: &RecordedOverlay| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let lower = openat2(CWD, &overlay.lower, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
            let lower = lower.map_err(|errno| {
                io::Error::new(errno.kind(), format!("{}: {errno}", overlay.lower.display()))
            })?;
            Ok::<_, io::Error>(Layer {
                dest: overlay.dest.clone(),
                upper: open_directory(home.root(), format!("{}/{UPPER}", overlay.folder))?,
                lower: open_lower(&lower)?,
                marks: overlay.marks,
            })
        };
        let layers = record.overlays.iter().map(layer).collect::<Result<_, _>>()?;
        let folder =
            openat(CWD, &self.folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let layers = Arc::new(RetainedLayers { layers, folder, _home: home });
        *open = Arc::downgrade(&layers);
        Ok(layers)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

/// Opens a lower for reading, without what is mounted in it: an overlay does not show that, either.
fn open_lower(lower: &OwnedFd) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    match open_tree(lower, "", flags) {
        Ok(alone) => open_directory(&alone, "."),
        // A plain user cannot; such a one has not mounted anything there, either.
        Err(Errno::PERM | Errno::NOSYS) => open_directory(lower, "."),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes the directories of one overlay; a descriptor of the folder they lie in.
fn make_pair(home: &Home, name: &str, lower: &OwnedFd) -> io::Result<OwnedFd> {
    let mode = Mode::RWXU;
    mkdirat(home.root(), name, mode)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(home.root(), name, flags, Mode::empty())?;
    for dir in [UPPER, WORK] {
        mkdirat(&folder, dir, mode)?;
    }
    let stat = rustix::fs::statat(lower, "", AtFlags::EMPTY_PATH)?;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    // A plain user can only have a lower of another owner mapped as it is; the upper then stays its own.
    match chownat(&folder, UPPER, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(()) | Err(Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    chmodat(&folder, UPPER, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
    Ok(folder)
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
