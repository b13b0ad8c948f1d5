//! A session's files, and the threads that work in them.

use super::accounts::Accounts;
use super::error::{Call, Class, FileError};
use super::identity::{Assumed, Identity};
use super::path::RootedPath;
use crate::sandbox::launch::Sandbox;
use execd_init_shim::messages::IdMap;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use std::cell::{Cell, OnceCell};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How often a resolution is tried that renames elsewhere on the machine have spoilt.
const RESOLVE_TRIES: u32 = 128;
/// The most links a path may lead through, as the kernel has it (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// File systems that are windows into the kernel: nothing in them is read or written on anybody's behalf, whatever
/// path led there. Their numbers are in linux/magic.h.
const KERNEL_FILE_SYSTEMS: [(u64, &str); 17] = [
    (0x9fa0, "procfs"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroupfs"),
    (0x6367_7270, "cgroupfs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x4341_5d53, "smackfs"),
    (0xcafe_4a11, "bpffs"),
    (0x6165_676c, "pstore"),
    (0xde5e_81e4, "efivarfs"),
    (0x6265_6570, "configfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x6e73_6673, "nsfs"),
    (0x0000_1cd1, "devpts"),
    (0x1980_0202, "mqueue"),
];

/// The files of a session, as its programs see them.
#[derive(Debug)]
pub struct Tree {
    sandbox: Arc<Sandbox>,
    identity: Identity,
    ids: Ids,
    workspace: PathBuf,
}

/// How the numbers of the daemon are called inside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids(Option<IdMap>);

/// What the kernel shows for an id that has no name in a user namespace (user_namespaces(7)).
const OVERFLOW_ID: u32 = 65534;

impl Ids {
    pub(crate) fn uid_inside(self, uid: u32) -> u32 {
        self.0.map_or(uid, |map| if uid == map.outside_uid { map.inside_uid } else { OVERFLOW_ID })
    }

    pub(crate) fn gid_inside(self, gid: u32) -> u32 {
        self.0.map_or(gid, |map| if gid == map.outside_gid { map.inside_gid } else { OVERFLOW_ID })
    }

    pub(crate) fn uid_outside(self, uid: u32) -> Option<u32> {
        self.0.map_or(Some(uid), |map| (uid == map.inside_uid).then_some(map.outside_uid))
    }

    pub(crate) fn gid_outside(self, gid: u32) -> Option<u32> {
        self.0.map_or(Some(gid), |map| (gid == map.inside_gid).then_some(map.outside_gid))
    }
}

impl Tree {
    /// The files of `sandbox`, which must still have its view.
    pub fn new(sandbox: Arc<Sandbox>, workspace: PathBuf) -> Self {
        let identity = Identity::of(sandbox.spec());
        let ids = Ids(sandbox.spec().namespaces.user);
        Self { sandbox, identity, ids, workspace }
    }

    /// Reads a path that a caller wrote.
    ///
    /// # Errors
    /// [`RootedPath::parse`].
    pub fn path(&self, text: &str) -> Result<RootedPath, FileError> {
        RootedPath::parse(text, &self.workspace)
    }

    pub(crate) fn ids(&self) -> Ids {
        self.ids
    }

    /// Turns the calling thread into one of the session, until the worker is dropped. `is_cancelled` is asked
    /// now and then during long work.
    ///
    /// # Errors
    /// When the identity cannot be taken on.
    pub fn worker<'a>(&'a self, is_cancelled: &'a dyn Fn() -> bool) -> Result<Worker<'a>, FileError> {
        let identity =
            self.identity.assume().map_err(|error| FileError::Own(format!("become the session: {error}")))?;
        Ok(Worker {
            tree: self,
            is_cancelled,
            insists: Cell::new(false),
            accounts: OnceCell::new(),
            _identity: identity,
        })
    }
}

/// A thread that has taken on the identity of a session's programs.
pub struct Worker<'a> {
    pub(crate) tree: &'a Tree,
    is_cancelled: &'a dyn Fn() -> bool,
    insists: Cell<bool>,
    accounts: OnceCell<Accounts>,
    _identity: Assumed,
}

/// What a path leads to, held fast: whatever the path leads to a moment later, this stays what it is.
#[derive(Debug)]
pub(crate) struct Node {
    /// `O_PATH`
    pub(crate) fd: OwnedFd,
    pub(crate) stat: Statx,
}

/// Whether a link at the end of a path is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    Follow,
    Keep,
}

/// All that is ever asked of statx(2).
const STAT_MASK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

pub(crate) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// What tells one file from another: device and inode.
pub(crate) type FileId = (u32, u32, u64);

pub(crate) fn identity(stat: &Statx) -> FileId {
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)
}

