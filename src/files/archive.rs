//! Whole subtrees in one go, as tar(5), packed with gzip.
//!
//! Only formats are left to the library. What an archive names is made below the destination, one step at a time,
//! each of which follows no link and knows no `..`; so an archive cannot write outside, whether by its names or by links
//! that it brings along. It may bring links that lead elsewhere; they mean what they mean inside the session.

use super::error::{Call, Class, FileError};
use super::path::RootedPath;
use super::stage::PARENT_MODE;
use super::stream::{Sparse, Wanted};
use super::tree::{
    DIRECTORY, FileId, Worker, identity, kind, open_below, open_regular_below, split_below, stat_entry,
    unlink,
};
use super::walk::{Order, Walk};
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_OMIT, linkat, mkdirat, mknodat,
    openat, symlinkat, utimensat,
};
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use tar::{Archive, Builder, Entry, EntryType, Header};

/// What is moved at once; bytes.
const PIECE_BYTES: usize = 128 * 1024;
/// What one entry may say about itself besides its content: long names, extended attributes. The library keeps that in
/// memory. Bytes.
const PREAMBLE_BYTES_MAX: u64 = 1 << 20;
/// What is kept of the directories of one archive, to give them their modes and times in the end; bytes.
const DIRECTORIES_BYTES_MAX: usize = 32 << 20;
/// The first bytes of anything packed with gzip (RFC 1952).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

