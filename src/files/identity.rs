//! The identity of a session's programs, taken on by a thread of the daemon while it works in the session's files.
//!
//! File system ids alone would not do: the thread would keep the daemon's capabilities, with which it may open
//! what no program of the session may, and for uid 0 they would change nothing at all. So the groups and the effective
//! capabilities change too. The permitted ones stay, which is how the thread gets back.

use crate::sandbox::spec::SandboxSpec;
use rustix::process::{Gid, getgroups};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups};
use std::io;
use std::marker::PhantomData;

/// Who the programs of a session are, in the ids of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    uid: u32,
    gid: u32,
    capabilities: CapabilitySet,
    /// Whether they have no supplementary groups; else they have the daemon's.
    drops_groups: bool,
}

impl Identity {
    pub(super) fn of(spec: &SandboxSpec) -> Self {
        match spec.namespaces.user {
            // What they are capable of there counts only in their own user namespace.
            Some(map) => Self {
                uid: map.outside_uid,
                gid: map.outside_gid,
                capabilities: CapabilitySet::empty(),
                drops_groups: false,
            },
            None => {
                let kept = if spec.uid == 0 { spec.capabilities } else { 0 };
                let capabilities = CapabilitySet::from_bits_retain(kept);
                Self { uid: spec.uid, gid: spec.gid, capabilities, drops_groups: true }
            }
        }
    }

    /// Takes it on, until what is returned is dropped.
    pub(super) fn assume(&self) -> io::Result<Assumed> {
        let own = Own { groups: getgroups()?, sets: capabilities(None)? };
        let assumed = Assumed { own, regroup: self.drops_groups, on_this_thread: PhantomData };
        if self.drops_groups {
            set_thread_groups(&[])?;
        }
        execd_sys::set_fs_gid(self.gid)?;
        execd_sys::set_fs_uid(self.uid)?;
        let effective = self.capabilities.intersection(assumed.own.sets.permitted);
        set_capabilities(None, CapabilitySets { effective, ..assumed.own.sets })?;
        Ok(assumed)
    }
}

#[derive(Debug)]
struct Own {
    groups: Vec<Gid>,
    sets: CapabilitySets,
}

/// While this lives, the thread has another identity.
#[derive(Debug)]
pub(super) struct Assumed {
    own: Own,
    regroup: bool,
    on_this_thread: PhantomData<*const ()>,
}

impl Assumed {
    fn restore(&self) -> io::Result<()> {
        set_capabilities(None, self.own.sets)?;
        execd_sys::set_fs_uid(rustix::process::geteuid().as_raw())?;
        execd_sys::set_fs_gid(rustix::process::getegid().as_raw())?;
        if self.regroup {
            set_thread_groups(&self.own.groups)?;
        }
        // Leaving a file system uid other than 0 has raised some again (capabilities(7)).
        Ok(set_capabilities(None, self.own.sets)?)
    }
}

impl Drop for Assumed {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            // The next one to use this thread would act as somebody else.
            tracing::error!(%error, "a thread cannot take its own identity back");
            std::process::abort();
        }
    }
}
