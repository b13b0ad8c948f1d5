//! Files as block devices, and file systems as a whole.

use crate::check;
use linux_raw_sys::ioctl::EXT4_IOC_SHUTDOWN;
use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LOOP_CONFIGURE, LOOP_CTL_GET_FREE, loop_config, loop_info64,
};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Leave dirty data and the journal alone (EXT4_GOING_FLAGS_NOLOGFLUSH of fs/ext4/ext4.h).
const GOING_FLAGS_NOLOGFLUSH: u32 = 2;

/// The number of a loop device that nobody uses (loop(4), LOOP_CTL_GET_FREE); `control` is /dev/loop-control.
///
/// # Errors
/// Those of the ioctl.
pub fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument.
    let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) }.into())?;
    u32::try_from(number).map_err(io::Error::other)
}

/// Makes a loop device stand for a file until its last user is gone (loop(4), LOOP_CONFIGURE, kernel 5.8).
///
/// # Errors
/// `EBUSY` when somebody was faster.
pub fn configure_loop_device(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an all-zero `loop_config` is valid: integers and arrays of them.
    let mut config: loop_config = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd() as u32;
    config.info = loop_info64 { lo_flags: LO_FLAGS_AUTOCLEAR as u32, ..config.info };
    // SAFETY: LOOP_CONFIGURE reads one `loop_config`, which outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) }.into()).map(drop)
}

/// Gives up an ext4 file system: what has not been written to its device is not written any more (FS_IOC_SHUTDOWN).
/// `root` has to be opened for reading.
///
/// # Errors
/// `ENOTTY` for another kind of file system, `EPERM` without CAP_SYS_ADMIN.
pub fn abandon_file_system(root: BorrowedFd<'_>) -> io::Result<()> {
    let flags = GOING_FLAGS_NOLOGFLUSH;
    // SAFETY: the ioctl reads one u32, which outlives the call.
    check(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_SHUTDOWN as _, &raw const flags) }.into()).map(drop)
}
