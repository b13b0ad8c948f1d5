//! A session as everybody but its own task sees it.

use super::background::Background;
use super::files::Workers;
use super::inside::Door;
use super::options::{Mount, MountMode, SessionOptions};
use super::registry::Registry;
use super::run::{Attachment, End, Queued, Run, RunSpec, Runs};
use super::state::State;
use super::task::Order;
use crate::workspace::home::{Limit, Tier, Usage};
use crate::workspace::session_uppers::SessionUppers;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;

/// The name of a session; a UUID, because the SDK's file adapter insists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub Uuid);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A session.
#[derive(Debug)]
pub struct Session {
    /// Its name.
    pub id: SessionId,
    /// What it was created with, paths resolved.
    pub options: SessionOptions,
    /// When it was created.
    pub created_at: SystemTime,
    pub(super) registry: Weak<Registry>,
    /// The launcher it was forked by.
    pub(super) launcher_generation: u64,
    /// The runs it knows of.
    pub runs: Runs,
    /// What output of a run is kept for those who read it later; bytes.
    pub(super) run_buffer_bytes_max: usize,
    pub(super) queue: mpsc::Sender<Order>,
    pub(super) background: Background,
    pub(super) door: Door,
    pub(super) workers: Workers,
    pub(super) stop: watch::Sender<bool>,
    pub(super) life: Mutex<Life>,
    /// To be asked about; others hold them.
    pub(super) uppers: Weak<SessionUppers>,
}

/// Where the changes of a session lie.
#[derive(Debug, Clone)]
pub struct UppersInfo {
    /// In what.
    pub tier: Tier,
    /// What they may take.
    pub limit: Limit,
    /// What they took some seconds ago.
    pub used: Usage,
    /// Why nothing can be written any more.
    pub sealed: Option<String>,
}

#[derive(Debug)]
pub(super) struct Life {
    pub(super) state: State,
    pub(super) last_run_at: SystemTime,
    pub(super) idle_since: Instant,
    pub(super) running: bool,
    /// Why its overlays are read-only by now.
    pub(super) sealed: Option<String>,
    /// When those who were writing were last killed for that.
    pub(super) writers_killed: Option<std::time::Instant>,
}

/// What a shell says of a command that SIGKILL ended.
const KILLED_STATUS: i32 = 128 + 9;

/// Why a run is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunRefused {
    /// As many wait as may.
    #[error("{0} runs wait for this session already")]
    TooMany(usize),
    /// The session is dead; the text says of what.
    #[error("isolated session is not active: {0}")]
    Dead(String),
}

impl Session {
    /// Queues a run. Its events are read from what is returned; dropping that stops it, unless it is to go on.
    ///
    /// # Errors
    /// See [`RunRefused`].
    pub fn run(&self, spec: RunSpec) -> Result<Attachment, RunRefused> {
        let run = Run::foreground(&spec, self.run_buffer_bytes_max);
        let attachment = run.attach(0);
        match self.queue.try_send(Order::Run(Queued { spec, run: std::sync::Arc::clone(&run) })) {
            Ok(()) => {
                self.runs.add(run, self.run_buffer_bytes_max);
                Ok(attachment)
            }
            Err(mpsc::error::TrySendError::Full(_)) => Err(RunRefused::TooMany(self.queue.max_capacity())),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(RunRefused::Dead(self.reason())),
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.life().state.clone()
    }

    /// When its last run began or ended; its creation, before the first.
    pub fn last_run_at(&self) -> SystemTime {
        self.life().last_run_at
    }

    /// Seconds until it is deleted for being idle; `None` without an idle timeout.
    pub fn idle_remaining_seconds(&self) -> Option<u64> {
        let timeout = self.options.idle_timeout?;
        let life = self.life();
        let busy = life.running || self.is_in_use();
        let idle = if busy { std::time::Duration::ZERO } else { life.idle_since.elapsed() };
        Some(timeout.saturating_sub(idle).as_secs())
    }

    pub(super) fn reason(&self) -> String {
        match self.state() {
            State::Dead { reason } => reason,
            State::Active | State::Destroyed => "it is being deleted".into(),
        }
    }

    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    pub(super) fn die(&self, reason: String) {
        let mut life = self.life();
        life.state = std::mem::replace(&mut life.state, State::Destroyed).die(reason);
    }

    /// Takes it out of the registry; its task has nothing left to do.
    pub(super) fn forget(&self) {
        self.life().state = State::Destroyed;
        if let Some(registry) = self.registry.upgrade() {
            registry.forget(self.id);
        }
    }

    pub(super) fn run_begins(&self) {
        let mut life = self.life();
        life.running = true;
        life.last_run_at = SystemTime::now();
    }

    pub(super) fn run_ends(&self) {
        let mut life = self.life();
        life.running = false;
        life.last_run_at = SystemTime::now();
        life.idle_since = Instant::now();
    }

    /// Where the changes of its persistent overlays lie; `None` for a session without.
    pub fn uppers_info(&self) -> Option<UppersInfo> {
        let is_persistent = |mount: &Mount| mount.mode == MountMode::Overlay { persist: true };
        if !self.options.mounts.iter().any(is_persistent) {
            return None;
        }
        let uppers = self.uppers.upgrade()?;
        let sealed = self.life().sealed.clone();
        Some(UppersInfo {
            tier: uppers.tier(),
            limit: uppers.limit_of_session(),
            used: uppers.used(),
            sealed,
        })
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.life().sealed.is_some()
    }

    pub(super) fn note_sealed(&self, why: Option<String>) {
        self.life().sealed = why;
    }

    /// Whether a run goes on, or waits.
    pub(super) fn is_running(&self) -> bool {
        self.life().running || self.queue.capacity() < self.queue.max_capacity()
    }

    /// Whether something goes on beside the shell that keeps it from being idle.
    pub(super) fn is_in_use(&self) -> bool {
        self.runs.background_running() > 0 || self.workers.are_used()
    }

    /// Somebody has worked in its files.
    pub(super) fn used(&self) {
        self.life().idle_since = Instant::now();
    }

    pub(super) fn idle_since(&self) -> Instant {
        self.life().idle_since
    }

    /// A background run has ended, and with it the session's busyness.
    pub(super) fn background_ended(&self) {
        let mut life = self.life();
        life.last_run_at = SystemTime::now();
        life.idle_since = Instant::now();
        drop(life);
        self.background.attention.notify_one();
    }

    pub(super) fn note_writers_killed(&self) {
        self.life().writers_killed = Some(std::time::Instant::now());
    }

    /// Names the cause, where a run ended of a lack of memory or of room.
    pub(super) fn with_cause(&self, end: End, began: std::time::Instant) -> End {
        let killed = match end {
            End::Status(code) => code == KILLED_STATUS,
            End::ShellEnded(status) | End::Exited(status) => status.shell_code() == KILLED_STATUS,
            _ => false,
        };
        if killed && self.life().writers_killed.is_some_and(|at| at >= began) {
            return End::QuotaExceeded(KILLED_STATUS);
        }
        let struck = || self.registry.upgrade().is_some_and(|registry| registry.oom_struck_since(began));
        if killed && struck() { End::OutOfMemory(KILLED_STATUS) } else { end }
    }

    /// What to say when the sandbox is suddenly gone.
    pub(super) fn why_gone(&self) -> String {
        match self.registry.upgrade() {
            Some(registry) if registry.launcher_is_lost(self.launcher_generation) => {
                "the launcher was lost".into()
            }
            _ => "its first process was killed".into(),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
