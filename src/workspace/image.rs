//! Images: a file that holds an ext4 file system, mounted through a loop device but nowhere in the file tree. Whoever
//! fills one meets ENOSPC, and nobody else notices.
//!
//! A formatted image of the usual size is made once with mke2fs(8); others are copies of its few blocks that are not empty,
//! which takes little longer than making a directory. Some are kept ready.
//!
//! The file is locked (flock(2)) through the very descriptor that the loop device is given, so the lock lasts as long as
//! the device does: no image is ever mounted twice, whatever became of the execd that mounted it first.

use super::home::Limit;
use execd_init_shim::detached::ext4_file_system;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Their folder below `upper_root`.
const FOLDER: &str = ".images";
const TEMPLATE: &str = "template";
/// Bytes of an inode, as mke2fs is told.
const INODE_BYTES: u64 = 256;
/// What the file system needs for itself besides inodes: a journal and some blocks, and this part of its size.
const OWN_BYTES: u64 = (4 << 20) + (64 << 10);
const OWN_PART: u64 = 8192;
/// What it keeps back for its own metadata: this part, up to 4096 blocks (ext4_calculate_resv_clusters of the kernel).
const HELD_BACK_PART: u64 = 50;
const HELD_BACK_BYTES_MAX: u64 = 4096 * 4096;
/// Images kept ready once there has been a use for one.
const READY_MAX: usize = 2;
/// Pause after an image could not be made; sessions say why by then.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// How long the last user of an image may take to let it go.
const RELEASE_MAX: Duration = Duration::from_secs(10);
/// How often a loop device is asked for that somebody else is faster to take.
const LOOP_TRIES: u32 = 64;
const LOOP_CONTROL: &str = "/dev/loop-control";
/// The block device's major number (Documentation/admin-guide/devices.txt).
const LOOP_MAJOR: u32 = 7;

/// An image and the file system in it.
#[derive(Debug)]
pub(super) struct Image {
    /// The root directory, as mounted.
    pub(super) root: OwnedFd,
}

/// Makes images.
#[derive(Debug)]
pub(super) struct Images {
    folder: PathBuf,
    /// The size that is kept ready.
    usual: Limit,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<(PathBuf, Image)>,
    wanted: bool,
    stopped: bool,
}

impl Images {
    /// Finds out whether images can be used, by using one.
    ///
    /// # Errors
    /// Why they cannot.
    pub(super) fn open(upper_root: &Path, usual: Limit) -> io::Result<Self> {
        let folder = upper_root.join(FOLDER);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        for leftover in fs::read_dir(&folder)? {
            fs::remove_file(leftover?.path())?;
        }
        let images = Self { folder, usual, state: Mutex::default(), changed: Condvar::new() };
        let first = images.make(usual)?;
        images.state().ready.push_back(first);
        Ok(images)
    }

    /// Whether this entry of `upper_root` is the folder of images.
    pub(super) fn is_called(name: &std::ffi::OsStr) -> bool {
        name == FOLDER
    }

    /// An image for these limits, whose file is moved to `path`.
    ///
    /// # Errors
    /// What goes wrong, above all no room and no loop device.
    pub(super) fn take(&self, limit: Limit, path: &Path) -> io::Result<Image> {
        let ready = if limit == self.usual { self.state().ready.pop_front() } else { None };
        let (file, image) = match ready {
            Some(ready) => ready,
            None => self.make(limit)?,
        };
        fs::rename(file, path)?;
        Ok(image)
    }

    /// Has further ones made ready; not while a session waits for something else.
    pub(super) fn refill(&self) {
        self.state().wanted = true;
        self.changed.notify_all();
    }

