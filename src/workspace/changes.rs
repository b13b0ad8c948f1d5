//! What an upper means for its lower.
//!
//! The upper is walked in order, and each of its directories has the lower's directory opened beside it, once, as long
//! as that shows through; so an entry costs one look at either side. Neither side is ever left: links are not
//! followed, and of overlayfs' own attributes only those are read that hide something, never those that lead elsewhere.

use super::layer::{Layer, Marks, is_portable};
use crate::files::archive::is_gone;
use crate::files::error::{Call, FileError};
use crate::files::info::octal_digits;
use crate::files::tree::{DIRECTORY, kind, open_below, split_below, stat, stat_entry};
use crate::files::walk::{BELOW_BYTES_MAX, GoOn, Order, Seen, Walk};
use crate::files::xattr;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, RawDir, Statx};
use rustix::io::Errno;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::ffi::{CStr, CString, OsStr};
use std::mem::MaybeUninit;
use std::ops::Bound;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::rc::Rc;

/// Bytes of a lower directory's entries that are read at once.
const ENTRIES_BYTES: usize = 32 * 1024;
/// Between two questions whether to go on, in one directory.
const ENTRIES_AT_ONCE: usize = 1024;

/// What one entry of an upper means for the lower.
#[derive(Debug, Clone)]
pub struct Change {
    /// The path, below the roots of both trees.
    pub below: Vec<u8>,
    /// What it does.
    pub effect: Effect,
    /// Of the upper's entry; of the lower's, where that is deleted.
    pub stat: Statx,
}

/// What one entry of an upper does to the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The lower's entry goes, with everything in it.
    Deleted,
    /// The lower has nothing there.
    Added,
    /// It takes the place of the lower's entry. A directory that does is opaque: nothing of the lower's shows in it.
    Replaced {
        /// Whether what it replaces is a directory.
        directory: bool,
    },
    /// A directory on both sides, whose entries are merged.
    Merged {
        /// Whether its own mode, owner or attributes differ from the lower's.
        differs: bool,
    },
}

/// A change as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// In the session; what is no UTF-8 in it is replaced.
    pub path: String,
    /// `added`, `modified` or `deleted`.
    pub change: &'static str,
    /// `file`, `directory`, `symlink`, `fifo`, `socket` or `device`; of what was deleted, where it was.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Bytes.
    pub size: u64,
    /// Octal digits, written as a decimal number.
    pub mode: u32,
}

impl Change {
    /// What is told of it; nothing of a directory that only has changes in it.
    pub fn listed(&self, layer: &Layer) -> Option<Listed> {
        let change = match self.effect {
            Effect::Deleted => "deleted",
            Effect::Added => "added",
            Effect::Replaced { .. } | Effect::Merged { differs: true } => "modified",
            Effect::Merged { differs: false } => return None,
        };
        Some(Listed {
            path: shown(layer, &self.below).to_string_lossy().into_owned(),
            change,
            kind: match kind(&self.stat) {
                FileType::RegularFile => "file",
                FileType::Directory => "directory",
                FileType::Symlink => "symlink",
                FileType::Fifo => "fifo",
                FileType::Socket => "socket",
                _ => "device",
            },
            size: self.stat.stx_size,
            mode: octal_digits(u32::from(self.stat.stx_mode) & 0o7777),
        })
    }
}

/// Where something is in the session.
pub(crate) fn shown(layer: &Layer, below: &[u8]) -> PathBuf {
    // Joining nothing would add a slash.
    if below.is_empty() { layer.dest.clone() } else { layer.dest.join(OsStr::from_bytes(below)) }
}

/// Whether a path lies below another.
pub(crate) fn is_beneath(path: &[u8], above: &[u8]) -> bool {
    let is_root = above.is_empty() && !path.is_empty();
    is_root || path.strip_prefix(above).is_some_and(|rest| rest.starts_with(b"/"))
}

/// The changes of an upper: first the root, when everything is asked for, and then by name, a directory before what is in
/// it. What a directory hides that takes the place of
/// another follows right after it.
pub struct Changes<'a> {
    layer: &'a Layer,
    walk: Walk<Found, Examine>,
    shared: Rc<Shared>,
    /// What comes before the walk goes on.
    pending: VecDeque<Change>,
    /// What the walk has found and what comes after them.
    held: Option<(Vec<u8>, Found)>,
}

