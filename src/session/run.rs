//! One run: what is asked, what is kept of it, how it ended.

use super::journal::{Journal, Reader};
use super::log::Log;
use crate::sandbox::cgroup::CpuTime;
use execd_init_shim::messages::ExitStatus;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use uuid::Uuid;

/// Finished foreground runs that a session keeps for clients that come back.
const FOREGROUND_KEPT_MAX: usize = 32;
/// Finished background runs that a session keeps.
const BACKGROUND_KEPT_MAX: usize = 64;

/// The name of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RunId(pub Uuid);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunSpec {
    /// Shell code.
    pub code: String,
    /// Standard input; empty when absent.
    pub stdin: Option<Vec<u8>>,
    /// Variables for this run only; names are valid.
    pub envs: Vec<(String, String)>,
    /// How long it may take; `None` for as long as it likes.
    pub timeout: Option<Duration>,
    /// Make events of pieces of lines as they come.
    pub partial_output: bool,
    /// Stop it once nobody reads its events any more.
    pub cancel_on_disconnect: bool,
}

/// How a run went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// How it ended.
    pub end: End,
    /// Wall time since the shell got the code.
    pub took: Duration,
    /// CPU time of all its processes, where they have a cgroup to be told apart by.
    pub cpu: Option<CpuTime>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The code came to its end with this status.
    Status(i32),
    /// The code ended the shell; the session goes on with a new one.
    ShellEnded(ExitStatus),
    /// The shell of a background run has ended, as it does.
    Exited(ExitStatus),
    /// The code, or the shell that ran it, was killed when the machine or its container ran out of memory.
    OutOfMemory(i32),
    /// The code, or the shell that ran it, was killed for writing when its session held more than it may.
    QuotaExceeded(i32),
    /// The code took the shell's way back; the session goes on with a new one.
    ShellLost,
    /// It took longer than it was allowed.
    TimedOut(Duration),
    /// Whoever asked for it went away, or asked for its end.
    Cancelled,
    /// The session was deleted or ended, or execd stops.
    SessionEnded,
    /// Something failed on execd's side.
    Failed,
}

impl End {
    /// The status a shell would tell, where the run came to have one.
    pub fn exit_code(self) -> Option<i32> {
        match self {
            Self::Status(code) | Self::OutOfMemory(code) | Self::QuotaExceeded(code) => Some(code),
            Self::ShellEnded(status) | Self::Exited(status) => Some(status.shell_code()),
            Self::TimedOut(_) => Some(124),
            Self::ShellLost | Self::Cancelled | Self::SessionEnded | Self::Failed => None,
        }
    }

    /// The signal that ended the shell itself.
    pub fn signal(self) -> Option<i32> {
        match self {
            Self::ShellEnded(ExitStatus::Signal(signal)) | Self::Exited(ExitStatus::Signal(signal)) => {
                Some(signal)
            }
            _ => None,
        }
    }
}

/// The name of a standard signal (signal(7)); `None` for other numbers.
pub fn signal_name(signal: i32) -> Option<&'static str> {
    const NAMES: [&str; 31] = [
        "SIGHUP",
        "SIGINT",
        "SIGQUIT",
        "SIGILL",
        "SIGTRAP",
        "SIGABRT",
        "SIGBUS",
        "SIGFPE",
        "SIGKILL",
        "SIGUSR1",
        "SIGSEGV",
        "SIGUSR2",
        "SIGPIPE",
        "SIGALRM",
        "SIGTERM",
        "SIGSTKFLT",
        "SIGCHLD",
        "SIGCONT",
        "SIGSTOP",
        "SIGTSTP",
        "SIGTTIN",
        "SIGTTOU",
        "SIGURG",
        "SIGXCPU",
        "SIGXFSZ",
        "SIGVTALRM",
        "SIGPROF",
        "SIGWINCH",
        "SIGIO",
        "SIGPWR",
        "SIGSYS",
    ];
    NAMES.get(usize::try_from(signal).ok()?.checked_sub(1)?).copied()
}

/// What is known of a run, while it goes on and for a while after.
#[derive(Debug)]
pub struct Run {
    /// Its name.
    pub id: RunId,
    /// When it was asked for.
    pub started_at: SystemTime,
    /// Its events.
    pub journal: Arc<Journal>,
    /// What it wrote, both streams in one; for background runs.
    pub log: Option<Log>,
    cancel_on_disconnect: bool,
    cancelled: watch::Sender<bool>,
    begun: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
}

/// What became of a run.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// How it went.
    pub report: Report,
    /// When it ended.
    pub finished_at: SystemTime,
}

impl Run {
    /// A run in the foreground.
    pub(super) fn foreground(spec: &RunSpec, buffer_bytes_max: usize) -> Arc<Self> {
        let journal = Journal::new(buffer_bytes_max, spec.partial_output, true);
        Self::new(journal, None, spec.cancel_on_disconnect)
    }

    /// A run in the background.
    pub(super) fn background(log: Log, buffer_bytes_max: usize) -> Arc<Self> {
        Self::new(Journal::new(buffer_bytes_max, false, false), Some(log), false)
    }

    fn new(journal: Arc<Journal>, log: Option<Log>, cancel_on_disconnect: bool) -> Arc<Self> {
        let is_background = log.is_some();
        Arc::new(Self {
            id: RunId(Uuid::new_v4()),
            started_at: SystemTime::now(),
            journal,
            log,
            cancel_on_disconnect,
            cancelled: watch::Sender::new(false),
            begun: AtomicBool::new(is_background),
            outcome: Mutex::new(None),
        })
    }

