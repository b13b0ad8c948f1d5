//! A cgroup v2 directory per sandbox, and leaves in it (cgroups(7), cgroup-v2.rst).
//!
//! No controller is needed: the directories give exact membership, `cgroup.kill` and freezing, on hybrid v1
//! hosts too. The tree hangs below execd's own cgroup and is reached through a mount that is never attached
//! anywhere, so a read-only /sys/fs/cgroup does not matter.
//!
//! ```text
//! <execd's cgroup>/execd-<pid>      held by flock(2) as long as this execd lives
//!     <session id>/                 its init
//!         0/ 1/ …                   leaves: the shell, and runs that left processes behind
//!         run-<id>/                 a background run
//! ```

use procfs::process::{MountInfo, Process};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, flock, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Processes leave a cgroup a moment after they are seen dead; how long to wait for that.
const EMPTY_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long processes may take to come to rest.
const FREEZE_WAIT_MAX: Duration = Duration::from_secs(2);
/// The beginning of a cpu.stat, which is where the times are; bytes.
const CPU_STAT_BYTES_MAX: usize = 256;
const INSTANCE_PREFIX: &str = "execd-";

/// This execd's part of the cgroup tree.
#[derive(Debug)]
pub struct CgroupTree {
    parent: OwnedFd,
    own: OwnedFd,
    name: String,
}

/// A directory of the tree.
#[derive(Debug)]
pub struct Cgroup {
    parent: OwnedFd,
    dir: OwnedFd,
    name: String,
    /// Opened when it is first asked for.
    cpu_stat: OnceLock<File>,
}

/// CPU time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuTime {
    /// In programs.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
}

impl CgroupTree {
    /// Makes this execd's directory and removes those that dead ones left.
    ///
    /// # Errors
    /// A sentence that says why this machine offers none.
    pub fn create() -> Result<Self, String> {
        let parent = own_cgroup()?;
        sweep(&parent);
        let name = format!("{INSTANCE_PREFIX}{}", std::process::id());
        let own =
            make_dir(&parent, &name).map_err(|errno| format!("mkdir in execd's own cgroup: {errno}"))?;
        flock(&own, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| format!("lock execd's cgroup directory: {errno}"))?;
        Ok(Self { parent, own, name })
    }

    /// A directory for one sandbox.
    ///
    /// # Errors
    /// Those of mkdir(2); `EAGAIN` at the limit of descendants.
    pub fn sandbox(&self, name: &str) -> io::Result<Cgroup> {
        Cgroup::create(&self.own, name)
    }
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        let _ = unlinkat(&self.parent, self.name.as_str(), AtFlags::REMOVEDIR);
    }
}

impl Cgroup {
    fn create(parent: &OwnedFd, name: &str) -> io::Result<Self> {
        let dir = make_dir(parent, name)?;
        Ok(Self { parent: parent.try_clone()?, dir, name: name.to_owned(), cpu_stat: OnceLock::new() })
    }

