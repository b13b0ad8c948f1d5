//! A running sandbox: what the daemon holds of it, and how programs are started in it.
//!
//! All calls here block, for a millisecond or so. They belong on a thread that may block.

use super::launcher::Launcher;
use super::plan::{made_outside, plan, program};
use super::spec::SandboxSpec;
use execd_init_shim::Failure;
use execd_init_shim::channel::{Channel, FDS_MAX, Received};
use execd_init_shim::detached::{Detached, detach};
use execd_init_shim::messages::{Command, Event, ExitStatus, MountStep, Place, Request};
use execd_sys::{Cloned, SingleThreaded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::Signal;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long init may take for its mounts, or for one program; a hung network file system below a workspace
/// is what makes this happen.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);

/// Why there is no sandbox, or no program in it.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A set-up step failed; the text names it.
    #[error(transparent)]
    Step(#[from] Failure),
    /// Mounts cannot be replaced; they are as they were.
    #[error(transparent)]
    NotReplaced(Failure),
    /// The launcher died.
    #[error("the launcher is gone")]
    LauncherLost,
    /// init died.
    #[error("the sandbox's init is gone")]
    InitLost,
    /// init did not answer in time.
    #[error("the sandbox's init did not answer within {} s", ANSWER_WAIT_MAX.as_secs())]
    TimedOut,
    /// The daemon's own side failed.
    #[error("talk to the sandbox")]
    Io(#[source] io::Error),
}

/// Why mounts were not replaced.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// They are as they were.
    #[error(transparent)]
    Unchanged(LaunchError),
    /// Some may be missing: the sandbox is of no use any more.
    #[error(transparent)]
    Broken(LaunchError),
}

impl From<io::Error> for LaunchError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::TimedOut,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::InitLost,
            _ => Self::Io(error),
        }
    }
}

/// An init that has been forked and is busy with its plan.
#[derive(Debug)]
pub struct Forked {
    /// A handle to it.
    pub pidfd: OwnedFd,
    /// Its pid as the daemon numbers it.
    pub pid: i32,
    /// Wall time of the clone; microseconds.
    pub clone_us: u32,
}

/// What the daemon needs to see the files of a sandbox exactly as the sandbox does. Root alone is not enough:
/// when init dies the mounts vanish from under it, and paths would then lead into the host's files. The
/// namespace keeps them in place for as long as somebody holds the view.
#[derive(Debug)]
pub struct View {
    /// `O_PATH` descriptor of the sandbox's `/`.
    pub root: OwnedFd,
    /// The mount namespace, held and never entered.
    pub mount_namespace: OwnedFd,
}

/// A sandbox. Dropping it kills everything inside.
#[derive(Debug)]
pub struct Sandbox {
    spec: SandboxSpec,
    channel: Channel,
    pidfd: OwnedFd,
    /// init's pid as the daemon numbers it.
    pub pid: i32,
    /// The sandbox's files, until given up.
    pub view: Option<View>,
    /// Writable descriptor of the control directory, if the spec has one.
    pub control: Option<OwnedFd>,
    /// Wall time of the clone; microseconds.
    pub clone_us: u32,
    /// From before the clone until all mounts were in place; microseconds.
    pub assembled_us: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    programs: u32,
    /// Where programs start, if not where the spec says.
    cwd: Option<PathBuf>,
    /// Ends that arrived while something else was waited for.
    exits: VecDeque<(u32, ExitStatus)>,
}

/// A program that runs in a sandbox.
#[derive(Debug)]
pub struct Started {
    /// Its name in [`Sandbox::next_exit`].
    pub id: u32,
    /// A handle to it.
    pub pidfd: OwnedFd,
    /// Which of the commands it was.
    pub command: usize,
    /// From before the sandbox's clone to the call of execve; microseconds.
    pub since_clone_us: u32,
}

/// A program to start, with nothing else open than these streams.
#[derive(Debug)]
pub struct ProgramStart<'a> {
    /// Tried in order until one exists.
    pub commands: Vec<Command>,
    /// Standard input, output and error.
    pub streams: [BorrowedFd<'a>; 3],
    /// The cgroup it is born in.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// What [`Sandbox::next_exit`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Program `id` has ended.
    Program(u32, ExitStatus),
    /// init is gone, so everything is.
    Sandbox,
    /// Nothing new.
    None,
    /// Another thread talks to init; what that learns about ends can be asked for afterwards.
    Busy,
}

