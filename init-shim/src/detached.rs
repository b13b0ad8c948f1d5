//! Mounts that are made before they are shown: they come into being detached, get all their attributes, and are then
//! attached where they belong.
//!
//! Both sides use this: init for everything that a plan names, the daemon for the workspaces of a sandbox that was
//! made before they were known, whose init can no longer see the host.

use crate::Failure;
use crate::failure::{Call, CallError};
use crate::messages::{HeldUpper, MountStep, Upper};
use execd_sys::{MountAttr, Propagation, mount_setattr};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, mkdirat, open, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::ffi::CStr;
use std::path::{Component, Path, PathBuf};

pub(crate) type Outcome<T> = Result<T, CallError>;

pub(crate) const NOSUID: MountAttr =
    MountAttr { read_only: false, nosuid: true, nodev: false, noexec: false };
pub(crate) const NOSUID_NODEV: MountAttr = MountAttr { nodev: true, ..NOSUID };
pub(crate) const NO_ATTR: MountAttr = MountAttr { nosuid: false, ..NOSUID };
pub(crate) const SELF: &CStr = c"";

/// A detached mount, and where it goes. Closing one that was never attached waits for an RCU grace period.
#[derive(Debug)]
pub struct Detached {
    /// The mount.
    pub mount: OwnedFd,
    /// Where it goes.
    pub dest: PathBuf,
    /// Whether its root is a directory.
    pub is_directory: bool,
    /// Whether links on the way there are followed: only for the sandbox's own places. Those of a caller are resolved
    /// beforehand, and a link that appears later must not lead them anywhere.
    pub follows_links: bool,
}

/// Makes the mount of a step that shows a part of this process's file system: a bind, or an overlay whose upper this
/// process can reach.
///
/// # Errors
/// The call that failed.
pub fn detach(step: &MountStep) -> Result<Detached, Failure> {
    let make = || {
        let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).call(|| "open(\"/\")".into())?;
        match step {
            MountStep::Bind { source, dest, read_only, recursive } => {
                bind(&root, source, dest, *read_only, *recursive)
            }
            MountStep::Overlay { lower, upper: Upper::Directory { upper, work }, dest } => {
                let layers = Layers {
                    lower: source(&root, lower)?,
                    upper: source(&root, upper)?,
                    work: source(&root, work)?,
                };
                Ok(Detached::of_caller(layers.mount("/proc/self/fd/", false)?, dest, true))
            }
            MountStep::Overlay { lower, upper: Upper::Held(HeldUpper(home)), dest } => {
                let layers = Layers {
                    lower: source(&root, lower)?,
                    upper: source(home, Path::new("upper"))?,
                    work: source(home, Path::new("work"))?,
                };
                Ok(Detached::of_caller(layers.mount("/proc/self/fd/", false)?, dest, true))
            }
            _ => Err(CallError::what("it can only be made in the sandbox")),
        }
    };
    make().map_err(|error| error.of(step.describe()))
}

impl Detached {
    pub(crate) fn directory(mount: OwnedFd, dest: &Path) -> Self {
        Self { mount, dest: dest.into(), is_directory: true, follows_links: true }
    }

    pub(crate) fn of_caller(mount: OwnedFd, dest: &Path, is_directory: bool) -> Self {
        Self { mount, dest: dest.into(), is_directory, follows_links: false }
    }

    fn open(&self, root: BorrowedFd<'_>, path: &Path) -> Outcome<OwnedFd> {
        if self.follows_links {
            return open_beneath(root, path);
        }
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
            .call(|| format!("openat2({path:?}, RESOLVE_NO_SYMLINKS)"))
    }

    /// Attaches it below `root`. A mount point that does not exist is made, which works wherever an earlier mount is
    /// writable.
    pub(crate) fn attach(&self, root: BorrowedFd<'_>) -> Outcome<()> {
        let target = match self.open(root, &self.dest) {
            Err(error) if error.is(Errno::NOENT) => self.make_mount_point(root)?,
            other => other?,
        };
        attach_to(self.mount.as_fd(), target.as_fd())
    }

    fn make_mount_point(&self, root: BorrowedFd<'_>) -> Outcome<OwnedFd> {
        let mut parent = root.try_clone_to_owned().call(|| "dup(root)".into())?;
        let mut walked = PathBuf::from("/");
        let mut components = self
            .dest
            .components()
            .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
            .peekable();
        while let Some(name) = components.next() {
            walked.push(name);
            let name = name.as_os_str();
            let last = components.peek().is_none();
            parent = match self.open(root, &walked) {
                Err(error) if error.is(Errno::NOENT) => {
                    if last && !self.is_directory {
                        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                        openat(&parent, name, flags, Mode::from(0o644))
                            .call(|| format!("open({walked:?}, O_CREAT)"))?;
                    } else {
                        mkdirat(&parent, name, Mode::from(0o755)).call(|| format!("mkdir({walked:?})"))?;
                    }
                    self.open(root, &walked)?
                }
                other => other?,
            };
        }
        Ok(parent)
    }
}

/// Opens a host path that must contain no symbolic link.
pub(crate) fn source(root: &OwnedFd, path: &Path) -> Outcome<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .call(|| format!("openat2({path:?}, RESOLVE_NO_SYMLINKS)"))
}

