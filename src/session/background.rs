//! Background runs: each has a shell of its own, started by init beside the session's, in its folder and with its
//! exported variables.
//!
//! ```text
//!  handler ──► ask the task where the shell is ──► blocking thread: log, pipe, cgroup leaf, code, init ──► 202
//!  follower task: pipe ──► log and journal, until its end       session task: tells it how the shell ended
//! ```
//!
//! A run is over when its shell is; what that left behind may go on writing to the log.

use super::control::ControlDir;
use super::dialect::Carried;
use super::inside::Inside;
use super::process::{descendants, open_process, pid_of};
use super::run::{End, Report, Run, RunSpec};
use super::session::Session;
use super::shell_io::{Stream, kept};
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::launch::{LaunchError, ProgramStart};
use execd_init_shim::messages::ExitStatus;
use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// Background runs of one session that may go on at once.
pub(super) const RUNNING_MAX: usize = 16;
/// Ended background runs of one session whose processes may go on writing to the log.
const LEFTOVERS_MAX: usize = 48;
/// How long the session's shell may take to say where it is.
const ASK_MAX: Duration = Duration::from_secs(2);
/// Bytes taken from a pipe at once: what one holds.
const CHUNK_BYTES: usize = 64 * 1024;
const SIGKILL: i32 = 9;
/// The most that is read before anything else is looked at; bytes.
const BURST_BYTES_MAX: usize = 1 << 20;

/// A wish that the session's task finds out where its shell is; answered once that is as known as it will be.
pub(super) type Ask = oneshot::Sender<()>;

/// What a session has for its background runs.
#[derive(Debug)]
pub(super) struct Background {
    pub(super) asks: mpsc::Sender<Ask>,
    /// Where the shell was when it was last asked.
    known: Mutex<Option<Carried>>,
    /// One for each run that may go on.
    slots: Arc<Semaphore>,
    /// One for each run that has ended and left processes behind which are listened to.
    leftovers: Arc<Semaphore>,
    /// Rung when the session's task should look for ends of programs.
    pub(super) attention: Notify,
    exits: Mutex<Exits>,
}

#[derive(Debug, Default)]
struct Exits {
    followers: HashMap<u32, oneshot::Sender<ExitStatus>>,
    /// Programs that are being started and whose name is not known yet.
    starting: usize,
    /// Ends that were told before it was.
    early: HashMap<u32, ExitStatus>,
}

/// Why a background run is not started.
#[derive(Debug, thiserror::Error)]
pub enum BackgroundError {
    /// As many go on as may.
    #[error("{0} background runs go on in this session already")]
    TooMany(usize),
    /// The session is dead or ends; the text says of what.
    #[error("isolated session is not active: {0}")]
    Dead(String),
    /// The program.
    #[error("start the background run")]
    Launch(#[from] LaunchError),
    /// The daemon's own side.
    #[error("start the background run")]
    Io(#[from] io::Error),
}

impl Background {
    pub(super) fn new(asks: mpsc::Sender<Ask>) -> Self {
        Self {
            asks,
            known: Mutex::default(),
            slots: Arc::new(Semaphore::new(RUNNING_MAX)),
            leftovers: Arc::new(Semaphore::new(LEFTOVERS_MAX)),
            attention: Notify::new(),
            exits: Mutex::default(),
        }
    }

    /// Notes where the shell is.
    pub(super) fn note_state(&self, state: Carried) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    /// Passes on how a program ended, if it is one of a background run.
    pub(super) fn ended(&self, id: u32, status: ExitStatus) {
        let mut exits = self.exits();
        match exits.followers.remove(&id) {
            Some(follower) => drop(follower.send(status)),
            None if exits.starting > 0 => drop(exits.early.insert(id, status)),
            None => {}
        }
    }

    /// Follows a program that has just been started.
    fn follow(&self, id: u32) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        let mut exits = self.exits();
        match exits.early.remove(&id) {
            Some(status) => drop(sender.send(status)),
            None => drop(exits.followers.insert(id, sender)),
        }
        receiver
    }

    /// Nothing more will be told: whoever follows a program learns that the session has ended.
    pub(super) fn end(&self) {
        *self.exits() = Exits::default();
    }

    fn exits(&self) -> MutexGuard<'_, Exits> {
        self.exits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a program as being started.
struct Starting<'a>(&'a Background);

impl<'a> Starting<'a> {
    fn new(background: &'a Background) -> Self {
        background.exits().starting += 1;
        Self(background)
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut exits = self.0.exits();
        exits.starting -= 1;
        if exits.starting == 0 {
            exits.early.clear();
        }
        drop(exits);
        // Ends that arrived while the answer to the start was waited for have rung nobody.
        self.0.attention.notify_one();
    }
}

/// A program that runs, with what belongs to it.
struct Started {
    run: Arc<Run>,
    pipe: OwnedFd,
    pidfd: OwnedFd,
    leaf: Option<Cgroup>,
    ended: oneshot::Receiver<ExitStatus>,
    /// Its files in the control directory.
    files: Vec<String>,
    control: Arc<ControlDir>,
    began: Instant,
}

impl Session {
    /// Starts a run in the background.
    ///
    /// # Errors
    /// See [`BackgroundError`].
    pub async fn run_in_background(
        self: &Arc<Self>,
        spec: RunSpec,
        log_dir: Option<PathBuf>,
    ) -> Result<Arc<Run>, BackgroundError> {
        let inside = self.door.enter().await.ok_or_else(|| BackgroundError::Dead(self.reason()))?;
        // It may be that nothing is to change for a while.
        let mut shut = self.door.watch();
        let _change = tokio::select! {
            change = self.share_changes() => change,
            _ = shut.wait_for(|shut| *shut) => return Err(BackgroundError::Dead(self.reason())),
        };
        let slot = Arc::clone(&self.background.slots).try_acquire_owned();
        let slot = slot.map_err(|_| BackgroundError::TooMany(RUNNING_MAX))?;
        let state = self.shell_state().await;
        let session = Arc::clone(self);
        let started =
            tokio::task::spawn_blocking(move || session.start(&inside, &spec, state.as_ref(), log_dir));
        let started = started.await.map_err(io::Error::other)??;
        let run = Arc::clone(&started.run);
        self.runs.add(Arc::clone(&run), self.run_buffer_bytes_max);
        tokio::spawn(follow(Arc::clone(self), started, slot));
        Ok(run)
    }

