//! Commit: what a session has changed becomes the lower's own.
//!
//! The upper is read and stays as it is. Every entry is prepared in full under a passing name in its directory and
//! renamed over what was there, so that at every moment each name has its old content or its new; where a directory and
//! something else change places without the kernel's help, there is one rename between. A commit that was cut off is
//! finished by another: passing names bear the journal's id and are removed first, and what the journal knows to be
//! done is left alone.
//!
//! Both trees are reached through descriptors alone, without links and, in the lower, without entering mounts. What is no
//! longer as the walk has found it is a conflict, never followed elsewhere.
//!
//! A directory is made, or stays, where it is while it is filled, open to its owner alone if it is new, and gets its own
//! attributes after its entries. Sockets and devices are made again as nodes, as `cp -a` does, so that the lower shows
//! what the session saw.

use super::batch::{Batch, Clock, Directory, First, Link, Put, Step};
use super::changes::{Change, Changes, Effect};
use super::clear::clear;
use super::journal::Journal;
use super::layer::Layer;
use super::site::{LOOKUP, Place, Site, is_in};
use super::timestamp::Timestamp;
use crate::files::copy::{self, Like, failed_at};
use crate::files::error::{Call, Class, FileError};
use crate::files::remove::names;
use crate::files::tree::{
    DIRECTORY, FileId, Node, identity, kind, open_below, open_regular_below, open_within, permissions,
    proc_path, rename, split_below, stat, stat_entry, unlink,
};
use crate::files::walk::{BELOW_BYTES_MAX, GoOn, Order, Walk};
use crate::files::xattr;
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, FileType, Mode, RenameFlags, Statx, fchmod, fchown, fsync, futimens, linkat, mkdirat,
    renameat_with,
};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

/// How many paths an answer names; all are counted.
const PATHS_MAX: usize = 1000;

/// What happens to an entry of the lower that somebody else has changed since the session started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnConflict {
    /// It is not looked at.
    Overwrite,
    /// It stays, and everything in it.
    Skip,
    /// Nothing at all is committed.
    Fail,
}

/// What to commit, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Paths below the root, with all that is in them; none for everything.
    pub only: Vec<Vec<u8>>,
    /// What to do about conflicts.
    pub on_conflict: OnConflict,
    /// Whether files keep their set-id bits and capabilities.
    pub keep_privileges: bool,
}

/// Paths, as the session calls them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// The first thousand.
    pub first: Vec<String>,
    /// How many there are.
    pub count: u64,
}

impl Paths {
    fn push(&mut self, path: String) {
        self.count += 1;
        if self.first.len() < PATHS_MAX {
            self.first.push(path);
        }
    }
}

/// What a commit has done.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Entries that were written, removed, or given other attributes; a removed directory counts as one.
    pub applied: u64,
    /// Content that was copied.
    pub bytes: u64,
    /// What was left alone because of a conflict.
    pub skipped: Paths,
    /// What bringing it all to the disk took; microseconds.
    pub fsync_us: u64,
}

/// What a commit would overwrite or remove although somebody else has changed it since the session started.
///
/// # Errors
/// When a tree cannot be read.
pub fn conflicts(
    layer: &Layer,
    options: &Options,
    since: Timestamp,
    own: &Journal,
    go_on: &GoOn<'_>,
) -> Result<Paths, FileError> {
    let site = Site::new(layer, options, since, own, go_on);
    let mut changes = Changes::new(layer, &options.only)?;
    let mut found = Paths::default();
    let mut inside: Option<Vec<u8>> = None;
    while let Some(change) = changes.next(go_on) {
        let change = change?;
        if inside.as_ref().is_some_and(|dir| is_in(dir, &change.below)) || change.below.is_empty() {
            continue;
        }
        if site.conflicts(&change, own)? {
            found.push(site.path(&change.below).display().to_string());
            inside = Some(change.below);
        }
    }
    Ok(found)
}