impl Worker<'_> {
    /// Whether [`Worker::pack`] makes sense; the name of the directory.
    ///
    /// # Errors
    /// When there is no such directory, or it cannot be read.
    pub fn check_pack(&self, text: &str) -> Result<String, FileError> {
        let path = self.path(text)?;
        self.readable_directory(&path)?;
        Ok(path.file_name())
    }

    /// Packs what is in a directory. Sockets and devices are left out, as they would mean nothing elsewhere.
    ///
    /// # Errors
    /// What cannot be read, and what `to` fails with.
    pub fn pack(&self, text: &str, to: &mut dyn Write) -> Result<(), FileError> {
        let root = self.path(text)?;
        let base = self.readable_directory(&root)?;
        let mut builder = Builder::new(GzEncoder::new(to, Compression::fast()));
        let mut links: HashMap<FileId, PathBuf> = HashMap::new();
        let mut walk =
            Walk::new(base, Order::Names, usize::MAX, |seen| stat_entry(seen.dir, seen.name).map(Some));
        while let Some(step) = walk.next(&|| self.go_on()) {
            let (below, stat) = match step {
                Ok(found) => found,
                Err(error) if error.errno().is_some_and(is_gone) => continue,
                Err(error) => return Err(error),
            };
            let path = Path::new(OsStr::from_bytes(&below));
            let mut header = self.header(&stat);
            let packed = if let Some(first) = links.get(&identity(&stat)) {
                header.set_entry_type(EntryType::Link);
                header.set_size(0);
                builder.append_link(&mut header, path, first)
            } else {
                if stat.stx_nlink > 1 && kind(&stat) == FileType::RegularFile {
                    links.insert(identity(&stat), path.to_path_buf());
                }
                match self.pack_entry(&mut builder, header, &stat, walk.base(), &below) {
                    Err(error) if Errno::from_io_error(&error).is_some_and(is_gone) => Ok(()),
                    packed => packed,
                }
            };
            packed.call("pack", root.join(path))?;
        }
        builder.into_inner().and_then(GzEncoder::finish).call("pack", &root).map(drop)
    }

    fn pack_entry(
        &self,
        builder: &mut Builder<GzEncoder<&mut dyn Write>>,
        mut header: Header,
        stat: &Statx,
        base: &OwnedFd,
        below: &[u8],
    ) -> io::Result<()> {
        let path = Path::new(OsStr::from_bytes(below));
        match kind(stat) {
            FileType::RegularFile => {
                let file = open_regular_below(base, below)?;
                header.set_entry_type(EntryType::Regular);
                header.set_size(stat.stx_size);
                // It may become shorter while it is read, and its length has been told.
                let content = Wanted { worker: self, inner: file.chain(io::repeat(0)) }.take(stat.stx_size);
                builder.append_data(&mut header, path, content)
            }
            FileType::Directory => {
                header.set_entry_type(EntryType::Directory);
                let mut name = below.to_vec();
                name.push(b'/');
                builder.append_data(&mut header, Path::new(OsStr::from_bytes(&name)), io::empty())
            }
            FileType::Symlink => {
                let (dir, name) = split_below(below);
                let dir = open_below(base, dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, path, Path::new(OsStr::from_bytes(target.as_bytes())))
            }
            FileType::Fifo => {
                header.set_entry_type(EntryType::Fifo);
                builder.append_data(&mut header, path, io::empty())
            }
            _ => Ok(()),
        }
    }

    fn header(&self, stat: &Statx) -> Header {
        let (ids, accounts) = (self.tree.ids(), self.accounts());
        let (uid, gid) = (ids.uid_inside(stat.stx_uid), ids.gid_inside(stat.stx_gid));
        let mut header = Header::new_gnu();
        header.set_size(0);
        header.set_mode(u32::from(stat.stx_mode) & 0o7777);
        header.set_mtime(stat.stx_mtime.tv_sec.max(0) as u64);
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        // A name that does not fit is left to the number.
        let _ = header.set_username(&accounts.user(uid));
        let _ = header.set_groupname(&accounts.group(gid));
        header
    }

    /// Unpacks an archive, packed with gzip or not, into a directory, which is made if it is missing. What is there
    /// already is replaced, except that a directory stays one. Everything belongs to the session's user.
    ///
    /// # Errors
    /// [`Class::Invalid`] for what is no archive, and for entries that lead outside. What was unpacked before stays.
    pub fn unpack(&self, text: &str, from: &mut dyn Read) -> Result<(), FileError> {
        let root = self.path(text)?;
        let broken = |error: io::Error| broken(&root, &error);
        let mut from = BufReader::with_capacity(PIECE_BYTES, from);
        let is_packed = from.fill_buf().map_err(broken)?.starts_with(&GZIP_MAGIC);
        let plain: Box<dyn Read + '_> =
            if is_packed { Box::new(MultiGzDecoder::new(from)) } else { Box::new(from) };
        let left = Rc::new(Cell::new(0));
        let mut archive =
            Archive::new(Metered { inner: Wanted { worker: self, inner: plain }, left: Rc::clone(&left) });
        let dir = self.make_directories(&root, PARENT_MODE)?;
        let base = open_below(&dir, b"", DIRECTORY, Mode::empty()).call("openat2", &root)?;
        let mut target = Target { base, root: root.clone(), directories: BTreeMap::new(), bytes: 0 };
        let mut entries = archive.entries().map_err(broken)?;
        loop {
            self.go_on()?;
            left.set(PREAMBLE_BYTES_MAX);
            let Some(entry) = entries.next() else { break };
            left.set(u64::MAX);
            let mut entry = entry.map_err(broken)?;
            self.unpack_entry(&mut entry, &mut target)?;
            // What nobody has asked for does not count as part of the next one.
            io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
        }
        target.finish(self)
    }

    fn unpack_entry(&self, entry: &mut Entry<'_, impl Read>, target: &mut Target) -> Result<(), FileError> {
        let entry_type = entry.header().entry_type();
        if entry_type == EntryType::XGlobalHeader {
            return Ok(());
        }
        let name = entry.path_bytes().into_owned();
        let below = target.below(&name)?;
        let path = target.root.join(OsStr::from_bytes(&below));
        let bad = |error: io::Error| broken(&path, &error);
        let mode = Mode::from_raw_mode(entry.header().mode().map_err(bad)? & 0o777);
        let times = modified(entry.header().mtime().map_err(bad)?);
        if below.is_empty() {
            return Ok(());
        }
        let (parent, last) = split_below(&below);
        let dir = target.directory(parent)?;
        if entry_type == EntryType::Directory {
            target.make_directory(&dir, last, &path)?;
            return target.note(below, mode, times);
        }
        match unlink(&dir, last, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno).call("unlinkat", &path),
        }
        match entry_type {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(&dir, last, flags, Mode::RUSR | Mode::WUSR).call("openat", &path)?;
                let mut file = File::from(file);
                self.unpack_content(entry, &mut file, &path)?;
                rustix::fs::fchmod(&file, mode).call("fchmod", &path)?;
                rustix::fs::futimens(&file, &times).call("utimensat", &path)
            }
            EntryType::Symlink => {
                let to = link_name(entry, &path)?;
                symlinkat(OsStr::from_bytes(&to), &dir, last).call("symlinkat", &path)?;
                utimensat(&dir, last, &times, AtFlags::SYMLINK_NOFOLLOW).call("utimensat", &path)
            }
            EntryType::Link => {
                let to = target.below(&link_name(entry, &path)?)?;
                let (to_dir, to_last) = split_below(&to);
                linkat(target.directory(to_dir)?, to_last, &dir, last, AtFlags::empty()).call("linkat", &path)
            }
            EntryType::Fifo => {
                mknodat(&dir, last, FileType::Fifo, mode, 0).call("mknodat", &path)?;
                utimensat(&dir, last, &times, AtFlags::SYMLINK_NOFOLLOW).call("utimensat", &path)
            }
            other => Err(FileError::invalid(
                &path,
                format!("entries of type {:?} are not unpacked", other.as_byte() as char),
            )),
        }
    }

    fn unpack_content(
        &self,
        from: &mut impl Read,
        to: &mut File,
        path: &RootedPath,
    ) -> Result<(), FileError> {
        let mut to = Sparse::new(to);
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            self.go_on()?;
            match from.read(&mut piece) {
                Ok(0) => return to.finish().call("ftruncate", path),
                Ok(length) => to.write_all(piece.get(..length).unwrap_or_default()).call("write", path)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(path, &error)),
            }
        }
    }
}

