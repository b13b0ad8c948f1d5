//! The uppers of one session: made with it, and removed, or left to be kept, when it has gone.

use super::clear::clear;
use super::duplicate::duplicate;
use super::home::{Home, Limit, Place, Tier, Usage, open_directory, tree_usage};
use super::layer::{Layer, Marks, open_lower};
use super::record::{Record, RecordedOverlay};
use super::timestamp::Timestamp;
use super::uppers::{Uppers, lock};
use crate::files::FileError;
use execd_init_shim::messages::{HeldUpper, Upper};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid, chmodat, chownat, mkdirat, openat, openat2,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// The file of an image in a session's folder.
pub(super) const IMAGE: &str = "image";
/// What the names of folders end in that have taken the place of others.
const RENEWED: &str = "+";
pub(super) const UPPER: &str = "upper";
const WORK: &str = "work";

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
    /// Whether the session has come about.
    in_use: bool,
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

impl SessionUppers {
    /// None yet.
    pub(super) fn new(uppers: Arc<Uppers>, id: Uuid, wanted: &Wanted<'_>) -> Self {
        let tier = uppers.tier(wanted);
        let limit = wanted.limit.unwrap_or(uppers.limits.persistent);
        let record = Record::new(id, tier, limit, wanted.retain.as_secs());
        let contents =
            Contents { record, persistent: None, ephemeral: None, made: Vec::new(), in_use: false };
        Self {
            uppers,
            id,
            tier,
            wanted_limit: wanted.limit,
            userns: wanted.userns,
            used: Mutex::default(),
            contents: Mutex::new(contents),
        }
    }

    /// Notes that there is a session that uses them. What was made for one that did not come about is never kept.
    pub fn taken_into_use(&self) {
        lock(&self.contents).in_use = true;
    }

    /// Whose they are.
    pub fn id(&self) -> Uuid {
        self.id
    }

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

    /// Finds out what the persistent ones hold; a walk, for directories.
    pub(super) fn measure(&self) -> Usage {
        let walk = {
            let contents = lock(&self.contents);
            match &contents.persistent {
                None => return Usage::default(),
                Some(Home { place: Place::Directory(_, path), .. }) => path.clone(),
                Some(home) => return home.usage(),
            }
        };
        let usage = tree_usage(&walk);
        *lock(&self.used) = usage;
        usage
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
        let record = contents.record.clone();
        let session = record.session;
        let folder = self.uppers.root.join(session.to_string());
        let is_on_disk = persistent.as_ref().is_some_and(|home| home.tier() != Tier::Memory);
        let trash = &self.uppers.trash;
        trash.drop_later((ephemeral, persistent));
        let left = if is_on_disk && contents.in_use && record.retain_seconds > 0 {
            self.uppers.retain(record, folder)
        } else if folder.exists() {
            trash.take(&folder)
        } else {
            Ok(())
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
