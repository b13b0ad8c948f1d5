//! What commits have written into a lower, kept beside the upper, so that after a crash too a commit knows its own work
//! from what others have done to the lower meanwhile.
//!
//! A file with an id and records that are only ever appended. What is about to be given its name is noted before: an
//! inode of the lower that is as noted is this journal's and nobody has changed it since. A record that was cut off, and
//! what comes after it, does not count.
//!
//! At most [`FILES_MAX`] files are remembered, the latest; whatever is forgotten counts as written by others and is copied
//! again.

use super::timestamp::Timestamp;
use crate::files::copy::owner;
use crate::files::error::{Call, Class, FileError};
use crate::files::tree::{FileId, identity};
use rustix::fd::BorrowedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, Statx, flock, openat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::time::{Duration, SystemTime};

/// How many files are remembered; each takes some 200 bytes of memory.
pub const FILES_MAX: usize = 1 << 18;
/// How a journal begins; the id follows.
const MAGIC: &[u8; 16] = b"execd-journal 1\n";
/// Of an id, in the file and in names.
const ID_BYTES: usize = 32;
/// No record is longer.
const RECORD_BYTES_MAX: usize = 256;
/// Times in a file system advance in steps: one that is younger than this might not tell a change that comes after it.
const STEP: Duration = Duration::from_millis(50);
/// What messages call it.
const NAME: &str = "the commit's journal";

/// The state of an inode of the lower, but for what changes when it gets its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    size: u64,
    modified: Timestamp,
    mode: u16,
    owner: (u32, u32),
}

impl Written {
    fn of(stat: &Statx) -> Self {
        let (uid, gid) = owner(stat);
        let owner = (uid.as_raw(), gid.as_raw());
        Self { size: stat.stx_size, modified: stat.stx_mtime.into(), mode: stat.stx_mode, owner }
    }
}

/// The state of an inode of the upper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    id: FileId,
    size: u64,
    modified: Timestamp,
    changed: Timestamp,
}

impl Source {
    fn of(stat: &Statx) -> Self {
        Self {
            id: identity(stat),
            size: stat.stx_size,
            modified: stat.stx_mtime.into(),
            changed: stat.stx_ctime.into(),
        }
    }
}

/// What is known of a file that was written.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Known {
    written: Written,
    /// What it was copied from, where that can tell whether it has changed.
    source: Option<Source>,
    privileged: bool,
}

/// What comes after the header: each with its length and a checksum before it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Record {
    /// From here on there may be passing names in the lower.
    Begun,
    /// From here on there are none.
    Ended,
    File(FileId, Known),
    /// A directory is, or is about to be, changed; with the time of its last change once that is over.
    Directory(FileId, Option<Timestamp>),
}

/// What commits of one upper have written.
#[derive(Debug)]
pub struct Journal {
    file: File,
    id: String,
    /// Whether the last commit was cut off.
    interrupted: bool,
    files: HashMap<FileId, Known>,
    /// In the order in which they came, for forgetting.
    order: VecDeque<FileId>,
    directories: HashMap<FileId, Option<Timestamp>>,
    /// Records that have not been written yet.
    pending: Vec<u8>,
}

