//! What happens to files, by inotify(7) on the session's own view.
//!
//! inotify watches directories one by one and not their contents, so a watch of a tree is one of every directory in
//! it: those that are there, and those that appear. What appears in a new directory before it is watched is found by
//! reading it, and told as well.

use super::error::{Call, Class, FileError};
use super::path::RootedPath;
use super::tree::{
    DIRECTORY, FileId, Last, Worker, identity, kind, open_below, proc_path, refuse_kernel, stat, stat_entry,
};
use super::walk::{Order, Walk};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FileType, Mode};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

/// Directories that one watch may cover.
pub const DIRECTORIES_MAX: usize = 16 * 1024;
/// Bytes of events that are read at once.
const EVENTS_BYTES: usize = 64 * 1024;
/// Changes told at once; what is left is read next.
const BATCH_MAX: usize = 4096;

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is there now.
    Created,
    /// Its content, mode, owner or times are others.
    Modified,
    /// It is gone, or has been moved to where nobody watches.
    Removed,
    /// It has another path.
    Moved,
    /// So much has happened that some was lost; whoever needs to know has to look.
    Overflow,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What has happened.
    pub kind: ChangeKind,
    /// To what; absolute.
    pub path: String,
    /// Where it was before; only if moved.
    pub from: Option<String>,
    /// Whether it is a directory.
    pub is_directory: bool,
}

/// A watch. Readiness shows on its descriptor.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    root: RootedPath,
    /// The root's device and inode. It is not kept open: that would keep the news of its end from coming.
    identity: FileId,
    /// The one name that counts, where a file is watched.
    only: Option<Vec<u8>>,
    directories: HashMap<i32, Vec<u8>>,
    /// What left a directory, until it is known whether it arrives in another.
    leaving: Option<Leaving>,
    /// Told already, though the event is still to come.
    told: HashSet<Vec<u8>>,
    /// The watched directory itself is gone.
    ended: bool,
}

#[derive(Debug)]
struct Leaving {
    cookie: u32,
    below: Vec<u8>,
    is_directory: bool,
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl Worker<'_> {
    /// Watches a directory with all that is below it, or a single file.
    ///
    /// # Errors
    /// When there is nothing to watch, or the machine's limits are reached ([`Class::Busy`]).
    pub fn watch(&self, text: &str) -> Result<Watch, FileError> {
        let path = self.path(text)?;
        let node = self.node(&path, Last::Follow)?;
        let (root, only) = match kind(&node.stat) {
            FileType::Directory => (path, None),
            _ => {
                let (parent, name) = path.split()?;
                (parent, Some(name.as_bytes().to_vec()))
            }
        };
        let inotify =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).call("inotify_init1", &root)?;
        let base = self.readable_directory(&root)?;
        let identity = identity(&stat(&base, &root)?);
        drop(base);
        let mut watch = Watch {
            inotify,
            root,
            identity,
            only,
            directories: HashMap::new(),
            leaving: None,
            told: HashSet::new(),
            ended: false,
        };
        watch.add(self, b"")?;
        if watch.only.is_none() {
            watch.add_below(self, b"", &mut |_, _| {})?;
        }
        Ok(watch)
    }
}

impl Watch {
    /// Whether something has left a directory and may arrive in another in the next moment.
    pub fn is_undecided(&self) -> bool {
        self.leaving.is_some()
    }

