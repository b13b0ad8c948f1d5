//! Why a file operation fails.

use rustix::io::Errno;
use std::path::Path;

/// The kinds of failure a caller can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The request makes no sense here.
    Invalid,
    /// There is no such file.
    NotFound,
    /// The session could not do that either, or nobody may.
    Forbidden,
    /// Something is in the way.
    Conflict,
    /// The disk or a quota is full.
    NoSpace,
    /// Later may do.
    Busy,
    /// The answer would be too large.
    TooLarge,
    /// The session or the client has gone.
    Cancelled,
    /// Anything else.
    Failed,
}

/// Why a file operation fails.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FileError {
    /// Found out without a system call, or from what one has told.
    #[error("{path}: {reason}")]
    Refused {
        /// As the session calls it.
        path: String,
        /// What is wrong.
        reason: String,
        /// Its kind.
        class: Class,
    },
    /// A system call.
    #[error("{path}: {} ({call})", message(*errno))]
    Call {
        /// Its name.
        call: &'static str,
        /// What it was about, as the session calls it.
        path: String,
        /// Why it failed.
        errno: Errno,
    },
    /// There is nobody left to do it for.
    #[error("the operation was given up")]
    Cancelled,
    /// The daemon's own side.
    #[error("{0}")]
    Own(String),
}

impl FileError {
    /// A failure that no system call has reported.
    pub fn refused(path: impl AsRef<Path>, class: Class, reason: impl Into<String>) -> Self {
        Self::Refused { path: path.as_ref().display().to_string(), reason: reason.into(), class }
    }

    /// A request that makes no sense.
    pub fn invalid(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::refused(path, Class::Invalid, reason)
    }

    /// Its kind.
    pub fn class(&self) -> Class {
        match self {
            Self::Refused { class, .. } => *class,
            Self::Cancelled => Class::Cancelled,
            Self::Own(_) => Class::Failed,
            Self::Call { errno, .. } => match *errno {
                Errno::NOENT => Class::NotFound,
                Errno::ISDIR | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::INVAL => {
                    Class::Invalid
                }
                Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY => Class::Forbidden,
                Errno::EXIST | Errno::NOTEMPTY | Errno::BUSY | Errno::MLINK => Class::Conflict,
                Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Class::NoSpace,
                Errno::AGAIN | Errno::MFILE | Errno::NFILE | Errno::NOMEM => Class::Busy,
                _ => Class::Failed,
            },
        }
    }

    /// What the kernel said, if it was the kernel.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { errno, .. } => Some(*errno),
            Self::Refused { .. } | Self::Cancelled | Self::Own(_) => None,
        }
    }
}

/// Names a system call and what it was about.
pub(crate) trait Call<T> {
    fn call(self, call: &'static str, path: impl AsRef<Path>) -> Result<T, FileError>;
}

impl<T> Call<T> for Result<T, Errno> {
    fn call(self, call: &'static str, path: impl AsRef<Path>) -> Result<T, FileError> {
        self.map_err(|errno| FileError::Call { call, path: path.as_ref().display().to_string(), errno })
    }
}

impl<T> Call<T> for std::io::Result<T> {
    fn call(self, call: &'static str, path: impl AsRef<Path>) -> Result<T, FileError> {
        self.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)).call(call, path)
    }
}

/// The kernel's words for a number, without the number.
fn message(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
