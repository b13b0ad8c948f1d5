//! One overlay, seen from outside: its two trees.

use rustix::fd::OwnedFd;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// `trusted.overlay.*`, which only the kernel and the host's root can write.
    Trusted,
    /// `user.overlay.*`, of a mount in a user namespace (`userxattr`).
    User,
}