type Examine = Box<dyn FnMut(Seen<'_>) -> Result<Option<Found>, Errno>>;

/// What examining an entry of the upper needs to know and may leave behind.
struct Shared {
    marks: Marks,
    only: Only,
    side: RefCell<Side>,
    /// Whether deletions are kept apart from the other entries of their directory.
    apart: Cell<bool>,
    deleted: RefCell<Vec<Change>>,
}

/// What goes with the directory of the upper that is read next.
struct Side {
    /// The lower's directory, where entries are compared with it.
    lower: Option<OwnedFd>,
    /// Whether nothing of it shows.
    hidden: bool,
    /// Whether whiteouts may be files with an attribute.
    marked_files: bool,
}

/// What is found out about an entry of the upper while its directory is open.
struct Found {
    meaning: Meaning,
    stat: Statx,
    /// Of a directory: whether its entries are compared with the lower's.
    compare: bool,
    /// Of a directory that is compared: whether nothing of the lower's shows in it.
    hidden: bool,
    /// [`Side::marked_files`] of a directory.
    marked_files: bool,
}

enum Meaning {
    /// A change.
    Is(Effect),
    /// Nothing of the lower's shows there, where something beneath is asked for.
    InTheWay,
    /// A directory that no path can name the entries of.
    TooDeep,
}

impl Found {
    fn new(meaning: Meaning, stat: Statx) -> Self {
        Self { meaning, stat, compare: false, hidden: false, marked_files: false }
    }

    fn change(effect: Effect, stat: Statx) -> Option<Self> {
        Some(Self::new(Meaning::Is(effect), stat))
    }
}

/// What is asked for.
struct Only(BTreeSet<Vec<u8>>);

/// How a path has to do with what is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Is asked for, or lies beneath something that is.
    Wanted,
    /// Has something beneath it that is asked for.
    OnTheWay,
}

impl Only {
    fn new(paths: &[Vec<u8>]) -> Self {
        if paths.iter().any(Vec::is_empty) {
            return Self(BTreeSet::new());
        }
        let all: BTreeSet<Vec<u8>> = paths.iter().cloned().collect();
        let is_covered = |path: &[u8]| ancestors(path).skip(1).any(|above| all.contains(above));
        Self(all.iter().filter(|path| !is_covered(path)).cloned().collect())
    }

    fn role(&self, path: &[u8]) -> Option<Role> {
        if self.0.is_empty() || ancestors(path).any(|above| self.0.contains(above)) {
            return Some(Role::Wanted);
        }
        self.beneath(path).next().map(|_| Role::OnTheWay)
    }

    /// What is asked for beneath a path.
    fn beneath(&self, path: &[u8]) -> impl Iterator<Item = &Vec<u8>> {
        let above = path.to_vec();
        let first = [path, b"/"].concat();
        let from = (Bound::Included(&*first), Bound::Unbounded);
        self.0.range::<[u8], _>(from).take_while(move |path| is_beneath(path, &above))
    }
}

/// A path and all above it.
fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(Some(path), |path: &&[u8]| {
        let path: &[u8] = path;
        path.get(..path.iter().rposition(|byte| *byte == b'/')?)
    })
}

impl<'a> Changes<'a> {
    /// The changes of a layer. With `only`, those at or beneath one of these clean relative paths, and the directories
    /// on the way to them, since they must exist. Such a directory takes no other's place as a whole: it is merged,
    /// even if the upper hides what the lower has in it.
    ///
    /// # Errors
    /// When the roots of the trees cannot be read.
    pub fn new(layer: &'a Layer, only: &[Vec<u8>]) -> Result<Self, FileError> {
        let open =
            |root: &OwnedFd| open_below(root, b"", DIRECTORY, Mode::empty()).call("openat2", &layer.dest);
        let (upper, lower) = (open(&layer.upper)?, open(&layer.lower)?);
        let mark = xattr::value(&upper, layer.marks.opaque()).call("getxattr", &layer.dest)?;
        let side = Side { lower: Some(lower), hidden: false, marked_files: mark.as_deref() == Some(b"x") };
        let shared = Rc::new(Shared {
            marks: layer.marks,
            only: Only::new(only),
            side: RefCell::new(side),
            apart: Cell::new(false),
            deleted: RefCell::default(),
        });
        let examined = Rc::clone(&shared);
        let examine: Examine = Box::new(move |seen| examined.examine(&seen));
        let walk = Walk::new(upper, Order::Names, usize::MAX, examine);
        let mut changes = Self { layer, walk, shared, pending: VecDeque::new(), held: None };
        if changes.shared.only.0.is_empty() {
            let root = changes.root()?;
            changes.pending.push_back(root);
        }
        Ok(changes)
    }