pub(crate) fn bind(
    root: &OwnedFd,
    path: &Path,
    dest: &Path,
    read_only: bool,
    recursive: bool,
) -> Outcome<Detached> {
    let source = source(root, path)?;
    let is_directory = file_type(source.as_fd())? == FileType::Directory;
    let mount = clone_tree(source.as_fd(), SELF, recursive)?;
    let attr = MountAttr { read_only, ..NOSUID_NODEV };
    // A clone belongs to the peer group of its source.
    mount_setattr(mount.as_fd(), SELF, recursive, attr, Propagation::Private)
        .call(|| format!("mount_setattr(mount, {attr:?}, MS_PRIVATE)"))?;
    Ok(Detached::of_caller(mount, dest, is_directory))
}

/// The directories of an overlay.
pub(crate) struct Layers {
    pub(crate) lower: OwnedFd,
    pub(crate) upper: OwnedFd,
    pub(crate) work: OwnedFd,
}

/// Opens a path with `root` as its `/`, whatever links it contains.
pub(crate) fn open_beneath(root: BorrowedFd<'_>, path: &Path) -> Outcome<OwnedFd> {
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .call(|| format!("openat2({path:?}, RESOLVE_IN_ROOT)"))
}

impl Layers {
    /// The overlay of them. `descriptors` is how the folder with the links of this process's descriptors is called,
    /// such as `/proc/self/fd/`.
    pub(crate) fn mount(&self, descriptors: &str, userns: bool) -> Outcome<OwnedFd> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).call(|| "fsopen(overlay)".into())?;
        // The links mean exactly the directories that were opened, need no escaping, fit fsconfig's 255 bytes, and
        // show nothing of the host in the sandbox's mountinfo.
        for (key, dir) in [("lowerdir", &self.lower), ("upperdir", &self.upper), ("workdir", &self.work)] {
            fsconfig_set_string(&context, key, format!("{descriptors}{}", dir.as_raw_fd()))
                .call(|| format!("fsconfig(overlay, {key})"))?;
        }
        // An upper that needs nothing but itself to be read back. `nofollow`, because `off` still follows a
        // redirect that a hostile upper contains on many kernels (overlayfs.rst).
        let options = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off"), ("xino", "off")];
        for (key, value) in options {
            fsconfig_set_string(&context, key, value).call(|| format!("fsconfig(overlay, {key}={value})"))?;
        }
        if userns {
            fsconfig_set_flag(&context, "userxattr").call(|| "fsconfig(overlay, userxattr)".into())?;
        }
        create_mount(&context, "overlay", NOSUID_NODEV)
    }
}

/// A tmpfs that is mounted nowhere, with a root directory of mode 0700; it lasts as long as somebody holds it.
///
/// # Errors
/// The call that failed.
pub fn memory_file_system(bytes_max: u64, inodes_max: u64) -> Result<OwnedFd, Failure> {
    tmpfs(0o700, bytes_max, inodes_max, NOSUID_NODEV).map_err(|error| error.of("make a tmpfs"))
}

/// The ext4 file system on a block device, mounted nowhere; it lasts as long as somebody holds it.
///
/// # Errors
/// The call that failed.
pub fn ext4_file_system(device: &Path) -> Result<OwnedFd, Failure> {
    let mount = || {
        let context = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC).call(|| "fsopen(ext4)".into())?;
        fsconfig_set_string(&context, "source", device)
            .call(|| format!("fsconfig(ext4, source={})", device.display()))?;
        // What is removed on it takes no room beneath it either.
        fsconfig_set_flag(&context, "discard").call(|| "fsconfig(ext4, discard)".into())?;
        // Otherwise a thread of the kernel fills the image with zeros.
        fsconfig_set_flag(&context, "noinit_itable").call(|| "fsconfig(ext4, noinit_itable)".into())?;
        create_mount(&context, "ext4", NOSUID_NODEV)
    };
    mount().map_err(|error: CallError| error.of("mount an image"))
}

pub(crate) fn tmpfs(mode: u32, bytes_max: u64, inodes_max: u64, attr: MountAttr) -> Outcome<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).call(|| "fsopen(tmpfs)".into())?;
    let set = |key: &str, value: String| {
        fsconfig_set_string(&context, key, value.as_str()).call(|| format!("fsconfig(tmpfs, {key}={value})"))
    };
    set("mode", format!("{mode:o}"))?;
    set("size", bytes_max.to_string())?;
    if inodes_max > 0 {
        set("nr_inodes", inodes_max.to_string())?;
    }
    create_mount(&context, "tmpfs", attr)
}

pub(crate) fn create_mount(context: &OwnedFd, name: &str, attr: MountAttr) -> Outcome<OwnedFd> {
    fsconfig_create(context).call(|| format!("fsconfig({name}, CMD_CREATE)"))?;
    let mut flags = MountAttrFlags::empty();
    for (on, flag) in [
        (attr.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (attr.nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (attr.nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (attr.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
    ] {
        flags.set(flag, on);
    }
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, flags).call(|| format!("fsmount({name})"))
}

pub(crate) fn clone_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> Outcome<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(dir, path, flags).call(|| "open_tree(OPEN_TREE_CLONE)".into())
}

pub(crate) fn set_attr(mount: BorrowedFd<'_>, recursive: bool, attr: MountAttr) -> Outcome<()> {
    mount_setattr(mount, SELF, recursive, attr, Propagation::Unchanged)
        .call(|| format!("mount_setattr(mount, {attr:?})"))
}

pub(crate) fn attach_to(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Outcome<()> {
    move_mount(
        mount,
        SELF,
        target,
        SELF,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .call(|| "move_mount(mount, target)".into())
}

pub(crate) fn file_type(fd: BorrowedFd<'_>) -> Outcome<FileType> {
    let stat = rustix::fs::fstat(fd).call(|| "fstat(mount source)".into())?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}