impl Sandbox {
    /// Has the launcher fork an init, inside `cgroup` if given, and starts the first program as soon as its
    /// mounts are in place.
    ///
    /// # Errors
    /// The step that failed; nothing is left behind then.
    pub fn launch(
        launcher: &Launcher,
        spec: SandboxSpec,
        cgroup: Option<BorrowedFd<'_>>,
        first: ProgramStart<'_>,
    ) -> Result<(Self, Started), LaunchError> {
        let (ours, theirs) = asked_to_start(&spec, first)?;
        let forked = launcher.fork(&plan(&spec), theirs, cgroup)?;
        Self::assembled(ours, forked, spec)
    }

    /// Forks the init from this very process, which must have one thread: what a command line tool does.
    ///
    /// # Errors
    /// As [`Sandbox::launch`].
    pub fn fork(
        proof: &SingleThreaded,
        spec: SandboxSpec,
        first: ProgramStart<'_>,
    ) -> Result<(Self, Started), LaunchError> {
        let plan = plan(&spec);
        let plan_bytes = postcard::to_stdvec(&plan).map_err(io::Error::other)?;
        let (ours, theirs) = asked_to_start(&spec, first)?;
        let namespaces = execd_init_shim::launcher::namespaces(plan.id_map.is_some());
        let started = Instant::now();
        match execd_sys::clone3(proof, namespaces, None) {
            Ok(Cloned::Child) => {
                execd_init_shim::pid1::run(proof, theirs, &plan_bytes, started);
                execd_sys::exit_now(0)
            }
            Ok(Cloned::Parent { pid, pidfd }) => {
                let clone_us = started.elapsed().as_micros() as u32;
                Self::assembled(ours, Forked { pidfd, pid: pid.as_raw_pid(), clone_us }, spec)
            }
            Err(error) => Err(Failure {
                step: "fork the sandbox's init".into(),
                call: "clone3(new namespaces)".into(),
                errno: error.raw_os_error().unwrap_or(0),
            }
            .into()),
        }
    }

    fn assembled(
        channel: Channel,
        forked: Forked,
        spec: SandboxSpec,
    ) -> Result<(Self, Started), LaunchError> {
        let Forked { pidfd, pid, clone_us } = forked;
        // Until the sandbox exists as a value, this guard is what ends a half-built one.
        let guard = KillOnDrop(&pidfd);
        set_socket_timeout(&channel, Timeout::Recv, Some(ANSWER_WAIT_MAX)).map_err(io::Error::from)?;
        match request_attach(&channel, made_outside(&spec)) {
            // It has failed before; what it said last is still there to be read.
            Ok(_) | Err(LaunchError::InitLost) => {}
            Err(error) => return Err(error),
        }
        let mut answer = channel.recv::<Event>()?.ok_or(LaunchError::InitLost)?;
        let (has_control, assembled_us) = match answer.message {
            Event::Assembled { has_control, since_clone_us } => (has_control, since_clone_us),
            Event::Failed(failure) => return Err(failure.into()),
            _ => return Err(LaunchError::InitLost),
        };
        let view = Some(View { root: answer.fd()?, mount_namespace: answer.fd()? });
        let control = if has_control { Some(answer.fd()?) } else { None };
        std::mem::forget(guard);
        let state = Mutex::new(State { programs: FIRST_PROGRAM, cwd: None, exits: VecDeque::new() });
        let sandbox = Self { spec, channel, pidfd, pid, view, control, clone_us, assembled_us, state };
        let started = sandbox.await_start(&mut sandbox.state(), FIRST_PROGRAM)?;
        Ok((sandbox, started))
    }

    /// The spec it was launched with.
    pub fn spec(&self) -> &SandboxSpec {
        &self.spec
    }