pub(crate) fn permissions(stat: &Statx) -> Mode {
    Mode::from_raw_mode(u32::from(stat.stx_mode) & 0o7777)
}

pub(crate) fn stat(fd: impl AsFd, path: impl AsRef<Path>) -> Result<Statx, FileError> {
    rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, STAT_MASK).call("statx", path)
}

pub(crate) fn stat_entry(dir: impl AsFd, name: impl rustix::path::Arg) -> Result<Statx, Errno> {
    rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, STAT_MASK)
}

/// The name of an open file for calls that only take names; the link in procfs is followed to the very file.
pub(crate) fn proc_path(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Refuses what lies in a window into the kernel.
pub(crate) fn refuse_kernel(fd: impl AsFd, path: impl AsRef<Path>) -> Result<(), FileError> {
    let magic = rustix::fs::fstatfs(fd).call("fstatfs", &path)?.f_type as u64 & 0xffff_ffff;
    match KERNEL_FILE_SYSTEMS.iter().find(|(number, _)| *number == magic) {
        None => Ok(()),
        Some((_, name)) => {
            Err(FileError::refused(path, Class::Forbidden, format!("lies in {name}, which is not served")))
        }
    }
}

/// Opens below a directory without ever leaving it: no `..`, no links.
pub(crate) fn open_below(base: impl AsFd, below: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let below = if below.is_empty() { b"." } else { below };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    retry(|| rustix::fs::openat2(&base, below, flags | OFlags::CLOEXEC, mode, resolve))
}

/// The same, and without entering what is mounted below it.
pub(crate) fn open_within(base: impl AsFd, below: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let below = if below.is_empty() { b"." } else { below };
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    retry(|| rustix::fs::openat2(&base, below, flags | OFlags::CLOEXEC, Mode::empty(), resolve))
}

/// Refuses the root of a mount. To the kernel a name is only in use as a mount point where the caller's own mount
/// namespace has a mount there (`d_mountpoint`), and this thread's is another: it would remove the name, and detach the
/// session's mount with it (since kernel 3.18). Nobody in a session can mount, or rename what is mounted on, so this
/// stays true until the call that follows.
fn refuse_mount_point(dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
    match stat_entry(dir, name) {
        Ok(stat) if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) => Err(Errno::BUSY),
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// unlinkat(2) as it would go in the session.
pub(crate) fn unlink(dir: impl AsFd, name: impl AsRef<OsStr>, flags: AtFlags) -> Result<(), Errno> {
    refuse_mount_point(&dir, name.as_ref())?;
    rustix::fs::unlinkat(dir, name.as_ref(), flags)
}

/// renameat(2) as it would go in the session.
pub(crate) fn rename(
    from: impl AsFd,
    name: impl AsRef<OsStr>,
    to: impl AsFd,
    new_name: impl AsRef<OsStr>,
) -> Result<(), Errno> {
    refuse_mount_point(&from, name.as_ref())?;
    refuse_mount_point(&to, new_name.as_ref())?;
    rustix::fs::renameat(from, name.as_ref(), to, new_name.as_ref())
}

/// The directory that a path below another leads to, and the last name.
pub(crate) fn split_below(below: &[u8]) -> (&[u8], &OsStr) {
    let path = Path::new(OsStr::from_bytes(below));
    let parent = path.parent().map_or(&b""[..], |parent| parent.as_os_str().as_bytes());
    (parent, path.file_name().unwrap_or_default())
}

/// Opens a regular file below a directory for reading, as [`Worker::regular`] and [`Node::open`] do by path. What is none
/// by now counts as gone, and is not opened: with a FIFO or a device that alone would have effects.
pub(crate) fn open_regular_below(base: impl AsFd, below: &[u8]) -> Result<File, Errno> {
    let held = open_below(base, below, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&held)?.st_mode) != FileType::RegularFile {
        return Err(Errno::NOENT);
    }
    reopen(&held, OFlags::RDONLY)
}

/// Opens what is held by an `O_PATH` descriptor; the access rights are those of the session.
pub(crate) fn reopen(held: &OwnedFd, flags: OFlags) -> Result<File, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    rustix::fs::open(proc_path(held), flags, Mode::empty()).map(File::from)
}

/// Renames anywhere on the machine can make the kernel unsure whether `..` has left the root; it then asks to be asked
/// again (openat2(2)).
fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 1..RESOLVE_TRIES {
        match call() {
            Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
            done => return done,
        }
    }
    call()
}

