//! Extended attributes (xattr(7)), ACLs included, carried from one file to another as far as the session may, or all.

use super::copy::Failed;
use super::tree::proc_path;
use rustix::buffer::spare_capacity;
use rustix::fd::AsFd;
use rustix::fs::{
    XattrFlags, fgetxattr, flistxattr, flistxattr_query, fsetxattr, getxattr, getxattr_query, listxattr,
    listxattr_query, removexattr, setxattr,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString};

/// The most bytes of names, and of a value (linux/limits.h).
const BYTES_MAX: usize = 64 * 1024;

/// Copies what can be copied. Some attributes belong to the file system, some only root may set; mv(1) minds neither.
pub(crate) fn copy(from: impl AsFd, to: impl AsFd) {
    let mut names = Vec::new();
    // Most files have none, and then this is all there is to do.
    if !matches!(flistxattr_query(&from), Ok(1..)) {
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

/// The names of a file's attributes. The descriptor may be an `O_PATH` one, and that of a link.
pub(crate) fn names(file: &impl AsFd) -> Result<Vec<CString>, Errno> {
    let path = proc_path(file);
    // Most files have none, and then this is all there is to do.
    match listxattr_query(&*path) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::with_capacity(BYTES_MAX);
    listxattr(&*path, spare_capacity(&mut names))?;
    let each = names.split_inclusive(|byte| *byte == 0);
    Ok(each.filter_map(|name| CStr::from_bytes_with_nul(name).ok().map(CStr::to_owned)).collect())
}

/// The value of a file's attribute, if it has that. The descriptor may be an `O_PATH` one, and that of a link.
pub(crate) fn value(file: &impl AsFd, name: &CStr) -> Result<Option<Vec<u8>>, Errno> {
    let path = proc_path(file);
    loop {
        let length = match getxattr_query(&*path, name) {
            Err(Errno::NODATA | Errno::NOTSUP) => return Ok(None),
            other => other?,
        };
        let mut value = Vec::with_capacity(length);
        if length == 0 {
            return Ok(Some(value));
        }
        match getxattr(&*path, name, spare_capacity(&mut value)) {
            // It has changed since.
            Err(Errno::RANGE | Errno::NODATA) => {}
            other => return other.map(|_| Some(value)),
        }
    }
}

/// Gives `to` the attributes of `from`, of those that `carries` says yes to, and takes away what `from` has not if they
/// are to be `the_same`; whether anything had to be changed. What cannot be given is a failure. Either descriptor may be
/// an `O_PATH` one, and that of a link.
pub(crate) fn equate(
    from: &impl AsFd,
    to: &impl AsFd,
    the_same: bool,
    carries: &dyn Fn(&CStr) -> bool,
) -> Result<bool, Failed> {
    let carried = |names: Vec<CString>| names.into_iter().filter(|name| carries(name)).collect::<Vec<_>>();
    let wanted = carried(names(from).map_err(|errno| ("listxattr", errno))?);
    let present = carried(names(to).map_err(|errno| ("listxattr", errno))?);
    let path = proc_path(to);
    let mut changed = false;
    for name in present.iter().filter(|name| the_same && !wanted.contains(name)) {
        match removexattr(&*path, &**name) {
            Ok(()) | Err(Errno::NODATA) => changed = true,
            Err(errno) => return Err(("removexattr", errno)),
        }
    }
    let read = |errno| ("getxattr", errno);
    for name in &wanted {
        let Some(new) = value(from, name).map_err(read)? else { continue };
        if !present.contains(name) || value(to, name).map_err(read)?.as_ref() != Some(&new) {
            setxattr(&*path, &**name, &new, XattrFlags::empty()).map_err(|errno| ("setxattr", errno))?;
            changed = true;
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_copied_and_read() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        assert_eq!(names(&from), Ok(Vec::new()));
        if fsetxattr(&from, c"user.a", b"1", XattrFlags::empty()).is_err() {
            println!("skipped: no attributes in the folder for temporary files");
            return;
        }
        fsetxattr(&from, c"user.empty", b"", XattrFlags::empty()).unwrap();
        copy(&from, &to);
        assert_eq!(names(&to).unwrap().len(), 2);
        assert_eq!(value(&to, c"user.a"), Ok(Some(b"1".to_vec())));
        assert_eq!(value(&to, c"user.empty"), Ok(Some(Vec::new())));
        assert_eq!(value(&to, c"user.none"), Ok(None));
    }
}