/// Commits. When it fails, what has been committed until then stays; another commit goes on from there.
///
/// # Errors
/// [`Class::Conflict`] when others have changed the lower; whatever keeps a change from being made in full.
pub fn apply(
    layer: &Layer,
    options: &Options,
    since: Timestamp,
    journal: &mut Journal,
    go_on: &GoOn<'_>,
) -> Result<Outcome, FileError> {
    if options.on_conflict == OnConflict::Fail {
        refuse(&conflicts(layer, options, since, journal, go_on)?)?;
    }
    let site = Site::new(layer, options, since, journal, go_on);
    if journal.is_interrupted() {
        remove_leftovers(&site)?;
    }
    journal.begin()?;
    let mut commit = Commit {
        site,
        journal,
        batch: Batch::default(),
        place: None,
        directories: Vec::new(),
        links: HashMap::new(),
        left_alone: None,
        passing: Vec::new(),
        found_any: false,
        clock: Clock::default(),
        outcome: Outcome::default(),
    };
    if let Err(error) = commit.run() {
        // If even that fails, the journal is not ended, and the next commit tries again.
        let _ = commit.tidy().and_then(|()| commit.journal.end());
        return Err(error);
    }
    commit.journal.end()?;
    commit.outcome.fsync_us = commit.clock.micros();
    Ok(commit.outcome)
}

pub(crate) fn refuse(conflicts: &Paths) -> Result<(), FileError> {
    let Some(first) = conflicts.first.first() else { return Ok(()) };
    let others = match conflicts.count - 1 {
        0 => String::new(),
        others => format!(", and {others} more"),
    };
    let reason = format!("was changed by somebody else since the session started{others}");
    Err(FileError::refused(first, Class::Conflict, reason))
}

/// Removes the passing names that a commit which was cut off has left in the directories that the upper has, too.
fn remove_leftovers(site: &Site<'_>) -> Result<(), FileError> {
    let upper = site.layer.upper.try_clone().call("dup", site.path(b""))?;
    let mut walk = Walk::new(upper, Order::Names, usize::MAX, |seen| {
        Ok((seen.kind == FileType::Directory).then_some(()))
    });
    remove_leftovers_in(site, b"")?;
    while let Some(step) = walk.next(site.go_on) {
        match step {
            Ok((below, ())) => remove_leftovers_in(site, &below)?,
            Err(error) if walk.is_below_root() && error.class() == Class::NotFound => {}
            Err(error) => return Err(site.within(b"", error)),
        }
    }
    Ok(())
}

fn remove_leftovers_in(site: &Site<'_>, below: &[u8]) -> Result<(), FileError> {
    let dir = match open_within(&site.layer.lower, below, DIRECTORY) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG) => return Ok(()),
        opened => opened.call("openat2", site.path(below))?,
    };
    for (name, _) in names(&dir).call("getdents64", site.path(below))? {
        let name = OsStr::from_bytes(name.as_bytes());
        if site.is_passing(name) {
            clear(&dir, name, &site.path(below), site.go_on)?;
        }
    }
    Ok(())
}

/// A directory of the lower that is as it is to be.
struct Finished {
    below: Vec<u8>,
    dir: OwnedFd,
    changed: bool,
}

/// A commit that is going on.
struct Commit<'a> {
    site: Site<'a>,
    journal: &'a mut Journal,
    batch: Batch,
    /// The directory of the entry before; mostly that of the next one too.
    place: Option<Rc<Place>>,
    /// Those that the walk is in, from the root down.
    directories: Vec<Directory>,
    links: HashMap<FileId, First>,
    /// Everything in there stays as it is.
    left_alone: Option<Vec<u8>>,
    /// Passing names in use, but for those of the batch.
    passing: Vec<(Rc<Place>, String)>,
    found_any: bool,
    clock: Clock,
    outcome: Outcome,
}

