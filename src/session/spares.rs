//! Sandboxes kept ready: everything but the workspaces is in place and the shell is at its prompt, so that a session
//! only has its mounts attached and is there, in a fraction of the time.
//!
//! Spares are all of one kind, that of the sessions asked for lately; a session of another kind is made from the
//! ground up, and the second one of its kind in a row makes the spares change. They show the host's mounts as those
//! were when the spare was made, so a change of the host's mounts (proc_pid_mountinfo(5)) throws them away.
//!
//! One thread makes them, and throws them away.

use super::launchpad::{Launched, Launchpad};
use crate::sandbox::spec::SandboxSpec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Pause after a spare could not be made; sessions say why by then.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// How long a session waits for a spare that is being made already; from the ground up takes as long.
const WAIT_MAX: Duration = Duration::from_millis(5);

/// The spares.
#[derive(Debug)]
pub(super) struct Spares {
    launchpad: Arc<Launchpad>,
    count_max: usize,
    state: Mutex<State>,
    changed: Condvar,
    maker: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct State {
    /// What is kept ready.
    kind: Option<SandboxSpec>,
    /// What was asked for last and is not.
    other_kind: Option<SandboxSpec>,
    ready: VecDeque<Launched>,
    /// To be thrown away.
    stale: Vec<Launched>,
    /// Counts changes of kind and of the host's mounts: a spare begun before one is stale.
    epoch: u64,
    /// Whether one is being made, and whether somebody waits for it.
    making: bool,
    awaited: bool,
    stopped: bool,
    mounts: Option<File>,
}

impl Spares {
    /// None yet, and at most `count_max` later.
    pub(super) fn new(launchpad: Arc<Launchpad>, count_max: usize) -> std::io::Result<Arc<Self>> {
        let state = State {
            kind: None,
            other_kind: None,
            ready: VecDeque::new(),
            stale: Vec::new(),
            epoch: 0,
            making: false,
            awaited: false,
            stopped: false,
            mounts: File::open("/proc/self/mountinfo").ok(),
        };
        let spares = Arc::new(Self {
            launchpad,
            count_max,
            state: Mutex::new(state),
            changed: Condvar::new(),
            maker: Mutex::new(None),
        });
        if count_max > 0 {
            let maker = Arc::clone(&spares);
            let thread =
                std::thread::Builder::new().name("spares".into()).spawn(move || maker.make_more())?;
            *spares.maker.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        }
        Ok(spares)
    }

    /// A spare for a session with this spec, if there is one. The next is made after [`Spares::refill`], for it would only be in the
    /// way of this session. Blocks for some milliseconds at most.
    pub(super) fn take(&self, spec: &SandboxSpec) -> Option<Launched> {
        if self.count_max == 0 || spec.late_mounts.is_empty() {
            return None;
        }
        let kind = &kind(spec);
        let mut state = self.state();
        if state.kind.as_ref() != Some(kind) {
            if state.kind.is_none() || state.other_kind.as_ref() == Some(kind) {
                state.become_kind(kind.clone());
            } else {
                state.other_kind = Some(kind.clone());
            }
            return None;
        }
        state.other_kind = None;
        state.discard_stale(self.launchpad.launcher.generation());
        if state.ready.is_empty() && state.making && !state.awaited {
            state.awaited = true;
            let waiting = |state: &mut State| state.ready.is_empty() && state.making;
            let waited = self.changed.wait_timeout_while(state, WAIT_MAX, waiting);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.awaited = false;
        }
        state.ready.pop_front()
    }

    /// Has spares made, or thrown away, as it is time for.
    pub(super) fn refill(&self) {
        self.changed.notify_all();
    }

    /// Throws all of them away and makes no more; waits for that. Blocks.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
        let maker = self.maker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if maker.is_some_and(|maker| maker.join().is_err()) {
            tracing::error!("the thread that makes spare sandboxes panicked");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_more(&self) {
        loop {
            let idle = |state: &mut State| {
                !state.stopped
                    && state.stale.is_empty()
                    && (state.kind.is_none() || state.ready.len() >= self.count_max)
            };
            let mut state =
                self.changed.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                let all = (std::mem::take(&mut state.ready), std::mem::take(&mut state.stale));
                drop(state);
                return drop(all);
            }
            let stale = std::mem::take(&mut state.stale);
            let wanted = state.kind.clone().filter(|_| state.ready.len() < self.count_max);
            state.note_mounts();
            let epoch = state.epoch;
            state.making = wanted.is_some();
            drop(state);
            drop(stale);
            if let Some(kind) = wanted {
                self.make(kind, epoch);
            }
        }
    }

    fn make(&self, kind: SandboxSpec, epoch: u64) {
        let name = uuid::Uuid::new_v4().to_string();
        let made = self.launchpad.launch(&name, kind);
        let mut state = self.state();
        state.making = false;
        match made {
            Ok(spare) if state.epoch == epoch => state.ready.push_back(spare),
            Ok(spare) => state.stale.push(spare),
            Err(error) => {
                tracing::warn!(%error, "no spare sandbox can be made");
                self.changed.notify_all();
                let going_on = |state: &mut State| !state.stopped;
                drop(self.changed.wait_timeout_while(state, FAILURE_PAUSE, going_on));
                return;
            }
        }
        self.changed.notify_all();
    }
}

/// What sessions have in common that can be made of the same spares: all but what is attached later, and the folder.
fn kind(spec: &SandboxSpec) -> SandboxSpec {
    SandboxSpec { late_mounts: Vec::new(), cwd: "/".into(), ..spec.clone() }
}

impl State {
    fn become_kind(&mut self, kind: SandboxSpec) {
        self.kind = Some(kind);
        self.other_kind = None;
        self.all_stale();
    }

    fn all_stale(&mut self) {
        self.epoch += 1;
        self.stale.extend(self.ready.drain(..));
    }

    fn discard_stale(&mut self, generation: u64) {
        self.note_mounts();
        if self.ready.iter().any(|spare| spare.generation != generation) {
            self.all_stale();
        }
        let (alive, dead) = self.ready.drain(..).partition(|spare| spare.shell.is_alive());
        self.ready = alive;
        self.stale.extend::<VecDeque<_>>(dead);
    }

    fn note_mounts(&mut self) {
        let Some(mounts) = &self.mounts else { return };
        let mut fds = [PollFd::new(mounts, PollFlags::PRI)];
        let changed = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
        if changed {
            self.all_stale();
        }
    }
}
