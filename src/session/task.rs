//! The task that owns a session: it alone talks to the shell. Everybody else sends it runs, or tells it to
//! stop.

use super::background::Ask;
use super::options::SessionOptions;
use super::run::{End, Queued, Report, Run, RunSpec};
use super::session::Session;
use super::shell::{Shell, ShellError, Sign};
use super::shell_io::ShellIo;
use crate::config;
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::launch::Sandbox;
use crate::workspace::session_uppers::SessionUppers;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

/// How long the processes of a sandbox may take to be gone.
const DESTROY_MAX: Duration = Duration::from_secs(10);
/// How long a dead session stays listed.
const DEAD_KEPT: Duration = Duration::from_secs(60);
/// How long a shell may take to report once the processes of its run are killed.
const REPORT_AFTER_KILL_MAX: Duration = Duration::from_millis(8);
/// How long a shell may take to note that the processes of its run are gone; there may be thousands.
const SETTLE_MAX: Duration = Duration::from_secs(1);
/// Between two looks at whether killed processes are gone.
const GONE_CHECK_INTERVAL: Duration = Duration::from_millis(1);
/// How long a run has to last before it is noticed that its shell may be lost.
const PROMPT_WATCH_DELAY: Duration = Duration::from_millis(2);
/// How long a session has to be idle before its shell is asked where it is, so that a background run that is asked for
/// during a later run knows. In a row of runs nothing is asked.
const ASK_DELAY: Duration = Duration::from_millis(20);
/// How long a shell may take to say where it is.
const ASK_MAX: Duration = Duration::from_secs(1);
/// For a deadline that is none.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Everything a session holds in the kernel. Dropping it releases it in this order: processes, cgroup, and then,
/// in the order of the fields, the view of the mounts and the uppers. Blocks.
#[derive(Debug)]
pub(super) struct Resources {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) cgroup: Option<Arc<Cgroup>>,
    /// Only held, to be removed last.
    pub(super) uppers: Option<Arc<SessionUppers>>,
    /// Dropped after the sandbox.
    released: Option<std::sync::mpsc::Sender<()>>,
}

impl Resources {
    pub(super) fn new(sandbox: Arc<Sandbox>, cgroup: Option<Arc<Cgroup>>) -> Self {
        Self { sandbox, cgroup, uppers: None, released: None }
    }
}

impl Drop for Resources {
    fn drop(&mut self) {
        if let Err(error) = self.sandbox.destroy(DESTROY_MAX) {
            tracing::error!(init = self.sandbox.pid, %error, "processes of a session are stuck");
        }
        if let Some(Err(error)) = self.cgroup.as_ref().map(|cgroup| cgroup.remove()) {
            tracing::error!(%error, "the cgroup of a session could not be removed");
        }
        if let Some(uppers) = &self.uppers {
            let (released, is_released) = std::sync::mpsc::channel();
            uppers.drop_before(LastHolder { is_released, _sandbox: Arc::clone(&self.sandbox) });
            self.released = Some(released);
        }
    }
}

/// Outlasts everybody else who holds a sandbox, and so is the one who waits for its mounts to go.
struct LastHolder {
    is_released: std::sync::mpsc::Receiver<()>,
    _sandbox: Arc<Sandbox>,
}

impl Drop for LastHolder {
    fn drop(&mut self) {
        // Nothing is ever sent.
        let _ = self.is_released.recv();
    }
}

/// The task's state.
pub(super) struct Task {
    pub(super) session: Arc<Session>,
    pub(super) config: config::Session,
    pub(super) options: SessionOptions,
    pub(super) shell: Option<Shell>,
    pub(super) resources: Option<Resources>,
    pub(super) queue: mpsc::Receiver<Order>,
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) stop: watch::Receiver<bool>,
    /// When the shell is to be asked next where it is.
    pub(super) ask_at: Option<Instant>,
}

/// What the task is asked to do, one after the other.
#[derive(Debug)]
pub(super) enum Order {
    /// Run code.
    Run(Queued),
    /// Do nothing for a while.
    Rest {
        /// Told when that begins.
        answer: oneshot::Sender<Rest>,
        /// The shell is to be replaced then, and to go on where it is now.
        renews: bool,
    },
}