    /// The root of the upper began with mode and owner of the lower's, and without its attributes.
    fn root(&self) -> Result<Change, FileError> {
        let (upper, lower) =
            (stat(&self.layer.upper, &self.layer.dest)?, stat(&self.layer.lower, &self.layer.dest)?);
        let own = |stat: &Statx| (stat.stx_mode, stat.stx_uid, stat.stx_gid);
        let differs = own(&upper) != own(&lower);
        Ok(Change { below: Vec::new(), effect: Effect::Merged { differs }, stat: upper })
    }

    /// Has the deletions in a directory come before its other entries.
    pub(crate) fn deleted_first(self) -> Self {
        self.shared.apart.set(true);
        self
    }

    /// The next change. What vanishes meanwhile is left out. After a failure, what follows means nothing.
    pub fn next(&mut self, go_on: &GoOn<'_>) -> Option<Result<Change, FileError>> {
        loop {
            if let Some(change) = self.pending.pop_front() {
                return Some(Ok(change));
            }
            let found = match self.held.take() {
                Some(found) => Some(found),
                None => match self.walk.next(go_on) {
                    Some(Err(error)) if self.walk.is_below_root() && error.errno().is_some_and(is_gone) => {
                        continue;
                    }
                    found => match found.transpose() {
                        Ok(found) => found,
                        Err(error) => return Some(Err(error)),
                    },
                },
            };
            if self.take_deleted() {
                self.held = found;
                continue;
            }
            let (below, found) = found?;
            if let Some(change) = self.step(below, found, go_on).transpose() {
                return Some(change);
            }
        }
    }

    /// Whether reading a directory has left deletions behind; they come next.
    fn take_deleted(&mut self) -> bool {
        let mut deleted = std::mem::take(&mut *self.shared.deleted.borrow_mut());
        deleted.sort_unstable_by(|a, b| a.below.cmp(&b.below));
        self.pending.extend(deleted);
        !self.pending.is_empty()
    }

    fn step(&mut self, below: Vec<u8>, found: Found, go_on: &GoOn<'_>) -> Result<Option<Change>, FileError> {
        let effect = match found.meaning {
            Meaning::TooDeep => {
                return Err(FileError::invalid(shown(self.layer, &below), "is nested too deeply"));
            }
            Meaning::InTheWay => {
                let gone = self.gone_beneath(&below)?;
                self.pending.extend(gone);
                return Ok(None);
            }
            Meaning::Is(effect) => effect,
        };
        if effect != Effect::Deleted && kind(&found.stat) == FileType::Directory {
            self.enter(&below, effect, &found, go_on)?;
        }
        Ok(Some(Change { below, effect, stat: found.stat }))
    }

    /// Prepares for a directory, which the walk will read next.
    fn enter(
        &mut self,
        below: &[u8],
        effect: Effect,
        found: &Found,
        go_on: &GoOn<'_>,
    ) -> Result<(), FileError> {
        let replaces = effect == Effect::Replaced { directory: true };
        let mut side = Side { lower: None, hidden: found.hidden, marked_files: found.marked_files };
        if found.compare || replaces {
            side.lower = match open_below(&self.layer.lower, below, DIRECTORY, Mode::empty()) {
                Err(errno) if is_gone(errno) => None,
                opened => Some(opened.call("openat2", shown(self.layer, below))?),
            };
        }
        if let Some(lower) = side.lower.as_ref().filter(|_| replaces || found.hidden) {
            let hidden = self.hidden(below, lower, found.marked_files, go_on)?;
            self.pending.extend(hidden);
        }
        if !found.compare {
            side.lower = None;
        }
        self.shared.side.replace(side);
        Ok(())
    }

