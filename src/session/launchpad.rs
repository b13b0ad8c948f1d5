//! Launches sandboxes with a shell in them, each in a cgroup directory of its own.

use super::shell::{Shell, ShellError, Timings};
use super::task::Resources;
use crate::sandbox::cgroup::{Cgroup, CgroupTree};
use crate::sandbox::launcher::Launcher;
use crate::sandbox::spec::SandboxSpec;
use std::sync::Arc;
use std::time::Duration;

/// What sandboxes are launched with.
#[derive(Debug)]
pub struct Launchpad {
    /// Forks them.
    pub launcher: Arc<Launcher>,
    /// Where their cgroup directories go; `None` where there are none.
    pub cgroups: Option<CgroupTree>,
    /// How long a shell may take to answer.
    pub answer_max: Duration,
}

/// A sandbox whose shell has answered. Dropping it releases everything; blocks.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) shell: Shell,
    pub(super) resources: Resources,
    /// Of the launcher that forked it.
    pub(super) generation: u64,
    pub(super) timings: Timings,
}

impl Launchpad {
    /// Launches a sandbox; `name` is that of its cgroup directory. Blocks.
    pub(super) fn launch(&self, name: &str, spec: SandboxSpec) -> Result<Launched, ShellError> {
        let cgroup = self.cgroups.as_ref().map(|tree| tree.sandbox(name)).transpose()?.map(Arc::new);
        let mut guard = CgroupGuard(cgroup.clone());
        let generation = self.launcher.generation();
        let (shell, sandbox, timings) = Shell::launch(&self.launcher, spec, cgroup.clone(), self.answer_max)?;
        guard.0 = None;
        let resources = Resources::new(sandbox, cgroup);
        Ok(Launched { shell, resources, generation, timings })
    }
}

/// Removes the cgroup of a launch that failed.
struct CgroupGuard(Option<Arc<Cgroup>>);

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.as_ref().map(|cgroup| cgroup.remove()) {
            tracing::error!(%error, "the cgroup of a failed session could not be removed");
        }
    }
}
