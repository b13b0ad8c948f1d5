//! Where a commit works: the two trees, what belongs to whom in them, and what stands in the way.

use super::changes::{Change, Effect};
use super::commit::Options;
use super::journal::Journal;
use super::layer::{Layer, Marks, is_portable};
use super::timestamp::Timestamp;
use crate::files::error::{Call, Class, FileError};
use crate::files::tree::{
    DIRECTORY, FileId, identity, kind, open_below, open_within, permissions, split_below, stat, stat_entry,
};
use crate::files::walk::{BELOW_BYTES_MAX, GoOn, Order, Walk};
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, Statx, StatxAttributes};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How passing names begin; the journal's id follows.
const PASSING_PREFIX: &str = ".execd-commit-";

/// A directory to look names up in.
pub(super) const LOOKUP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW);

/// What stays the same throughout a commit.
pub(super) struct Site<'a> {
    pub(super) layer: &'a Layer,
    pub(super) options: &'a Options,
    /// What is younger was changed by somebody else, unless the journal knows better.
    pub(super) since: Timestamp,
    pub(super) go_on: &'a GoOn<'a>,
    /// How all passing names of this journal begin.
    prefix: String,
}

/// A directory that is there in both trees.
pub(super) struct Place {
    pub(super) below: Vec<u8>,
    pub(super) lower: OwnedFd,
    pub(super) id: FileId,
    /// None when it has gone since.
    pub(super) upper: Option<OwnedFd>,
}

impl<'a> Site<'a> {
    pub(super) fn new(
        layer: &'a Layer,
        options: &'a Options,
        since: Timestamp,
        own: &Journal,
        go_on: &'a GoOn<'a>,
    ) -> Self {
        Self { layer, options, since, go_on, prefix: format!("{PASSING_PREFIX}{}-", own.id()) }
    }

    /// What the session calls it.
    pub(super) fn path(&self, below: &[u8]) -> PathBuf {
        if below.is_empty() { self.layer.dest.clone() } else { self.layer.dest.join(os(below)) }
    }

    pub(super) fn passing_name(&self) -> String {
        format!("{}{}", self.prefix, uuid::Uuid::new_v4().simple())
    }

    /// Whether a name is a passing one of this journal. A session may have copied such a name, or have made it up; it
    /// is nothing that a commit carries.
    pub(super) fn is_passing(&self, name: &OsStr) -> bool {
        name.as_bytes().starts_with(self.prefix.as_bytes())
    }

    /// Whether a path leads through a passing name.
    fn is_in_passing(&self, below: &[u8]) -> bool {
        below.split(|byte| *byte == b'/').any(|name| self.is_passing(os(name)))
    }

    /// Whether a directory is only on the way to what is to be committed.
    pub(super) fn is_on_the_way(&self, below: &[u8]) -> bool {
        let only = &self.options.only;
        !only.is_empty() && !only.iter().any(|only| is_in(only, below))
    }

