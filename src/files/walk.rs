//! Whole trees: listing, and searching by pattern.
//!
//! A directory is opened below the root of the walk in one step that follows no link (`open_below`), so nothing
//! that is moved about meanwhile leads the walk elsewhere, and only one descriptor is open at a time however deep the
//! tree is. What is to be told of an entry is found out while its directory is open.

use super::error::{Call, Class, FileError};
use super::info::FileInfo;
use super::path::RootedPath;
use super::tree::{DIRECTORY, Last, Worker, kind, open_below, refuse_kernel, stat_entry};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, Mode, RawDir};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bytes of directory entries that are read at once.
const ENTRIES_BYTES: usize = 128 * 1024;
/// The deepest path that is walked, below the root of the walk; bytes. No path beyond could be asked for anyway.
pub(crate) const BELOW_BYTES_MAX: usize = 4095;

/// Asked now and then during long work; fails with [`FileError::Cancelled`] when nobody wants it any more.
pub(crate) type GoOn<'a> = dyn Fn() -> Result<(), FileError> + 'a;

/// An entry of a directory that is being read.
pub(crate) struct Seen<'a> {
    pub(crate) dir: &'a OwnedFd,
    pub(crate) name: &'a CStr,
    /// Below the root of the walk.
    pub(crate) below: &'a [u8],
    pub(crate) kind: FileType,
}

/// What is kept of an entry.
struct Kept<T> {
    /// Below the root of the walk.
    below: Vec<u8>,
    is_dir: bool,
    item: Option<T>,
}

/// In which order the entries of a directory come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// By name; a directory comes before what is in it.
    Names,
    /// So that the paths of files are in order as wholes.
    Paths,
}

/// A walk, in order, depth first. Items are what `examine` makes of entries; a directory is entered whether or not it
/// is kept.
pub(crate) struct Walk<T, F> {
    base: OwnedFd,
    order: Order,
    depth_max: usize,
    examine: F,
    buffer: Vec<MaybeUninit<u8>>,
    stack: Vec<std::vec::IntoIter<Kept<T>>>,
    /// The directory to be read next, and how deep it lies.
    enter: Option<(Vec<u8>, usize)>,
}

impl<T, F> Walk<T, F>
where
    F: FnMut(Seen<'_>) -> Result<Option<T>, Errno>,
{
    /// A walk below `base`, a directory that has been opened for reading.
    pub(crate) fn new(base: OwnedFd, order: Order, depth_max: usize, examine: F) -> Self {
        let buffer = vec![MaybeUninit::uninit(); ENTRIES_BYTES];
        let enter = (depth_max > 0).then(|| (Vec::new(), 0));
        Self { base, order, depth_max, examine, buffer, stack: Vec::new(), enter }
    }

    pub(crate) fn base(&self) -> &OwnedFd {
        &self.base
    }

    /// Whether what was read last, or could not be, is below the root of the walk.
    pub(crate) fn is_below_root(&self) -> bool {
        !self.stack.is_empty()
    }

    /// The next item, with its path below the root of the walk. After the failure of one directory it goes on with
    /// the next.
    pub(crate) fn next(&mut self, go_on: &GoOn<'_>) -> Option<Result<(Vec<u8>, T), FileError>> {
        loop {
            if let Some((below, depth)) = self.enter.take() {
                let read = go_on().and_then(|()| self.read(&below, depth + 1));
                match read {
                    Ok(kept) => self.stack.push(kept.into_iter()),
                    Err(error) => return Some(Err(error)),
                }
            }
            let Some(kept) = self.stack.last_mut()?.next() else {
                self.stack.pop();
                continue;
            };
            let depth = self.stack.len();
            if kept.is_dir && depth < self.depth_max {
                self.enter = Some((kept.below.clone(), depth));
            }
            if let Some(item) = kept.item {
                return Some(Ok((kept.below, item)));
            }
        }
    }

    fn read(&mut self, below: &[u8], depth: usize) -> Result<Vec<Kept<T>>, FileError> {
        let path = Path::new(OsStr::from_bytes(below));
        let dir = open_below(&self.base, below, DIRECTORY, Mode::empty()).call("openat2", path)?;
        refuse_kernel(&dir, path)?;
        let mut kept = Vec::new();
        let mut full = below.to_vec();
        if !full.is_empty() {
            full.push(b'/');
        }
        let prefix = full.len();
        let mut entries = RawDir::new(dir.as_fd(), &mut self.buffer);
        while let Some(entry) = entries.next() {
            let entry = entry.call("getdents64", path)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            full.truncate(prefix);
            full.extend_from_slice(name.to_bytes());
            let kind = match entry.file_type() {
                FileType::Unknown => match stat_entry(&dir, name) {
                    Ok(stat) => kind(&stat),
                    Err(_) => continue,
                },
                known => known,
            };
            let seen = Seen { dir: &dir, name, below: &full, kind };
            let item = match (self.examine)(seen) {
                Ok(item) => item,
                // Gone since.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno).call("statx", Path::new(OsStr::from_bytes(&full))),
            };
            let is_dir =
                kind == FileType::Directory && depth < self.depth_max && full.len() < BELOW_BYTES_MAX;
            if item.is_some() || is_dir {
                kept.push(Kept { below: full.clone(), is_dir, item });
            }
        }
        match self.order {
            Order::Names => kept.sort_unstable_by(|a, b| a.below.cmp(&b.below)),
            Order::Paths => kept.sort_unstable_by(|a, b| whole(a).cmp(whole(b))),
        }
        Ok(kept)
    }
}

/// The bytes by which whole paths are ordered: those of a directory go on with a slash.
fn whole<T>(kept: &Kept<T>) -> impl Iterator<Item = &u8> {
    kept.below.iter().chain(kept.is_dir.then_some(&b'/'))
}

/// Whether a directory in the middle of a walk may be left out: it is gone, has become something else, or is not for
/// this session to read.
fn is_passed_over(error: &FileError) -> bool {
    error.class() == Class::Forbidden
        || matches!(error.errno(), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV))
}

