//! Content on its way into a file. It is written to a file without a name, beside its place, and gets there in one
//! step once it is complete: whoever reads meanwhile sees the old content, and when the writer breaks off nothing
//! has happened.
//!
//! Where nothing can be put beside the place though the file itself can be written (a file that is a mount of its
//! own, a directory that is read-only, an owner that cannot be given), complete content is written over the old.

use super::change::Ownership;
use super::error::{Call, FileError};
use super::path::RootedPath;
use super::tree::{Node, Worker, permissions, proc_path, rename, require_regular, stat};
use super::xattr;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Seek, Write};

/// What a new file gets when nobody says otherwise.
const MODE: u32 = 0o644;
/// Directories that are made on the way.
pub(super) const PARENT_MODE: u32 = 0o755;
/// Where content waits that cannot wait beside its place.
const WAITING_PLACE: &str = "/tmp";
/// What is copied at once when content is written over a file; bytes.
const COPY_BYTES: usize = 256 * 1024;
/// Names tried for a file that has to have one.
const NAME_TRIES: usize = 16;

/// What is to become of the file besides its content; what is not said stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// A name or a number.
    pub owner: Option<String>,
    /// A name or a number.
    pub group: Option<String>,
}

/// Content that waits to be put in place.
#[derive(Debug)]
pub struct Staged {
    file: File,
    /// Where it has a name, on file systems that cannot do without; removed with it.
    name: Option<(OwnedFd, String)>,
    place: Place,
}

#[derive(Debug)]
struct Place {
    path: RootedPath,
    old: Option<Node>,
    /// Whether the old file can only be written over.
    over: bool,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some((dir, name)) = self.name.take() {
            // The directory is the session's; there is nobody to tell.
            let _ = rustix::fs::unlinkat(dir, name, AtFlags::empty());
        }
    }
}

impl Worker<'_> {
    /// Begins to replace, or to make, the file at `path`. Links at its end are followed, as a program's open(2) would.
    ///
    /// # Errors
    /// When no such file could be written.
    pub fn stage(&self, path: &RootedPath) -> Result<Staged, FileError> {
        let (path, old) = self.real_end(path)?;
        let mut place = Place { path, old, over: false };
        if let Some(old) = &place.old {
            super::tree::refuse_kernel(&old.fd, &place.path)?;
            require_regular(&old.stat, &place.path)?;
        }
        place.path.split()?;
        let dir = self.deepest_directory(&place.path)?;
        match nameless(&dir) {
            Ok((file, name)) => Ok(Staged { file, name: name.map(|name| (dir, name)), place }),
            Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
                let Some(old) = &place.old else { return Err(errno).call("openat", &place.path) };
                old.open(OFlags::WRONLY, &place.path)?;
                place.over = true;
                self.stage_apart(place)
            }
            Err(errno) => Err(errno).call("openat", &place.path),
        }
    }

    /// A file without a name in the session's own temporary folder, for content whose place is not known yet.
    ///
    /// # Errors
    /// When there is no room.
    pub fn spool(&self) -> Result<File, FileError> {
        let path = self.path(WAITING_PLACE)?;
        nameless(&self.directory(&path)?).call("openat", &path).map(|(file, _)| file)
    }

    fn stage_apart(&self, place: Place) -> Result<Staged, FileError> {
        let dir = self.directory(&self.path(WAITING_PLACE)?)?;
        let (file, name) = nameless(&dir).call("openat", WAITING_PLACE)?;
        Ok(Staged { file, name: name.map(|name| (dir, name)), place })
    }

    /// The nearest directory on the way to a path that exists.
    fn deepest_directory(&self, path: &RootedPath) -> Result<OwnedFd, FileError> {
        let mut dir = path.parent();
        while let Some(path) = dir {
            match self.directory(&path) {
                Err(error) if error.errno() == Some(Errno::NOENT) => dir = path.parent(),
                found => return found,
            }
        }
        Err(Errno::NOENT).call("openat2", path)
    }

    /// Puts complete content in its place; directories on the way are made.
    ///
    /// # Errors
    /// When something is in the way, or the session could not give it these attributes.
    pub fn land(&self, mut staged: Staged, wanted: &Attributes, fsync: bool) -> Result<(), FileError> {
        let path = staged.place.path.clone();
        let ownership = self.ownership(wanted)?;
        if !staged.place.over {
            match self.dress(&staged, wanted, ownership).and_then(|()| self.name(&mut staged, fsync)) {
                // The old owner cannot be given, or the old file is a mount.
                Err(error)
                    if staged.place.old.is_some()
                        && matches!(error.errno(), Some(Errno::PERM | Errno::BUSY | Errno::XDEV)) => {}
                done => return done,
            }
        }
        let Some(old) = &staged.place.old else { return Err(Errno::NOENT).call("open", &path) };
        let target = old.open(OFlags::WRONLY, &path)?;
        write_over(&mut staged.file, target, fsync).call("write", &path)?;
        self.apply(old, wanted.mode, ownership, &path)
    }

    /// Gives staged content what its file is to have.
    fn dress(&self, staged: &Staged, wanted: &Attributes, mut ownership: Ownership) -> Result<(), FileError> {
        let path = &staged.place.path;
        let mut mode = wanted.mode;
        if let Some(old) = &staged.place.old {
            let new = stat(&staged.file, path)?;
            let kept = |old, new| (old != new).then_some(old);
            ownership.uid = ownership.uid.or(kept(old.stat.stx_uid, new.stx_uid));
            ownership.gid = ownership.gid.or(kept(old.stat.stx_gid, new.stx_gid));
            mode = mode.or(Some(permissions(&old.stat).as_raw_mode()));
            // Attributes need a file that is open; one that cannot be read keeps its own, without them.
            if let Ok(old) = old.open(OFlags::RDONLY, path) {
                xattr::copy(old, &staged.file);
            }
        }
        let (uid, gid) = ownership.ids();
        if uid.is_some() || gid.is_some() {
            rustix::fs::fchown(&staged.file, uid, gid).call("fchown", path)?;
        }
        let mode = Mode::from_raw_mode(mode.unwrap_or(MODE));
        rustix::fs::fchmod(&staged.file, mode).call("fchmod", path)
    }

    /// Gives staged content its name.
    fn name(&self, staged: &mut Staged, fsync: bool) -> Result<(), FileError> {
        let path = &staged.place.path;
        let (parent, name) = path.split()?;
        let parent = self.make_directories(&parent, PARENT_MODE)?;
        if fsync {
            rustix::fs::fsync(&staged.file).call("fsync", path)?;
        }
        match &staged.name {
            Some((dir, own)) => {
                rename(dir, own, &parent, &name).call("renameat", path)?;
                staged.name = None;
            }
            None => {
                let from = proc_path(&staged.file);
                let link = |to: &std::ffi::OsStr| {
                    rustix::fs::linkat(rustix::fs::CWD, &from, &parent, to, AtFlags::SYMLINK_FOLLOW)
                };
                // Linking does not replace, so in place of an old file goes a name that is moved there at once.
                let linked = if staged.place.old.is_some() { Err(Errno::EXIST) } else { link(&name) };
                match linked {
                    Err(Errno::EXIST) => {
                        let passing = random_name();
                        link(passing.as_ref()).call("linkat", path)?;
                        if let Err(errno) = rename(&parent, &passing, &parent, &name) {
                            let _ = rustix::fs::unlinkat(&parent, &passing, AtFlags::empty());
                            return Err(errno).call("renameat", path);
                        }
                    }
                    linked => linked.call("linkat", path)?,
                }
            }
        }
        if fsync {
            let dir = super::tree::open_below(&parent, b"", super::tree::DIRECTORY, Mode::empty());
            dir.and_then(rustix::fs::fsync).call("fsync", path)?;
        }
        Ok(())
    }
}

