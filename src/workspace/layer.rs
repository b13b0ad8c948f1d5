//! One overlay, seen from outside: its two trees.

use super::home::open_directory;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::ffi::CStr;
use std::io;
use std::path::PathBuf;

/// The upper and the lower of an overlay, as directories of the host.
///
/// What is in the upper was made by code that nobody trusts, and may change at any time; the lower may be changed by
/// others. Both are only ever walked through descriptors, without following links.
#[derive(Debug)]
pub struct Layer {
    /// Where the overlay is mounted in the session; for messages, and for the paths of answers.
    pub dest: PathBuf,
    /// Opened for reading.
    pub upper: OwnedFd,
    /// Opened for reading.
    pub lower: OwnedFd,
    /// Which attributes are overlayfs' own here.
    pub marks: Marks,
}

/// How overlayfs marks what an upper means (Documentation/filesystems/overlayfs.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Marks {
    /// `trusted.overlay.*`, which only the kernel and the host's root can write.
    Trusted,
    /// `user.overlay.*`, of a mount in a user namespace (`userxattr`).
    User,
}

impl Marks {
    /// The attribute of directories that says what of the lower shows in them: `y` nothing, `x` that their whiteouts may
    /// be files with an attribute.
    pub(crate) fn opaque(self) -> &'static CStr {
        match self {
            Self::Trusted => c"trusted.overlay.opaque",
            Self::User => c"user.overlay.opaque",
        }
    }

    /// The attribute of empty files that makes them whiteouts.
    pub(crate) fn whiteout(self) -> &'static CStr {
        match self {
            Self::Trusted => c"trusted.overlay.whiteout",
            Self::User => c"user.overlay.whiteout",
        }
    }
}

/// Whether an attribute means something outside of an upper. Overlayfs' own do not, whichever mount they are of: one
/// kind is not even shown by a mount of the other, and a consumer's overlayfs would obey them. Labels are the machine's.
pub(crate) fn is_portable(attribute: &CStr) -> bool {
    let name = attribute.to_bytes();
    !name.starts_with(b"trusted.overlay.")
        && !name.starts_with(b"user.overlay.")
        && name != b"security.selinux"
}

/// Opens a lower for reading, without what is mounted in it: an overlay does not show that, either.
pub(super) fn open_lower(lower: &OwnedFd) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    match open_tree(lower, "", flags) {
        Ok(alone) => open_directory(&alone, "."),
        // A plain user cannot; such a one has not mounted anything there, either.
        Err(Errno::PERM | Errno::NOSYS) => open_directory(lower, "."),
        Err(errno) => Err(errno.into()),
    }
}