    /// What became of it; `None` while it goes on.
    pub fn outcome(&self) -> Option<Outcome> {
        *self.lock()
    }

    /// Whether it goes on, or waits to begin.
    pub fn is_running(&self) -> bool {
        self.outcome().is_none()
    }

    /// Asks for its end. One that has not begun has ended then.
    pub fn cancel(&self) {
        self.cancelled.send_replace(true);
        if !self.begun.load(Ordering::Acquire) {
            self.finish(Report { end: End::Cancelled, took: Duration::ZERO, cpu: None });
        }
    }

    /// It is about to begin; whether it still may.
    pub(super) fn begin(&self) -> bool {
        self.begun.store(true, Ordering::Release);
        !*self.cancelled.borrow()
    }

    /// Resolves once its end is asked for. Cancel safe.
    pub(super) async fn cancellation(&self) {
        // The sender lives as long as `self`.
        let _ = self.cancelled.subscribe().wait_for(|cancelled| *cancelled).await;
    }

    /// Notes how it went, once.
    pub(super) fn finish(&self, report: Report) {
        let mut outcome = self.lock();
        if outcome.is_none() {
            *outcome = Some(Outcome { report, finished_at: SystemTime::now() });
            drop(outcome);
            self.journal.end(report);
        }
    }

    /// Reads its events from behind number `after` on.
    pub fn attach(self: &Arc<Self>, after: u64) -> Attachment {
        Attachment { reader: self.journal.read(after), _presence: Presence(Arc::clone(self)) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who reads the events of a run.
#[derive(Debug)]
pub struct Attachment {
    /// Where they have come to. Dropped before it is looked whether others are left.
    pub reader: Reader,
    _presence: Presence,
}

impl Attachment {
    /// The run.
    pub fn run(&self) -> &Run {
        &self._presence.0
    }
}

/// When the last reader goes, a run that is for its readers ends.
#[derive(Debug)]
struct Presence(Arc<Run>);

impl Drop for Presence {
    fn drop(&mut self) {
        if self.0.cancel_on_disconnect && !self.0.journal.has_readers() {
            self.0.cancel();
        }
    }
}

/// The runs of a session: all that go on, and the last that have ended.
#[derive(Debug, Default)]
pub struct Runs(Mutex<Vec<Arc<Run>>>);

impl Runs {
    /// The run of that name.
    pub fn get(&self, id: RunId) -> Option<Arc<Run>> {
        self.lock().iter().find(|run| run.id == id).cloned()
    }

    /// All, oldest first.
    pub fn list(&self) -> Vec<Arc<Run>> {
        self.lock().clone()
    }

    /// How many background runs go on.
    pub fn background_running(&self) -> usize {
        self.lock().iter().filter(|run| run.log.is_some() && run.is_running()).count()
    }

    /// Adds one. The finished ones together keep no more output than one that goes on may.
    pub(super) fn add(&self, run: Arc<Run>, kept_bytes_max: usize) {
        let mut runs = self.lock();
        let (mut foreground, mut background, mut bytes) = (0, 0, 0);
        let mut keep: Vec<bool> = Vec::with_capacity(runs.len());
        for run in runs.iter().rev() {
            let (count, max) = match &run.log {
                None => (&mut foreground, FOREGROUND_KEPT_MAX),
                Some(_) => (&mut background, BACKGROUND_KEPT_MAX),
            };
            if run.is_running() {
                keep.push(true);
                continue;
            }
            *count += 1;
            bytes += run.journal.bytes();
            keep.push(*count <= max && (run.log.is_some() || bytes <= kept_bytes_max as u64));
        }
        let mut keep = keep.into_iter().rev();
        runs.retain(|_| keep.next().unwrap_or(true));
        runs.push(run);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Run>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A run on its way to a session's shell. One that never gets there ends with the session.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) spec: RunSpec,
    pub(super) run: Arc<Run>,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.run.finish(Report { end: End::SessionEnded, took: Duration::ZERO, cpu: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(cancel_on_disconnect: bool) -> RunSpec {
        RunSpec {
            code: ":".into(),
            stdin: None,
            envs: vec![],
            timeout: None,
            partial_output: false,
            cancel_on_disconnect,
        }
    }

    #[test]
    fn the_last_reader_that_goes_cancels() {
        let run = Run::foreground(&spec(true), 10);
        let (one, two) = (run.attach(0), run.attach(0));
        drop(one);
        assert!(run.is_running());
        drop(two);
        assert!(!run.is_running());
        let run = Run::foreground(&spec(false), 10);
        drop(run.attach(0));
        assert!(run.is_running());
    }

    #[test]
    fn a_session_forgets_old_runs_but_none_that_goes_on() {
        let runs = Runs::default();
        let first = Run::foreground(&spec(true), 10);
        runs.add(Arc::clone(&first), 1 << 20);
        for _ in 0..100 {
            let run = Run::foreground(&spec(true), 10);
            runs.add(Arc::clone(&run), 1 << 20);
            run.finish(Report { end: End::Status(0), took: Duration::ZERO, cpu: None });
        }
        assert_eq!(runs.list().len(), FOREGROUND_KEPT_MAX + 2);
        assert!(runs.get(first.id).is_some());
    }
}
