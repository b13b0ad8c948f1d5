//! The uppers of a session that has ended, while they are kept.

use super::home::{Home, Tier, open_directory, tree_usage};
use super::image::Image;
use super::layer::{Layer, open_lower};
use super::record::{Record, RecordedOverlay};
use super::session_uppers::{IMAGE, UPPER};
use super::uppers::lock;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

/// Uppers of a session that has ended.
#[derive(Debug)]
pub struct Retained {
    record: Mutex<Record>,
    pub(super) folder: PathBuf,
    /// Held for writing by whoever removes them or changes their lowers; whether they have been removed.
    pub(super) in_use: RwLock<bool>,
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

impl Retained {
    pub(super) fn new(record: Record, folder: PathBuf) -> Self {
        Self { record: Mutex::new(record), folder, in_use: RwLock::default(), open: Mutex::default() }
    }

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