pub(crate) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK);

impl Worker<'_> {
    /// Reads a path that a caller wrote.
    ///
    /// # Errors
    /// [`RootedPath::parse`].
    pub fn path(&self, text: &str) -> Result<RootedPath, FileError> {
        self.tree.path(text)
    }

    /// Asked now and then during long work.
    ///
    /// # Errors
    /// [`FileError::Cancelled`].
    pub(crate) fn go_on(&self) -> Result<(), FileError> {
        if !self.insists.get() && (self.is_cancelled)() { Err(FileError::Cancelled) } else { Ok(()) }
    }

    /// From here on the work is finished whether or not anybody still wants it: what is left is tidying up.
    pub(crate) fn insist(&self) {
        self.insists.set(true);
    }

    /// The accounts of the session, read once.
    pub(super) fn accounts(&self) -> &Accounts {
        self.accounts.get_or_init(|| Accounts::read(self))
    }

    fn resolve(&self, path: &RootedPath, flags: OFlags) -> Result<OwnedFd, FileError> {
        let view = self.tree.sandbox.view.as_ref();
        let root = &view.ok_or_else(|| FileError::Own("the session's files are gone".into()))?.root;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        retry(|| rustix::fs::openat2(root, path.as_bytes(), flags, Mode::empty(), resolve))
            .call("openat2", path)
    }

    /// What a path leads to, without opening it.
    pub(crate) fn node(&self, path: &RootedPath, last: Last) -> Result<Node, FileError> {
        let nofollow = if last == Last::Keep { OFlags::NOFOLLOW } else { OFlags::empty() };
        let fd = self.resolve(path, OFlags::PATH | nofollow)?;
        let stat = stat(&fd, path)?;
        Ok(Node { fd, stat })
    }

    /// What a path leads to, if anything.
    pub(crate) fn node_if_any(&self, path: &RootedPath, last: Last) -> Result<Option<Node>, FileError> {
        match self.node(path, last) {
            Ok(node) => Ok(Some(node)),
            Err(error) if error.errno() == Some(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The regular file a path leads to. Anything else is not even opened, since that alone could hang or have
    /// effects.
    pub(crate) fn regular(&self, path: &RootedPath) -> Result<Node, FileError> {
        let node = self.node(path, Last::Follow)?;
        refuse_kernel(&node.fd, path)?;
        require_regular(&node.stat, path)?;
        Ok(node)
    }

    /// A directory, for looking names up in it.
    pub(crate) fn directory(&self, path: &RootedPath) -> Result<OwnedFd, FileError> {
        let fd = self.resolve(path, OFlags::PATH | OFlags::DIRECTORY)?;
        refuse_kernel(&fd, path)?;
        Ok(fd)
    }

    /// A directory, for reading its entries.
    pub(crate) fn readable_directory(&self, path: &RootedPath) -> Result<OwnedFd, FileError> {
        let dir = self.directory(path)?;
        open_below(&dir, b"", DIRECTORY, Mode::empty()).call("openat2", path)
    }

    /// The directory a path's last name lies in, and that name.
    pub(crate) fn entry(&self, path: &RootedPath) -> Result<(OwnedFd, OsString), FileError> {
        let (parent, name) = path.split()?;
        Ok((self.directory(&parent)?, name))
    }

    /// Where a path leads when the links at its end are followed, whether or not there is something.
    pub(crate) fn real_end(&self, path: &RootedPath) -> Result<(RootedPath, Option<Node>), FileError> {
        let mut path = path.clone();
        for _ in 0..LINKS_MAX {
            let Some(node) = self.node_if_any(&path, Last::Keep)? else { return Ok((path, None)) };
            if kind(&node.stat) != FileType::Symlink {
                return Ok((path, Some(node)));
            }
            let target = rustix::fs::readlinkat(&node.fd, "", Vec::new()).call("readlinkat", &path)?;
            path = path.follow(OsStr::from_bytes(target.as_bytes()));
        }
        Err(Errno::LOOP).call("openat2", path)
    }
}

impl Node {
    /// Opens it, as it is now; the access rights are those of the session.
    pub(crate) fn open(&self, flags: OFlags, path: impl AsRef<Path>) -> Result<File, FileError> {
        reopen(&self.fd, flags).call("open", path)
    }
}

pub(crate) fn require_regular(stat: &Statx, path: impl AsRef<Path>) -> Result<(), FileError> {
    let what = match kind(stat) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "is a directory",
        _ => "is no regular file",
    };
    Err(FileError::invalid(path, what))
}
