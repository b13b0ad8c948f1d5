//! Where the uppers of one session lie, and what keeps them within bounds.

use super::image::Image;
use execd_init_shim::detached::memory_file_system;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, fstatfs, openat};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Inodes of an ephemeral upper.
pub const EPHEMERAL_INODES_MAX: u64 = 1 << 20;

/// Kinds of places for uppers, in the order in which they are preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// A file system in a file: the kernel ends every write beyond the limit (ENOSPC).
    Image,
    /// A directory of `upper_root`: a session that exceeds its limit is noticed, and can then write no more (EROFS).
    Directory,
    /// A tmpfs: the kernel ends every write beyond the limit (ENOSPC).
    Memory,
}

/// Who sees to it that a limit is kept to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Keeper {
    /// The kernel: a write beyond it fails (ENOSPC).
    Kernel,
    /// execd: soon after it is exceeded nothing can be written any more (EROFS).
    Execd,
}

impl Tier {
    /// Who sees to it that its limit is kept to.
    pub fn keeper(self) -> Keeper {
        match self {
            Self::Image | Self::Memory => Keeper::Kernel,
            Self::Directory => Keeper::Execd,
        }
    }
}

/// What the uppers of one session may hold together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Content and what it takes to keep it; bytes.
    pub bytes: u64,
    /// Files, directories and all else.
    pub inodes: u64,
}

/// What they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Files, directories and all else.
    pub inodes: u64,
}

/// Where the uppers of one session lie.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) place: Place,
    /// What an empty one counts as used.
    empty: Usage,
}

#[derive(Debug)]
pub(super) enum Place {
    Image(Image),
    Directory(OwnedFd, PathBuf),
    Memory(OwnedFd),
}

impl Home {
    pub(super) fn image(image: Image) -> io::Result<Self> {
        let empty = file_system_usage(image.root.as_fd())?;
        Ok(Self { place: Place::Image(image), empty })
    }

    pub(super) fn directory(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { place: Place::Directory(dir, path.into()), empty: Usage::default() })
    }

    pub(super) fn memory(limit: Limit) -> io::Result<Self> {
        let root = memory_file_system(limit.bytes, limit.inodes).map_err(io::Error::other)?;
        Ok(Self { place: Place::Memory(root), empty: Usage::default() })
    }

    pub(super) fn tier(&self) -> Tier {
        match self.place {
            Place::Image(_) => Tier::Image,
            Place::Directory(..) => Tier::Directory,
            Place::Memory(_) => Tier::Memory,
        }
    }

    /// The directory that has a folder for each upper.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        match &self.place {
            Place::Image(image) => image.root.as_fd(),
            Place::Directory(root, _) | Place::Memory(root) => root.as_fd(),
        }
    }

    /// What it holds; for a directory that means a walk.
    pub(super) fn usage(&self) -> Usage {
        let used = match &self.place {
            Place::Image(image) => file_system_usage(image.root.as_fd()).unwrap_or_default(),
            Place::Memory(root) => file_system_usage(root.as_fd()).unwrap_or_default(),
            Place::Directory(_, path) => tree_usage(path),
        };
        Usage {
            bytes: used.bytes.saturating_sub(self.empty.bytes),
            inodes: used.inodes.saturating_sub(self.empty.inodes),
        }
    }
}

fn file_system_usage(root: BorrowedFd<'_>) -> io::Result<Usage> {
    let stat = fstatfs(root)?;
    let block = u64::try_from(stat.f_bsize).unwrap_or(0);
    Ok(Usage {
        bytes: stat.f_blocks.saturating_sub(stat.f_bfree) * block,
        inodes: stat.f_files.saturating_sub(stat.f_ffree),
    })
}

/// What is allocated below `dir`; what vanishes meanwhile does not count, nor what lies deeper than a path reaches.
pub(super) fn tree_usage(dir: &Path) -> Usage {
    let mut usage = Usage::default();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            usage.inodes += 1;
            usage.bytes += metadata.blocks() * 512;
            if metadata.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    usage
}

/// Opens a directory below another for reading.
pub(super) fn open_directory(base: impl AsFd, below: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(base, below.as_ref(), flags, Mode::empty())?)
}
