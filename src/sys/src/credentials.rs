//! The ids that file access is checked with (credentials(7)).

use std::io;

/// setfsuid(2) for the calling thread alone, which is what the call does by itself.
///
/// # Errors
/// `EPERM` when the kernel leaves the id as it was; the call itself says nothing about that.
pub fn set_fs_uid(uid: u32) -> io::Result<()> {
    // SAFETY: no pointers; it changes who may open what, and no memory.
    let taken = unsafe {
        libc::setfsuid(uid);
        libc::setfsuid(uid)
    };
    changed(taken, uid)
}

/// setfsgid(2) for the calling thread alone.
///
/// # Errors
/// As [`set_fs_uid`].
pub fn set_fs_gid(gid: u32) -> io::Result<()> {
    // SAFETY: as in `set_fs_uid`.
    let taken = unsafe {
        libc::setfsgid(gid);
        libc::setfsgid(gid)
    };
    changed(taken, gid)
}

/// The calls answer the id there was before, so the second of two says what the first has done.
fn changed(taken: libc::c_int, wanted: u32) -> io::Result<()> {
    if taken as u32 == wanted { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
}