    /// Lets [`Images::keep_ready`] end.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.stopped = true;
        let ready = std::mem::take(&mut state.ready);
        drop(state);
        self.changed.notify_all();
        drop(ready);
        let _ = fs::remove_dir_all(&self.folder);
    }

    /// Makes images ready until stopped.
    pub(super) fn keep_ready(&self) {
        loop {
            let idle =
                |state: &mut State| !state.stopped && (!state.wanted || state.ready.len() >= READY_MAX);
            let state = self.changed.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                return;
            }
            drop(state);
            match self.make(self.usual) {
                Ok(made) => {
                    let mut state = self.state();
                    state.ready.push_back(made);
                    state.wanted = state.ready.len() < READY_MAX;
                }
                Err(error) => {
                    tracing::warn!(%error, "no image can be made ready");
                    let going_on = |state: &mut State| !state.stopped;
                    drop(self.changed.wait_timeout_while(self.state(), FAILURE_PAUSE, going_on));
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, limit: Limit) -> io::Result<(PathBuf, Image)> {
        let path = self.folder.join(uuid::Uuid::new_v4().to_string());
        let made = self.unmounted(limit, &path).and_then(Image::mount);
        if made.is_err() {
            let _ = fs::remove_file(&path);
        }
        Ok((path, made?))
    }

    fn unmounted(&self, limit: Limit, path: &Path) -> io::Result<File> {
        if limit == self.usual {
            return copy(&self.template()?, path);
        }
        // Of any other size there may never be a second one.
        format(path, limit)?;
        File::options().read(true).write(true).open(path)
    }

    /// A formatted image of the usual size.
    fn template(&self) -> io::Result<File> {
        let path = self.folder.join(TEMPLATE);
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let passing = self.folder.join(uuid::Uuid::new_v4().to_string());
        let formatted = format(&passing, self.usual).and_then(|()| fs::rename(&passing, &path));
        if formatted.is_err() {
            let _ = fs::remove_file(&passing);
        }
        formatted?;
        File::open(&path)
    }
}

impl Image {
    /// Mounts what an earlier execd, or an earlier use, has left.
    ///
    /// # Errors
    /// What goes wrong; `WouldBlock` when it does not get free.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Self::mount(rustix::fs::open(path, flags, Mode::empty())?.into())
    }

    fn mount(file: File) -> io::Result<Self> {
        lock(&file)?;
        let device = loop_device(&file)?;
        let root = ext4_file_system(&device.path).map_err(io::Error::other)?;
        Ok(Self { root })
    }
}

fn lock(file: &File) -> io::Result<()> {
    let deadline = Instant::now() + RELEASE_MAX;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return Ok(done?),
        }
    }
}

/// Formats an image that takes this much.
fn format(path: &Path, limit: Limit) -> io::Result<()> {
    let held_back = (limit.bytes / HELD_BACK_PART).min(HELD_BACK_BYTES_MAX);
    let own = limit.bytes / OWN_PART + limit.inodes * INODE_BYTES + OWN_BYTES;
    let size = limit.bytes + held_back + own;
    File::create_new(path)?.set_len(size)?;
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=4", "-O", "^resize_inode"])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"])
        .args(["-I", &INODE_BYTES.to_string(), "-N", &limit.inodes.to_string()])
        .arg(path)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null());
    let output =
        command.output().map_err(|error| io::Error::new(error.kind(), format!("run mke2fs: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("mke2fs: {}", said.lines().next().unwrap_or("failed"))))
}

/// A copy with the same holes.
fn copy(template: &File, path: &Path) -> io::Result<File> {
    use rustix::fs::{SeekFrom, copy_file_range, seek};
    let copy = File::options().read(true).write(true).create_new(true).open(path)?;
    let size = template.metadata()?.len();
    copy.set_len(size)?;
    if rustix::fs::ioctl_ficlone(&copy, template).is_ok() {
        return Ok(copy);
    }
    let mut at = 0;
    while let Ok(data) = seek(template, SeekFrom::Data(at)) {
        at = seek(template, SeekFrom::Hole(data))?;
        let (mut from, mut to) = (data, data);
        while from < at {
            let length = usize::try_from(at - from).unwrap_or(usize::MAX);
            if copy_file_range(template, Some(&mut from), &copy, Some(&mut to), length)? == 0 {
                break;
            }
        }
    }
    Ok(copy)
}

/// A loop device, which lasts as long as this is held, or something is mounted of it.
struct LoopDevice {
    path: PathBuf,
    _device: OwnedFd,
}

fn loop_device(file: &File) -> io::Result<LoopDevice> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty());
    let control = open(Path::new(LOOP_CONTROL))
        .map_err(|errno| io::Error::new(errno.kind(), format!("open {LOOP_CONTROL}: {errno}")))?;
    for _ in 0..LOOP_TRIES {
        let number = execd_sys::free_loop_device(control.as_fd())?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = match open(&path) {
            // A container's /dev has those of its start; the kernel makes more.
            Err(Errno::NOENT) => {
                let device = rustix::fs::makedev(LOOP_MAJOR, number);
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::BlockDevice, mode, device)?;
                open(&path)?
            }
            opened => opened?,
        };
        match execd_sys::configure_loop_device(device.as_fd(), file.as_fd()) {
            Ok(()) => return Ok(LoopDevice { path, _device: device }),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("no loop device stays free"))
}