    /// Where the session's shell is, or was when it was last known.
    async fn shell_state(&self) -> Option<Carried> {
        let ask = async {
            let (answer, answered) = oneshot::channel();
            if self.background.asks.send(answer).await.is_ok() {
                let _ = answered.await;
            }
        };
        // A shell that is being replaced is not waited for.
        let _ = tokio::time::timeout(ASK_MAX, ask).await;
        self.background.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start(
        &self,
        inside: &Inside,
        spec: &RunSpec,
        state: Option<&Carried>,
        log_dir: Option<PathBuf>,
    ) -> Result<Started, BackgroundError> {
        let log = super::log::Log::new(log_dir.as_deref())?;
        let run = Run::background(log, self.run_buffer_bytes_max);
        let leaf =
            inside.cgroup.as_ref().map(|cgroup| cgroup.leaf(&format!("run-{}", run.id))).transpose()?;
        let control = Arc::clone(&inside.control);
        let (code, prelude) = (format!("c-{}", run.id), format!("p-{}", run.id));
        // From here on its drop removes them.
        let files = Files { control: &control, names: vec![code.clone(), prelude.clone()] };
        control.put(&code, spec.code.as_bytes())?;
        let script = inside.dialect.background_script(state, &spec.envs, &code);
        control.put(&prelude, script.as_bytes())?;
        let (pipe, write) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        rustix::io::ioctl_fionbio(&pipe, true).map_err(io::Error::from)?;
        let null = std::fs::File::open("/dev/null")?;
        let input = match &spec.stdin {
            None => null.into(),
            Some(bytes) => input_file(bytes)?,
        };
        let starting = Starting::new(&self.background);
        let program = inside.sandbox.start(ProgramStart {
            commands: inside.dialect.background_commands(&prelude),
            streams: [input.as_fd(), write.as_fd(), write.as_fd()],
            cgroup: leaf.as_ref().map(AsFd::as_fd),
        })?;
        let ended = self.background.follow(program.id);
        drop(starting);
        let files = files.keep();
        Ok(Started { run, pipe, pidfd: program.pidfd, leaf, ended, files, control, began: Instant::now() })
    }
}

/// Files in the control directory, removed when dropped.
struct Files<'a> {
    control: &'a ControlDir,
    names: Vec<String>,
}

impl Files<'_> {
    fn keep(mut self) -> Vec<String> {
        std::mem::take(&mut self.names)
    }
}

impl Drop for Files<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = self.control.remove(name);
        }
    }
}

