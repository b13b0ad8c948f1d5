//! Carries out the mount steps of a plan with the new mount API (kernel 5.12).
//!
//! 1. All mounts of the copied namespace become private, so nothing travels out.
//! 2. Detached mounts are made of everything that comes from the daemon's file system, while that can be seen as
//!    the daemon sees it. Sources are opened with `RESOLVE_NO_SYMLINKS`: the daemon resolved and checked them, and
//!    a link that appears in between makes the step fail instead of leading somewhere unchecked.
//! 3. The root. A read-only view of all of `/` needs no new mount: the copied namespace is made read-only in
//!    place, which saves a copy of every mount and the wait for the old root to go. Any other root is stacked on
//!    the old one.
//! 4. Each mount is attached, in order, to a destination opened with `openat2(RESOLVE_IN_ROOT)` in the new root,
//!    so no link of an image or workspace leads elsewhere.
//! 5. A stacked root becomes `/` by `pivot_root(".", ".")` and a lazy unmount of the old one.

use crate::Failure;
use crate::channel::{Channel, Received};
use crate::detached::{
    Detached, Layers, NO_ATTR, NOSUID, NOSUID_NODEV, Outcome, SELF, attach_to, bind, clone_tree,
    create_mount, file_type, open_beneath, set_attr, source, tmpfs,
};
use crate::failure::{Call, CallError};
use crate::messages::{MountStep, Place, Request, Upper};
use execd_sys::{MountAttr, Propagation, mount_setattr};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, StatxAttributes, StatxFlags,
    fstatfs, makedev, mkdirat, mknodat, open, openat, openat2, statat, statx, symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsOpenFlags, MoveMountFlags, UnmountFlags, fsconfig_set_string, fsopen, move_mount, unmount,
};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

/// Device nodes of a minimal /dev: name, major, minor (Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Mounts that the daemon makes; they arrive while init is busy with its own.
pub(crate) struct AwaitedMounts<'a> {
    channel: &'a Channel,
    arrived: VecDeque<Detached>,
    /// Those that have not been taken yet.
    left: usize,
}

impl<'a> AwaitedMounts<'a> {
    pub(crate) fn new(channel: &'a Channel, count: usize) -> Self {
        Self { channel, arrived: VecDeque::new(), left: count }
    }

    fn next(&mut self) -> Outcome<Detached> {
        loop {
            if let Some(mount) = self.arrived.pop_front() {
                self.left = self.left.saturating_sub(1);
                return Ok(mount);
            }
            let request = self.channel.recv::<Request>().call(|| "recvmsg(awaited mounts)".into())?;
            let Some(Received { message: Request::Attach { places }, fds, .. }) = request else {
                return Err(CallError::what("something else came than awaited mounts"));
            };
            self.arrived.extend(detached(places, fds)?);
        }
    }

    /// Attaches those that no step has awaited.
    pub(crate) fn attach_rest(mut self, root: BorrowedFd<'_>) -> Result<(), Failure> {
        while self.left > 0 {
            let mount = self.next().map_err(|error| error.of("await mounts"))?;
            attach_late(&mount, root)?;
        }
        Ok(())
    }
}

/// Attaches mounts that come with a request to it.
pub(crate) fn attach_all(
    places: Vec<Place>,
    fds: impl Iterator<Item = OwnedFd>,
    root: BorrowedFd<'_>,
) -> Result<(), Failure> {
    let mounts = detached(places, fds).map_err(|error| error.of("attach mounts"))?;
    mounts.iter().try_for_each(|mount| attach_late(mount, root))
}

/// Makes what is mounted there read-only.
pub(crate) fn seal(dests: &[PathBuf], root: BorrowedFd<'_>) -> Result<(), Failure> {
    let attr = MountAttr { read_only: true, ..NOSUID_NODEV };
    dests.iter().try_for_each(|dest| {
        let sealed = mount_root(dest, root).and_then(|mount| set_attr(mount.as_fd(), false, attr));
        sealed.map_err(|error| error.of(format!("seal {}", dest.display())))
    })
}

