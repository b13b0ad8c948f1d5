//! The changes of an upper as an image layer: tar(5) with whiteouts, packed with gzip (image-spec, layer.md).
//!
//! What the header of old has no room for (long names, large numbers, fractions of seconds, attributes, holes) is in
//! extended headers (pax(1)), which GNU tar, Python and Go all read. One thread walks, reads and frames; the caller's
//! packs and writes.

use super::changes::{Change, Changes, Effect, shown};
use super::layer::{Layer, is_portable};
use crate::files::archive::is_gone;
use crate::files::error::{Call, Class, FileError};
use crate::files::tree::{
    DIRECTORY, FileId, identity, kind, open_below, open_regular_below, split_below, stat,
};
use crate::files::walk::GoOn;
use crate::files::xattr;
use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom, Statx};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;
use tar::{EntryType, Header};

/// How the names of whiteouts begin.
const WHITEOUT: &[u8] = b".wh.";
/// In a directory of which nothing of the lower's shows.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What tar counts in; bytes.
const BLOCK_BYTES: u64 = 512;
/// What is handed from thread to thread at once, and read at once; bytes.
const PIECE_BYTES: usize = 256 * 1024;
/// How many pieces may wait to be packed.
const PIECES_WAITING: usize = 8;
/// Between two questions whether to go on, while there is nothing to pack.
const WAIT: Duration = Duration::from_millis(50);
/// The largest number that has room in the header's fields for owners (seven octal digits).
const ID_MAX: u32 = 0o777_7777;
/// The largest number that has room in the header's fields for sizes and times (eleven octal digits).
const SIZE_MAX: u64 = 0o777_7777_7777;
/// What one entry may have in attributes; bytes. Go's reader takes no extended header over a megabyte.
const ATTRIBUTES_BYTES_MAX: usize = 512 * 1024;
/// Into how many parts holes may divide a file; Go's reader takes no list of them over a megabyte.
const PARTS_MAX: usize = 16 * 1024;
/// With too many parts, holes up to this size are written as zeros; bytes.
const FILLED_HOLE_BYTES_MAX: u64 = 1 << 20;

/// What a layer would come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Measure {
    /// Entries of the archive.
    pub entries: u64,
    /// About how long the archive is before it is packed; bytes.
    pub bytes: u64,
}

/// What [`write`] would write of a layer, which may have changed by then.
///
/// # Errors
/// As [`write`], as far as can be told without reading files.
pub fn measure(layer: &Layer, only: &[Vec<u8>], go_on: &GoOn<'_>) -> Result<Measure, FileError> {
    let mut members = Members::new(layer, only)?;
    let mut measure = Measure::default();
    let mut linked: HashSet<FileId> = HashSet::new();
    while let Some(member) = members.next(go_on) {
        measure.entries += 1;
        measure.bytes += BLOCK_BYTES;
        let Member::Entry(change) = member? else { continue };
        let stat = &change.stat;
        let is_first = stat.stx_nlink < 2 || linked.insert(identity(stat));
        if kind(stat) == FileType::RegularFile && is_first {
            let allocated = stat.stx_blocks.saturating_mul(512).min(stat.stx_size);
            measure.bytes = measure.bytes.saturating_add(allocated.next_multiple_of(BLOCK_BYTES));
        }
    }
    Ok(measure)
}

/// Writes the changes of a layer, or with `only` those at or beneath some paths, as [`Changes::new`] has it. Whoever
/// reads it can tell when it has failed, since it then lacks its end.
///
/// # Errors
/// [`Class::Conflict`] for names that a layer cannot have; what cannot be read; what `to` fails with.
pub fn write(layer: &Layer, only: &[Vec<u8>], to: &mut dyn Write, go_on: &GoOn<'_>) -> Result<(), FileError> {
    let (sender, pieces) = sync_channel(PIECES_WAITING);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let framing = || frame(layer, only, sender, &is_over);
        let framer = std::thread::Builder::new().name("diff".into()).spawn_scoped(scope, framing);
        let framer = framer.call("clone", &layer.dest)?;
        let packed = pack(pieces, to, go_on, layer);
        is_over.store(true, Ordering::Relaxed);
        let framed = framer.join().map_err(|_| FileError::Own("the thread of a diff has failed".into()))?;
        packed.and(framed)
    })
}

/// Packs pieces until there is an empty one, which is the end; without one, the end is left out here too.
fn pack(
    pieces: Receiver<Vec<u8>>,
    to: &mut dyn Write,
    go_on: &GoOn<'_>,
    layer: &Layer,
) -> Result<(), FileError> {
    let mut gzip = GzEncoder::new(Gate { to, is_open: true }, Compression::fast());
    let packed = loop {
        let piece = match pieces.recv_timeout(WAIT) {
            Ok(piece) if piece.is_empty() => break Ok(true),
            Ok(piece) => piece,
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => break Ok(false),
        };
        if let Err(error) = go_on().and_then(|()| gzip.write_all(&piece).call("write", &layer.dest)) {
            break Err(error);
        }
    };
    if matches!(packed, Ok(true)) {
        return gzip.finish().call("write", &layer.dest).map(drop);
    }
    // Dropped, it would write its end.
    gzip.get_mut().is_open = false;
    packed.map(drop)
}

/// Lets nothing through once it is shut.
struct Gate<'a> {
    to: &'a mut dyn Write,
    is_open: bool,
}

impl Write for Gate<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_open { self.to.write(bytes) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.is_open { self.to.flush() } else { Ok(()) }
    }
}