    /// A leaf below this directory.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn leaf(&self, name: &str) -> io::Result<Cgroup> {
        Cgroup::create(&self.dir, name)
    }

    /// The processes in it, as the daemon numbers them.
    ///
    /// # Errors
    /// `ENODEV` when it has been removed.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        processes(&self.dir)
    }

    /// The CPU time of all processes that were ever in it (cpu.stat, which needs no controller; kernel 4.15).
    ///
    /// # Errors
    /// `ENODEV` when it has been removed.
    pub fn cpu_time(&self) -> io::Result<CpuTime> {
        let file = match self.cpu_stat.get() {
            Some(file) => file,
            None => {
                let file = self.open("cpu.stat", OFlags::RDONLY)?.into();
                self.cpu_stat.get_or_init(|| file)
            }
        };
        let mut text = [0; CPU_STAT_BYTES_MAX];
        let length = file.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
        let micros = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            Duration::from_micros(value.unwrap_or(0))
        };
        Ok(CpuTime { user: micros("user_usec "), system: micros("system_usec ") })
    }

    /// Moves a process here.
    ///
    /// # Errors
    /// `ESRCH` when it has ended.
    pub fn adopt(&self, pid: i32) -> io::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// The processes in its leaves.
    pub fn processes_below(&self) -> Vec<i32> {
        let leaves = subdirectories(&self.dir).into_iter().filter_map(|name| open_dir(&self.dir, &name).ok());
        leaves.flat_map(|leaf| processes(&leaf).unwrap_or_default()).collect()
    }

    /// Kills all processes in its leaves; those in the directory itself live on.
    pub fn kill_leaves(&self) {
        for name in subdirectories(&self.dir) {
            // It fails only when the leaf has gone.
            let _ = open_dir(&self.dir, &name).map(|leaf| write_file(&leaf, "cgroup.kill", "1"));
        }
    }

    /// Kills all processes in it and below, however they detached themselves (kernel 5.14).
    ///
    /// # Errors
    /// `ENOENT` on older kernels.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Holds up the processes in its leaves, however busy they are, until what is returned is dropped. What lies in the
    /// directory itself, a sandbox's init, goes on.
    ///
    /// # Errors
    /// `TimedOut` when one does not come to rest, such as one that hangs in the kernel.
    pub fn freeze_leaves(&self) -> io::Result<Frozen> {
        let mut frozen = Frozen(Vec::new());
        for name in subdirectories(&self.dir) {
            // It may have been removed since.
            let Ok(dir) = open_dir(&self.dir, &name) else { continue };
            write_file(&dir, "cgroup.freeze", "1")?;
            frozen.0.push(dir);
        }
        let deadline = Instant::now() + FREEZE_WAIT_MAX;
        while !frozen.0.iter().all(is_at_rest) {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(frozen)
    }

    /// Removes it and its leaves, waiting a little for processes to be gone.
    ///
    /// # Errors
    /// `EBUSY` when processes remain.
    pub fn remove(&self) -> io::Result<()> {
        let deadline = Instant::now() + EMPTY_WAIT_MAX;
        loop {
            match remove_tree(&self.parent, &self.name) {
                Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Removes the leaves with numbers for names that have no processes in them.
    pub fn remove_empty_leaves(&self) {
        for name in subdirectories(&self.dir).iter().filter(|name| name.parse::<u32>().is_ok()) {
            let _ = unlinkat(&self.dir, name.as_str(), AtFlags::REMOVEDIR);
        }
    }

    /// Removes it unless there are processes in it.
    pub fn remove_if_empty(&self) {
        let _ = remove_tree(&self.parent, &self.name);
    }

    fn open(&self, file: &str, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(openat(&self.dir, file, flags | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        write_file(&self.dir, file, text)
    }
}

fn processes(dir: &OwnedFd) -> io::Result<Vec<i32>> {
    let mut text = String::new();
    let file = openat(dir, "cgroup.procs", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    File::from(file).read_to_string(&mut text)?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Processes that are held up; they go on when this is dropped.
#[derive(Debug)]
pub struct Frozen(Vec<OwnedFd>);

impl Drop for Frozen {
    fn drop(&mut self) {
        for dir in &self.0 {
            // It fails only when the directory has gone.
            let _ = write_file(dir, "cgroup.freeze", "0");
        }
    }
}

/// Whether all its processes are held up, or there are none (cgroup.events).
fn is_at_rest(dir: &OwnedFd) -> bool {
    let mut text = String::new();
    let file = openat(dir, "cgroup.events", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let Ok(file) = file else { return true };
    let read = File::from(file).read_to_string(&mut text);
    read.is_err() || text.lines().any(|line| line == "frozen 1" || line == "populated 0")
}

fn write_file(dir: &OwnedFd, file: &str, text: &str) -> io::Result<()> {
    let file = openat(dir, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    File::from(file).write_all(text.as_bytes())
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// Opens the directory of the cgroup execd runs in.
fn own_cgroup() -> Result<OwnedFd, String> {
    let text =
        std::fs::read_to_string("/proc/self/cgroup").map_err(|e| format!("read /proc/self/cgroup: {e}"))?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or("this kernel has no cgroup v2 hierarchy")?;
    if path.starts_with("/..") {
        return Err(format!("execd's cgroup {path} lies outside its cgroup namespace"));
    }
    let detached = detached_mount();
    let (root, path) = match &detached {
        Ok(mount) => (mount.as_fd(), path.trim_start_matches('/').to_owned()),
        Err(errno) => (CWD, attached_path(path).ok_or_else(|| format!("mount cgroup2: {errno}"))?),
    };
    let path = if path.is_empty() { "." } else { &path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(root, path, flags, Mode::empty()).map_err(|errno| format!("open cgroup {path}: {errno}"))
}

fn detached_mount() -> Result<OwnedFd, Errno> {
    let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)
}

/// Where `path` of the hierarchy is found under a cgroup2 mount that exists already.
fn attached_path(path: &str) -> Option<String> {
    below_mount(path, |mount| mount.fs_type == "cgroup2")
}

fn below_mount(path: &str, is_wanted: impl Fn(&MountInfo) -> bool) -> Option<String> {
    let mounts = Process::myself().ok()?.mountinfo().ok()?;
    mounts.into_iter().filter(is_wanted).find_map(|mount| {
        let below = path.strip_prefix(mount.root.trim_end_matches('/'))?;
        Some(format!("{}{below}", mount.mount_point.display()))
    })
}

/// The files that may count the kills for lack of memory in execd's own cgroup and so in its sandboxes, cgroup v2 and v1
/// (memory.events of cgroup-v2.rst; memory.oom_control of cgroup-v1/memory.rst).
pub fn memory_kill_counters() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let v2 = text.lines().find_map(|line| line.strip_prefix("0::")).and_then(attached_path);
    let v1 = text.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|name| name == "memory").then_some(path)
    });
    let v1 = v1.and_then(|path| {
        below_mount(path, |mount| mount.fs_type == "cgroup" && mount.super_options.contains_key("memory"))
    });
    let v2 = v2.map(|group| Path::new(&group).join("memory.events"));
    let v1 = v1.map(|group| Path::new(&group).join("memory.oom_control"));
    v2.into_iter().chain(v1).collect()
}

fn make_dir(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    mkdirat(parent, name, Mode::from(0o755))?;
    open_dir(parent, name)
}

fn open_dir(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    openat(
        parent,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )
}

/// Removes what earlier instances left: their lock is free once they are dead.
fn sweep(parent: &OwnedFd) {
    for name in subdirectories(parent).into_iter().filter(|name| name.starts_with(INSTANCE_PREFIX)) {
        let Ok(dir) = open_dir(parent, &name) else {
            continue;
        };
        if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = remove_tree(parent, &name);
        }
    }
}

fn remove_tree(parent: &OwnedFd, name: &str) -> Result<(), Errno> {
    let dir = open_dir(parent, name)?;
    for child in subdirectories(&dir) {
        remove_tree(&dir, &child)?;
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn subdirectories(dir: &OwnedFd) -> Vec<String> {
    let Ok(entries) = Dir::read_from(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type() == rustix::fs::FileType::Directory)
        .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned))
        .filter(|name| name != "." && name != "..")
        .collect()
}