/// What is mounted where further mounts are to go.
pub(crate) fn hold(places: &[Place], root: BorrowedFd<'_>) -> Result<Vec<OwnedFd>, Failure> {
    let hold = |place: &Place| {
        mount_root(&place.dest, root).map_err(|error| error.of(format!("find {}", place.dest.display())))
    };
    places.iter().map(hold).collect()
}

/// Attaches mounts in the place of others, which whoever is in them keeps.
pub(crate) fn replace(
    old: &[OwnedFd],
    places: Vec<Place>,
    fds: impl Iterator<Item = OwnedFd>,
    root: BorrowedFd<'_>,
) -> Result<(), Failure> {
    // The deepest first; one that is on another of them goes with that.
    for mount in old.iter().rev() {
        unmount(format!("/proc/self/fd/{}", mount.as_raw_fd()), UnmountFlags::DETACH)
            .call(|| "umount2(old mount, MNT_DETACH)".into())
            .map_err(|error| error.of("detach old mounts"))?;
    }
    attach_all(places, fds, root)
}

/// The root of what is mounted in that very place.
fn mount_root(dest: &Path, root: BorrowedFd<'_>) -> Outcome<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let found = openat2(root, dest, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .call(|| format!("openat2({dest:?}, RESOLVE_NO_SYMLINKS)"))?;
    let stat = statx(&found, SELF, AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .call(|| format!("statx({dest:?})"))?;
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        Ok(found)
    } else {
        Err(CallError::what("nothing is mounted there any more"))
    }
}

fn attach_late(mount: &Detached, root: BorrowedFd<'_>) -> Result<(), Failure> {
    mount.attach(root).map_err(|error| error.of(format!("attach {}", mount.dest.display())))
}

fn detached(places: Vec<Place>, mut fds: impl Iterator<Item = OwnedFd>) -> Outcome<Vec<Detached>> {
    let of = |Place { dest, is_directory }: Place| {
        let mount = fds.next().ok_or_else(|| CallError::what("a mount is missing"))?;
        Ok(Detached { mount, dest, is_directory, follows_links: false })
    };
    places.into_iter().map(of).collect()
}

/// The new root, in place.
pub(crate) struct Assembled {
    /// `O_PATH` descriptor of `/`.
    pub(crate) root: OwnedFd,
    /// Writable descriptor of the control directory.
    pub(crate) control: Option<OwnedFd>,
}

/// Carries out `steps` and pivots into the result. `userns` chooses overlayfs' unprivileged attributes.
pub(crate) fn assemble(
    steps: &[MountStep],
    userns: bool,
    awaited: &mut AwaitedMounts<'_>,
) -> Result<Assembled, Failure> {
    let step = "prepare the root";
    let old = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .call(|| "open(\"/\")".into())
        .map_err(|e| e.of(step))?;
    mount_setattr(old.as_fd(), SELF, true, NO_ATTR, Propagation::Private)
        .call(|| "mount_setattr(\"/\", AT_RECURSIVE, MS_PRIVATE)".into())
        .map_err(|e| e.of(step))?;
    // Overlays name their layers by paths through this folder, which a mount may soon cover.
    rustix::process::chdir("/proc/self/fd")
        .call(|| "chdir(\"/proc/self/fd\")".into())
        .map_err(|e| e.of(step))?;
    let mut builder =
        Builder { old, root: None, control: None, scratch: None, masks: Masks::default(), userns, awaited };
    let (in_place, steps) = builder.found_root(steps).map_err(|e| e.of(step))?;
    let mut made = Vec::new();
    for step in steps {
        made.push(builder.make(step).map_err(|error| error.of(step.describe()))?);
    }
    if in_place {
        let attr = MountAttr { read_only: true, ..NOSUID_NODEV };
        set_attr(builder.old.as_fd(), true, attr).map_err(|e| e.of("make the root read-only"))?;
    }
    for (step, mounts) in steps.iter().zip(made) {
        builder.place(step, mounts).map_err(|error| error.of(step.describe()))?;
    }
    let Some(root) = builder.root else {
        return Err(Failure::check(step, "nothing is mounted on /"));
    };
    if !in_place {
        enter(&root).map_err(|e| e.of("enter the new root"))?;
    }
    rustix::process::chdir("/").call(|| "chdir(\"/\")".into()).map_err(|e| e.of(step))?;
    Ok(Assembled { root, control: builder.control })
}