/// One entry of the archive.
enum Member {
    /// Says that the lower's entry at a path goes.
    Whiteout(Vec<u8>),
    /// Says that nothing of the lower's shows in the directory at a path.
    Opaque(Vec<u8>),
    /// What the upper has.
    Entry(Box<Change>),
}

/// The entries of the archive, in order.
struct Members<'a> {
    layer: &'a Layer,
    changes: Changes<'a>,
    /// The last directory that takes the place of another.
    opaque: Option<Vec<u8>>,
    ready: VecDeque<Member>,
}

impl<'a> Members<'a> {
    fn new(layer: &'a Layer, only: &[Vec<u8>]) -> Result<Self, FileError> {
        let changes = Changes::new(layer, only)?.deleted_first();
        Ok(Self { layer, changes, opaque: None, ready: VecDeque::new() })
    }

    fn next(&mut self, go_on: &GoOn<'_>) -> Option<Result<Member, FileError>> {
        loop {
            if let Some(member) = self.ready.pop_front() {
                return Some(Ok(member));
            }
            if let Err(error) = self.changes.next(go_on)?.and_then(|change| self.take(change)) {
                return Some(Err(error));
            }
        }
    }

    fn take(&mut self, change: Change) -> Result<(), FileError> {
        let (parent, name) = split_below(&change.below);
        let is_deleted = change.effect == Effect::Deleted;
        // One entry says it of all that was in the directory.
        let is_said = is_deleted && self.opaque.as_deref() == Some(parent);
        let is_socket = !is_deleted && kind(&change.stat) == FileType::Socket;
        if is_said || is_socket && change.effect == Effect::Added {
            return Ok(());
        }
        if name.as_bytes().starts_with(WHITEOUT) {
            let reason = "an image layer cannot have names that begin with .wh.";
            return Err(FileError::refused(shown(self.layer, &change.below), Class::Conflict, reason));
        }
        // A directory that only differs in what is in it has another time than the lower's by that.
        let is_directory = !is_deleted && kind(&change.stat) == FileType::Directory;
        let replaces = match change.effect {
            Effect::Replaced { directory } => Some(directory),
            _ => None,
        };
        if is_deleted || is_socket || replaces.is_some_and(|directory| directory != is_directory) {
            self.ready.push_back(Member::Whiteout(change.below.clone()));
        }
        let opaque = (is_directory && replaces == Some(true)).then(|| change.below.clone());
        if !is_deleted && !is_socket {
            self.ready.push_back(Member::Entry(Box::new(change)));
        }
        if let Some(below) = opaque {
            self.opaque = Some(below.clone());
            self.ready.push_back(Member::Opaque(below));
        }
        Ok(())
    }
}

/// Frames everything as tar, into pieces.
fn frame(
    layer: &Layer,
    only: &[Vec<u8>],
    sender: SyncSender<Vec<u8>>,
    is_over: &AtomicBool,
) -> Result<(), FileError> {
    let go_on = || if is_over.load(Ordering::Relaxed) { Err(FileError::Cancelled) } else { Ok(()) };
    let upper = open_below(&layer.upper, b"", DIRECTORY, Mode::empty()).call("openat2", &layer.dest)?;
    let mut framer = Framer {
        layer,
        upper,
        go_on: &go_on,
        pieces: Pieces { sender, piece: Vec::with_capacity(PIECE_BYTES) },
        links: HashMap::new(),
        buffer: vec![0; PIECE_BYTES],
    };
    let mut members = Members::new(layer, only)?;
    while let Some(member) = members.next(&go_on) {
        match member? {
            Member::Whiteout(below) => {
                let (parent, name) = split_below(&below);
                framer.mark(&in_directory(parent, &[WHITEOUT, name.as_bytes()].concat()))?;
            }
            Member::Opaque(below) => framer.mark(&in_directory(&below, OPAQUE))?,
            Member::Entry(change) => framer.entry(&change)?,
        }
    }
    framer.pieces.finish()
}

fn in_directory(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// Bytes on their way to the thread that packs.
struct Pieces {
    sender: SyncSender<Vec<u8>>,
    piece: Vec<u8>,
}

impl Pieces {
    fn put(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<(), FileError> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        // Without a receiver there is a failure that says more.
        self.sender.send(piece).map_err(|_| FileError::Cancelled)
    }

    /// Ends the archive.
    fn finish(&mut self) -> Result<(), FileError> {
        self.put(&[0; 2 * BLOCK_BYTES as usize])?;
        if !self.piece.is_empty() {
            self.send()?;
        }
        self.send()
    }
}

/// What a header says besides name and kind.
#[derive(Clone, Copy, Default)]
struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanoseconds: u32,
}

impl Meta {
    fn of(stat: &Statx) -> Self {
        Self {
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            seconds: stat.stx_mtime.tv_sec,
            nanoseconds: stat.stx_mtime.tv_nsec,
        }
    }
}

/// The header of one entry.
struct Head<'a> {
    kind: EntryType,
    name: &'a [u8],
    /// Of links.
    target: &'a [u8],
    /// Of the content in the archive; bytes.
    size: u64,
    device: Option<(u32, u32)>,
    meta: Meta,
}

impl<'a> Head<'a> {
    fn new(kind: EntryType, name: &'a [u8], meta: Meta) -> Self {
        Self { kind, name, target: b"", size: 0, device: None, meta }
    }
}

/// The records of an extended header.
#[derive(Default)]
struct Records(Vec<u8>);

