//! Finds out what this machine can isolate by doing it: throw-away sandboxes with the same namespaces, mounts
//! and identity changes a session has, up to but not including exec. What cannot be done is reported with the
//! step that failed and why.

use super::options::{Mount, MountMode, SessionOptions, UidMode};
use super::prepare::{Foundation, prepare};
use crate::sandbox::launch::{LaunchError, ProgramStart, Sandbox};
use crate::sandbox::launcher::Launcher;
use rustix::fd::AsFd;
use std::fs::File;
use std::time::Duration;
use uuid::Uuid;

/// The unprivileged id that a switch of identity is tried with (nobody).
const OTHER_ID: u32 = 65534;
const EXIT_WAIT_MAX: Duration = Duration::from_secs(5);

/// What the machine can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Everything that was tried.
    pub checks: Vec<Check>,
}

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Check {
    /// What.
    pub name: Feature,
    /// Whether it works.
    pub available: bool,
    /// Why it does not, and what would help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// A sandbox with execd's own ids.
    Setpriv,
    /// A sandbox with another uid and gid.
    IdentitySwitch,
    /// A sandbox in a user namespace.
    Userns,
    /// An overlay whose upper is in `upper_root`.
    PersistentOverlay,
    /// A network namespace with loopback only.
    PrivateNetwork,
    /// Exact process groups by cgroup v2.
    Cgroup,
}

impl Feature {
    /// For a table.
    pub fn title(self) -> &'static str {
        match self {
            Self::Setpriv => "sandbox, own identity (uid_mode setpriv)",
            Self::IdentitySwitch => "sandbox, another uid and gid",
            Self::Userns => "sandbox in a user namespace (uid_mode userns)",
            Self::PersistentOverlay => "overlay with its upper in upper_root",
            Self::PrivateNetwork => "private network (share_net false)",
            Self::Cgroup => "exact kill by cgroup v2",
        }
    }
}

impl Report {
    /// Whether `feature` works.
    pub fn can(&self, feature: Feature) -> bool {
        self.checks.iter().any(|check| check.name == feature && check.available)
    }

    /// Why it does not.
    pub fn why_not(&self, feature: Feature) -> &str {
        self.checks
            .iter()
            .find(|check| check.name == feature)
            .and_then(|check| check.reason.as_deref())
            .unwrap_or("not tried")
    }

    /// Whether sessions can be created at all.
    pub fn available(&self) -> bool {
        self.can(Feature::Setpriv) || self.can(Feature::Userns)
    }
}

/// Tries everything. `cgroup` is the outcome of setting the cgroup tree up.
pub fn probe(launcher: &Launcher, foundation: &Foundation, cgroup: Result<(), String>) -> Report {
    let base = SessionOptions::new(vec![Mount { path: "/".into(), mode: MountMode::ReadOnly }]);
    let userns = SessionOptions { uid_mode: UidMode::Userns, ..base.clone() };
    let switched = SessionOptions { uid: Some(OTHER_ID), gid: Some(OTHER_ID), ..base.clone() };
    let setpriv = attempt(launcher, foundation, &base);
    let identity = setpriv.clone().and_then(|()| attempt(launcher, foundation, &switched));
    let userns_works = attempt(launcher, foundation, &userns);
    // What does not depend on the identity is tried with one that works.
    let working = if setpriv.is_ok() { &base } else { &userns };
    let private = SessionOptions { share_net: false, ..working.clone() };
    let checks = [
        (Feature::Setpriv, setpriv),
        (Feature::IdentitySwitch, identity),
        (Feature::Userns, userns_works),
        (Feature::PersistentOverlay, persistent_overlay(launcher, foundation, working)),
        (Feature::PrivateNetwork, attempt(launcher, foundation, &private)),
        (Feature::Cgroup, cgroup),
    ];
    let checks = checks.into_iter().map(|(name, outcome)| Check {
        name,
        available: outcome.is_ok(),
        reason: outcome.err(),
    });
    Report { checks: checks.collect() }
}

fn persistent_overlay(
    launcher: &Launcher,
    foundation: &Foundation,
    options: &SessionOptions,
) -> Result<(), String> {
    let uppers = foundation.uppers.as_ref().ok_or("upper_root is not in use")?;
    let [image, directory, _] = uppers.ladder();
    if let (false, Some(reason)) = (image.available, directory.reason) {
        return Err(format!("overlays use memory instead: {reason}"));
    }
    let lower = Mount { path: "/usr".into(), mode: MountMode::Overlay { persist: true } };
    attempt(launcher, foundation, &SessionOptions { mounts: vec![lower], ..options.clone() })
}

/// One throw-away sandbox.
fn attempt(launcher: &Launcher, foundation: &Foundation, options: &SessionOptions) -> Result<(), String> {
    let prepared = prepare(foundation, Uuid::new_v4(), options).map_err(|error| with_cause(&error))?;
    let null = File::open("/dev/null").map_err(|error| format!("open /dev/null: {error}"))?;
    let start = ProgramStart { commands: Vec::new(), streams: [null.as_fd(); 3], cgroup: None };
    let outcome = Sandbox::launch(launcher, prepared.spec, None, start).and_then(|(sandbox, program)| {
        let status = sandbox.wait(program.id, Some(EXIT_WAIT_MAX));
        // Its upper is removed next; the mounts have to be gone by then.
        sandbox.destroy(EXIT_WAIT_MAX)?;
        status
    });
    match outcome {
        Ok(status) if status.shell_code() == 0 => Ok(()),
        Ok(status) => Err(format!("the trial program ended with {status:?}")),
        Err(error) => Err(explain(&error)),
    }
}

fn with_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// The failure, and for those that have a common cause, the remedy.
fn explain(error: &LaunchError) -> String {
    const EPERM: i32 = 1;
    const ENOSPC: i32 = 28;
    const ENOSYS: i32 = 38;
    let hint = match error {
        LaunchError::Step(failure)
            if failure.errno == EPERM
                && (failure.call.contains("clone3") || failure.call.contains("unshare(mount")) =>
        {
            "; namespaces need CAP_SYS_ADMIN, or unprivileged user namespaces"
        }
        LaunchError::Step(failure) if failure.errno == EPERM && failure.call.contains("proc") => {
            "; a container runtime masks /proc: start the container with unmasked system paths"
        }
        LaunchError::Step(failure) if failure.errno == EPERM && failure.call.contains("SIOCSIFFLAGS") => {
            "; bringing up loopback needs CAP_NET_ADMIN, or uid_mode userns"
        }
        LaunchError::Step(failure) if failure.errno == EPERM => {
            "; missing capability, or a seccomp or AppArmor profile of the container"
        }
        LaunchError::Step(failure) if failure.errno == ENOSPC => {
            "; the limit of namespaces is reached (user.max_*_namespaces)"
        }
        LaunchError::Step(failure) if failure.errno == ENOSYS => {
            "; needs Linux 5.12, or the container's seccomp profile hides the call"
        }
        _ => "",
    };
    format!("{error}{hint}")
}
