//! What went wrong on the far side: which step, which system call, which errno.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A step that failed. It prints like strace(1) with the step in front:
/// `mount overlay on /workspace: fsconfig(create): EINVAL`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Failure {
    /// What the step was for, in the caller's terms.
    pub step: String,
    /// The call, with the arguments that matter.
    pub call: String,
    /// The error number of the call, errno(3); 0 when no call failed but a check did.
    pub errno: i32,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.call)?;
        if self.errno == 0 { Ok(()) } else { write!(f, ": {:?}", nix::errno::Errno::from_raw(self.errno)) }
    }
}

impl Failure {
    /// A failed check: no system call is to blame.
    pub fn check(step: impl Into<String>, what: impl Into<String>) -> Self {
        Self { step: step.into(), call: what.into(), errno: 0 }
    }
}

/// A system call's error, before it is known which step it belonged to.
#[derive(Debug)]
pub(crate) struct CallError {
    call: String,
    errno: i32,
}

impl CallError {
    pub(crate) fn of(self, step: impl Into<String>) -> Failure {
        Failure { step: step.into(), call: self.call, errno: self.errno }
    }

    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.errno == errno.raw_os_error()
    }

    pub(crate) fn new(call: impl Into<String>, error: &std::io::Error) -> Self {
        Self { call: call.into(), errno: error.raw_os_error().unwrap_or(0) }
    }

    pub(crate) fn what(call: impl Into<String>) -> Self {
        Self { call: call.into(), errno: 0 }
    }
}

/// Names the call whose result this is.
pub(crate) trait Call<T> {
    fn call(self, call: impl FnOnce() -> String) -> Result<T, CallError>;
}

impl<T> Call<T> for rustix::io::Result<T> {
    fn call(self, call: impl FnOnce() -> String) -> Result<T, CallError> {
        self.map_err(|errno| CallError { call: call(), errno: errno.raw_os_error() })
    }
}

impl<T> Call<T> for nix::Result<T> {
    fn call(self, call: impl FnOnce() -> String) -> Result<T, CallError> {
        self.map_err(|errno| CallError { call: call(), errno: errno as i32 })
    }
}

impl<T> Call<T> for std::io::Result<T> {
    fn call(self, call: impl FnOnce() -> String) -> Result<T, CallError> {
        self.map_err(|error| CallError::new(call(), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_like_strace() {
        let failure = Err::<(), _>(rustix::io::Errno::INVAL)
            .call(|| "move_mount(7, \"/\")".into())
            .map_err(|e| e.of("mount overlay on /workspace"))
            .unwrap_err();
        assert_eq!(failure.to_string(), "mount overlay on /workspace: move_mount(7, \"/\"): EINVAL");
        assert_eq!(Failure::check("bind /x", "is a socket").to_string(), "bind /x: is a socket");
    }
}
