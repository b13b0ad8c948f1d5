//! keyctl(2).

use crate::check;
use std::io;

/// Gives the process a session keyring of its own, empty and unnamed (`KEYCTL_JOIN_SESSION_KEYRING`), so
/// that keys of the daemon or of another sandbox are out of reach (session-keyring(7)).
///
/// # Errors
/// `ENOSYS` in a kernel without keyrings, `EPERM` under a seccomp profile, `EDQUOT` at the key quota.
pub fn join_session_keyring() -> io::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring; nothing else is read.
    check(unsafe {
        libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    })
    .map(drop)
}