impl Journal {
    /// Opens the journal of that name in a directory that no session sees, or starts it.
    ///
    /// # Errors
    /// [`Class::Busy`] while it is open elsewhere; when it cannot be read or is none.
    pub fn open(dir: BorrowedFd<'_>, name: &str) -> Result<Self, FileError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map(File::from).call("openat", NAME)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                return Err(FileError::refused(NAME, Class::Busy, "another commit is going on"));
            }
            locked => locked.call("flock", NAME)?,
        }
        let mut journal = Self {
            file,
            id: String::new(),
            interrupted: false,
            files: HashMap::new(),
            order: VecDeque::new(),
            directories: HashMap::new(),
            pending: Vec::new(),
        };
        journal.read()?;
        Ok(journal)
    }

    /// Reads what there is and cuts off what is not whole.
    fn read(&mut self) -> Result<(), FileError> {
        let mut reader = BufReader::with_capacity(1 << 16, self.file.try_clone().call("dup", NAME)?);
        let Some(id) = header(&mut reader).call("read", NAME)? else { return self.start() };
        self.id = id;
        let mut whole = (MAGIC.len() + ID_BYTES) as u64;
        while let Some((record, length)) = next_record(&mut reader).call("read", NAME)? {
            self.learn(record);
            whole += length;
        }
        self.file.set_len(whole).call("ftruncate", NAME)?;
        self.file.seek(SeekFrom::Start(whole)).map(drop).call("lseek", NAME)
    }

    fn start(&mut self) -> Result<(), FileError> {
        self.id = uuid::Uuid::new_v4().simple().to_string();
        self.file.set_len(0).call("ftruncate", NAME)?;
        self.file.seek(SeekFrom::Start(0)).call("lseek", NAME)?;
        self.pending.extend_from_slice(MAGIC);
        self.pending.extend_from_slice(self.id.as_bytes());
        self.write()
    }

    fn learn(&mut self, record: Record) {
        match record {
            Record::Begun => self.interrupted = true,
            Record::Ended => self.interrupted = false,
            Record::Directory(id, changed) => {
                // As many as there are files; these take less.
                if self.directories.len() < FILES_MAX || self.directories.contains_key(&id) {
                    self.directories.insert(id, changed);
                }
            }
            Record::File(id, known) => {
                if self.files.insert(id, known).is_none() {
                    self.order.push_back(id);
                }
                if self.order.len() > FILES_MAX
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.files.remove(&oldest);
                }
            }
        }
    }

    fn note(&mut self, record: Record) -> Result<(), FileError> {
        let bytes = postcard::to_allocvec(&record).map_err(|error| FileError::Own(error.to_string()))?;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.pending.extend_from_slice(&length.to_le_bytes());
        self.pending.extend_from_slice(&checksum(&bytes).to_le_bytes());
        self.pending.extend_from_slice(&bytes);
        self.learn(record);
        Ok(())
    }

    /// Writes what has been noted.
    ///
    /// # Errors
    /// [`Class::NoSpace`] above all.
    pub(super) fn write(&mut self) -> Result<(), FileError> {
        let written = self.file.write_all(&self.pending).call("write", NAME);
        self.pending.clear();
        written
    }

    /// Brings what has been noted to the disk.
    pub(super) fn sync(&mut self) -> Result<(), FileError> {
        self.write()?;
        rustix::fs::fdatasync(&self.file).call("fdatasync", NAME)
    }

    /// What is in the passing names of this journal's commits.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether a commit was cut off, which may have left passing names.
    pub(super) fn is_interrupted(&self) -> bool {
        self.interrupted
    }

    pub(super) fn begin(&mut self) -> Result<(), FileError> {
        self.note(Record::Begun)?;
        self.write()
    }

    pub(super) fn end(&mut self) -> Result<(), FileError> {
        self.note(Record::Ended)?;
        self.write()
    }

    /// Notes a file that is about to get its name, and what it was copied from.
    pub(super) fn note_file(
        &mut self,
        copy: &Statx,
        source: &Statx,
        privileged: bool,
    ) -> Result<(), FileError> {
        let settled = is_settled(source.stx_ctime.into());
        let source = settled.then(|| Source::of(source));
        self.note(Record::File(identity(copy), Known { written: Written::of(copy), source, privileged }))
    }

    /// Notes a file that is about to lose one of several names, which counts as a change of the others.
    pub(super) fn note_shared(&mut self, lower: &Statx) -> Result<(), FileError> {
        let known = Known { written: Written::of(lower), source: None, privileged: false };
        self.note(Record::File(identity(lower), known))
    }

    /// Notes a directory that is about to be changed, and writes it down at once.
    pub(super) fn note_directory(&mut self, id: FileId) -> Result<(), FileError> {
        if self.directories.get(&id) == Some(&None) {
            return Ok(());
        }
        self.note(Record::Directory(id, None))?;
        self.write()
    }

    /// Notes a directory that has been changed, to be written later.
    pub(super) fn note_changed_directory(&mut self, stat: &Statx) -> Result<(), FileError> {
        self.note(Record::Directory(identity(stat), Some(stat.stx_ctime.into())))
    }

    /// Whether an entry of the lower is as a commit has written it.
    pub(super) fn is_own(&self, lower: &Statx) -> bool {
        let id = identity(lower);
        let is_directory = self.directories.get(&id).is_some_and(|changed| {
            // Cut off before its end was noted, nothing can be told.
            changed.is_none_or(|changed| changed == lower.stx_ctime.into())
        });
        is_directory || self.files.get(&id).is_some_and(|known| known.written == Written::of(lower))
    }

    /// Whether an entry of the lower is what a commit has made of this very entry of the upper.
    pub(super) fn is_done(&self, lower: &Statx, upper: &Statx, privileged: bool) -> bool {
        self.files.get(&identity(lower)).is_some_and(|known| {
            known.written == Written::of(lower)
                && known.source == Some(Source::of(upper))
                && known.privileged == privileged
        })
    }
}

