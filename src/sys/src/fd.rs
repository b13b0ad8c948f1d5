//! Descriptors across exec: close_range(2) and dup2(2).

use crate::check;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::io;

/// Closes every descriptor from `first` on.
///
/// For the moment after a fork or before an exec, when the caller owns none of them any more. Taking the
/// lowest number instead of a list is the point: what nobody remembered is closed too.
///
/// # Errors
/// `ENOSYS` before kernel 5.9.
pub fn close_range_from(first: u32) -> io::Result<()> {
    // SAFETY: no pointers. Closing descriptors that some `OwnedFd` still names would break that owner's
    // promise, which is why the only callers are processes about to exec or just born, whose owners are
    // forgotten or never dropped (see init-shim).
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Makes `target` (0, 1, 2 or another fixed number) refer to what `fd` refers to, without close-on-exec.
///
/// # Errors
/// Those of dup2(2).
pub fn redirect(fd: BorrowedFd<'_>, target: i32) -> io::Result<()> {
    if fd.as_raw_fd() == target {
        // dup2 onto itself would leave close-on-exec set.
        // SAFETY: F_SETFD takes an integer.
        return check(unsafe { libc::fcntl(target, libc::F_SETFD, 0) }.into()).map(drop);
    }
    // SAFETY: dup2 takes two integers; the number it replaces belongs to no `OwnedFd` of the caller,
    // which has only the standard streams and its own socket (see init-shim).
    check(unsafe { libc::dup2(fd.as_raw_fd(), target) }.into()).map(drop)
}

/// Takes ownership of descriptor number `fd` and makes it close-on-exec.
///
/// For a number that [`redirect`] has just filled, which by its contract nobody owns.
///
/// # Errors
/// `EBADF` when the number is not open.
pub fn adopt(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes an integer.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    // SAFETY: the number is open (just checked) and, as the caller filled it with `redirect`, unowned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
