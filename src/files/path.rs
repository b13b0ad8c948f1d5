//! Paths as callers write them: absolute ones as the session sees them, relative ones against its workspace.

use super::error::FileError;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// The longest path the kernel takes, without its NUL; bytes (path_resolution(7)).
const PATH_BYTES_MAX: usize = 4095;

/// An absolute path inside a session, to be resolved with the session's `/` as root. It may still lead through links
/// and `..`, but never writes itself out of where it begins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RootedPath(PathBuf);

impl RootedPath {
    /// Reads what a caller wrote.
    ///
    /// # Errors
    /// [`super::Class::Invalid`] for an empty one, one with a NUL, one too long, and one whose `..` lead out.
    pub fn parse(text: &str, workspace: &Path) -> Result<Self, FileError> {
        if text.is_empty() {
            return Err(FileError::invalid("path", "must not be empty"));
        }
        if text.contains('\0') {
            return Err(FileError::invalid("path", "must not contain a NUL"));
        }
        let mut path = if text.starts_with('/') { PathBuf::from("/") } else { workspace.to_path_buf() };
        let mut depth = 0_usize;
        // Without doubled slashes and dots. What `..` means depends on links, so those stay.
        for component in Path::new(text).components() {
            match component {
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
                Component::Normal(_) => depth += 1,
                Component::ParentDir => {
                    let out = || FileError::invalid(text, "leads out of the session's files");
                    depth = depth.checked_sub(1).ok_or_else(out)?;
                }
            }
            path.push(component);
        }
        if path.as_os_str().len() > PATH_BYTES_MAX {
            return Err(FileError::invalid(abridged(text), "is longer than the kernel takes"));
        }
        Ok(Self(path))
    }

    /// What a link at this place that says `target` leads to.
    pub(super) fn follow(&self, target: &OsStr) -> Self {
        let parent = self.0.parent().unwrap_or(Path::new("/"));
        Self(parent.join(target))
    }

    /// Something in this directory.
    pub(super) fn join(&self, below: impl AsRef<Path>) -> Self {
        Self(self.0.join(below))
    }

    /// The directory it lies in, and its name there.
    ///
    /// # Errors
    /// [`super::Class::Invalid`] for `/` and for what ends in `..`.
    pub(super) fn split(&self) -> Result<(Self, OsString), FileError> {
        match (self.0.parent(), self.0.file_name()) {
            (Some(parent), Some(name)) => Ok((Self(parent.to_path_buf()), name.to_owned())),
            _ => Err(FileError::invalid(&self.0, "names no entry of a directory")),
        }
    }

    /// The directory it lies in; `None` for `/`.
    pub(super) fn parent(&self) -> Option<Self> {
        self.0.parent().map(|parent| Self(parent.to_path_buf()))
    }

    /// Its last part, for a download.
    pub fn file_name(&self) -> String {
        self.0.file_name().map_or_else(|| "root".into(), |name| name.to_string_lossy().into_owned())
    }

    /// As a path that is resolved from a descriptor of the root.
    pub(super) fn as_bytes(&self) -> &[u8] {
        self.0.as_os_str().as_bytes()
    }
}

impl AsRef<Path> for RootedPath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for RootedPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

fn abridged(text: &str) -> String {
    text.chars().take(64).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<String> {
        RootedPath::parse(text, Path::new("/work")).ok().map(|path| path.to_string())
    }

    #[test]
    fn relative_ones_begin_at_the_workspace() {
        assert_eq!(parse("a/./b//c/").as_deref(), Some("/work/a/b/c"));
        assert_eq!(parse(".").as_deref(), Some("/work"));
        assert_eq!(parse("/").as_deref(), Some("/"));
        assert_eq!(parse("/a/../b").as_deref(), Some("/a/../b"));
    }

    #[test]
    fn none_leads_out() {
        for text in ["..", "../x", "a/../../x", "/..", "/a/../..", "", "a\0b"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert_eq!(parse(&"x/".repeat(3000)), None);
    }

    #[test]
    fn split_needs_a_name() {
        let split = |text: &str| RootedPath::parse(text, Path::new("/work")).and_then(|path| path.split());
        assert!(split("/").is_err() && split("/a/..").is_err());
        let (parent, name) = split("/a/b").unwrap();
        assert_eq!((parent.to_string().as_str(), name.to_str()), ("/a", Some("b")));
    }
}