impl Staged {
    /// Adds content.
    ///
    /// # Errors
    /// [`super::Class::NoSpace`] above all.
    pub fn write(&mut self, content: &[u8]) -> Result<(), FileError> {
        self.file.write_all(content).call("write", &self.place.path)
    }

    /// Adds content that was spooled.
    ///
    /// # Errors
    /// As [`Staged::write`].
    pub fn write_from(&mut self, mut spool: File) -> Result<(), FileError> {
        spool
            .rewind()
            .and_then(|()| io::copy(&mut spool, &mut self.file))
            .map(drop)
            .call("write", &self.place.path)
    }

    pub(super) fn path(&self) -> &RootedPath {
        &self.place.path
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }
}

/// Adds content to a spool.
///
/// # Errors
/// As [`Staged::write`].
pub fn spool(file: &mut File, content: &[u8]) -> Result<(), FileError> {
    file.write_all(content).call("write", WAITING_PLACE)
}

/// A new file in a directory; without a name, where the file system can do that.
fn nameless(dir: &OwnedFd) -> Result<(File, Option<String>), Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o600);
    match rustix::fs::openat(dir, ".", flags | OFlags::TMPFILE, mode) {
        // What file systems answer that know no such files (open(2)).
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
        opened => return opened.map(|fd| (fd.into(), None)),
    }
    for _ in 0..NAME_TRIES {
        let name = random_name();
        match rustix::fs::openat(dir, &name, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode) {
            Err(Errno::EXIST) => {}
            opened => return opened.map(|fd| (fd.into(), Some(name))),
        }
    }
    Err(Errno::EXIST)
}

/// A name nobody has.
pub(crate) fn random_name() -> String {
    format!(".execd-{}", uuid::Uuid::new_v4().simple())
}

fn write_over(from: &mut File, mut to: File, fsync: bool) -> io::Result<()> {
    from.rewind()?;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match io::Read::read(from, &mut buffer)? {
            0 => break,
            length => to.write_all(buffer.get(..length).unwrap_or_default())?,
        }
    }
    let length = to.stream_position()?;
    to.set_len(length)?;
    if fsync { to.sync_all() } else { Ok(()) }
}
