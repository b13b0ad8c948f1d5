//! One run: what is asked, what comes back.

use super::shell_io::Stream;
use bytes::Bytes;
use execd_init_shim::messages::ExitStatus;
use std::time::Duration;
use tokio::sync::mpsc;
use uuid::Uuid;

/// Chunks of output between the session and whoever reads a run; when they are not taken, the run's own
/// writes block.
pub const EVENTS_MAX: usize = 4;

/// The name of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RunId(pub Uuid);

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
}

/// A run on its way to a session's shell.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) spec: RunSpec,
    pub(super) events: mpsc::Sender<RunEvent>,
}

/// What happens in a run. The last is an `End`, unless the session is gone first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunEvent {
    /// A piece of output, cut anywhere.
    Output(Stream, Bytes),
    /// It is over.
    End(Report),
}

/// How a run went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// How it ended.
    pub end: End,
    /// Wall time since the shell got the code.
    pub took: Duration,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The code came to its end with this status.
    Status(i32),
    /// The code ended the shell; the session goes on with a new one.
    ShellEnded(ExitStatus),
    /// The code took the shell's way back; the session goes on with a new one.
    ShellLost,
    /// It took longer than it was allowed.
    TimedOut(Duration),
    /// Whoever asked for it went away.
    Cancelled,
    /// The session was deleted or ended, or execd stops.
    SessionEnded,
    /// Something failed on execd's side.
    Failed,
}
