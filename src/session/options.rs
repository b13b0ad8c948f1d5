//! What a caller may ask of a session, validated before anything is touched.

use crate::sandbox::environment::Passthrough;
use crate::sandbox::profile::{Profile, is_reserved};
use crate::workspace::resolve::{is_clean, is_plain_absolute};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The most workspaces and overlays of one session.
pub const MOUNTS_MAX: usize = 16;
/// The most binds and extra writable folders of one session.
pub const BINDS_MAX: usize = 64;

/// A validated request for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOptions {
    /// The profile.
    pub profile: Profile,
    /// Workspaces in the order asked for; the first is where the shell starts.
    pub mounts: Vec<Mount>,
    /// Folders to be writable at their own path.
    pub extra_writable: Vec<PathBuf>,
    /// Further binds.
    pub binds: Vec<Bind>,
    /// Use the daemon's network; otherwise loopback only.
    pub share_net: bool,
    /// Which environment variables pass.
    pub environment: Passthrough,
    /// The uid inside; execd's own when absent.
    pub uid: Option<u32>,
    /// The gid inside; execd's own when absent.
    pub gid: Option<u32>,
    /// How the identity comes about.
    pub uid_mode: UidMode,
    /// Idle time after which the session is deleted; `None` for never.
    pub idle_timeout: Option<Duration>,
    /// What is to become of the uppers of its persistent overlays.
    pub uppers: UpperOptions,
}

/// What is to become of the uppers of a session's persistent overlays, all together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UpperOptions {
    /// What they may hold; bytes, at most what is configured.
    pub bytes_max: Option<u64>,
    /// The same in files, directories and all else.
    pub inodes_max: Option<u64>,
    /// How long they are kept after the session's end.
    pub retain: Duration,
}

/// A workspace as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Same path inside and outside.
    pub path: PathBuf,
    /// How it is mounted.
    pub mode: MountMode,
}

/// The mode of a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountMode {
    /// Writes go through to the host.
    ReadWrite,
    /// No writes.
    ReadOnly,
    /// Writes go to an upper.
    Overlay {
        /// On disk, or in a tmpfs that dies with the session.
        persist: bool,
    },
}

/// A bind as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// The host path.
    pub source: PathBuf,
    /// Where it appears.
    pub dest: PathBuf,
    /// No writes.
    pub read_only: bool,
}

/// How the identity of a session comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UidMode {
    /// Real ids (setuid(2)).
    #[default]
    Setpriv,
    /// A user namespace with one id mapped onto execd's own.
    Userns,
}

/// A request that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct OptionError {
    /// The field, as in JSON.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl OptionError {
    /// Names a field and what is wrong with it.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// A path for a workspace: absolute, clean, and not one of the sandbox's own places.
///
/// # Errors
/// Names `field`.
pub fn mount_path(field: &str, path: &str) -> Result<PathBuf, OptionError> {
    let wrong = |reason: String| Err(OptionError::new(field, reason));
    if path.is_empty() {
        return wrong("must not be empty".into());
    }
    if !is_clean(path) {
        return wrong(format!("{path:?} must be absolute, without '.', '..', doubled or trailing '/'"));
    }
    if is_reserved(Path::new(path)) {
        return wrong(format!("{path:?} is one of the sandbox's own places"));
    }
    Ok(path.into())
}

/// A path for a bind or an extra writable folder.
///
/// # Errors
/// Names `field`.
pub fn absolute_path(field: &str, path: &str) -> Result<PathBuf, OptionError> {
    if path.is_empty() {
        return Err(OptionError::new(field, "must not be empty"));
    }
    if !is_plain_absolute(Path::new(path)) || path.contains('\0') {
        return Err(OptionError::new(field, format!("{path:?} must be absolute, without '..'")));
    }
    Ok(path.into())
}

impl SessionOptions {
    /// These workspaces and the defaults for everything else; no idle timeout.
    pub fn new(mounts: Vec<Mount>) -> Self {
        Self {
            profile: Profile::default(),
            mounts,
            extra_writable: Vec::new(),
            binds: Vec::new(),
            share_net: true,
            environment: Passthrough::default(),
            uid: None,
            gid: None,
            uid_mode: UidMode::default(),
            idle_timeout: None,
            uppers: UpperOptions::default(),
        }
    }

    /// Checks what concerns several fields at once.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(&self) -> Result<(), OptionError> {
        let wrong = |field: &str, reason: String| Err(OptionError::new(field, reason));
        if self.mounts.is_empty() {
            return wrong("workspace", "workspace.path or overlays is required".into());
        }
        if self.mounts.len() > MOUNTS_MAX {
            return wrong("overlays", format!("at most {MOUNTS_MAX} mounts, the workspace included"));
        }
        if self.binds.len() + self.extra_writable.len() > BINDS_MAX {
            return wrong("binds", format!("at most {BINDS_MAX} binds and writable folders"));
        }
        for (index, mount) in self.mounts.iter().enumerate() {
            if self.mounts.iter().skip(index + 1).any(|other| other.path == mount.path) {
                return wrong("overlays", format!("{} is mounted twice", mount.path.display()));
            }
            if mount.path == Path::new("/") && mount.mode == MountMode::ReadWrite {
                return wrong("overlays", "the root can only be mounted overlay or ro".into());
            }
        }
        for bind in &self.binds {
            if is_reserved(&bind.dest) || bind.dest == Path::new("/") {
                return wrong(
                    "binds.dest",
                    format!("{} is one of the sandbox's own places", bind.dest.display()),
                );
            }
        }
        for path in &self.extra_writable {
            if is_reserved(path) || path == Path::new("/") {
                return wrong(
                    "extra_writable",
                    format!("{} is one of the sandbox's own places", path.display()),
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(paths: &[&str]) -> SessionOptions {
        let mount = |path: &&str| Mount { path: path.into(), mode: MountMode::Overlay { persist: true } };
        SessionOptions::new(paths.iter().map(mount).collect())
    }

    #[test]
    fn mounts_are_required_unique_and_few() {
        assert!(options(&["/a", "/a/b"]).check().is_ok());
        assert_eq!(options(&[]).check().unwrap_err().field, "workspace");
        assert_eq!(options(&["/a", "/b", "/a"]).check().unwrap_err().field, "overlays");
        let many: Vec<String> = (0..=MOUNTS_MAX).map(|n| format!("/m{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(options(&many[1..]).check().is_ok());
        assert!(options(&many).check().is_err());
    }

    #[test]
    fn paths_are_checked_where_they_are_named() {
        for bad in ["", "relative", "/a/../b", "/a/", "/proc", "/dev/x", "/run/execd"] {
            assert_eq!(mount_path("workspace.path", bad).unwrap_err().field, "workspace.path", "{bad}");
        }
        assert!(absolute_path("binds.source", "/a/./b/").is_ok());
        assert!(absolute_path("binds.source", "/a/../b").is_err());
    }
}