    /// Starts another program. Returns once it has been executed.
    ///
    /// # Errors
    /// The step that failed.
    pub fn start(&self, program: ProgramStart<'_>) -> Result<Started, LaunchError> {
        let mut state = self.state();
        state.programs += 1;
        let id = state.programs;
        request_start(&self.channel, &self.spec, state.cwd.as_deref(), id, program)?;
        let started = self.await_start(&mut state, id);
        if matches!(started, Err(LaunchError::TimedOut)) {
            // Code inside may have stopped what was being started, and init waits for that: it is of no use any more.
            self.kill();
        }
        started
    }

    fn await_start(&self, state: &mut State, id: u32) -> Result<Started, LaunchError> {
        loop {
            let mut answer = self.channel.recv::<Event>()?.ok_or(LaunchError::InitLost)?;
            match answer.message {
                Event::Started { id: of, command, since_clone_us } if of == id => {
                    return Ok(Started { id, pidfd: answer.fd()?, command, since_clone_us });
                }
                Event::NotStarted { id: of, failure } if of == id => return Err(failure.into()),
                Event::Exited { id, status } => state.exits.push_back((id, status)),
                _ => {}
            }
        }
    }

    /// Programs start in this folder from now on, a path inside.
    pub fn start_in(&self, cwd: &Path) {
        self.state().cwd = Some(cwd.into());
    }

    /// Makes further mounts and has them attached, in order. For those that [`super::profile::split`] finds.
    ///
    /// # Errors
    /// The step that failed; the mounts before it stay.
    pub fn attach(&self, mounts: &[MountStep]) -> Result<(), LaunchError> {
        let mut state = self.state();
        let mut unanswered = request_attach(&self.channel, mounts.iter())?;
        while unanswered > 0 {
            self.await_attached(&mut state)?;
            unanswered -= 1;
        }
        Ok(())
    }

    /// Makes the mounts in these places read-only.
    ///
    /// # Errors
    /// The step that failed; `EBUSY` when a file is open for writing.
    pub fn seal(&self, dests: &[PathBuf]) -> Result<(), LaunchError> {
        let mut state = self.state();
        self.channel.send(&Request::Seal { dests: dests.to_vec() }, &[], &[])?;
        self.await_attached(&mut state)
    }

    /// Makes mounts and has them attached in the place of those that are there, in order. Programs that are in one of
    /// those stay there.
    ///
    /// # Errors
    /// [`ReplaceError`] says what has become of the mounts.
    pub fn replace(&self, mounts: &[MountStep]) -> Result<(), ReplaceError> {
        let unchanged = |error: LaunchError| ReplaceError::Unchanged(error);
        let mut state = self.state();
        if mounts.len() > FDS_MAX - 1 {
            let failure = Failure::check("replace mounts", "there are too many of them");
            return Err(unchanged(failure.into()));
        }
        let made: Vec<_> = mounts
            .iter()
            .map(detach)
            .collect::<Result<_, _>>()
            .map_err(|failure| unchanged(failure.into()))?;
        let places = made.iter().map(place).collect();
        let fds: Vec<BorrowedFd<'_>> = made.iter().map(|detached| detached.mount.as_fd()).collect();
        let sent = self.channel.send(&Request::Replace { places }, &[], &fds);
        sent.map_err(|error| unchanged(error.into()))?;
        match self.await_attached(&mut state) {
            Ok(()) => Ok(()),
            Err(LaunchError::NotReplaced(failure)) => Err(unchanged(failure.into())),
            Err(error) => Err(ReplaceError::Broken(error)),
        }
    }