fn is_settled(changed: Timestamp) -> bool {
    let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else { return false };
    let Some(before) = now.checked_sub(STEP) else { return false };
    i64::try_from(before.as_secs()).is_ok_and(|sec| changed < Timestamp { sec, nsec: before.subsec_nanos() })
}

/// The id of a journal; none for an empty file, or one that was cut off before there was one.
fn header(reader: &mut impl Read) -> io::Result<Option<String>> {
    let mut bytes = [0; MAGIC.len() + ID_BYTES];
    if !fill(reader, &mut bytes)? {
        return Ok(None);
    }
    let id = bytes.strip_prefix(MAGIC).and_then(|id| std::str::from_utf8(id).ok());
    match id {
        Some(id) if id.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(Some(id.to_owned())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The next record that is whole, and its length in the file.
fn next_record(reader: &mut impl Read) -> io::Result<Option<(Record, u64)>> {
    let (mut length, mut sum) = ([0; 4], [0; 4]);
    if !fill(reader, &mut length)? || !fill(reader, &mut sum)? {
        return Ok(None);
    }
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > RECORD_BYTES_MAX {
        return Ok(None);
    }
    let mut bytes = vec![0; length];
    if !fill(reader, &mut bytes)? || checksum(&bytes) != u32::from_le_bytes(sum) {
        return Ok(None);
    }
    Ok(postcard::from_bytes(&bytes).ok().map(|record| (record, 8 + length as u64)))
}

/// Whether there was enough to read.
fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        done => done.map(|()| true),
    }
}

/// FNV-1a; that of nothing is not zero, as what a crash leaves may be.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum: u32, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tree::stat_entry;
    use rustix::fd::{AsFd, OwnedFd};
    use std::path::Path;

    fn open_dir(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn own_work_is_known_again_and_a_torn_tail_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open_dir(dir.path());
        for name in ["a", "b", "c"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let stat = |name: &str| stat_entry(&fd, name).unwrap();
        std::thread::sleep(2 * STEP);
        let mut journal = Journal::open(fd.as_fd(), "journal").unwrap();
        assert_eq!(journal.id().len(), ID_BYTES);
        assert_eq!(Journal::open(fd.as_fd(), "journal").unwrap_err().class(), Class::Busy);
        let id = journal.id().to_owned();
        journal.begin().unwrap();
        journal.note_file(&stat("a"), &stat("b"), false).unwrap();
        journal.sync().unwrap();
        let whole = std::fs::read(dir.path().join("journal")).unwrap();
        journal.note_file(&stat("b"), &stat("a"), false).unwrap();
        journal.sync().unwrap();
        drop(journal);
        let longer = std::fs::read(dir.path().join("journal")).unwrap();
        for length in whole.len()..longer.len() {
            std::fs::write(dir.path().join("journal"), &longer[..length]).unwrap();
            let journal = Journal::open(fd.as_fd(), "journal").unwrap();
            assert_eq!(journal.id(), id);
            assert!(journal.is_interrupted());
            assert!(journal.is_own(&stat("a")) && !journal.is_own(&stat("b")) && !journal.is_own(&stat("c")));
            assert!(journal.is_done(&stat("a"), &stat("b"), false));
            assert!(!journal.is_done(&stat("a"), &stat("b"), true));
            assert!(!journal.is_done(&stat("a"), &stat("c"), false));
            drop(journal);
            assert_eq!(std::fs::read(dir.path().join("journal")).unwrap(), whole);
        }
        std::fs::write(dir.path().join("a"), "A").unwrap();
        let mut zeros = whole.clone();
        zeros.extend_from_slice(&[0; 64]);
        std::fs::write(dir.path().join("journal"), &zeros).unwrap();
        let mut journal = Journal::open(fd.as_fd(), "journal").unwrap();
        assert!(!journal.is_own(&stat("a")));
        journal.end().unwrap();
        drop(journal);
        assert!(!Journal::open(fd.as_fd(), "journal").unwrap().is_interrupted());
    }

    #[test]
    fn a_journal_that_is_none_is_refused_and_an_unfinished_header_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open_dir(dir.path());
        std::fs::write(dir.path().join("journal"), [b'x'; 100]).unwrap();
        assert!(Journal::open(fd.as_fd(), "journal").is_err());
        std::fs::write(dir.path().join("journal"), &MAGIC[..7]).unwrap();
        let id = Journal::open(fd.as_fd(), "journal").unwrap().id().to_owned();
        assert_eq!(Journal::open(fd.as_fd(), "journal").unwrap().id(), id);
    }
}