/// As long as this is held, the session's shell runs nothing.
#[derive(Debug)]
pub(super) struct Rest {
    /// Whether there are processes besides the idle shell that cannot be held up.
    pub(super) has_stragglers: bool,
    /// The shell's process, as the daemon numbers it.
    pub(super) shell: i32,
    over: oneshot::Sender<()>,
}

impl Rest {
    /// Ends it, and has the shell replaced.
    pub(super) fn renew_shell(self) {
        // It fails only when the session ends.
        let _ = self.over.send(());
    }
}

/// What the task turns to next.
enum Next {
    Order(Order),
    Ask(Ask),
    AskYourself,
    Attend(io::Result<()>),
    /// Programs may have ended.
    Look,
    Expire,
    End,
}

/// Resolves once the session is told to end.
async fn told_to(stop: &mut watch::Receiver<bool>) {
    // An error means that the session itself is gone, which is the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Why a run is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    TimedOut(Duration),
    Cancelled,
}

/// How far the stopping of a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopping {
    No,
    Interrupted(Cause),
    Killed(Cause),
    ShellKilled(Cause),
}

impl Stopping {
    fn cause(self) -> Option<Cause> {
        match self {
            Self::No => None,
            Self::Interrupted(cause) | Self::Killed(cause) | Self::ShellKilled(cause) => Some(cause),
        }
    }
}

impl Task {
    /// Lives as long as the session does.
    pub(super) async fn live(mut self) {
        let reason = self.serve().await;
        // Whoever sees it dead is told why by the next run, too.
        self.queue.close();
        if let Some(reason) = reason {
            tracing::warn!(session = %self.session.id, reason, "session died");
            self.session.die(reason);
        }
        self.release().await;
        if !self.stopped() {
            self.stay_listed().await;
        }
        self.session.forget();
    }

    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// Runs code until the session is to end; the reason, when it ends by itself.
    async fn serve(&mut self) -> Option<String> {
        loop {
            let idle_until = self.idle_deadline();
            let ask_at = self.ask_at;
            let Some(shell) = &mut self.shell else { return Some("it has no shell".into()) };
            let next = tokio::select! {
                biased;
                () = told_to(&mut self.stop) => Next::End,
                order = self.queue.recv() => order.map_or(Next::End, Next::Order),
                Some(ask) = self.asks.recv() => Next::Ask(ask),
                waited = shell.io.wait() => Next::Attend(waited),
                () = self.session.background.attention.notified() => Next::Look,
                () = sleep_until(ask_at.unwrap_or(idle_until)), if ask_at.is_some() => Next::AskYourself,
                () = sleep_until(idle_until) => Next::Expire,
            };
            let failed = match next {
                Next::End => return None,
                Next::Order(Order::Run(queued)) => self.run(queued).await.err(),
                Next::Order(Order::Rest { answer, renews }) => match self.rest(answer, renews).await {
                    Ok(()) => self.attend().await,
                    Err(error) => Some(error),
                },
                Next::Ask(ask) => {
                    self.ask_shell().await;
                    let _ = ask.send(());
                    self.attend().await
                }
                Next::AskYourself => {
                    self.ask_shell().await;
                    self.attend().await
                }
                Next::Attend(Ok(())) => self.attend().await,
                Next::Look => {
                    shell.io.sandbox_spoke = true;
                    self.attend().await
                }
                Next::Attend(Err(error)) => Some(format!("its descriptors failed: {error}")),
                // Whoever uses it rings nobody when done, so it is looked at again.
                Next::Expire if self.session.is_in_use() => {
                    self.session.used();
                    None
                }
                Next::Expire if self.idle_deadline() > Instant::now() => None,
                Next::Expire => {
                    tracing::info!(session = %self.session.id, "session idle for too long");
                    self.session.stop();
                    return None;
                }
            };
            if failed.is_some() {
                return failed;
            }
        }
    }

    fn idle_deadline(&self) -> Instant {
        self.session.idle_since() + self.options.idle_timeout.unwrap_or(FAR)
    }