    fn await_attached(&self, state: &mut State) -> Result<(), LaunchError> {
        loop {
            let answer = self.channel.recv::<Event>()?.ok_or(LaunchError::InitLost)?;
            match answer.message {
                Event::Attached(outcome) => return Ok(outcome?),
                Event::NotReplaced(failure) => return Err(LaunchError::NotReplaced(failure)),
                Event::Exited { id, status } => state.exits.push_back((id, status)),
                _ => {}
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next end of a program, without waiting. Readiness shows on the descriptor of [`AsFd`].
    pub fn next_exit(&self) -> Exit {
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => return Exit::Busy,
        };
        if let Some((id, status)) = state.exits.pop_front() {
            return Exit::Program(id, status);
        }
        loop {
            match self.channel.try_recv::<Event>() {
                Ok(Some(Received { message: Event::Exited { id, status }, .. })) => {
                    return Exit::Program(id, status);
                }
                Ok(Some(_)) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Exit::None,
                Ok(None) | Err(_) => return Exit::Sandbox,
            }
        }
    }

    /// Waits for the end of program `id`, for at most `timeout`.
    ///
    /// # Errors
    /// [`LaunchError::InitLost`] when the sandbox ends first, [`LaunchError::TimedOut`].
    pub fn wait(&self, id: u32, timeout: Option<Duration>) -> Result<ExitStatus, LaunchError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            match self.next_exit() {
                Exit::Program(of, status) if of == id => return Ok(status),
                Exit::Program(..) | Exit::Busy => {}
                Exit::Sandbox => return Err(LaunchError::InitLost),
                Exit::None => wait_readable(self.channel.as_fd(), deadline)?,
            }
        }
    }

    /// Kills everything inside.
    pub fn kill(&self) {
        drop(KillOnDrop(&self.pidfd));
    }

    /// Kills everything inside and waits until it is gone.
    ///
    /// # Errors
    /// [`LaunchError::TimedOut`] when a process is stuck in the kernel.
    pub fn destroy(&self, timeout: Duration) -> Result<(), LaunchError> {
        self.kill();
        wait_readable(self.pidfd.as_fd(), Some(Instant::now() + timeout))
    }
}

impl AsFd for Sandbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The number of the program a sandbox is launched with.
const FIRST_PROGRAM: u32 = 1;

/// A channel in which the request for the first program waits already, so that init finds it without a turn over
/// the sockets.
fn asked_to_start(spec: &SandboxSpec, first: ProgramStart<'_>) -> Result<(Channel, Channel), LaunchError> {
    let (ours, theirs) = Channel::pair()?;
    request_start(&ours, spec, None, FIRST_PROGRAM, first)?;
    Ok((ours, theirs))
}

fn request_start(
    channel: &Channel,
    spec: &SandboxSpec,
    cwd: Option<&Path>,
    id: u32,
    start: ProgramStart<'_>,
) -> Result<(), LaunchError> {
    let into_cgroup = start.cgroup.is_some();
    let mut fds = start.streams.to_vec();
    fds.extend(start.cgroup);
    let mut program = program(spec, start.commands);
    if let Some(cwd) = cwd {
        program.cwd = cwd.into();
    }
    Ok(channel.send(&Request::Start { id, program, into_cgroup }, &[], &fds)?)
}

/// Makes mounts and asks for them to be attached; how many messages that took.
fn request_attach<'a>(
    channel: &Channel,
    mounts: impl Iterator<Item = &'a MountStep>,
) -> Result<usize, LaunchError> {
    let mut messages = 0;
    let mut mounts = mounts.peekable();
    while mounts.peek().is_some() {
        // A large message takes one descriptor for itself.
        let made: Vec<_> = mounts.by_ref().take(FDS_MAX - 1).map(detach).collect::<Result<_, _>>()?;
        let request = Request::Attach { places: made.iter().map(place).collect() };
        let fds: Vec<BorrowedFd<'_>> = made.iter().map(|detached| detached.mount.as_fd()).collect();
        channel.send(&request, &[], &fds)?;
        messages += 1;
    }
    Ok(messages)
}

fn place(mount: &Detached) -> Place {
    Place { dest: mount.dest.clone(), is_directory: mount.is_directory }
}

/// Kills an init; the kernel then kills the rest of its PID namespace (pid_namespaces(7)).
struct KillOnDrop<'a>(&'a OwnedFd);

impl Drop for KillOnDrop<'_> {
    fn drop(&mut self) {
        // It fails only when init is dead already.
        let _ = rustix::process::pidfd_send_signal(self.0, Signal::KILL);
    }
}

/// Blocks until `fd` is readable.
///
/// # Errors
/// [`LaunchError::TimedOut`] at the deadline.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> Result<(), LaunchError> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return Err(LaunchError::TimedOut),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(LaunchError::Io(errno.into())),
        }
    }
}
