//! Real overlays for tests.

use super::layer::{Layer, Marks};
use crate::files::FileError;
use crate::files::walk::GoOn;
use execd_init_shim::Failure;
use execd_init_shim::detached::detach;
use execd_init_shim::messages::{MountStep, Upper};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, XattrFlags, lsetxattr, mkdirat, openat};
use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Always wants more.
pub(crate) const GO_ON: &GoOn<'static> = &|| Ok::<(), FileError>(());

/// An overlay that is mounted, but nowhere in the tree of files: other tests look at the machine's mounts.
pub(crate) struct Overlay {
    dir: TempDir,
    mount: Option<OwnedFd>,
}

impl Overlay {
    /// Mounts one over what a script of bash makes; `None` where that is impossible.
    pub(crate) fn new(lower: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        for name in ["lower", "upper", "work"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut overlay = Self { dir, mount: None };
        run(&overlay.lower(), lower);
        match overlay.show("upper", "work") {
            Ok(()) => Some(overlay),
            Err(failure) => {
                println!("skipped: no overlay can be mounted: {failure}");
                None
            }
        }
    }

    /// Mounts it with another upper.
    pub(crate) fn show(&mut self, upper: &str, work: &str) -> Result<(), Failure> {
        self.mount = None;
        let upper = Upper::Directory { upper: self.path(upper), work: self.path(work) };
        let step = MountStep::Overlay { lower: self.lower(), upper, dest: "/".into() };
        self.mount = Some(detach(&step)?.mount);
        Ok(())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn lower(&self) -> PathBuf {
        self.path("lower")
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.path("upper")
    }

    /// Other processes find it there, too.
    pub(crate) fn merged(&self) -> PathBuf {
        let mount = self.mount.as_ref().unwrap().as_raw_fd();
        format!("/proc/{}/fd/{mount}/.", std::process::id()).into()
    }

    /// Runs a script of bash in it.
    pub(crate) fn change(&self, script: &str) {
        run(&self.merged(), script);
    }

    /// Makes directories in each other in the upper, with names so long.
    pub(crate) fn nest(&self, levels: usize, length: usize) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut dir = openat(CWD, self.upper(), flags, Mode::empty()).unwrap();
        let name = "n".repeat(length);
        for _ in 0..levels {
            mkdirat(&dir, &name, Mode::from(0o755)).unwrap();
            dir = openat(&dir, &name, flags, Mode::empty()).unwrap();
        }
    }

    pub(crate) fn layer(&self) -> Layer {
        let open = |path: PathBuf| fs::File::open(path).unwrap().into();
        Layer {
            dest: "/inside".into(),
            upper: open(self.upper()),
            lower: open(self.lower()),
            marks: Marks::Trusted,
        }
    }
}

/// Runs a script of bash in a directory.
pub(crate) fn run(dir: &Path, script: &str) {
    let output =
        Command::new("bash").args(["-euc", &format!("umask 022\n{script}")]).current_dir(dir).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn set_attribute(path: &Path, name: &CStr, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}