/// The input of a run, as a file that nothing else can be reached through.
fn input_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use std::io::{Seek, Write};
    let memfd = memfd_create("input", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = std::fs::File::from(memfd);
    file.write_all(bytes)?;
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(file.into())
}

/// Carries what a background run writes into its log and its journal, and notes its end.
async fn follow(session: Arc<Session>, started: Started, slot: OwnedSemaphorePermit) {
    let Started { run, pipe, pidfd, leaf, mut ended, files, control, began } = started;
    let mut output = Output::new(pipe);
    let mut killed = false;
    let status = loop {
        tokio::select! {
            biased;
            () = run.cancellation(), if !killed => {
                killed = true;
                kill(leaf.as_ref(), &pidfd);
            }
            status = &mut ended => break status.ok(),
            () = output.ready() => output.take(&run, true).await,
        }
    };
    // What it had written by its end; others may go on writing for ever.
    output.take(&run, true).await;
    let end = session.with_cause(status.map_or(End::SessionEnded, End::Exited), began);
    let cpu = leaf.as_ref().and_then(|leaf| leaf.cpu_time().ok());
    run.finish(Report { end, took: began.elapsed(), cpu });
    for name in &files {
        let _ = control.remove(name);
    }
    drop((control, slot));
    session.background_ended();
    // Whom nobody listens to any more gets SIGPIPE.
    let leftover = Arc::clone(&session.background.leftovers).try_acquire_owned();
    while leftover.is_ok() && !output.is_at_end() {
        tokio::select! {
            biased;
            () = run.cancellation(), if !killed => {
                killed = true;
                kill(leaf.as_ref(), &pidfd);
            }
            () = output.ready() => output.take(&run, false).await,
        }
    }
    if let Some(leaf) = leaf {
        leaf.remove_if_empty();
    }
}

/// Kills a background run, with everything that it started or that its shell has left behind.
fn kill(leaf: Option<&Cgroup>, shell: &OwnedFd) {
    if leaf.is_some_and(|leaf| leaf.kill().is_ok()) {
        return;
    }
    let below = pid_of(shell).map(descendants).unwrap_or_default();
    for process in below.into_iter().filter_map(open_process) {
        let _ = execd_sys::send_signal(process.as_fd(), SIGKILL);
    }
    let _ = execd_sys::send_signal(shell.as_fd(), SIGKILL);
}

/// The pipe that a background run writes to.
struct Output {
    /// `None` at its end.
    pipe: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Whether the last look left something behind.
    more: bool,
}

impl Output {
    fn new(pipe: OwnedFd) -> Self {
        let pipe = match execd_sys::watch_readable(pipe) {
            Ok(pipe) => Some(Arc::new(pipe)),
            Err(error) => {
                tracing::error!(%error, "the output of a background run cannot be read");
                None
            }
        };
        Self { pipe, more: false }
    }

    fn is_at_end(&self) -> bool {
        self.pipe.is_none()
    }

    /// Resolves when there is something to take; never at the end. Cancel safe.
    async fn ready(&self) {
        match &self.pipe {
            Some(_) if self.more => {}
            // What is written after this makes it ready again.
            Some(pipe) => drop(pipe.readable().await.map(|mut guard| guard.clear_ready())),
            None => std::future::pending().await,
        }
    }

    /// Takes what has been written, up to a limit, on a thread that may wait for a slow disk.
    async fn take(&mut self, run: &Arc<Run>, to_journal: bool) {
        let Some(pipe) = self.pipe.take() else { return };
        let run = Arc::clone(run);
        let drained = tokio::task::spawn_blocking(move || {
            let drained = drain(&run, pipe.get_ref(), to_journal);
            (pipe, drained)
        });
        if let Ok((pipe, drained @ (Drained::Empty | Drained::More))) = drained.await {
            self.more = matches!(drained, Drained::More);
            self.pipe = Some(pipe);
        }
    }
}

enum Drained {
    More,
    Empty,
    Ended,
}

fn drain(run: &Run, output: &OwnedFd, to_journal: bool) -> Drained {
    let mut taken = 0;
    while taken < BURST_BYTES_MAX {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        match rustix::io::read(output, spare_capacity(&mut chunk)) {
            Ok(0) => return Drained::Ended,
            Ok(length) => taken += length,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Drained::Empty,
            Err(_) => return Drained::Ended,
        }
        if let Some(log) = &run.log
            && let Err(error) = log.append(&chunk)
        {
            tracing::warn!(run = %run.id, %error, "output of a background run is lost");
        }
        if to_journal {
            run.journal.output(Stream::Stdout, kept(chunk));
        }
    }
    Drained::More
}
