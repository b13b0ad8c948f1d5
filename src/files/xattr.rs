//! Extended attributes (xattr(7)), ACLs included, carried from one file to another as far as the session may.

use rustix::buffer::spare_capacity;
use rustix::fd::AsFd;
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr};
use std::ffi::CStr;

/// The most bytes of names, and of a value (linux/limits.h).
const BYTES_MAX: usize = 64 * 1024;

/// Copies what can be copied. Some attributes belong to the file system, some only root may set; mv(1) minds neither.
pub(crate) fn copy(from: impl AsFd, to: impl AsFd) {
    let mut names = Vec::new();
    // Most files have none, and then this is all there is to do.
    if !matches!(flistxattr(&from, &mut [0_u8; 0][..]), Ok(1..)) {
        return;
    }
    names.reserve(BYTES_MAX);
    if flistxattr(&from, spare_capacity(&mut names)).is_err() {
        return;
    }
    let mut value = Vec::with_capacity(BYTES_MAX);
    for name in
        names.split_inclusive(|byte| *byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok())
    {
        value.clear();
        if fgetxattr(&from, name, spare_capacity(&mut value)).is_ok() {
            let _ = fsetxattr(&to, name, &value, XattrFlags::empty());
        }
    }
}