fn enter(root: &OwnedFd) -> Outcome<()> {
    rustix::process::fchdir(root).call(|| "fchdir(new root)".into())?;
    rustix::process::pivot_root(".", ".").call(|| "pivot_root(\".\", \".\")".into())?;
    unmount(".", UnmountFlags::DETACH).call(|| "umount2(\".\", MNT_DETACH)".into())
}

/// The tmpfs of the private directories.
struct Scratch {
    mount: OwnedFd,
    /// A directory in it that stays empty.
    empty: OwnedFd,
    /// How many others it has.
    count: u32,
}

/// Mounts that already cover something, to make further ones of: they have all their attributes.
#[derive(Default)]
struct Masks {
    file: Option<OwnedFd>,
    directory: Option<OwnedFd>,
}

struct Builder<'a, 'b> {
    /// `/` as the daemon sees it.
    old: OwnedFd,
    /// `/` as the sandbox will see it; `None` until the first mount.
    root: Option<OwnedFd>,
    control: Option<OwnedFd>,
    scratch: Option<Scratch>,
    masks: Masks,
    userns: bool,
    awaited: &'a mut AwaitedMounts<'b>,
}

impl Builder<'_, '_> {
    /// Sees to the root; whether it is the old one in place, and the steps that are left.
    fn found_root<'s>(&mut self, steps: &'s [MountStep]) -> Outcome<(bool, &'s [MountStep])> {
        let root = Path::new("/");
        match steps.split_first() {
            Some((MountStep::Bind { source, dest, read_only: true, recursive: true }, rest))
                if source == root && dest == root =>
            {
                self.root = Some(self.old.try_clone().call(|| "dup(root)".into())?);
                Ok((true, rest))
            }
            Some((first, rest)) if first.dest() == root => {
                let mounts = self.make(first)?;
                self.place(first, mounts)?;
                Ok((false, rest))
            }
            _ => {
                let base = tmpfs(0o755, 1 << 20, 1024, NOSUID_NODEV)?;
                self.attach(&Detached::directory(base, root))?;
                Ok((false, steps))
            }
        }
    }

    /// Makes what a step needs of the daemon's file system.
    fn make(&mut self, step: &MountStep) -> Outcome<Vec<Detached>> {
        match step {
            MountStep::Bind { source, dest, read_only, recursive } => {
                Ok(vec![bind(&self.old, source, dest, *read_only, *recursive)?])
            }
            MountStep::Overlay { lower, upper, dest } => {
                Ok(vec![Detached::of_caller(self.overlay(lower, upper)?, dest, true)])
            }
            MountStep::Awaited { dest } => {
                let mount = self.awaited.next()?;
                if mount.dest == *dest { Ok(vec![mount]) } else { Err(CallError::what("another mount came")) }
            }
            MountStep::Tmpfs { dest, mode, bytes_max, inodes_max } => {
                let mount = tmpfs(*mode, *bytes_max, *inodes_max, NOSUID_NODEV)?;
                Ok(vec![Detached::directory(mount, dest)])
            }
            MountStep::Scratch { dest, bytes_max, inodes_max } => {
                self.park_scratch(dest, *bytes_max, *inodes_max)?;
                Ok(Vec::new())
            }
            MountStep::Private { dest, mode } => {
                let (_, mount) = self.shown_scratch_dir(*mode, NOSUID_NODEV)?;
                Ok(vec![Detached::directory(mount, dest)])
            }
            MountStep::Dev { dest } => self.dev(dest),
            MountStep::Proc { .. } | MountStep::Mask { .. } | MountStep::Control { .. } => Ok(Vec::new()),
        }
    }

    /// Attaches what was made for a step, and does what can only be done in the new root.
    fn place(&mut self, step: &MountStep, mounts: Vec<Detached>) -> Outcome<()> {
        for mount in &mounts {
            self.attach(mount)?;
        }
        match step {
            MountStep::Proc { dest, read_only, masked } => self.proc(dest, *read_only, masked),
            MountStep::Mask { dest } => self.mask_path(dest),
            MountStep::Control { dest, bytes_max } => self.control(dest, *bytes_max),
            _ => Ok(()),
        }
    }

    fn new_root(&self) -> Outcome<&OwnedFd> {
        self.root.as_ref().ok_or_else(|| CallError::what("the root is not mounted yet"))
    }

    fn open_inside(&self, path: &Path) -> Outcome<OwnedFd> {
        open_beneath(self.new_root()?.as_fd(), path)
    }

    fn attach(&mut self, detached: &Detached) -> Outcome<()> {
        let Detached { mount, dest, .. } = detached;
        if dest == Path::new("/") {
            // Stacked on the old root: paths keep resolving in that, since a process's root directory is not
            // crossed upwards, and the new one is reached by descriptor.
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
            move_mount(mount, SELF, CWD, "/", flags).call(|| "move_mount(mount, \"/\")".into())?;
            self.root = Some(mount.try_clone().call(|| "dup(mount)".into())?);
            return Ok(());
        }
        detached.attach(self.new_root()?.as_fd())
    }

    fn overlay(&mut self, lower: &Path, upper: &Upper) -> Outcome<OwnedFd> {
        let lower = source(&self.old, lower)?;
        let (upper, work) = match upper {
            Upper::Directory { upper, work } => (source(&self.old, upper)?, source(&self.old, work)?),
            Upper::Tmpfs { bytes_max, inodes_max } => {
                let place = self.parking_place()?;
                let mount = tmpfs(0o755, *bytes_max, *inodes_max, NOSUID_NODEV)?;
                attach_to(mount.as_fd(), place.as_fd())?;
                for name in ["upper", "work"] {
                    mkdirat(&mount, name, Mode::from(0o755)).call(|| format!("mkdir({name})"))?;
                }
                let upper = open_beneath(mount.as_fd(), Path::new("upper"))?;
                copy_ownership(lower.as_fd(), upper.as_fd())?;
                (upper, open_beneath(mount.as_fd(), Path::new("work"))?)
            }
            Upper::Held(_) => return Err(CallError::what("its upper is the daemon's")),
        };
        // Through the working directory, see `assemble`.
        Layers { lower, upper, work }.mount("", self.userns)
    }

    /// Where a file system is mounted that nobody is to see: overlayfs wants its upper mounted in this namespace.
    fn parking_place(&mut self) -> Outcome<OwnedFd> {
        if self.scratch.is_some() {
            return self.scratch_dir(0o700);
        }
        // An overlay that will be the root itself: what lies on the old one goes with it.
        open_beneath(self.old.as_fd(), Path::new("/proc"))
    }

    fn control(&mut self, dest: &Path, bytes_max: u64) -> Outcome<()> {
        // Of its own, so that a session that fills its private places can still be given code to run.
        let mount = tmpfs(0o755, bytes_max, 4096, MountAttr { noexec: true, ..NOSUID_NODEV })?;
        let mount = Detached::directory(mount, dest);
        self.attach(&mount)?;
        // A second, detached mount of the same tmpfs stays writable for the daemon.
        self.control = Some(clone_tree(mount.mount.as_fd(), SELF, false)?);
        set_attr(mount.mount.as_fd(), false, MountAttr { read_only: true, ..NO_ATTR })
    }

    fn park_scratch(&mut self, dest: &Path, bytes_max: u64, inodes_max: u64) -> Outcome<()> {
        // Device nodes are made in it; each directory that is shown says nodev for itself.
        let scratch = Detached::directory(tmpfs(0o700, bytes_max, inodes_max, NOSUID)?, dest);
        self.attach(&scratch)?;
        let mount = scratch.mount;
        mkdirat(&mount, "empty", Mode::from(0o555)).call(|| "mkdir(empty)".into())?;
        let empty = open_beneath(mount.as_fd(), Path::new("empty"))?;
        self.scratch = Some(Scratch { mount, empty, count: 0 });
        Ok(())
    }

    fn scratch(&mut self) -> Outcome<&mut Scratch> {
        self.scratch.as_mut().ok_or_else(|| CallError::what("no scratch tmpfs has been mounted"))
    }

    /// A new directory of the scratch tmpfs.
    fn scratch_dir(&mut self, mode: u32) -> Outcome<OwnedFd> {
        let scratch = self.scratch()?;
        let name = scratch.count.to_string();
        scratch.count += 1;
        mkdirat(&scratch.mount, name.as_str(), Mode::from(mode))
            .call(|| "mkdir(private directory)".into())?;
        open_beneath(scratch.mount.as_fd(), Path::new(&name))
    }

    /// A new directory of the scratch tmpfs, and a detached mount of it. Not for a mount that stays detached:
    /// closing one waits for an RCU grace period.
    fn shown_scratch_dir(&mut self, mode: u32, attr: MountAttr) -> Outcome<(OwnedFd, OwnedFd)> {
        let dir = self.scratch_dir(mode)?;
        let mount = clone_tree(dir.as_fd(), SELF, false)?;
        set_attr(mount.as_fd(), false, attr)?;
        Ok((dir, mount))
    }

    fn dev(&mut self, dest: &Path) -> Outcome<Vec<Detached>> {
        // Nodes are made through the parked mount; what is shown is read-only.
        let (dev, shown) =
            self.shown_scratch_dir(0o755, MountAttr { read_only: true, noexec: true, ..NOSUID })?;
        let (_, shm) = self.shown_scratch_dir(0o1777, NOSUID_NODEV)?;
        let mut bound = Vec::new();
        for (name, major, minor) in DEVICES {
            if let Some(mount) = self.device(&dev, name, makedev(major, minor))? {
                bound.push(Detached {
                    mount,
                    dest: dest.join(name),
                    is_directory: false,
                    follows_links: true,
                });
            }
        }
        for (name, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
            ("ptmx", "pts/ptmx"),
        ] {
            symlinkat(target, &dev, name).call(|| format!("symlink(dev/{name})"))?;
        }
        let pts = fsopen("devpts", FsOpenFlags::FSOPEN_CLOEXEC).call(|| "fsopen(devpts)".into())?;
        for (key, value) in [("ptmxmode", "666"), ("mode", "620")] {
            fsconfig_set_string(&pts, key, value).call(|| format!("fsconfig(devpts, {key}={value})"))?;
        }
        let pts = create_mount(&pts, "devpts", MountAttr { noexec: true, ..NOSUID })?;
        for name in ["pts", "shm"] {
            mkdirat(&dev, name, Mode::from(0o755)).call(|| format!("mkdir(dev/{name})"))?;
        }
        let mut mounts = vec![
            Detached::directory(shown, dest),
            Detached::directory(pts, &dest.join("pts")),
            Detached::directory(shm, &dest.join("shm")),
        ];
        mounts.append(&mut bound);
        Ok(mounts)
    }

    /// Makes a node where that is permitted. Without CAP_MKNOD, in a user namespace, or under a device cgroup
    /// that refuses, makes an empty file and returns a mount of the host's node for it.
    fn device(&self, dev: &OwnedFd, name: &str, number: Dev) -> Outcome<Option<OwnedFd>> {
        if !self.userns && mknodat(dev, name, FileType::CharacterDevice, Mode::from(0o666), number).is_ok() {
            return Ok(None);
        }
        let source = source(&self.old, &Path::new("/dev").join(name))?;
        let stat = rustix::fs::fstat(&source).call(|| format!("fstat(/dev/{name})"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || stat.st_rdev != number {
            return Err(CallError::what(format!("/dev/{name} is not the device of that name")));
        }
        let node = clone_tree(source.as_fd(), SELF, false)?;
        // Read-only keeps mode and times of the host's node as they are; the device can be written all the same.
        set_attr(node.as_fd(), false, MountAttr { read_only: true, noexec: true, ..NOSUID })?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat(dev, name, flags, Mode::from(0o666)).call(|| format!("open(dev/{name}, O_CREAT)"))?;
        Ok(Some(node))
    }

    fn proc(&mut self, dest: &Path, read_only: bool, masked: &[String]) -> Outcome<()> {
        let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).call(|| "fsopen(proc)".into())?;
        // init is not dumpable, so even uid 0 without CAP_SYS_PTRACE does not see it (kernel 5.8 on; an
        // older kernel shows it, and its files stay closed all the same).
        let _ = fsconfig_set_string(&context, "hidepid", "invisible");
        if !self.userns {
            // Members of this group are exempt, and by default it is group 0; nobody is in the last one.
            let _ = fsconfig_set_string(&context, "gid", "4294967294");
        }
        let proc = create_mount(&context, "proc", MountAttr { noexec: true, ..NOSUID_NODEV })?;
        let proc = Detached::directory(proc, dest);
        self.attach(&proc)?;
        let proc = proc.mount;
        if self.userns {
            // No nesting: the limit of this namespace, which is read-only to everything inside.
            let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let limit = openat(&proc, "sys/user/max_user_namespaces", flags, Mode::empty())
                .call(|| "open(/proc/sys/user/max_user_namespaces)".into())?;
            rustix::io::write(&limit, b"0").call(|| "write(max_user_namespaces, 0)".into())?;
        }
        if read_only {
            set_attr(proc.as_fd(), false, MountAttr { read_only: true, ..NO_ATTR })?;
        }
        for name in masked {
            if let Some(target) = proc_entry(&proc, name)? {
                self.mask(&target)?;
            }
        }
        Ok(())
    }

    fn mask_path(&mut self, dest: &Path) -> Outcome<()> {
        match self.open_inside(dest) {
            Err(error) if error.is(Errno::NOENT) => Ok(()),
            target => self.mask(&target?),
        }
    }

    fn mask(&mut self, target: &OwnedFd) -> Outcome<()> {
        let is_directory = file_type(target.as_fd())? == FileType::Directory;
        let known = if is_directory { &mut self.masks.directory } else { &mut self.masks.file };
        if let Some(known) = known {
            return attach_to(clone_tree(known.as_fd(), SELF, false)?.as_fd(), target.as_fd());
        }
        let cover = if is_directory {
            clone_tree(self.scratch()?.empty.as_fd(), SELF, false)?
        } else {
            // nodev makes the null device unopenable, so the path can neither be read nor written.
            clone_tree(source(&self.old, Path::new("/dev/null"))?.as_fd(), SELF, false)?
        };
        set_attr(cover.as_fd(), false, MountAttr { read_only: true, noexec: true, ..NOSUID_NODEV })?;
        attach_to(cover.as_fd(), target.as_fd())?;
        let place = if is_directory { &mut self.masks.directory } else { &mut self.masks.file };
        *place = Some(cover);
        Ok(())
    }
}