    /// A directory of the lower.
    pub(super) fn lower(&self, below: &[u8], flags: OFlags) -> Result<OwnedFd, FileError> {
        match open_within(&self.layer.lower, below, flags) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {
                let reason = "is no longer a directory of the lower; something else has taken its place";
                Err(FileError::refused(self.path(below), Class::Conflict, reason))
            }
            opened => opened.call("openat2", self.path(below)),
        }
    }

    pub(super) fn place(&self, below: &[u8]) -> Result<Place, FileError> {
        let lower = self.lower(below, LOOKUP)?;
        let id = identity(&stat(&lower, self.path(below))?);
        let upper = open_below(&self.layer.upper, below, LOOKUP, Mode::empty());
        Ok(Place { below: below.to_vec(), lower, id, upper: upper.ok() })
    }

    /// Whether an attribute is for the lower.
    pub(super) fn carries(&self, name: &CStr) -> bool {
        is_portable(name) && (self.options.keep_privileges || name != c"security.capability")
    }

    /// The mode an entry gets. Those of directories give nobody any right: theirs only say whose new entries are.
    pub(super) fn mode(&self, stat: &Statx) -> Mode {
        let mode = permissions(stat);
        if self.options.keep_privileges || kind(stat) == FileType::Directory {
            mode
        } else {
            mode - (Mode::SUID | Mode::SGID)
        }
    }

    /// Whether the owner of the root is the session's doing: in a user namespace its directory in the upper could not be
    /// given the lower's.
    pub(super) fn knows_owner(&self, below: &[u8]) -> bool {
        !below.is_empty() || self.layer.marks == Marks::Trusted
    }

    /// Whether somebody else has changed what a change would replace or delete.
    pub(super) fn conflicts(&self, change: &Change, own: &Journal) -> Result<bool, FileError> {
        if matches!(change.effect, Effect::Added | Effect::Merged { .. }) {
            return Ok(false);
        }
        let (parent, name) = split_below(&change.below);
        if self.is_passing(name) {
            return Ok(false);
        }
        let parent = self.lower(parent, LOOKUP)?;
        self.is_newer(&parent, name, &change.below, own)
    }

    /// Whether somebody else has changed an entry of the lower, or something in it.
    pub(super) fn is_newer(
        &self,
        dir: &OwnedFd,
        name: &OsStr,
        below: &[u8],
        own: &Journal,
    ) -> Result<bool, FileError> {
        self.look_into(dir, name, below, true, &mut |stat| self.is_newer_than_since(stat, own))
    }

    /// Whether somebody else has changed this very entry.
    pub(super) fn is_newer_than_since(&self, stat: &Statx, own: &Journal) -> bool {
        Timestamp::from(stat.stx_ctime) > self.since && !own.is_own(stat)
    }

    /// Looks at what is to be removed: refuses what something is mounted on, or in, and tells what else there is.
    pub(super) fn survey(
        &self,
        dir: &OwnedFd,
        name: &OsStr,
        below: &[u8],
        found: &mut dyn FnMut(&Statx),
    ) -> Result<(), FileError> {
        let mut tell = |stat: &Statx| {
            found(stat);
            false
        };
        self.look_into(dir, name, below, false, &mut tell).map(drop)
    }

    /// Whether `judge` says so of an entry of the lower or of anything in it. Nothing can be said of what lies too deep.
    fn look_into(
        &self,
        dir: &OwnedFd,
        name: &OsStr,
        below: &[u8],
        if_unknown: bool,
        judge: &mut dyn FnMut(&Statx) -> bool,
    ) -> Result<bool, FileError> {
        let root = match stat_entry(dir, name) {
            Err(Errno::NOENT) => return Ok(false),
            found => found.call("statx", self.path(below))?,
        };
        self.refuse_mount(&root, below)?;
        if judge(&root) {
            return Ok(true);
        }
        if kind(&root) != FileType::Directory {
            return Ok(false);
        }
        let base = open_below(dir, name.as_bytes(), DIRECTORY, Mode::empty());
        let mut walk = Walk::new(base.call("openat2", self.path(below))?, Order::Names, usize::MAX, |seen| {
            let stat = stat_entry(seen.dir, seen.name)?;
            let is_too_deep = seen.kind == FileType::Directory && seen.below.len() >= BELOW_BYTES_MAX;
            // What a commit that was cut off has left is not judged.
            let found = !self.is_in_passing(seen.below) && (judge(&stat) || (if_unknown && is_too_deep));
            let is_mount = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
            Ok((found || is_mount).then_some((found, stat)))
        });
        while let Some(step) = walk.next(self.go_on) {
            match step {
                Ok((inner, (found, stat))) => {
                    self.refuse_mount(&stat, &join(below, &inner))?;
                    if found {
                        return Ok(true);
                    }
                }
                // Gone since.
                Err(error) if walk.is_below_root() && error.errno() == Some(Errno::NOENT) => {}
                Err(error) => return Err(self.within(below, error)),
            }
        }
        Ok(false)
    }

    fn refuse_mount(&self, stat: &Statx, below: &[u8]) -> Result<(), FileError> {
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(FileError::refused(self.path(below), Class::Conflict, "something is mounted there"));
        }
        Ok(())
    }

    /// A failure of a walk, by the session's path.
    pub(super) fn within(&self, below: &[u8], error: FileError) -> FileError {
        match error {
            FileError::Call { call, path, errno } => {
                let path = self.path(&join(below, path.as_bytes())).display().to_string();
                FileError::Call { call, path, errno }
            }
            error => error,
        }
    }
}

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    Path::new(os(dir)).join(os(name)).into_os_string().into_encoded_bytes()
}

/// Whether a path is another or lies below it; both below the same root.
pub(super) fn is_in(dir: &[u8], below: &[u8]) -> bool {
    match below.strip_prefix(dir) {
        _ if dir.is_empty() => true,
        Some(rest) => rest.is_empty() || rest.starts_with(b"/"),
        None => false,
    }
}