    /// Reacts to something that happened while nothing ran.
    async fn attend(&mut self) -> Option<String> {
        let shell = self.shell.as_mut()?;
        let sign = shell.idle_sign();
        tell_ends(shell, &self.session);
        match sign? {
            Sign::SandboxGone => Some(self.session.why_gone()),
            Sign::Ended(status) => {
                tracing::info!(session = %self.session.id, ?status, "the idle shell ended; replacing it");
                self.replace_shell().await.err()
            }
            Sign::Reported(_) | Sign::Lost => None,
        }
    }

    /// Lets somebody else work on the session's files alone.
    async fn rest(&mut self, answer: oneshot::Sender<Rest>, renews: bool) -> Result<(), String> {
        if renews {
            // What it says is found by the one that takes over.
            self.question_shell().await;
        }
        let Some(shell) = &self.shell else { return Err("it has no shell".into()) };
        let (over, mut is_over) = oneshot::channel();
        let rest = Rest { has_stragglers: shell.has_stragglers(), shell: shell.pid(), over };
        if answer.send(rest).is_err() {
            return Ok(());
        }
        loop {
            tokio::select! {
                biased;
                () = told_to(&mut self.stop) => return Ok(()),
                renew = &mut is_over => {
                    return if renew.is_ok() { self.replace_shell().await } else { Ok(()) };
                }
                Some(ask) = self.asks.recv() => drop(ask.send(())),
            }
        }
    }

    /// Has the idle shell say where it is.
    async fn ask_shell(&mut self) {
        self.ask_at = None;
        self.question_shell().await;
        let Some(shell) = &mut self.shell else { return };
        if let Some(known) = shell.asked() {
            self.session.background.note_state(known);
        }
        shell.note_cpu();
    }

    /// Has the idle shell write down where it is.
    async fn question_shell(&mut self) {
        let Some(shell) = &mut self.shell else { return };
        let token = shell.begin_ask();
        let deadline = Instant::now() + ASK_MAX;
        while shell.sign(&token).is_none() {
            if !matches!(tokio::time::timeout_at(deadline, shell.io.wait()).await, Ok(Ok(()))) {
                break;
            }
        }
        tell_ends(shell, &self.session);
    }

    /// One run, from code to report. An error means the session cannot go on.
    async fn run(&mut self, queued: Queued) -> Result<(), String> {
        let Queued { spec, run } = &queued;
        if !run.begin() {
            run.finish(Report { end: End::Cancelled, took: Duration::ZERO, cpu: None });
            return Ok(());
        }
        self.session.run_begins();
        self.ask_at = None;
        let began = Instant::now();
        let (end, sign) = match &mut self.shell {
            Some(shell) => {
                let mut course = Course {
                    session: &self.session,
                    config: &self.config,
                    asks: &mut self.asks,
                    stop: &mut self.stop,
                };
                course.conduct(shell, spec, run).await
            }
            None => (End::Failed, None),
        };
        let end = self.session.with_cause(end, began.into_std());
        let cpu = self.shell.as_mut().and_then(|shell| {
            take_leftover(&mut shell.io, run);
            shell.take_cpu_time()
        });
        self.session.run_ends();
        run.finish(Report { end, took: began.elapsed(), cpu });
        // Only now, so that the answer does not wait for it.
        let tidied = match &mut self.shell {
            Some(shell) => {
                let stopped = matches!(end, End::TimedOut(_) | End::Cancelled);
                if stopped && matches!(sign, Some(Sign::Reported(_))) {
                    settle(shell).await;
                    tell_ends(shell, &self.session);
                }
                shell.end_run(spec.stdin.is_some())
            }
            None => Ok(()),
        };
        self.ask_at = Some(Instant::now() + ASK_DELAY);
        self.after_run(end, tidied).await
    }