    /// Whether there is nothing left to watch.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What has happened since; empty, if nothing has. With `decide`, what has left and not arrived counts as
    /// removed.
    ///
    /// # Errors
    /// When inotify fails.
    pub fn read(&mut self, worker: &Worker<'_>, decide: bool) -> Result<Vec<Change>, FileError> {
        let mut changes = Vec::new();
        let mut buffer = vec![MaybeUninit::uninit(); EVENTS_BYTES];
        let events = self.inotify.try_clone().call("dup", &self.root)?;
        let mut reader = inotify::Reader::new(events, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_bytes().to_vec());
                    self.note(worker, event.wd(), event.events(), event.cookie(), name, &mut changes);
                }
                Err(Errno::AGAIN) => {
                    self.told.clear();
                    break;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).call("read", &self.root),
            }
            if changes.len() >= BATCH_MAX && reader.is_buffer_empty() {
                break;
            }
        }
        if decide {
            self.left(&mut changes);
        }
        Ok(changes)
    }

    fn note(
        &mut self,
        worker: &Worker<'_>,
        wd: i32,
        events: ReadFlags,
        cookie: u32,
        name: Option<Vec<u8>>,
        changes: &mut Vec<Change>,
    ) {
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            changes.push(self.overflow());
            return;
        }
        let Some(dir) = self.directories.get(&wd).cloned() else { return };
        if events.contains(ReadFlags::IGNORED) {
            self.directories.remove(&wd);
            return;
        }
        let is_directory = events.contains(ReadFlags::ISDIR);
        let Some(name) = name else {
            if dir.is_empty()
                && events.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT)
            {
                self.left(changes);
                changes.push(self.change(ChangeKind::Removed, b"", true));
                self.ended = true;
            }
            return;
        };
        if self.only.as_ref().is_some_and(|only| *only != name) {
            return;
        }
        let below = join(&dir, &name);
        if is_nameless(&name) && !self.is_there(worker, &dir, &name) {
            return;
        }
        if events.contains(ReadFlags::MOVED_TO)
            && let Some(leaving) = self.leaving.take_if(|leaving| leaving.cookie == cookie)
        {
            self.rename(&leaving.below, &below);
            let from = Some(self.shown(&leaving.below));
            changes.push(Change { from, ..self.change(ChangeKind::Moved, &below, is_directory) });
            // It may have moved on before it could be watched where it appeared.
            if is_directory && self.only.is_none() && !self.directories.values().any(|dir| *dir == below) {
                self.appeared(worker, &below, changes);
            }
            return;
        }
        self.left(changes);
        if events.contains(ReadFlags::MOVED_FROM) {
            self.leaving = Some(Leaving { cookie, below, is_directory });
        } else if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            if !self.told.remove(&below) {
                changes.push(self.change(ChangeKind::Created, &below, is_directory));
            }
            if is_directory && self.only.is_none() {
                self.appeared(worker, &below, changes);
            }
        } else if events.contains(ReadFlags::DELETE) {
            changes.push(self.change(ChangeKind::Removed, &below, is_directory));
        } else if events.intersects(ReadFlags::MODIFY | ReadFlags::ATTRIB | ReadFlags::CLOSE_WRITE) {
            let change = self.change(ChangeKind::Modified, &below, is_directory);
            // Writers write often.
            if changes.last() != Some(&change) {
                changes.push(change);
            }
        }
    }

    /// Watches a directory that has appeared, and tells what is in it already.
    fn appeared(&mut self, worker: &Worker<'_>, below: &[u8], changes: &mut Vec<Change>) {
        let mut found = Vec::new();
        let added = self.add(worker, below).and_then(|()| {
            self.add_below(worker, below, &mut |below, is_directory| {
                found.push((below.to_vec(), is_directory))
            })
        });
        for (below, is_directory) in found {
            changes.push(self.change(ChangeKind::Created, &below, is_directory));
            self.told.insert(below);
        }
        match added.map_err(|error| error.class()) {
            // Gone again, or not for this session to read.
            Ok(()) | Err(Class::NotFound | Class::Forbidden | Class::Invalid) => {}
            Err(_) => changes.push(self.overflow()),
        }
    }

    /// Nothing has arrived for what has left.
    fn left(&mut self, changes: &mut Vec<Change>) {
        let Some(Leaving { below, is_directory, .. }) = self.leaving.take() else { return };
        let gone: Vec<i32> =
            self.directories.iter().filter(|(_, dir)| is_within(dir, &below)).map(|(wd, _)| *wd).collect();
        for wd in gone {
            self.directories.remove(&wd);
            // It may be gone by itself.
            let _ = inotify::remove_watch(&self.inotify, wd);
        }
        changes.push(self.change(ChangeKind::Removed, &below, is_directory));
    }

    fn rename(&mut self, from: &[u8], to: &[u8]) {
        for dir in self.directories.values_mut() {
            if is_within(dir, from) {
                let rest = dir.get(from.len()..).unwrap_or_default();
                *dir = [to, rest].concat();
            }
        }
    }

    fn add(&mut self, worker: &Worker<'_>, below: &[u8]) -> Result<(), FileError> {
        let path = self.root.join(OsStr::from_bytes(below));
        if self.directories.len() >= DIRECTORIES_MAX {
            let reason = format!("more than {DIRECTORIES_MAX} directories cannot be watched at once");
            return Err(FileError::refused(path, Class::Busy, reason));
        }
        let dir = self.open(worker, below)?;
        refuse_kernel(&dir, &path)?;
        let flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        match inotify::add_watch(&self.inotify, proc_path(&dir), flags) {
            Ok(wd) => {
                self.directories.insert(wd, below.to_vec());
                Ok(())
            }
            // This is what the kernel calls its limit of watches (inotify_add_watch(2)).
            Err(Errno::NOSPC) => Err(FileError::refused(
                path,
                Class::Busy,
                "the machine's limit of inotify watches is reached",
            )),
            Err(errno) => Err(errno).call("inotify_add_watch", &path),
        }
    }

    /// Watches the directories in a directory, and shows everything that is found there.
    fn add_below(
        &mut self,
        worker: &Worker<'_>,
        below: &[u8],
        found: &mut dyn FnMut(&[u8], bool),
    ) -> Result<(), FileError> {
        let dir = self.open(worker, below)?;
        let mut walk =
            Walk::new(dir, Order::Names, usize::MAX, |seen| Ok(Some(seen.kind == FileType::Directory)));
        while let Some(step) = walk.next(&|| worker.go_on()) {
            match step {
                Ok((inner, is_directory)) => {
                    let full = join(below, &inner);
                    found(&full, is_directory);
                    if is_directory {
                        match self.add(worker, &full) {
                            Err(error) if error.class() == Class::Busy => return Err(error),
                            _ => {}
                        }
                    }
                }
                Err(error) if !walk.is_below_root() || error.class() == Class::Cancelled => {
                    return Err(error);
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// A directory below the root, as long as the root's path still leads to it.
    fn open(&self, worker: &Worker<'_>, below: &[u8]) -> Result<OwnedFd, FileError> {
        let path = self.root.join(OsStr::from_bytes(below));
        let base = worker.readable_directory(&self.root)?;
        if identity(&stat(&base, &self.root)?) != self.identity {
            return Err(FileError::refused(&path, Class::NotFound, "is another directory by now"));
        }
        open_below(base, below, DIRECTORY, Mode::empty()).call("openat2", &path)
    }

    fn is_there(&self, worker: &Worker<'_>, dir: &[u8], name: &[u8]) -> bool {
        self.open(worker, dir).is_ok_and(|dir| stat_entry(dir, OsStr::from_bytes(name)).is_ok())
    }

    fn change(&self, kind: ChangeKind, below: &[u8], is_directory: bool) -> Change {
        Change { kind, path: self.shown(below), from: None, is_directory }
    }

    fn overflow(&self) -> Change {
        self.change(ChangeKind::Overflow, b"", true)
    }

    fn shown(&self, below: &[u8]) -> String {
        let path = self.root.join(OsStr::from_bytes(below)).to_string();
        if below.is_empty() && path.len() > 1 { path.trim_end_matches('/').to_owned() } else { path }
    }
}

/// Files without a name (`O_TMPFILE`) are told of as `#` and their inode number, which nobody can open.
fn is_nameless(name: &[u8]) -> bool {
    name.strip_prefix(b"#").is_some_and(|rest| !rest.is_empty() && rest.iter().all(u8::is_ascii_digit))
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

fn is_within(path: &[u8], dir: &[u8]) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}
