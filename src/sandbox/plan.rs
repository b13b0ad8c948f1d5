//! From spec to messages, without touching anything: what init is to set up, and what a program is born with.

use super::spec::SandboxSpec;
use execd_init_shim::messages::{Command, Identity, MountStep, Plan, Program, Upper};

/// What init is to set up.
pub fn plan(spec: &SandboxSpec) -> Plan {
    Plan {
        id_map: spec.namespaces.user,
        cgroup_namespace: spec.namespaces.cgroup,
        network: spec.namespaces.network,
        hostname: spec.hostname.clone(),
        mounts: spec.mounts.iter().map(as_seen_by_init).collect(),
        awaited_mounts: made_outside(spec).count(),
        oom_score_adj: spec.oom_score_adj,
    }
}

/// The mounts that the daemon makes, in the order in which init expects them.
pub fn made_outside(spec: &SandboxSpec) -> impl Iterator<Item = &MountStep> {
    spec.mounts.iter().filter(|step| is_held(step)).chain(&spec.late_mounts)
}

fn is_held(step: &MountStep) -> bool {
    matches!(step, MountStep::Overlay { upper: Upper::Held(_), .. })
}

fn as_seen_by_init(step: &MountStep) -> MountStep {
    if is_held(step) { MountStep::Awaited { dest: step.dest().into() } } else { step.clone() }
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