    async fn after_run(&mut self, end: End, tidied: io::Result<()>) -> Result<(), String> {
        if self.stopped() {
            return Ok(());
        }
        let Some(shell) = &mut self.shell else { return Err("it has no shell".into()) };
        let gone = match (end, tidied) {
            (End::SessionEnded, _) => return Err(self.session.why_gone()),
            (End::Failed | End::ShellEnded(_) | End::Exited(_) | End::ShellLost, _) => true,
            (_, Err(error)) => {
                tracing::warn!(session = %self.session.id, %error, "tidying up after a run failed");
                true
            }
            (
                End::Status(_)
                | End::OutOfMemory(_)
                | End::QuotaExceeded(_)
                | End::TimedOut(_)
                | End::Cancelled,
                Ok(()),
            ) => shell.is_over(),
        };
        if gone { self.replace_shell().await } else { Ok(()) }
    }

    async fn replace_shell(&mut self) -> Result<(), String> {
        let Some(mut shell) = self.shell.take() else { return Err("it has no shell".into()) };
        let answer_max = Duration::from_millis(self.config.shell_start_max_ms);
        let mut replaced = tokio::task::spawn_blocking(move || {
            let outcome = shell.replace(answer_max);
            (shell, outcome)
        });
        let outcome = tokio::select! {
            outcome = &mut replaced => outcome,
            () = told_to(&mut self.stop) => {
                // Whatever the new shell is busy with, it ends with its sandbox.
                if let Some(resources) = &self.resources {
                    resources.sandbox.kill();
                }
                replaced.await
            }
        };
        match outcome {
            Ok((shell, outcome)) => {
                self.shell = Some(shell);
                outcome.map_err(|error: ShellError| match error {
                    ShellError::Launch(crate::sandbox::launch::LaunchError::InitLost) => {
                        self.session.why_gone()
                    }
                    other => format!("no new shell: {other}"),
                })
            }
            Err(error) => Err(format!("no new shell: {error}")),
        }
    }

    /// Ends everything inside and waits until nothing is left.
    async fn release(&mut self) {
        while let Ok(order) = self.queue.try_recv() {
            drop(order);
        }
        // First of all: whatever is being started in it ends with it, and is not waited for.
        if let Some(resources) = &self.resources {
            resources.sandbox.kill();
        }
        // Nothing is started in it any more, and nobody is in its files.
        self.session.door.shut().await;
        // What nobody wants any more is not written out first.
        if let Some(uppers) = self.resources.as_ref().and_then(|resources| resources.uppers.as_ref()) {
            uppers.abandon();
        }
        let shell = self.shell.take();
        let resources = self.resources.take();
        let released = tokio::task::spawn_blocking(move || {
            // The shell shares the sandbox, whose mounts have to be let go before the uppers.
            drop(shell);
            drop(resources);
        });
        if let Err(error) = released.await {
            tracing::error!(session = %self.session.id, %error, "releasing a session failed");
        }
        self.session.background.end();
    }

    /// A dead session stays visible for a while, and answers runs that were waiting or still come.
    async fn stay_listed(&mut self) {
        let until = Instant::now() + DEAD_KEPT;
        tokio::select! {
            () = told_to(&mut self.stop) => {}
            () = sleep_until(until) => {}
        }
    }
}

/// Passes on how programs other than the shell have ended.
fn tell_ends(shell: &mut Shell, session: &Session) {
    for (id, status) in shell.take_others_ended() {
        session.background.ended(id, status);
    }
}

/// What a run needs of its session while it goes on.
struct Course<'a> {
    session: &'a Session,
    config: &'a config::Session,
    asks: &'a mut mpsc::Receiver<Ask>,
    stop: &'a mut watch::Receiver<bool>,
}