impl Records {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        // A record begins with its length, those digits included.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        self.0.extend_from_slice(length.to_string().as_bytes());
        for part in [b" ", key, b"=", value, b"\n"] {
            self.0.extend_from_slice(part);
        }
    }

    /// The attributes of a file. Those that vanish meanwhile are left out.
    fn attributes(&mut self, file: &impl AsFd) -> Result<(), Errno> {
        for name in xattr::names(file)?.iter().filter(|name| is_portable(name)) {
            if let Some(value) = xattr::value(file, name)? {
                self.add(&attribute_key(name.to_bytes()), &value);
            }
            if self.0.len() > ATTRIBUTES_BYTES_MAX {
                return Err(Errno::TOOBIG);
            }
        }
        Ok(())
    }
}

/// A key ends at the first `=`, so that is escaped, as GNU tar does.
fn attribute_key(name: &[u8]) -> Vec<u8> {
    let mut key = b"SCHILY.xattr.".to_vec();
    for byte in name {
        match byte {
            b'%' => key.extend_from_slice(b"%25"),
            b'=' => key.extend_from_slice(b"%3D"),
            byte => key.push(*byte),
        }
    }
    key
}

/// Seconds since the epoch with their fraction. What the kernel counts up from whole seconds is counted down before it.
fn seconds(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (..0, _) => format!("-{}.{:09}", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds),
        _ => format!("{seconds}.{nanoseconds:09}"),
    }
}

/// Makes entries of what the upper has.
struct Framer<'a> {
    layer: &'a Layer,
    upper: OwnedFd,
    go_on: &'a GoOn<'a>,
    pieces: Pieces,
    /// The first names of files that have several.
    links: HashMap<FileId, Vec<u8>>,
    buffer: Vec<u8>,
}