    /// What a directory of the upper hides: what only the lower's has.
    fn hidden(
        &self,
        below: &[u8],
        lower: &OwnedFd,
        marked_files: bool,
        go_on: &GoOn<'_>,
    ) -> Result<Vec<Change>, FileError> {
        let path = shown(self.layer, below);
        let upper = match open_below(self.walk.base(), below, DIRECTORY, Mode::empty()) {
            Err(errno) if is_gone(errno) => return Ok(Vec::new()),
            opened => opened.call("openat2", &path)?,
        };
        let mut hidden = Vec::new();
        for (index, name) in names(lower).call("getdents64", &path)?.iter().enumerate() {
            if index % ENTRIES_AT_ONCE == 0 {
                go_on()?;
            }
            let full = [below, b"/", name.to_bytes()].concat();
            let Some(role) = self.shared.only.role(&full) else { continue };
            let shows = match stat_entry(&upper, &**name) {
                Ok(stat) => {
                    !self.shared.is_whiteout(&upper, name, &stat, marked_files).call("getxattr", &path)?
                }
                Err(Errno::NOENT) => false,
                Err(errno) => return Err(errno).call("statx", &path),
            };
            let stat = if shows { None } else { lower_entry(lower, name).call("statx", &path)? };
            match stat {
                None => {}
                Some(_) if role == Role::OnTheWay => hidden.extend(self.gone_beneath(&full)?),
                Some(stat) => hidden.push(Change { below: full, effect: Effect::Deleted, stat }),
            }
        }
        Ok(hidden)
    }

    /// What the lower has of what is asked for beneath a path where nothing of it shows.
    fn gone_beneath(&self, below: &[u8]) -> Result<Vec<Change>, FileError> {
        let mut gone = Vec::new();
        for path in self.shared.only.beneath(below) {
            let (parent, name) = split_below(path);
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let stat = match open_below(&self.layer.lower, parent, flags, Mode::empty()) {
                Ok(dir) => CString::new(name.as_bytes()).map_or(Ok(None), |name| lower_entry(&dir, &name)),
                Err(errno) if is_gone(errno) => Ok(None),
                Err(errno) => Err(errno),
            };
            if let Some(stat) = stat.call("statx", shown(self.layer, path))? {
                gone.push(Change { below: path.clone(), effect: Effect::Deleted, stat });
            }
        }
        Ok(gone)
    }
}

impl Shared {
    fn examine(&self, seen: &Seen<'_>) -> Result<Option<Found>, Errno> {
        // As if it were gone, so that the walk does not enter it either.
        let role = self.only.role(seen.below).ok_or(Errno::NOENT)?;
        let stat = stat_entry(seen.dir, seen.name)?;
        if kind(&stat) != seen.kind {
            return Err(Errno::NOENT);
        }
        let side = self.side.borrow();
        let lower = match &side.lower {
            Some(dir) => lower_entry(dir, seen.name)?,
            None => None,
        };
        if self.is_whiteout(seen.dir, seen.name, &stat, side.marked_files)? {
            // Where nothing shows anyway, what is hidden has been told already.
            return Ok(lower.filter(|_| !side.hidden).and_then(|lower| self.whiteout(seen, role, lower)));
        }
        if seen.kind == FileType::Directory {
            return self.directory(seen, role, &side, stat, lower).map(Some);
        }
        let directory = lower.map(|lower| kind(&lower) == FileType::Directory);
        Ok(match (role, directory) {
            (Role::Wanted, Some(directory)) => Found::change(Effect::Replaced { directory }, stat),
            (Role::Wanted, None) => Found::change(Effect::Added, stat),
            (Role::OnTheWay, Some(true)) => Some(Found::new(Meaning::InTheWay, stat)),
            (Role::OnTheWay, _) => None,
        })
    }