impl Commit<'_> {
    fn run(&mut self) -> Result<(), FileError> {
        let mut changes = Changes::new(self.site.layer, &self.site.options.only)?;
        self.enter(Vec::new(), false);
        while let Some(change) = changes.next(self.site.go_on) {
            let change = change?;
            if change.below.is_empty() {
                continue;
            }
            self.found_any = true;
            self.leave_until(&change.below);
            if !self.is_left_alone(&change.below) {
                self.step(&change)?;
            }
            if self.batch.is_full() {
                self.flush()?;
            }
        }
        while self.leave() {}
        self.flush()
    }

    /// Removes all passing names, whether or not anybody still wants anything.
    fn tidy(&mut self) -> Result<(), FileError> {
        let batched = self.batch.puts().map(|put| (Rc::clone(&put.place), put.passing.clone()));
        let passing: Vec<_> = self.passing.drain(..).chain(batched).collect();
        for (place, name) in passing {
            clear(&place.lower, name.as_ref(), &self.site.path(&place.below), &|| Ok(()))?;
        }
        Ok(())
    }

    fn is_left_alone(&self, below: &[u8]) -> bool {
        self.left_alone.as_ref().is_some_and(|dir| is_in(dir, below))
    }

    fn enter(&mut self, below: Vec<u8>, made: bool) {
        let dressed = made || !self.site.is_on_the_way(&below);
        self.directories.push(Directory { below, dressed, made, touched: false, narrowed: false });
    }

    /// Ends with the directories that an entry is not in.
    fn leave_until(&mut self, below: &[u8]) {
        while self.directories.last().is_some_and(|dir| !is_in(&dir.below, below)) {
            self.leave();
        }
        let (parent, _) = split_below(below);
        if self.directories.last().is_none_or(|dir| dir.below != parent) {
            // One that the walk had nothing to say about.
            self.directories.push(Directory {
                below: parent.to_vec(),
                dressed: false,
                made: false,
                touched: false,
                narrowed: false,
            });
        }
    }

    fn leave(&mut self) -> bool {
        let Some(directory) = self.directories.pop() else { return false };
        if directory.dressed || directory.touched {
            self.batch.push(Step::Leave(directory));
        }
        true
    }

    fn step(&mut self, change: &Change) -> Result<(), FileError> {
        let (parent, name) = split_below(&change.below);
        if self.site.is_passing(name) {
            self.left_alone = Some(change.below.clone());
            return Ok(());
        }
        let checks = self.site.options.on_conflict != OnConflict::Overwrite;
        if checks && self.site.conflicts(change, self.journal)? {
            return self.leave_alone_with_all(&change.below);
        }
        let place = self.place(parent)?;
        match change.effect {
            Effect::Deleted => self.delete(&place, name, &change.below),
            _ if kind(&change.stat) == FileType::Directory => self.directory(&place, name, change),
            _ => self.file(&place, name, &change.below),
        }
    }

    /// What to do about something that somebody else has changed.
    fn leave_alone(&mut self, below: &[u8]) -> Result<(), FileError> {
        let path = self.site.path(below).display().to_string();
        if self.site.options.on_conflict == OnConflict::Fail {
            refuse(&Paths { first: vec![path.clone()], count: 1 })?;
        }
        self.outcome.skipped.push(path);
        Ok(())
    }

    fn leave_alone_with_all(&mut self, below: &[u8]) -> Result<(), FileError> {
        self.left_alone = Some(below.to_vec());
        self.leave_alone(below)
    }

    fn place(&mut self, below: &[u8]) -> Result<Rc<Place>, FileError> {
        if let Some(place) = self.place.as_ref().filter(|place| place.below == below) {
            return Ok(Rc::clone(place));
        }
        let place = Rc::new(self.site.place(below)?);
        self.place = Some(Rc::clone(&place));
        Ok(place)
    }

    /// Before an entry of a directory is changed.
    fn touch(&mut self, place: &Place) -> Result<(), FileError> {
        (self.site.go_on)()?;
        if let Some(directory) = self.directories.last_mut().filter(|dir| dir.below == place.below) {
            directory.touched = true;
        }
        self.journal.note_directory(place.id)
    }

    fn delete(&mut self, place: &Rc<Place>, name: &OsStr, below: &[u8]) -> Result<(), FileError> {
        let stat = match stat_entry(&place.lower, name) {
            Err(Errno::NOENT) => return Ok(()),
            found => found.call("statx", self.site.path(below))?,
        };
        self.touch(place)?;
        self.prepare_removal(place, below)?;
        if kind(&stat) == FileType::Directory {
            let aside = self.site.passing_name();
            self.passing.push((Rc::clone(place), aside.clone()));
            rename(&place.lower, name, &place.lower, &aside).call("renameat", self.site.path(below))?;
            clear(&place.lower, aside.as_ref(), &self.site.path(below), self.site.go_on)?;
            self.passing.pop();
        } else {
            unlink(&place.lower, name, AtFlags::empty()).call("unlinkat", self.site.path(below))?;
        }
        self.outcome.applied += 1;
        Ok(())
    }

    /// Before something of the lower goes. Files in it that have other names, too, count as changed by that; the journal
    /// has to know whose doing it was.
    fn prepare_removal(&mut self, place: &Place, below: &[u8]) -> Result<(), FileError> {
        let (_, name) = split_below(below);
        let mut noted = Ok(false);
        self.site.survey(&place.lower, name, below, &mut |stat| {
            let is_shared = stat.stx_nlink > 1 && kind(stat) != FileType::Directory;
            if noted.is_ok() && is_shared && !self.site.is_newer_than_since(stat, self.journal) {
                noted = self.journal.note_shared(stat).map(|()| true);
            }
        })?;
        if noted? { self.journal.write() } else { Ok(()) }
    }

    fn directory(&mut self, place: &Rc<Place>, name: &OsStr, change: &Change) -> Result<(), FileError> {
        let path = || self.site.path(&change.below);
        if change.below.len() >= BELOW_BYTES_MAX {
            return Err(FileError::invalid(path(), "is nested too deeply to be committed"));
        }
        let lower = match stat_entry(&place.lower, name) {
            Err(Errno::NOENT) => None,
            found => Some(found.call("statx", path())?),
        };
        match lower {
            Some(lower) if kind(&lower) == FileType::Directory => {
                self.enter(change.below.clone(), false);
                self.narrow(&lower, change)
            }
            Some(_) if self.is_taken(place, &change.below)? => self.leave_alone_with_all(&change.below),
            old => {
                self.make_directory(place, name, &change.below, old.is_some())?;
                self.enter(change.below.clone(), true);
                self.outcome.applied += 1;
                Ok(())
            }
        }
    }

    /// Takes from a directory the rights of others that it will not give them in the end, before it is filled.
    fn narrow(&mut self, lower: &Statx, change: &Change) -> Result<(), FileError> {
        let others = Mode::RWXG | Mode::RWXO;
        let surplus = (permissions(lower) - permissions(&change.stat)) & others;
        if surplus.is_empty() || self.directories.last().is_none_or(|dir| !dir.dressed) {
            return Ok(());
        }
        self.journal.note_directory(identity(lower))?;
        if let Some(directory) = self.directories.last_mut() {
            directory.narrowed = true;
        }
        let held = self.site.lower(&change.below, LOOKUP)?;
        rustix::fs::chmod(proc_path(&held), permissions(lower) - surplus)
            .call("fchmodat", self.site.path(&change.below))
    }

    fn make_directory(
        &mut self,
        place: &Rc<Place>,
        name: &OsStr,
        below: &[u8],
        replaces: bool,
    ) -> Result<(), FileError> {
        self.touch(place)?;
        let path = self.site.path(below);
        let passing = self.site.passing_name();
        self.passing.push((Rc::clone(place), passing.clone()));
        mkdirat(&place.lower, &passing, Mode::RWXU).call("mkdirat", &path)?;
        let made = stat_entry(&place.lower, &passing).call("statx", &path)?;
        self.journal.note_directory(identity(&made))?;
        if replaces {
            self.prepare_removal(place, below)?;
            self.swap(place, &passing, name, below)?;
        } else {
            rename(&place.lower, &passing, &place.lower, name).call("renameat", &path)?;
        }
        self.passing.pop();
        Ok(())
    }

    fn file(&mut self, place: &Rc<Place>, name: &OsStr, below: &[u8]) -> Result<(), FileError> {
        let Some(source) = self.hold(place, name, below)? else { return Ok(()) };
        if source.stat.stx_nlink > 1
            && let Some(first) = self.links.get(&identity(&source.stat)).cloned()
        {
            if stat_entry(&place.lower, name).is_ok_and(|lower| identity(&lower) == first.id) {
                return Ok(());
            }
            self.touch(place)?;
            self.batch.push(Step::Link(Link { place: Rc::clone(place), below: below.to_vec(), first }));
            return Ok(());
        }
        let privileged = self.site.options.keep_privileges;
        let done = stat_entry(&place.lower, name).ok();
        let done = done.filter(|lower| self.journal.is_done(lower, &source.stat, privileged));
        let done = match done {
            Some(lower) if self.is_unchanged(place, name, below, &source)? => Some(lower),
            _ => None,
        };
        let id = match done {
            Some(lower) => identity(&lower),
            None => self.copy(place, below, &source)?,
        };
        if source.stat.stx_nlink > 1 {
            self.links.insert(identity(&source.stat), First { below: below.to_vec(), id });
        }
        Ok(())
    }

    /// Whether the lower still has the content that has been copied once: a file that a program has mapped into its memory
    /// (MAP_SHARED) can be written without any of its times changing.
    fn is_unchanged(
        &self,
        place: &Place,
        name: &OsStr,
        below: &[u8],
        source: &Node,
    ) -> Result<bool, FileError> {
        if kind(&source.stat) != FileType::RegularFile {
            return Ok(true);
        }
        let path = self.site.path(below);
        let upper = copy::open_quietly(&source.fd).call("open", &path)?;
        let lower = match open_regular_below(&place.lower, name.as_bytes()) {
            Err(Errno::NOENT) => return Ok(false),
            opened => opened.call("open", &path)?,
        };
        copy::is_same_content(&upper, &lower, self.site.go_on).call("read", &path)
    }

    /// The upper's entry, unless it has gone since, or has become something that the next commit sees to.
    fn hold(&self, place: &Place, name: &OsStr, below: &[u8]) -> Result<Option<Node>, FileError> {
        let Some(upper) = &place.upper else { return Ok(None) };
        let fd = match copy::hold(upper, name) {
            Err(Errno::NOENT) => return Ok(None),
            held => held.call("openat", self.site.path(below))?,
        };
        let stat = stat(&fd, self.site.path(below))?;
        let is_whiteout =
            kind(&stat) == FileType::CharacterDevice && (stat.stx_rdev_major, stat.stx_rdev_minor) == (0, 0);
        let is_other = is_whiteout || kind(&stat) == FileType::Directory;
        Ok((!is_other).then_some(Node { fd, stat }))
    }

    /// Copies to a passing name; which file it is now.
    fn copy(&mut self, place: &Rc<Place>, below: &[u8], source: &Node) -> Result<FileId, FileError> {
        self.touch(place)?;
        let path = self.site.path(below);
        let passing = self.site.passing_name();
        self.passing.push((Rc::clone(place), passing.clone()));
        let carries = |name: &std::ffi::CStr| self.site.carries(name);
        let like = Like { mode: self.site.mode(&source.stat), carries: &carries };
        let copied = copy::exactly(source, &place.lower, passing.as_ref(), &like, self.site.go_on)
            .map_err(failed_at(&path))?;
        let copy = stat_entry(&place.lower, &passing).call("statx", &path)?;
        self.passing.pop();
        self.batch.push(Step::Put(Box::new(Put {
            place: Rc::clone(place),
            below: below.to_vec(),
            passing,
            file: copied.file,
            bytes: copied.bytes,
            copy,
            source: source.stat,
        })));
        Ok(identity(&copy))
    }

    /// Puts everything in place that has been prepared.
    fn flush(&mut self) -> Result<(), FileError> {
        self.batch
            .sync(&mut self.clock)
            .map_err(|(below, failed)| failed_at(self.site.path(&below))(failed))?;
        if self.batch.puts().next().is_some() {
            for put in self.batch.puts() {
                self.journal.note_file(&put.copy, &put.source, self.site.options.keep_privileges)?;
            }
            self.clock.time(|| self.journal.sync())?;
        }
        let mut finished = Vec::new();
        // A step stays in the batch until it is done, so that its passing name is known.
        while let Some(step) = self.batch.steps.pop_front() {
            let done = (self.site.go_on)().and_then(|()| self.carry_out(&step, &mut finished));
            if let Err(error) = done {
                self.batch.steps.push_front(step);
                return Err(error);
            }
        }
        self.batch.reset();
        for Finished { below, dir, changed } in finished {
            if changed {
                self.clock.time(|| fsync(&dir)).call("fsync", self.site.path(&below))?;
            }
            self.journal.note_changed_directory(&stat(&dir, self.site.path(&below))?)?;
        }
        self.journal.write()
    }

    fn carry_out(&mut self, step: &Step, finished: &mut Vec<Finished>) -> Result<(), FileError> {
        match step {
            Step::Put(put) => self.put(put),
            Step::Link(link) => self.link(link),
            Step::Leave(directory) => {
                finished.push(self.finish(directory)?);
                Ok(())
            }
        }
    }

    /// Whether somebody else has changed a place while the copy was made.
    fn is_taken(&self, place: &Place, below: &[u8]) -> Result<bool, FileError> {
        let (_, name) = split_below(below);
        Ok(self.site.options.on_conflict != OnConflict::Overwrite
            && self.site.is_newer(&place.lower, name, below, self.journal)?)
    }

    fn put(&mut self, put: &Put) -> Result<(), FileError> {
        if self.is_taken(&put.place, &put.below)? {
            let path = self.site.path(&put.below);
            unlink(&put.place.lower, &put.passing, AtFlags::empty()).call("unlinkat", path)?;
            return self.leave_alone(&put.below);
        }
        self.land(&put.place, &put.passing, &put.below)?;
        self.outcome.bytes += put.bytes;
        Ok(())
    }

    fn link(&mut self, link: &Link) -> Result<(), FileError> {
        let (first_dir, first_name) = split_below(&link.first.below);
        let (_, name) = split_below(&link.below);
        let path = self.site.path(&link.below);
        let is_first = |stat: Statx| identity(&stat) == link.first.id;
        // To rename(2) two names of one file are the same, and the passing one would stay.
        if stat_entry(&link.place.lower, name).is_ok_and(is_first) {
            return Ok(());
        }
        if self.is_taken(&link.place, &link.below)? {
            return self.leave_alone(&link.below);
        }
        let first_dir = self.site.lower(first_dir, LOOKUP)?;
        if !stat_entry(&first_dir, first_name).is_ok_and(is_first) {
            let reason = "shares its content with another file, which somebody else has changed meanwhile";
            return Err(FileError::refused(path, Class::Conflict, reason));
        }
        let passing = self.site.passing_name();
        self.passing.push((Rc::clone(&link.place), passing.clone()));
        linkat(&first_dir, first_name, &link.place.lower, &passing, AtFlags::empty())
            .call("linkat", &path)?;
        self.land(&link.place, &passing, &link.below)?;
        // Left if the name has become one of the same file meanwhile.
        match unlink(&link.place.lower, &passing, AtFlags::empty()) {
            Err(Errno::NOENT) => {}
            done => done.call("unlinkat", &path)?,
        }
        self.passing.pop();
        Ok(())
    }

    /// Renames a passing name over whatever is at its own.
    fn land(&mut self, place: &Rc<Place>, passing: &str, below: &[u8]) -> Result<(), FileError> {
        let (_, name) = split_below(below);
        self.prepare_removal(place, below)?;
        let old = stat_entry(&place.lower, name);
        if old.is_ok_and(|old| kind(&old) == FileType::Directory) {
            self.swap(place, passing, name, below)?;
        } else {
            rename(&place.lower, passing, &place.lower, name).call("renameat", self.site.path(below))?;
        }
        self.outcome.applied += 1;
        Ok(())
    }

    /// Puts what has a passing name in the place of something that cannot be renamed over, and removes that.
    fn swap(
        &mut self,
        place: &Rc<Place>,
        passing: &str,
        name: &OsStr,
        below: &[u8],
    ) -> Result<(), FileError> {
        let path = self.site.path(below);
        match renameat_with(&place.lower, passing, &place.lower, name, RenameFlags::EXCHANGE) {
            // File systems that cannot.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                self.swap_in_two(place, passing, name).call("renameat", &path)?;
            }
            done => done.call("renameat2", &path)?,
        }
        // The old one has its name now.
        clear(&place.lower, passing.as_ref(), &path, self.site.go_on)
    }

    fn swap_in_two(&self, place: &Place, passing: &str, name: &OsStr) -> Result<(), Errno> {
        let aside = self.site.passing_name();
        let dir = &place.lower;
        rename(dir, name, dir, &aside)?;
        if let Err(errno) = rename(dir, passing, dir, name) {
            rename(dir, &aside, dir, name)?;
            return Err(errno);
        }
        rename(dir, &aside, dir, passing)
    }

    /// Gives a directory its own attributes.
    fn finish(&mut self, directory: &Directory) -> Result<Finished, FileError> {
        let below = &directory.below;
        let dir = self.site.lower(below, DIRECTORY)?;
        let mut changed = directory.touched || directory.made || directory.narrowed;
        if directory.dressed {
            match open_below(&self.site.layer.upper, below, DIRECTORY, Mode::empty()) {
                // Gone since; the next commit sees to it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                upper => {
                    let upper = upper.call("openat2", self.site.path(below))?;
                    changed |= self.level(directory, &upper, &dir)?;
                }
            }
        }
        Ok(Finished { below: below.clone(), dir, changed })
    }

    /// Makes a directory's own attributes those of the upper's; whether any had to be changed.
    fn level(&mut self, directory: &Directory, upper: &OwnedFd, lower: &OwnedFd) -> Result<bool, FileError> {
        let below = &directory.below;
        let path = self.site.path(below);
        let (wanted, now) = (stat(upper, &path)?, stat(lower, &path)?);
        self.journal.note_directory(identity(&now))?;
        let changed = self.level_rights(below, upper, &wanted, lower, &now).map_err(failed_at(&path))?;
        if (changed || directory.narrowed) && !directory.made {
            self.outcome.applied += 1;
        }
        // The root of an upper was made with the session; nobody has seen a change where there is none.
        let is_seen = !below.is_empty() || self.found_any;
        let changes_time = is_seen && Timestamp::from(wanted.stx_mtime) != Timestamp::from(now.stx_mtime);
        if changes_time {
            futimens(lower, &copy::times(&wanted)).call("utimensat", &path)?;
        }
        Ok(changed || changes_time)
    }

    fn level_rights(
        &self,
        below: &[u8],
        upper: &OwnedFd,
        wanted: &Statx,
        lower: &OwnedFd,
        now: &Statx,
    ) -> Result<bool, copy::Failed> {
        let mut changed = false;
        if copy::owner(wanted) != copy::owner(now) && self.site.knows_owner(below) {
            let (uid, gid) = copy::owner(wanted);
            fchown(lower, Some(uid), Some(gid)).map_err(|errno| ("fchown", errno))?;
            changed = true;
        }
        // The root of an upper has none of the lower's; that was not the session.
        let the_same = !below.is_empty();
        let carries = |name: &std::ffi::CStr| self.site.carries(name);
        changed |= xattr::equate(upper, lower, the_same, &carries)?;
        let mode = self.site.mode(wanted);
        if changed || mode != permissions(now) {
            fchmod(lower, mode).map_err(|errno| ("fchmod", errno))?;
            copy::require_mode(lower, mode)?;
            changed = true;
        }
        Ok(changed)
    }
}

#[cfg(test)]
pub(super) mod tests;