impl Course<'_> {
    /// Gives the code to the shell and carries events until the run is over; how, and the shell's sign of it.
    async fn conduct(&mut self, shell: &mut Shell, spec: &RunSpec, run: &Run) -> (End, Option<Sign>) {
        let token = match shell.begin(&spec.code, spec.stdin.as_deref(), &spec.envs) {
            Ok(token) => token,
            Err(error) => {
                tracing::error!(%error, "a run could not be handed to its shell");
                return (End::Failed, None);
            }
        };
        let grace = Duration::from_millis(self.config.interrupt_grace_ms);
        let mut stopping = Stopping::No;
        let began = Instant::now();
        let mut deadline = began + spec.timeout.unwrap_or(FAR);
        let sign = loop {
            let sign = shell.sign(&token);
            tell_ends(shell, self.session);
            if let Some(sign) = sign {
                break sign;
            }
            // Output that nobody will read any more is not waited for.
            let reading = !matches!(stopping.cause(), Some(Cause::Cancelled));
            tokio::select! {
                biased;
                () = told_to(self.stop) => return (End::SessionEnded, None),
                () = sleep_until(deadline) => {
                    (stopping, deadline) = escalate(shell, stopping, spec, grace);
                }
                () = sleep_until(began + PROMPT_WATCH_DELAY), if !shell.io.watches_prompt() => {
                    shell.io.watch_prompt(true);
                }
                () = run.cancellation(), if stopping == Stopping::No => {
                    shell.interrupt();
                    stopping = Stopping::Interrupted(Cause::Cancelled);
                    deadline = Instant::now() + grace;
                }
                Some(ask) = self.asks.recv() => drop(ask.send(())),
                () = self.session.background.attention.notified() => shell.io.sandbox_spoke = true,
                () = run.journal.room(), if reading && shell.io.has_output() => {
                    if let Some((stream, chunk)) = shell.io.read_output() {
                        run.journal.output(stream, chunk);
                    }
                }
                waited = shell.io.wait() => {
                    if let Err(error) = waited {
                        tracing::error!(%error, "waiting for a shell failed");
                        return (End::Failed, None);
                    }
                }
            }
        };
        let end = match (sign, stopping.cause()) {
            (Sign::SandboxGone, _) => End::SessionEnded,
            (_, Some(Cause::TimedOut(limit))) => End::TimedOut(limit),
            (_, Some(Cause::Cancelled)) => End::Cancelled,
            (Sign::Reported(status), None) => End::Status(status),
            (Sign::Ended(status), None) => End::ShellEnded(status),
            (Sign::Lost, None) => End::ShellLost,
        };
        (end, Some(sign))
    }
}

/// Ends what an interrupted run left in the background, which ignores SIGINT, and lets the shell take note of it.
/// A shell that does not even manage that is killed, and then replaced.
async fn settle(shell: &mut Shell) {
    shell.kill_run();
    let deadline = Instant::now() + SETTLE_MAX;
    while !shell.killed_run_is_gone() && Instant::now() < deadline {
        tokio::time::sleep(GONE_CHECK_INTERVAL).await;
    }
    let token = shell.begin_nothing();
    while shell.sign(&token).is_none() {
        if !matches!(tokio::time::timeout_at(deadline, shell.io.wait()).await, Ok(Ok(()))) {
            return shell.kill_shell();
        }
    }
}

/// The next step of stopping a run, and when the one after that is due.
fn escalate(shell: &mut Shell, stopping: Stopping, spec: &RunSpec, grace: Duration) -> (Stopping, Instant) {
    match stopping {
        Stopping::No => {
            shell.interrupt();
            let cause = Cause::TimedOut(spec.timeout.unwrap_or_default());
            (Stopping::Interrupted(cause), Instant::now() + grace)
        }
        Stopping::Interrupted(cause) if shell.runs_alone() => {
            shell.kill_shell();
            (Stopping::ShellKilled(cause), Instant::now() + FAR)
        }
        Stopping::Interrupted(cause) => {
            shell.kill_run();
            (Stopping::Killed(cause), Instant::now() + REPORT_AFTER_KILL_MAX)
        }
        Stopping::Killed(cause) | Stopping::ShellKilled(cause) => {
            shell.kill_shell();
            (Stopping::ShellKilled(cause), Instant::now() + FAR)
        }
    }
}

/// Takes what the run had written when it ended, and not a byte more: what comes later is from processes it left
/// behind. At most what two pipes hold, so it is taken whether or not there is room.
fn take_leftover(io: &mut ShellIo, run: &Run) {
    let mut left = io.pending_bytes();
    io.mark_readable();
    while left > 0 {
        let Some((stream, chunk)) = io.read_output() else { break };
        left = left.saturating_sub(chunk.len() as u64);
        run.journal.output(stream, chunk);
    }
}