impl Framer<'_> {
    /// An empty file that means something.
    fn mark(&mut self, name: &[u8]) -> Result<(), FileError> {
        let meta = Meta { mode: 0o644, ..Meta::default() };
        self.head(&Head::new(EntryType::Regular, name, meta), Records::default())
    }

    /// What is gone by now is left out.
    fn entry(&mut self, change: &Change) -> Result<(), FileError> {
        let (below, stat) = (&*change.below, &change.stat);
        let kind = match kind(stat) {
            FileType::RegularFile => return self.regular(below),
            FileType::Symlink => EntryType::Symlink,
            FileType::Directory => EntryType::Directory,
            FileType::Fifo => EntryType::Fifo,
            FileType::CharacterDevice => EntryType::Char,
            FileType::BlockDevice => EntryType::Block,
            _ => return Ok(()),
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let Some(held) =
            self.if_any("openat2", below, open_below(&self.upper, below, flags, Mode::empty()))?
        else {
            return Ok(());
        };
        let mut records = Records::default();
        self.attributes(below, &held, &mut records)?;
        let mut target = Vec::new();
        if kind == EntryType::Symlink {
            let read = match rustix::fs::readlinkat(&held, "", Vec::new()) {
                // It is no link any more.
                Err(Errno::INVAL) => Err(Errno::NOENT),
                read => read,
            };
            let Some(read) = self.if_any("readlinkat", below, read)? else { return Ok(()) };
            target = read.into_bytes();
        }
        if kind == EntryType::Directory {
            let name = [if below.is_empty() { b"." } else { below }, b"/"].concat();
            return self.head(&Head::new(kind, &name, Meta::of(stat)), records);
        }
        if self.link(below, stat)? {
            return Ok(());
        }
        let is_device = matches!(kind, EntryType::Char | EntryType::Block);
        let device = is_device.then_some((stat.stx_rdev_major, stat.stx_rdev_minor));
        let head = Head { target: &target, device, ..Head::new(kind, below, Meta::of(stat)) };
        self.head(&head, records)
    }

    fn regular(&mut self, below: &[u8]) -> Result<(), FileError> {
        let opened = open_regular_below(&self.upper, below);
        let Some(file) = self.if_any("open", below, opened)? else { return Ok(()) };
        // As it is now: it may have been written to since it was found.
        let stat = stat(&file, shown(self.layer, below))?;
        if self.link(below, &stat)? {
            return Ok(());
        }
        let mut records = Records::default();
        self.attributes(below, &file, &mut records)?;
        let size = stat.stx_size;
        let meta = Meta::of(&stat);
        if stat.stx_blocks.saturating_mul(512) < size {
            let parts = self.parts(below, &file, size)?;
            if *parts != [(0, size)] {
                return self.sparse(below, &file, meta, size, &parts, records);
            }
        }
        self.head(&Head { size, ..Head::new(EntryType::Regular, below, meta) }, records)?;
        self.content(below, &file, 0, size)?;
        self.pad(size)
    }

    /// A file with holes, in version 1.0 of GNU tar's format: a list of the parts with data comes first.
    fn sparse(
        &mut self,
        below: &[u8],
        file: &File,
        meta: Meta,
        size: u64,
        parts: &[(u64, u64)],
        mut records: Records,
    ) -> Result<(), FileError> {
        let mut list = format!("{}\n", parts.len());
        for (start, length) in parts {
            list.push_str(&format!("{start}\n{length}\n"));
        }
        let mut list = list.into_bytes();
        list.resize(list.len().next_multiple_of(BLOCK_BYTES as usize), 0);
        let data: u64 = parts.iter().map(|(_, length)| length).sum();
        records.add(b"GNU.sparse.major", b"1");
        records.add(b"GNU.sparse.minor", b"0");
        records.add(b"GNU.sparse.name", below);
        records.add(b"GNU.sparse.realsize", size.to_string().as_bytes());
        let (parent, name) = split_below(below);
        let stored = in_directory(parent, &[b"GNUSparseFile.0/", name.as_bytes()].concat());
        let size = list.len() as u64 + data;
        self.head(&Head { size, ..Head::new(EntryType::Regular, &stored, meta) }, records)?;
        self.pieces.put(&list)?;
        for (start, length) in parts {
            self.content(below, file, *start, *length)?;
        }
        self.pad(data)
    }

    /// The parts of a file that are no holes, as start and length. A hole at the end is marked by an empty part.
    fn parts(&self, below: &[u8], file: &File, size: u64) -> Result<Vec<(u64, u64)>, FileError> {
        let seek = |to| match rustix::fs::seek(file, to) {
            Err(Errno::NXIO) => Ok(None),
            other => other.map(Some).call("lseek", shown(self.layer, below)),
        };
        let mut parts = Vec::new();
        let (mut at, mut filled) = (0, 0);
        while at < size {
            (self.go_on)()?;
            let Some(start) = seek(SeekFrom::Data(at))?.filter(|start| *start < size) else { break };
            let Some(end) = seek(SeekFrom::Hole(start))?.map(|end| end.min(size)) else { break };
            join(&mut parts, (start, end.saturating_sub(start)), filled);
            // Whoever writes to it meanwhile must not keep this going.
            at = end.max(start + 1);
            while parts.len() > PARTS_MAX {
                filled = (filled * 2).max(4096);
                if filled > FILLED_HOLE_BYTES_MAX {
                    let path = shown(self.layer, below);
                    return Err(FileError::refused(path, Class::TooLarge, "has too many holes"));
                }
                let all = std::mem::take(&mut parts);
                all.into_iter().for_each(|part| join(&mut parts, part, filled));
            }
        }
        if parts.last().is_none_or(|(start, length)| start + length < size) {
            parts.push((size, 0));
        }
        Ok(parts)
    }

    /// As many bytes as have been told, whatever the file has by now.
    fn content(&mut self, below: &[u8], file: &File, start: u64, length: u64) -> Result<(), FileError> {
        let end = start.saturating_add(length);
        let mut at = start;
        while at < end {
            (self.go_on)()?;
            let wanted = (end - at).min(PIECE_BYTES as u64) as usize;
            let buffer = self.buffer.get_mut(..wanted).unwrap_or_default();
            let read = match file.read_at(buffer, at) {
                Ok(0) => {
                    buffer.fill(0);
                    wanted
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                read => read.call("pread64", shown(self.layer, below))?,
            };
            self.pieces.put(buffer.get(..read).unwrap_or_default())?;
            at += read as u64;
        }
        Ok(())
    }

    /// Makes a link of a file that is in the archive already; notes one that may come again.
    fn link(&mut self, below: &[u8], stat: &Statx) -> Result<bool, FileError> {
        if stat.stx_nlink < 2 {
            return Ok(false);
        }
        if let Some(first) = self.links.get(&identity(stat)).cloned() {
            let head = Head { target: &first, ..Head::new(EntryType::Link, below, Meta::of(stat)) };
            return self.head(&head, Records::default()).map(|()| true);
        }
        self.links.insert(identity(stat), below.to_vec());
        Ok(false)
    }

    fn attributes(&self, below: &[u8], file: &impl AsFd, records: &mut Records) -> Result<(), FileError> {
        let path = shown(self.layer, below);
        match records.attributes(file) {
            Err(Errno::TOOBIG) => Err(FileError::refused(
                path,
                Class::TooLarge,
                "has more in attributes than a layer can carry",
            )),
            read => read.call("getxattr", path),
        }
    }

    fn if_any<T>(
        &self,
        call: &'static str,
        below: &[u8],
        result: Result<T, Errno>,
    ) -> Result<Option<T>, FileError> {
        match result {
            Err(errno) if is_gone(errno) => Ok(None),
            other => other.map(Some).call(call, shown(self.layer, below)),
        }
    }

    fn head(&mut self, head: &Head<'_>, mut records: Records) -> Result<(), FileError> {
        let mut header = Header::new_ustar();
        header.set_entry_type(head.kind);
        header.set_size(head.size);
        let meta = head.meta;
        header.set_mode(meta.mode);
        header.set_uid(meta.uid.min(ID_MAX).into());
        header.set_gid(meta.gid.min(ID_MAX).into());
        let whole = u64::try_from(meta.seconds).unwrap_or(0).min(SIZE_MAX);
        header.set_mtime(whole);
        let has_room = match header.as_ustar_mut() {
            Some(fields) => (fill(&mut fields.name, head.name), fill(&mut fields.linkname, head.target)),
            None => (false, false),
        };
        let (major, minor) = head.device.unwrap_or_default();
        let path = shown(self.layer, head.name);
        header.set_device_major(major).and_then(|()| header.set_device_minor(minor)).call("pack", path)?;
        header.set_cksum();
        if !has_room.0 {
            records.add(b"path", head.name);
        }
        if !has_room.1 {
            records.add(b"linkpath", head.target);
        }
        if head.size > SIZE_MAX {
            records.add(b"size", head.size.to_string().as_bytes());
        }
        for (key, id) in [(b"uid", meta.uid), (b"gid", meta.gid)].into_iter().filter(|(_, id)| *id > ID_MAX) {
            records.add(key, id.to_string().as_bytes());
        }
        if meta.nanoseconds > 0 || i64::try_from(whole) != Ok(meta.seconds) {
            records.add(b"mtime", seconds(meta.seconds, meta.nanoseconds).as_bytes());
        }
        self.records(&records)?;
        self.pieces.put(header.as_bytes())
    }

    fn records(&mut self, records: &Records) -> Result<(), FileError> {
        if records.0.is_empty() {
            return Ok(());
        }
        let size = records.0.len() as u64;
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        if let Some(fields) = header.as_ustar_mut() {
            fill(&mut fields.name, b"PaxHeaders");
        }
        header.set_cksum();
        self.pieces.put(header.as_bytes())?;
        self.pieces.put(&records.0)?;
        self.pad(size)
    }

    /// Fills the last block of `size` bytes.
    fn pad(&mut self, size: u64) -> Result<(), FileError> {
        let missing = size.next_multiple_of(BLOCK_BYTES) - size;
        let zeros = [0; BLOCK_BYTES as usize];
        self.pieces.put(zeros.get(..missing as usize).unwrap_or_default())
    }
}

/// Adds a part, as one with the last where the hole between them is small.
fn join(parts: &mut Vec<(u64, u64)>, (start, length): (u64, u64), filled: u64) {
    match parts.last_mut() {
        Some((last, last_length)) if start - (*last + *last_length) <= filled => {
            *last_length = start + length - *last;
        }
        _ => parts.push((start, length)),
    }
}

/// Writes what has room into a field; whether all has.
fn fill(field: &mut [u8], bytes: &[u8]) -> bool {
    field.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
    bytes.len() <= field.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::trial::{GO_ON, Overlay, run, set_attribute};
    use flate2::read::GzDecoder;
    use std::collections::{BTreeMap, BTreeSet};
    use std::ffi::OsStr;
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::io::Read;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use std::os::unix::net::UnixListener;
    use std::path::{Path, PathBuf};
    use std::{fs, process::Command};

    fn packed(layer: &Layer, only: &[&str]) -> Result<Vec<u8>, FileError> {
        let only: Vec<Vec<u8>> = only.iter().map(|path| path.as_bytes().to_vec()).collect();
        let mut bytes = Vec::new();
        write(layer, &only, &mut bytes, GO_ON).map(|()| bytes)
    }

    fn unpacked(bytes: &[u8]) -> Vec<u8> {
        let mut tar = Vec::new();
        GzDecoder::new(bytes).read_to_end(&mut tar).unwrap();
        tar
    }

    /// The names in an archive, in order.
    fn members(bytes: &[u8]) -> Vec<Vec<u8>> {
        let tar = unpacked(bytes);
        let mut archive = tar::Archive::new(&*tar);
        archive.entries().unwrap().map(|entry| entry.unwrap().path_bytes().into_owned()).collect()
    }

    fn names(bytes: &[u8]) -> Vec<String> {
        members(bytes).iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    }

    /// Applies a layer to a directory, as image-spec has it, with GNU tar.
    fn apply(bytes: &[u8], to: &Path) {
        for name in members(bytes) {
            let (parent, name) = split_below(&name);
            let dir = to.join(OsStr::from_bytes(parent));
            let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) else { continue };
            let hidden: Vec<PathBuf> = match name.as_bytes() == OPAQUE {
                true => {
                    fs::read_dir(&dir).map_or(Vec::new(), |all| all.map(|one| one.unwrap().path()).collect())
                }
                false => vec![dir.join(OsStr::from_bytes(hidden))],
            };
            for path in hidden {
                match fs::symlink_metadata(&path).unwrap().is_dir() {
                    true => fs::remove_dir_all(&path).unwrap(),
                    false => fs::remove_file(&path).unwrap(),
                }
            }
        }
        let archive = to.with_extension("tgz");
        fs::write(&archive, bytes).unwrap();
        let mut tar = Command::new("tar");
        tar.args([
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "--warning=no-timestamp",
            "--exclude=.wh.*",
            "-xpzf",
        ]);
        let output = tar.arg(&archive).arg("-C").arg(to).output().unwrap();
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && complaints.is_empty(), "{complaints}");
    }

    /// All that is to be the same of an entry.
    #[derive(Debug, PartialEq, Eq)]
    struct Facts {
        mode: u32,
        owner: (u32, u32),
        modified: (i64, i64),
        device: u64,
        content: (u64, u64),
        blocks: Option<u64>,
        target: Option<PathBuf>,
        attributes: BTreeMap<String, Vec<u8>>,
        also_called: BTreeSet<PathBuf>,
    }

    fn facts(root: &Path) -> BTreeMap<PathBuf, Facts> {
        let mut facts = BTreeMap::new();
        let mut called: HashMap<(u64, u64), BTreeSet<PathBuf>> = HashMap::new();
        let mut ids = Vec::new();
        let mut dirs = vec![root.to_path_buf()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let below = path.strip_prefix(root).unwrap().to_path_buf();
                if metadata.is_dir() {
                    dirs.push(path.clone());
                } else {
                    let id = (metadata.dev(), metadata.ino());
                    called.entry(id).or_default().insert(below.clone());
                    ids.push((below.clone(), id));
                }
                let fd = held(&path);
                let value = |name| xattr::value(&fd, name).unwrap().unwrap();
                let attributes = xattr::names(&fd).unwrap();
                let attributes = attributes.iter().filter(|name| is_portable(name));
                let mut hasher = DefaultHasher::new();
                if metadata.is_file() {
                    fs::read(&path).unwrap().hash(&mut hasher);
                }
                let is_sparse = metadata.is_file() && metadata.blocks() * 512 < metadata.len();
                let known = Facts {
                    mode: metadata.mode(),
                    owner: (metadata.uid(), metadata.gid()),
                    modified: (metadata.mtime(), metadata.mtime_nsec()),
                    device: if is_device(&metadata) { metadata.rdev() } else { 0 },
                    content: (if metadata.is_dir() { 0 } else { metadata.len() }, hasher.finish()),
                    blocks: is_sparse.then(|| metadata.blocks()),
                    target: fs::read_link(&path).ok(),
                    attributes: attributes
                        .map(|name| (name.to_string_lossy().into_owned(), value(name)))
                        .collect(),
                    also_called: BTreeSet::new(),
                };
                facts.insert(below, known);
            }
        }
        for (below, id) in ids {
            facts.get_mut(&below).unwrap().also_called = called[&id].clone();
        }
        facts
    }

    fn is_device(metadata: &fs::Metadata) -> bool {
        metadata.file_type().is_char_device() || metadata.file_type().is_block_device()
    }

    fn held(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// Applies the diff to a copy of the lower and compares that with what the session sees.
    fn assert_round_trip(overlay: &Overlay, left_out: &[&str]) -> Vec<u8> {
        let copy = overlay.path("copy");
        run(&overlay.path(""), "rm -rf copy; cp -a lower copy");
        let bytes = packed(&overlay.layer(), &[]).unwrap();
        apply(&bytes, &copy);
        let (mut expected, found) = (facts(&overlay.merged()), facts(&copy));
        for name in left_out {
            assert!(expected.remove(Path::new(name)).is_some(), "{name}");
        }
        for (path, facts) in &expected {
            assert_eq!(found.get(path), Some(facts), "{}", path.display());
        }
        assert_eq!(expected.len(), found.len(), "{:?} {:?}", expected.keys(), found.keys());
        let measured = measure(&overlay.layer(), &[], GO_ON).unwrap();
        assert_eq!(measured.entries, members(&bytes).len() as u64);
        let length = unpacked(&bytes).len() as u64;
        assert!(measured.bytes <= length && length < measured.bytes + 2048 * (measured.entries + 1));
        bytes
    }

    const LOWER: &str = "mkdir -p keep/deep gone/inner again/sub again/same dir-file dir-link dir-mode dir-owner dir-attr
        touch -d '2001-02-03 04:05:06.789' keep/a keep/deep/b gone/inner/x again/old again/same/x again/sub/y dir-file/x
        for name in modified deleted file-dir file-link mode owner attr socket touched; do echo $name > $name; done
        ln -s keep/a link-changed; ln -s keep link-dir; mkfifo fifo-file
        echo linked > hard-1; ln hard-1 hard-2; echo linked > pair-1; ln pair-1 pair-2; chmod 2755 dir-mode";

    const CHANGES: &str = r#"
        echo new > new; mkdir -p new-dir/sub; echo x > new-dir/sub/x; echo more >> modified; rm deleted
        rm -r gone; rm -r again; mkdir again; echo other > again/old; mkdir again/same again/third; touch again/same/y
        rm -r dir-file; echo file > dir-file; rm file-dir; mkdir file-dir; echo in > file-dir/in
        rm -r dir-link; ln -s keep dir-link; rm link-dir; mkdir link-dir; touch link-dir/a
        rm file-link; ln -s modified file-link; ln -sfn "$(printf 't%.0s' {1..300})" link-changed
        chmod 1777 dir-mode; chown 12:34 dir-owner; chmod 600 mode; chown 3000000:4000000 owner
        rm fifo-file; echo file > fifo-file; mkfifo fifo; mknod device c 1 3; mknod block b 7 200
        echo again >> hard-1; echo a > linked-1; ln linked-1 linked-2; ln linked-1 keep/deep/linked-3
        ln -s nowhere soft-1; ln soft-1 soft-2
        truncate -s 64M sparse; for at in 1 40; do printf island | dd of=sparse bs=1M seek=$at conv=notrunc; done
        truncate -s 1M hole; truncate -s 1M tail; printf end >> tail; truncate -s 3000001 head; printf start | dd of=head conv=notrunc
        head -c 1000000 /dev/urandom > random; : > empty; head -c 512 /dev/urandom > block-sized
        long=$(printf 'n%.0s' {1..230}); echo long > $long; mkdir -p $long-dir/$long/$long; echo deep > $long-dir/$long/$long/x
        ln -s $long-dir/$long/$long/x $long-dir/soft; ln $long-dir/$long/$long/x $long-dir/hard
        truncate -s 100k $long-dir/$long/hole
        echo bad > $'bad\xff\xfename'; ln -s $'\xff' $'link\xfe'; truncate -s 100k $'hole\xfe'
        echo line > $'new\nline'; echo space > ' leading'; echo dash > -dash
        cp /bin/true setuid; chmod 4755 setuid; cp /bin/true setgid; chown :7 setgid; chmod 6711 setgid; mkdir -m 1777 sticky
        printf 'n%.0s' {1..100} | xargs touch; printf 'm%.0s' {1..99} | xargs mkdir
        touch -d '1960-01-01 00:00:00.25Z' old; touch -d @-0.5 just-before; touch -d @0 epoch; touch -hd @-7 soft-1
        touch -d '2200-01-01 00:00:00.000000001Z' touched; touch -d '1999-01-01' keep/deep dir-attr
    "#;

    #[test]
    fn a_diff_makes_of_the_lower_what_the_session_sees() {
        let Some(overlay) = Overlay::new(LOWER) else { return };
        overlay.change(CHANGES);
        let merged = overlay.merged();
        set_attribute(&merged.join("attr"), c"user.x", b"value");
        set_attribute(&merged.join("new"), c"user.odd=%name", b"\0\n=\xff");
        set_attribute(&merged.join("new"), c"user.empty", b"");
        set_attribute(&merged.join("dir-attr"), c"user.x", &[b'v'; 2000]);
        set_attribute(&merged.join("sparse"), c"user.x", b"sparse");
        set_attribute(&merged.join("file-link"), c"trusted.on-link", b"1");
        set_attribute(&merged.join("fifo"), c"trusted.on-fifo", b"1");
        let _new = UnixListener::bind(merged.join("socket-new")).unwrap();
        fs::remove_file(merged.join("socket")).unwrap();
        let _over = UnixListener::bind(merged.join("socket")).unwrap();
        let bytes = assert_round_trip(&overlay, &["socket", "socket-new"]);
        assert!(unpacked(&bytes).len() < 10 << 20);
        let blocks = |name: &str| facts(&merged).get(Path::new(name)).unwrap().blocks;
        assert!(blocks("sparse").is_some_and(|blocks| blocks < 64), "the file system has no holes");
    }

    #[test]
    fn whiteouts_come_before_what_they_make_room_for() {
        let Some(overlay) = Overlay::new(
            "mkdir again dir-file m untouched; touch again/x dir-file/x file-dir m/a m/z untouched/x gone
            touch -d 2001-02-03 untouched",
        ) else {
            return;
        };
        overlay.change(
            "rm -r again dir-file; mkdir again; touch again/x again/a dir-file; rm file-dir; mkdir file-dir
            rm m/z gone; touch m/b untouched/temporary; rm untouched/temporary
            touch -d 2001-02-03 untouched",
        );
        let layer = overlay.layer();
        assert_eq!(
            names(&packed(&layer, &[]).unwrap()),
            [
                "./",
                ".wh.gone",
                "again/",
                "again/.wh..wh..opq",
                "again/a",
                "again/x",
                ".wh.dir-file",
                "dir-file",
                ".wh.file-dir",
                "file-dir/",
                "m/",
                "m/.wh.z",
                "m/b",
                "untouched/",
            ]
        );
        assert_eq!(
            names(&packed(&layer, &["m/z", "again/x"]).unwrap()),
            ["again/", "again/x", "m/", "m/.wh.z"]
        );
        assert_round_trip(&overlay, &[]);
    }

    #[test]
    fn hostile_uppers_change_nothing_outside_and_bring_no_marks() {
        let Some(overlay) = Overlay::new("mkdir d real; touch d/x real/x; ln -s real link") else { return };
        overlay.change("rm link; mkdir link; touch link/y");
        let upper = overlay.upper();
        fs::create_dir(upper.join("d")).unwrap();
        for name in ["d", "d/own", "link"] {
            if name == "d/own" {
                fs::write(upper.join(name), "own").unwrap();
            }
            let path = upper.join(name);
            set_attribute(&path, c"user.overlay.redirect", b"/real");
            set_attribute(&path, c"user.overlay.opaque", b"y");
            set_attribute(&path, c"user.overlay.overlay.opaque", b"y");
            set_attribute(&path, c"trusted.overlay.redirect", b"/../../etc");
            set_attribute(&path, c"trusted.overlay.metacopy", b"");
            set_attribute(&path, c"trusted.overlay.overlay.opaque", b"y");
            set_attribute(&path, c"user.kept", b"y");
        }
        let bytes = packed(&overlay.layer(), &[]).unwrap();
        assert_eq!(names(&bytes), ["./", "d/", "d/own", ".wh.link", "link/", "link/y"]);
        let tar = unpacked(&bytes);
        assert!(!tar.windows(8).any(|bytes| bytes == b".overlay"));
        assert_eq!(tar.windows(9).filter(|bytes| bytes == b"user.kept").count(), 3);
        let copy = overlay.path("copy");
        run(&overlay.path(""), "cp -a lower copy");
        apply(&bytes, &copy);
        run(&copy, "test -e d/x; test \"$(ls real)\" = x; test \"$(ls link)\" = y; test ! -L link");
    }

    #[test]
    fn names_that_a_layer_cannot_have_and_depth_are_refused() {
        let Some(overlay) = Overlay::new("touch .wh.kept .wh.deleted; mkdir d") else { return };
        let layer = overlay.layer();
        let check = |only: &[&str], class: Class, word: &str| {
            let only_bytes: Vec<Vec<u8>> = only.iter().map(|path| path.as_bytes().to_vec()).collect();
            let measured = measure(&layer, &only_bytes, GO_ON).unwrap_err();
            let written = packed(&layer, only).unwrap_err();
            assert_eq!((measured.class(), written.class()), (class, class));
            assert!(measured.to_string().contains(word) && written.to_string().contains(word), "{written}");
        };
        overlay.change("touch d/.wh.x");
        check(&[], Class::Conflict, "/inside/d/.wh.x");
        overlay.change("rm d/.wh.x; mkdir .wh.dir");
        check(&[], Class::Conflict, "/inside/.wh.dir");
        packed(&layer, &["d"]).unwrap();
        overlay.change("rmdir .wh.dir; rm .wh.deleted");
        check(&[], Class::Conflict, "/inside/.wh.deleted");
        overlay.nest(20, 250);
        check(&["n".repeat(250).as_str()], Class::Invalid, "too deeply");
    }

    /// Does something at the first write.
    struct Meddling<F>(Vec<u8>, Option<F>);

    impl<F: FnOnce() -> io::Result<()>> Write for Meddling<F> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.take().map_or(Ok(()), |meddle| meddle())?;
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn files_that_change_meanwhile_do_not_break_the_archive() {
        let Some(overlay) = Overlay::new("") else { return };
        overlay.change(
            "head -c 8M /dev/urandom > a; for i in 1 2 3; do head -c 1M /dev/urandom > b$i; done; mkdir c
            touch c/x d; mkfifo e",
        );
        let meddle = || {
            overlay.change(
                "truncate -s 1M a; rm b1 b2; mkdir b2; head -c 1M /dev/zero >> b3; rm -r c; rm d; mkfifo d",
            );
            Ok(())
        };
        let mut to = Meddling(Vec::new(), Some(meddle));
        write(&overlay.layer(), &[], &mut to, GO_ON).unwrap();
        let tar = unpacked(&to.0);
        let mut archive = tar::Archive::new(&*tar);
        let found: Vec<(String, u64)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let length = io::copy(&mut entry, &mut io::sink()).unwrap();
                (entry.path().unwrap().display().to_string(), length)
            })
            .collect();
        assert!(found.contains(&("a".to_owned(), 8 << 20)));
        assert!(found.contains(&("b3".to_owned(), 2 << 20)) && found.contains(&("e".to_owned(), 0)));
        assert!(!found.iter().any(|(name, _)| name.starts_with("b1") || name == "d"), "{found:?}");
    }

    #[test]
    fn what_has_failed_has_no_end() {
        let Some(overlay) = Overlay::new("") else { return };
        overlay.change("head -c 8M /dev/urandom > -before; touch .wh.x");
        let layer = overlay.layer();
        let mut bytes = Vec::new();
        assert_eq!(write(&layer, &[], &mut bytes, GO_ON).unwrap_err().class(), Class::Conflict);
        assert!(GzDecoder::new(&*bytes).read_to_end(&mut Vec::new()).is_err());
        // A client that has gone, and work that nobody wants any more.
        let mut gone = Meddling(Vec::new(), Some(|| Err(io::ErrorKind::BrokenPipe.into())));
        assert!(write(&layer, &[], &mut gone, GO_ON).is_err());
        assert!(gone.0.is_empty());
        let count = std::cell::Cell::new(0);
        let go_on = || {
            count.set(count.get() + 1);
            if count.get() > 3 { Err(FileError::Cancelled) } else { Ok(()) }
        };
        assert!(matches!(write(&layer, &[], &mut Vec::new(), &go_on), Err(FileError::Cancelled)));
    }

    #[test]
    fn of_too_many_holes_the_small_ones_are_filled() {
        let Some(overlay) = Overlay::new("") else { return };
        let layer = overlay.layer();
        let parts = |name: &str, islands: u64, distance: u64| {
            let path = overlay.merged().join(name);
            let file = File::create(&path).unwrap();
            for island in 0..islands {
                file.write_all_at(&[1], island * distance).unwrap();
            }
            file.set_len(islands * distance).unwrap();
            let (sender, _pieces) = sync_channel(1);
            let framer = Framer {
                layer: &layer,
                upper: overlay.layer().upper,
                go_on: GO_ON,
                pieces: Pieces { sender, piece: Vec::new() },
                links: HashMap::new(),
                buffer: Vec::new(),
            };
            framer.parts(name.as_bytes(), &file, islands * distance)
        };
        let few = parts("few", 3, 16384).unwrap();
        assert_eq!(few, [(0, 4096), (16384, 4096), (32768, 4096), (49152, 0)]);
        let max = PARTS_MAX as u64;
        assert_eq!(parts("enough", max, 16384).unwrap().len(), PARTS_MAX + 1);
        let length = max * 16384 + 4096;
        assert_eq!(parts("many", max + 1, 16384).unwrap(), [(0, length), (length + 12288, 0)]);
        let error = parts("far", max + 1, 4 << 20).unwrap_err();
        assert_eq!(error.class(), Class::TooLarge);
    }

    #[test]
    fn times_count_down_before_the_epoch() {
        assert_eq!(seconds(0, 0), "0");
        assert_eq!(seconds(12, 3_000_000), "12.003000000");
        assert_eq!(seconds(-1, 0), "-1");
        assert_eq!(seconds(-1, 500_000_000), "-0.500000000");
        assert_eq!(seconds(-2, 999_999_999), "-1.000000001");
        assert_eq!(seconds(i64::MIN, 1), "-9223372036854775807.999999999");
    }

    #[test]
    fn records_know_their_length() {
        for length in [0, 1, 85, 86, 87, 88, 89, 90, 91, 984, 985, 986, 987, 988, 989, 990, 9979, 9990] {
            let mut records = Records::default();
            records.add(b"key", &vec![b'v'; length]);
            let text = String::from_utf8(records.0).unwrap();
            let (told, _) = text.split_once(' ').unwrap();
            assert_eq!(told.parse(), Ok(text.len()), "{length}");
        }
    }
}