    fn whiteout(&self, seen: &Seen<'_>, role: Role, lower: Statx) -> Option<Found> {
        match role {
            Role::OnTheWay if kind(&lower) != FileType::Directory => None,
            Role::OnTheWay => Some(Found::new(Meaning::InTheWay, lower)),
            Role::Wanted if self.apart.get() => {
                let change = Change { below: seen.below.to_vec(), effect: Effect::Deleted, stat: lower };
                self.deleted.borrow_mut().push(change);
                None
            }
            Role::Wanted => Found::change(Effect::Deleted, lower),
        }
    }

    fn directory(
        &self,
        seen: &Seen<'_>,
        role: Role,
        side: &Side,
        stat: Statx,
        lower: Option<Statx>,
    ) -> Result<Found, Errno> {
        if seen.below.len() >= BELOW_BYTES_MAX {
            return Ok(Found::new(Meaning::TooDeep, stat));
        }
        let (dir, lower) = match (&side.lower, lower) {
            (Some(dir), Some(lower)) if kind(&lower) == FileType::Directory => (dir, lower),
            (_, Some(_)) => return Ok(Found::new(Meaning::Is(Effect::Replaced { directory: false }), stat)),
            (_, None) => return Ok(Found::new(Meaning::Is(Effect::Added), stat)),
        };
        let upper = held(seen.dir, seen.name)?;
        let attributes = xattr::names(&upper)?;
        let opaque = self.marks.opaque();
        let mark = match attributes.iter().any(|name| **name == *opaque) {
            true => xattr::value(&upper, opaque)?,
            false => None,
        };
        let hidden = side.hidden || mark.as_deref() == Some(b"y");
        let marked_files = mark.as_deref() == Some(b"x");
        if hidden && role == Role::Wanted {
            // What is in it takes the place of what the lower has there, too.
            let meaning = Meaning::Is(Effect::Replaced { directory: true });
            return Ok(Found { meaning, stat, compare: true, hidden, marked_files });
        }
        let differs = stat.stx_mode != lower.stx_mode
            || (stat.stx_uid, stat.stx_gid) != (lower.stx_uid, lower.stx_gid)
            || attributes_differ(&upper, &attributes, dir, seen.name)?;
        let meaning = Meaning::Is(Effect::Merged { differs });
        Ok(Found { meaning, stat, compare: true, hidden, marked_files })
    }

    /// Whether an entry of the upper says that there is none.
    fn is_whiteout(
        &self,
        dir: &OwnedFd,
        name: &CStr,
        stat: &Statx,
        marked_files: bool,
    ) -> Result<bool, Errno> {
        if !marked_files || kind(stat) != FileType::RegularFile || stat.stx_size > 0 {
            return Ok(is_whiteout_device(stat));
        }
        Ok(xattr::value(&held(dir, name)?, self.marks.whiteout())?.is_some())
    }
}

fn is_whiteout_device(stat: &Statx) -> bool {
    kind(stat) == FileType::CharacterDevice && (stat.stx_rdev_major, stat.stx_rdev_minor) == (0, 0)
}