/// An entry of our own procfs, checked to be one; `None` when this kernel has none of that name.
fn proc_entry(proc: &OwnedFd, name: &str) -> Outcome<Option<OwnedFd>> {
    let entry = openat(proc, name, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty());
    let entry = match entry {
        Err(Errno::NOENT) => return Ok(None),
        other => other.call(|| format!("open(proc/{name})"))?,
    };
    let stat = fstatfs(&entry).call(|| format!("fstatfs(proc/{name})"))?;
    if stat.f_type == PROC_SUPER_MAGIC {
        Ok(Some(entry))
    } else {
        Err(CallError::what(format!("{name} is not on procfs")))
    }
}

/// An overlay's root directory shows the upper's mode and owner; they should be the lower's. An owner that a
/// user namespace cannot express stays as it is.
fn copy_ownership(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Outcome<()> {
    use rustix::fs::{Gid, Uid, chmodat, chownat};
    let stat = statat(from, SELF, AtFlags::EMPTY_PATH).call(|| "fstatat(lower)".into())?;
    let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
    match chownat(to, SELF, owner.0, owner.1, AtFlags::EMPTY_PATH) {
        Ok(()) | Err(Errno::PERM | Errno::INVAL | Errno::OVERFLOW) => {}
        Err(errno) => return Err(errno).call(|| "fchownat(upper)".into()),
    }
    // fchmod refuses O_PATH descriptors; the link in /proc/self/fd, the working directory, is the same directory.
    let path = to.as_raw_fd().to_string();
    chmodat(CWD, path, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())
        .call(|| "fchmodat(upper)".into())
}
