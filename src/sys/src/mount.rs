//! mount_setattr(2).

use crate::check;
use rustix::fd::{AsRawFd, BorrowedFd};
use std::ffi::CStr;
use std::io;

/// Attributes to set on mounts. They are only ever added: clearing is what a sandbox must never need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountAttr {
    /// `MOUNT_ATTR_RDONLY`
    pub read_only: bool,
    /// `MOUNT_ATTR_NOSUID`
    pub nosuid: bool,
    /// `MOUNT_ATTR_NODEV`
    pub nodev: bool,
    /// `MOUNT_ATTR_NOEXEC`
    pub noexec: bool,
}

/// How mounts and unmounts travel (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// As it is.
    Unchanged,
    /// `MS_PRIVATE`: in neither direction.
    Private,
}

#[repr(C)]
struct RawMountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes on the mount at `path` below `dir`, or on all mounts beneath it too.
///
/// # Errors
/// Those of mount_setattr(2): `ENOSYS` before kernel 5.12, `EINVAL` when `path` is no mount point, `EPERM`
/// without `CAP_SYS_ADMIN` or for a locked attribute.
pub fn mount_setattr(
    dir: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
    attr: MountAttr,
    propagation: Propagation,
) -> io::Result<()> {
    let bit = |on: bool, flag: u64| if on { flag } else { 0 };
    let raw = RawMountAttr {
        set: bit(attr.read_only, libc::MOUNT_ATTR_RDONLY)
            | bit(attr.nosuid, libc::MOUNT_ATTR_NOSUID)
            | bit(attr.nodev, libc::MOUNT_ATTR_NODEV)
            | bit(attr.noexec, libc::MOUNT_ATTR_NOEXEC),
        clear: 0,
        propagation: match propagation {
            Propagation::Unchanged => 0,
            Propagation::Private => libc::MS_PRIVATE,
        },
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `path` ends in NUL, `raw` is the kernel's `struct mount_attr` (32 bytes, kernel 5.12); both
    // outlive the call, which only reads them.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const raw,
            std::mem::size_of::<RawMountAttr>(),
        )
    })
    .map(drop)
}
