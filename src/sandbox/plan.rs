//! From spec to messages, without touching anything: what init is to set up, and what a program is born with.

use super::spec::SandboxSpec;
use execd_init_shim::messages::{Command, Identity, Plan, Program};

/// What init is to set up.
pub fn plan(spec: &SandboxSpec) -> Plan {
    Plan {
        id_map: spec.namespaces.user,
        cgroup_namespace: spec.namespaces.cgroup,
        network: spec.namespaces.network,
        hostname: spec.hostname.clone(),
        mounts: spec.mounts.clone(),
        awaited_mounts: spec.late_mounts.len(),
        oom_score_adj: spec.oom_score_adj,
    }
}

/// A program of that sandbox; the first of `commands` that exists is executed.
pub fn program(spec: &SandboxSpec, commands: Vec<Command>) -> Program {
    Program {
        commands,
        environment: spec.environment.clone(),
        cwd: spec.cwd.clone(),
        new_session: spec.new_session,
        identity: Identity {
            uid: spec.uid,
            gid: spec.gid,
            // In a user namespace the mapping has already made init who the programs are to be.
            switch: spec.namespaces.user.is_none(),
        },
        capabilities: spec.capabilities,
        seccomp: spec.seccomp.program.clone(),
        seccomp_early: spec.seccomp.lets_programs_start,
    }
}
