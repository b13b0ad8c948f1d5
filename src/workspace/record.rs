//! What is written down about the uppers of a session, beside them: enough for a later execd to know them again.

use super::home::{Limit, Tier};
use super::layer::Marks;
use super::timestamp::Timestamp;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use uuid::Uuid;

const FILE: &str = "record.json";
/// The largest that is read; bytes.
const BYTES_MAX: u64 = 1 << 20;
/// Of this form; another one is not read.
const VERSION: u32 = 1;

/// The record of one session's uppers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Whose uppers.
    pub session: Uuid,
    /// Where they lie.
    pub tier: Tier,
    /// What they may hold.
    pub limit: Limit,
    /// When the session was created.
    pub created: Timestamp,
    /// What its uppers began on; that of its source, for a fork. A change of a lower after that is none it has seen.
    pub since: Timestamp,
    /// When it ended; `None` as long as it lives, and when it was cut off.
    pub ended: Option<Timestamp>,
    /// How long they are kept after the end; seconds, 0 for not at all.
    pub retain_seconds: u64,
    /// Whether its lowers are being changed.
    pub committing: bool,
    /// The overlays, in the order of their folders.
    pub overlays: Vec<RecordedOverlay>,
}

/// One overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedOverlay {
    /// Where it is mounted inside.
    pub dest: PathBuf,
    /// The host's directory, links resolved.
    pub lower: PathBuf,
    /// The folder of its upper, where the session's uppers lie.
    pub folder: String,
    /// How its upper is marked.
    pub marks: Marks,
}

impl Record {
    /// The record of a session that begins.
    pub fn new(session: Uuid, tier: Tier, limit: Limit, retain_seconds: u64) -> Self {
        Self {
            version: VERSION,
            session,
            tier,
            limit,
            created: Timestamp::now(),
            since: Timestamp::now(),
            ended: None,
            retain_seconds,
            committing: false,
            overlays: Vec::new(),
        }
    }

    /// When its uppers go; `None` as long as it has not ended, and for never.
    pub fn expires(&self) -> Option<SystemTime> {
        self.ended?.system_time().checked_add(Duration::from_secs(self.retain_seconds))
    }

    /// Writes it into the session's folder, in one step.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let passing = folder.join(format!("{FILE}.new"));
        serde_json::to_writer(File::create(&passing)?, self)?;
        fs::rename(passing, folder.join(FILE))
    }

    /// Reads it from a session's folder.
    ///
    /// # Errors
    /// Those of the file system; `InvalidData` for what is no record of this version.
    pub fn read(folder: &Path) -> io::Result<Self> {
        // Whatever lies there must not be waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = rustix::fs::open(folder.join(FILE), flags, Mode::empty())?.into();
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a record that is no file"));
        }
        let record: Self = serde_json::from_reader(BufReader::new(file.take(BYTES_MAX)))?;
        if record.version != VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a record of another version"));
        }
        Ok(record)
    }
}