/// The directory that is unpacked into.
struct Target {
    base: OwnedFd,
    root: RootedPath,
    /// Those of the archive, with what they are to have once everything is in them.
    directories: BTreeMap<Vec<u8>, (Mode, Timestamps)>,
    /// What their names take.
    bytes: usize,
}

impl Target {
    /// A name of the archive as a path below the base.
    fn below(&self, name: &[u8]) -> Result<Vec<u8>, FileError> {
        let mut below = PathBuf::new();
        for component in Path::new(OsStr::from_bytes(name)).components() {
            match component {
                Component::Normal(name) if !name.as_bytes().contains(&0) => below.push(name),
                Component::CurDir => {}
                _ => {
                    let name = String::from_utf8_lossy(name);
                    return Err(FileError::invalid(&*name, "the archive names a path outside of itself"));
                }
            }
        }
        Ok(below.into_os_string().into_encoded_bytes())
    }

    /// A directory below the base; made, if it is missing.
    fn directory(&self, below: &[u8]) -> Result<OwnedFd, FileError> {
        let open =
            |below: &[u8]| open_below(&self.base, below, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        let path = self.root.join(OsStr::from_bytes(below));
        match open(below) {
            Err(Errno::NOENT) => {}
            Err(Errno::LOOP) => return Err(FileError::invalid(&path, "the archive leads through a link")),
            opened => return opened.call("openat2", &path),
        }
        let (parent, last) = split_below(below);
        self.make_directory(&self.directory(parent)?, last, &path)?;
        open(below).call("openat2", &path)
    }

    fn make_directory(&self, dir: &OwnedFd, name: &OsStr, path: &RootedPath) -> Result<(), FileError> {
        let is_directory = || stat_entry(dir, name).is_ok_and(|stat| kind(&stat) == FileType::Directory);
        match mkdirat(dir, name, Mode::from_raw_mode(PARENT_MODE)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) if is_directory() => Ok(()),
            Err(Errno::EXIST) => {
                Err(FileError::refused(path, Class::Conflict, "is in the way of a directory of the archive"))
            }
            Err(errno) => Err(errno).call("mkdirat", path),
        }
    }

    fn note(&mut self, below: Vec<u8>, mode: Mode, times: Timestamps) -> Result<(), FileError> {
        let length = below.len() + size_of::<(Vec<u8>, Mode, Timestamps)>();
        if self.directories.insert(below, (mode, times)).is_none() {
            self.bytes += length;
        }
        if self.bytes > DIRECTORIES_BYTES_MAX {
            return Err(FileError::refused(
                &self.root,
                Class::TooLarge,
                "the archive has too many directories",
            ));
        }
        Ok(())
    }

    /// From below, since a mode may forbid what is still to come.
    fn finish(self, worker: &Worker<'_>) -> Result<(), FileError> {
        for (below, (mode, times)) in self.directories.iter().rev() {
            worker.go_on()?;
            let path = self.root.join(OsStr::from_bytes(below));
            let dir = open_below(&self.base, below, DIRECTORY, Mode::empty()).call("openat2", &path)?;
            rustix::fs::fchmod(&dir, *mode).call("fchmod", &path)?;
            rustix::fs::futimens(&dir, times).call("utimensat", &path)?;
        }
        Ok(())
    }
}

/// What a name answers that has been found a moment ago and is no longer what it was.
pub(crate) fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
}

fn link_name(entry: &Entry<'_, impl Read>, path: &RootedPath) -> Result<Vec<u8>, FileError> {
    let name = entry.link_name_bytes().filter(|name| !name.is_empty());
    name.map(|name| name.into_owned()).ok_or_else(|| FileError::invalid(path, "a link without a target"))
}

fn modified(seconds: u64) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: i64::try_from(seconds).unwrap_or(0), tv_nsec: 0 },
    }
}

/// A failure on the archive's side.
fn broken(path: &RootedPath, error: &io::Error) -> FileError {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::ConnectionAborted => FileError::Cancelled,
        _ => FileError::invalid(path, format!("the archive cannot be read: {error}")),
    }
}

/// Counts what is read, down to an end.
struct Metered<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        match self.left.get().checked_sub(length as u64) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other("an entry says too much about itself")),
        }
        Ok(length)
    }
}