impl Worker<'_> {
    /// Lists a directory, to a depth; each entry goes to `found`.
    ///
    /// # Errors
    /// Of the directory itself, and those of `found`. What is below and cannot be read is left out.
    pub fn list(
        &self,
        text: &str,
        depth: usize,
        found: &mut dyn FnMut(FileInfo) -> Result<(), FileError>,
    ) -> Result<(), FileError> {
        let root = self.path(text)?;
        let base = self.walk_root(&root)?;
        let walk = Walk::new(base, Order::Names, depth, |seen| stat_entry(seen.dir, seen.name).map(Some));
        self.follow(walk, |below, stat| found(self.describe(shown(&root, below), &stat)))
    }

    /// Finds what is no directory and matches a pattern, by its name or by its path below the directory.
    ///
    /// # Errors
    /// As [`Worker::list`], and for the pattern.
    pub fn search(
        &self,
        text: &str,
        pattern: &str,
        found: &mut dyn FnMut(FileInfo) -> Result<(), FileError>,
    ) -> Result<(), FileError> {
        let matcher = Matcher::new(pattern)?;
        let root = self.path(text)?;
        let base = self.walk_root(&root)?;
        let walk = Walk::new(base, Order::Paths, usize::MAX, |seen| {
            if seen.kind == FileType::Directory || !matcher.matches(seen.below) {
                return Ok(None);
            }
            stat_entry(seen.dir, seen.name).map(Some)
        });
        self.follow(walk, |below, stat| found(self.describe(shown(&root, below), &stat)))
    }

    fn walk_root(&self, root: &RootedPath) -> Result<OwnedFd, FileError> {
        let node = self.node(root, Last::Follow)?;
        if kind(&node.stat) != FileType::Directory {
            return Err(FileError::invalid(root, "is no directory"));
        }
        self.readable_directory(root)
    }

    fn follow<T, F>(
        &self,
        mut walk: Walk<T, F>,
        mut each: impl FnMut(&[u8], T) -> Result<(), FileError>,
    ) -> Result<(), FileError>
    where
        F: FnMut(Seen<'_>) -> Result<Option<T>, Errno>,
    {
        while let Some(step) = walk.next(&|| self.go_on()) {
            match step {
                Ok((below, item)) => each(&below, item)?,
                Err(error) if walk.is_below_root() && is_passed_over(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn shown(root: &RootedPath, below: &[u8]) -> String {
    root.join(OsStr::from_bytes(below)).to_string()
}

/// A pattern as users of shells write it: `*` and `?` stop at slashes, `**` does not; `{a,b}`, `[…]` and `\` too.
struct Matcher {
    set: GlobSet,
    /// What it is compared with: a pattern without a slash is meant for names, wherever they are.
    names: bool,
    paths: bool,
}

impl Matcher {
    fn new(pattern: &str) -> Result<Self, FileError> {
        let wrong = |error: globset::Error| FileError::invalid("pattern", error.to_string());
        let glob = GlobBuilder::new(pattern)
            .literal_separator(true)
            .backslash_escape(true)
            .empty_alternates(true)
            .build()
            .map_err(wrong)?;
        // A set, since that knows shortcuts for the usual patterns; a matcher of one does not.
        let set = GlobSetBuilder::new().add(glob).build().map_err(wrong)?;
        let paths = pattern.contains('/');
        // One of several alternatives may be without.
        Ok(Self { set, names: !paths || pattern.contains('{'), paths })
    }

    fn matches(&self, below: &[u8]) -> bool {
        let name = below.rsplit(|byte| *byte == b'/').next().unwrap_or(below);
        let matches = |bytes| self.set.is_match(OsStr::from_bytes(bytes));
        (self.names && matches(name)) || (self.paths && matches(below))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_or_paths() {
        let matches = |pattern: &str, path: &str| Matcher::new(pattern).unwrap().matches(path.as_bytes());
        for (pattern, path) in [
            ("**/*.rs", "a.rs"),
            ("**/*.rs", "a/b/c.rs"),
            ("*.rs", "a/b/c.rs"),
            ("a/*.rs", "a/c.rs"),
            ("**", "a/b"),
            ("{a,b}.txt", "x/b.txt"),
            ("{a/b,c}.txt", "x/c.txt"),
            ("[a-c]?.txt", "b1.txt"),
            (r"\*.txt", "d/*.txt"),
            ("a/**/z", "a/z"),
            ("*", ".hidden"),
        ] {
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [("a/*.rs", "a/b/c.rs"), ("*.rs", "a.rs/x"), (r"\*.txt", "a.txt"), ("?", "ab")]
        {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
        assert!(Matcher::new("a[").is_err() && Matcher::new("{a").is_err());
    }
}