/// What the lower has under a name. It may have been an upper once: its whiteouts show nothing either.
fn lower_entry(dir: &OwnedFd, name: &CStr) -> Result<Option<Statx>, Errno> {
    match stat_entry(dir, name) {
        Ok(stat) => Ok(Some(stat).filter(|stat| !is_whiteout_device(stat))),
        // The upper's file system may have longer names.
        Err(Errno::NOENT | Errno::NAMETOOLONG) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// An entry, without opening it.
fn held(dir: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    open_below(dir, name.to_bytes(), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
}

/// Whether a directory has other attributes than its counterpart in the lower. One that is gone is no other.
fn attributes_differ(
    upper: &OwnedFd,
    attributes: &[CString],
    lower: &OwnedFd,
    name: &CStr,
) -> Result<bool, Errno> {
    let lower = match held(lower, name) {
        Err(errno) if is_gone(errno) => return Ok(false),
        opened => opened?,
    };
    let ours: BTreeSet<&CStr> =
        attributes.iter().map(|name| &**name).filter(|name| is_portable(name)).collect();
    let theirs = xattr::names(&lower)?;
    let theirs: BTreeSet<&CStr> =
        theirs.iter().map(|name| &**name).filter(|name| is_portable(name)).collect();
    if ours != theirs {
        return Ok(true);
    }
    for name in ours {
        if xattr::value(upper, name)? != xattr::value(&lower, name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The names in a directory, in order.
fn names(dir: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut buffer = vec![MaybeUninit::uninit(); ENTRIES_BYTES];
    let mut entries = RawDir::new(dir.as_fd(), &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Class;
    use crate::workspace::trial::{GO_ON, Overlay, set_attribute};

    /// All but the root.
    fn told(layer: &Layer, only: &[&str]) -> Vec<(String, Effect)> {
        let only: Vec<Vec<u8>> = only.iter().map(|path| path.as_bytes().to_vec()).collect();
        let mut changes = Changes::new(layer, &only).unwrap();
        let all = std::iter::from_fn(|| changes.next(GO_ON)).map(Result::unwrap);
        let all = all.filter(|change| !change.below.is_empty());
        all.map(|change| (String::from_utf8_lossy(&change.below).into_owned(), change.effect)).collect()
    }

    fn told_as(told: &[(String, Effect)]) -> Vec<(&str, Effect)> {
        told.iter().map(|(path, effect)| (&**path, *effect)).collect()
    }

    const NEW: Effect = Effect::Added;
    const GONE: Effect = Effect::Deleted;
    const OVER_FILE: Effect = Effect::Replaced { directory: false };
    const OVER_DIRECTORY: Effect = Effect::Replaced { directory: true };
    const SAME: Effect = Effect::Merged { differs: false };
    const DIFFERS: Effect = Effect::Merged { differs: true };

    const LOWER: &str =
        "mkdir -p again/sub again/both chmoded/in emptied file-to-be in/deep/er owned tree/a/b
        touch again/one again/both/x emptied/file file-to-be/x in/deep/er/file in/other kept to-be-directory
        touch tree/a/b/c tree/file marked";
    const CHANGES: &str = "rm -r again; mkdir -p again/both again/new; touch again/both/y again/new/z
        chmod 700 chmoded; chown 7 owned; rm emptied/file
        rm -r file-to-be; touch file-to-be; rm to-be-directory; mkdir to-be-directory; touch to-be-directory/in
        echo more >> in/deep/er/file; ln -s nowhere link; mkfifo pipe; rm -r tree; touch added; chmod 4755 added
        touch temporary; rm temporary";

    #[test]
    fn every_kind_of_change_is_told() {
        let Some(overlay) = Overlay::new(LOWER) else { return };
        overlay.change(CHANGES);
        set_attribute(&overlay.merged().join("marked"), c"user.mark", b"1");
        let layer = overlay.layer();
        let changes = told(&layer, &[]);
        assert_eq!(
            told_as(&changes),
            [
                ("added", NEW),
                ("again", OVER_DIRECTORY),
                ("again/one", GONE),
                ("again/sub", GONE),
                ("again/both", OVER_DIRECTORY),
                ("again/both/x", GONE),
                ("again/both/y", NEW),
                ("again/new", NEW),
                ("again/new/z", NEW),
                ("chmoded", DIFFERS),
                ("emptied", SAME),
                ("emptied/file", GONE),
                ("file-to-be", OVER_DIRECTORY),
                ("in", SAME),
                ("in/deep", SAME),
                ("in/deep/er", SAME),
                ("in/deep/er/file", OVER_FILE),
                ("link", NEW),
                ("marked", OVER_FILE),
                ("owned", DIFFERS),
                ("pipe", NEW),
                ("to-be-directory", OVER_FILE),
                ("to-be-directory/in", NEW),
                ("tree", GONE),
            ]
        );
        let mut changes = Changes::new(&layer, &[]).unwrap();
        let listed: Vec<Listed> = std::iter::from_fn(|| changes.next(GO_ON))
            .filter_map(|one| one.unwrap().listed(&layer))
            .collect();
        let of = |path: &str| {
            let found = listed.iter().find(|one| one.path == path).unwrap();
            (found.change, found.kind, found.size, found.mode)
        };
        assert_eq!(of("/inside/added"), ("added", "file", 0, 4755));
        assert_eq!(of("/inside/in/deep/er/file"), ("modified", "file", 5, 644));
        assert_eq!(of("/inside/tree").0, "deleted");
        assert_eq!((of("/inside/tree").1, of("/inside/tree").3), ("directory", 755));
        assert_eq!((of("/inside/link").1, of("/inside/pipe").1), ("symlink", "fifo"));
        assert!(!listed.iter().any(|one| one.path == "/inside/in"));
        let json = serde_json::to_value(listed.first().unwrap()).unwrap();
        let expected = r#"{"path":"/inside/added","change":"added","type":"file","size":0,"mode":4755}"#;
        assert_eq!(json, serde_json::from_str::<serde_json::Value>(expected).unwrap());
    }

    #[test]
    fn attributes_and_the_mode_of_the_lower_count() {
        let Some(overlay) = Overlay::new("mkdir same other value") else { return };
        for name in ["same", "other", "value"] {
            set_attribute(&overlay.lower().join(name), c"user.a", b"1");
        }
        overlay.change("touch same/x other/x value/x");
        set_attribute(&overlay.merged().join("other"), c"user.b", b"1");
        set_attribute(&overlay.merged().join("value"), c"user.a", b"2");
        let changes = told(&overlay.layer(), &[]);
        let directories: Vec<_> =
            told_as(&changes).into_iter().filter(|(path, _)| !path.contains('/')).collect();
        assert_eq!(directories, [("other", DIFFERS), ("same", SAME), ("value", DIFFERS)]);
    }

    #[test]
    fn only_some_paths_and_the_directories_on_the_way() {
        let Some(overlay) = Overlay::new(LOWER) else { return };
        overlay.change(CHANGES);
        let layer = overlay.layer();
        let check = |only: &[&str], expected: &[(&str, Effect)]| {
            assert_eq!(told_as(&told(&layer, only)), expected, "{only:?}");
        };
        check(
            &["in/deep"],
            &[("in", SAME), ("in/deep", SAME), ("in/deep/er", SAME), ("in/deep/er/file", OVER_FILE)],
        );
        check(&["in", "in/deep/er", "link"], &told_as(&told(&layer, &["in", "link"])));
        check(&["in/de", "adde", "none/at/all"], &[("in", SAME)]);
        // What is on the way to them is not replaced as a whole, which would take more with it.
        check(&["again/one"], &[("again", SAME), ("again/one", GONE)]);
        check(
            &["again/both"],
            &[("again", SAME), ("again/both", OVER_DIRECTORY), ("again/both/x", GONE), ("again/both/y", NEW)],
        );
        check(
            &["again/both/x", "again/both/none"],
            &[("again", SAME), ("again/both", SAME), ("again/both/x", GONE)],
        );
        // What was in something that is deleted or no directory any more.
        check(
            &["tree/a/b", "tree/none", "file-to-be/x", "kept/x"],
            &[("file-to-be/x", GONE), ("tree/a/b", GONE)],
        );
        check(&["to-be-directory/in"], &[("to-be-directory", OVER_FILE), ("to-be-directory/in", NEW)]);
        check(&["", "link"], &told_as(&told(&layer, &[])));
    }

    #[test]
    fn deletions_can_come_first() {
        let Some(overlay) = Overlay::new("mkdir d last; touch a z d/a d/z last/x") else { return };
        overlay.change("rm a z d/a d/z last/x; touch b d/b");
        let layer = overlay.layer();
        let mut changes = Changes::new(&layer, &[]).unwrap().deleted_first();
        let all: Vec<_> = std::iter::from_fn(|| changes.next(GO_ON))
            .map(|change| String::from_utf8(change.unwrap().below).unwrap())
            .collect();
        assert_eq!(all, ["", "a", "z", "b", "d", "d/a", "d/z", "d/b", "last", "last/x"]);
    }

    #[test]
    fn files_can_be_whiteouts_in_directories_that_say_so() {
        for marks in [Marks::Trusted, Marks::User] {
            let Some(overlay) = Overlay::new("mkdir marked plain; touch marked/a marked/b plain/a") else {
                return;
            };
            let upper = overlay.upper();
            std::fs::create_dir(upper.join("marked")).unwrap();
            std::fs::create_dir(upper.join("plain")).unwrap();
            for name in ["marked/a", "marked/b", "marked/none", "plain/a"] {
                std::fs::write(upper.join(name), "").unwrap();
                if name != "marked/b" {
                    set_attribute(&upper.join(name), marks.whiteout(), b"y");
                }
            }
            set_attribute(&upper.join("marked"), marks.opaque(), b"x");
            let layer = Layer { marks, ..overlay.layer() };
            assert_eq!(
                told_as(&told(&layer, &[])),
                [
                    ("marked", SAME),
                    ("marked/a", GONE),
                    ("marked/b", OVER_FILE),
                    ("plain", SAME),
                    ("plain/a", OVER_FILE)
                ]
            );
        }
    }

    #[test]
    fn marks_that_lead_elsewhere_or_are_of_another_mount_mean_nothing() {
        let Some(overlay) = Overlay::new("mkdir d e; touch d/x e/x") else { return };
        let upper = overlay.upper();
        for name in ["d", "e", "f"] {
            std::fs::create_dir(upper.join(name)).unwrap();
            std::fs::write(upper.join(name).join("own"), "").unwrap();
            set_attribute(&upper.join(name), c"trusted.overlay.redirect", b"/../../etc");
            set_attribute(&upper.join(name), c"user.overlay.redirect", b"/e");
        }
        set_attribute(&upper.join("d"), c"user.overlay.opaque", b"y");
        set_attribute(&upper.join("e"), c"trusted.overlay.opaque", b"y");
        assert_eq!(
            told_as(&told(&overlay.layer(), &[])),
            [
                ("d", SAME),
                ("d/own", NEW),
                ("e", OVER_DIRECTORY),
                ("e/x", GONE),
                ("e/own", NEW),
                ("f", NEW),
                ("f/own", NEW)
            ]
        );
        assert_eq!(
            told_as(&told(&Layer { marks: Marks::User, ..overlay.layer() }, &["d", "e"])),
            [("d", OVER_DIRECTORY), ("d/x", GONE), ("d/own", NEW), ("e", SAME), ("e/own", NEW)]
        );
    }

    #[test]
    fn links_of_the_lower_are_not_followed() {
        let Some(overlay) = Overlay::new("mkdir real; touch real/x; ln -s real link; ln -s /etc away") else {
            return;
        };
        overlay.change("rm link away; mkdir link away; touch link/x away/passwd");
        assert_eq!(
            told_as(&told(&overlay.layer(), &[])),
            [("away", OVER_FILE), ("away/passwd", NEW), ("link", OVER_FILE), ("link/x", NEW)]
        );
        assert_eq!(told_as(&told(&overlay.layer(), &["link/x"])), [("link", OVER_FILE), ("link/x", NEW)]);
    }

    #[test]
    fn whiteouts_of_nothing_are_nothing() {
        let Some(overlay) = Overlay::new("touch x") else { return };
        overlay.change("rm x");
        std::fs::remove_file(overlay.lower().join("x")).unwrap();
        assert_eq!(told(&overlay.layer(), &[]), []);
    }

    #[test]
    fn an_upper_that_no_path_can_name_is_refused() {
        let Some(overlay) = Overlay::new("") else { return };
        overlay.nest(20, 250);
        let layer = overlay.layer();
        let mut changes = Changes::new(&layer, &[]).unwrap();
        let error = std::iter::from_fn(|| changes.next(GO_ON)).find_map(Result::err).unwrap();
        assert_eq!(error.class(), Class::Invalid);
        assert!(error.to_string().ends_with("is nested too deeply"), "{error}");
        assert_eq!(told(&layer, &["elsewhere"]), []);
    }

    #[test]
    fn paths_and_what_is_above_them() {
        let all = |path: &'static str| -> Vec<_> { ancestors(path.as_bytes()).collect() };
        assert_eq!(all("a/bc/d"), [b"a/bc/d".as_slice(), b"a/bc", b"a"]);
        assert!(is_beneath(b"a/b", b"a") && !is_beneath(b"ab", b"a") && !is_beneath(b"a", b"a"));
        assert_eq!([0o644, 0o4755, 0].map(octal_digits), [644, 4755, 0]);
    }
}
