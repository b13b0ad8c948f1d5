//! The session's shell: how it is started, asked to run code, interrupted and replaced.
//!
//! Nothing is inherited by the shell but three streams: a script pipe of one page as standard input, the null
//! device, and a diagnostics pipe. For a run the daemon puts the code and its input into the control
//! directory and sends one line ([`super::dialect`]). A run ends at the first of three signs:
//!
//! 1. the status report with the run's token arrives;
//! 2. init reports that the shell has ended;
//! 3. the script pipe is empty, which means the shell read the extra newline behind the line and is back at
//!    its prompt without having reported: it is lost, and is replaced.
//!
//! The processes of a run are those of the shell's cgroup leaf. A run that leaves processes behind keeps the
//! leaf and the shell moves on to a new one, so a later kill never hits them. Where there is no cgroup tree,
//! the shell's descendants stand in for the leaf, which is not exact.

use super::control::ControlDir;
use super::dialect::{self, Carried, Dialect, INTERRUPT_SIGNAL, name};
use super::inside::Inside;
use super::process::{descendants, has_ended, open_process, pid_of};
use super::shell_io::ShellIo;
use crate::files::Tree;
use crate::sandbox::cgroup::{Cgroup, CpuTime};
use crate::sandbox::launch::{Exit, LaunchError, ProgramStart, Sandbox, Started};
use crate::sandbox::launcher::Launcher;
use crate::sandbox::spec::SandboxSpec;
use crate::workspace::session_uppers::SessionUppers;
use execd_init_shim::messages::{ExitStatus, MountStep};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::block_in_place;

const SIGINT: i32 = 2;
const SIGKILL: i32 = 9;
const SIGCONT: i32 = 18;
/// Between two looks at an init that another thread talks to.
const BUSY_WAIT: Duration = Duration::from_millis(5);
/// Processes of a killed run whose ends are awaited one by one; the shell's own children are the first of them.
const AWAITED_MAX: usize = 512;
/// What is kept of a shell's own complaints, for a message.
const DIAGNOSTICS_BYTES_MAX: usize = 1024;

/// The present shell of a session.
#[derive(Debug)]
pub(super) struct Shell {
    sandbox: Arc<Sandbox>,
    pub(super) io: ShellIo,
    process: Process,
    cgroup: Option<Arc<Cgroup>>,
    leaves: u32,
    /// Leaves of the run that were killed, each with some of its processes.
    killed: Vec<(Cgroup, Vec<OwnedFd>)>,
    /// How programs other than the shell have ended.
    others_ended: Vec<(u32, ExitStatus)>,
    /// CPU time of the present leaf that is accounted for, and time of this run in leaves before it.
    cpu_seen: CpuTime,
    cpu_before: CpuTime,
}

#[derive(Debug)]
struct Process {
    dialect: Dialect,
    id: u32,
    pidfd: OwnedFd,
    /// As the daemon numbers it.
    pid: i32,
    leaf: Option<Cgroup>,
    diagnostics: OwnedFd,
    /// Set once init has reported its end.
    ended: Option<ExitStatus>,
    /// Set once it has been killed, which its end follows.
    condemned: bool,
}

/// What has become of the shell, in the middle of a run or idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sign {
    /// The run reported this status.
    Reported(i32),
    /// The shell has ended.
    Ended(ExitStatus),
    /// The shell is at its prompt and has not reported.
    Lost,
    /// The whole sandbox is gone.
    SandboxGone,
}

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The sandbox or the program.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The daemon's own side.
    #[error("set up the shell")]
    Io(#[from] io::Error),
    /// It started and does not answer.
    #[error("the shell did not answer within {} ms{diagnostics}", .waited.as_millis())]
    Silent {
        /// How long it was waited for.
        waited: Duration,
        /// What it said.
        diagnostics: String,
    },
    /// It cannot enter its folder.
    #[error("the shell cannot enter {}", .0.display())]
    Folder(PathBuf),
    /// It started and ended at once.
    #[error("the shell ended with {status:?}{diagnostics}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        diagnostics: String,
    },
}

/// The descriptors a shell is born with, and the daemon's ends of them.
struct Streams {
    stdin: OwnedFd,
    null: OwnedFd,
    stderr: OwnedFd,
    script: OwnedFd,
    diagnostics: OwnedFd,
}

impl Streams {
    fn new() -> io::Result<Self> {
        let (stdin, script) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&script, rustix::param::page_size())?;
        set_nonblocking(&script)?;
        // Nobody drains the diagnostics, so the shell must not block on them either.
        let (diagnostics, stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?.into();
        Ok(Self { stdin, null, stderr, script, diagnostics })
    }

    fn borrow(&self) -> [BorrowedFd<'_>; 3] {
        [self.stdin.as_fd(), self.null.as_fd(), self.stderr.as_fd()]
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
}

impl Shell {
    /// Launches a sandbox with a shell as its first program, and waits until the shell answers. Blocks.
    pub(super) fn launch(
        launcher: &Launcher,
        spec: SandboxSpec,
        cgroup: Option<Arc<Cgroup>>,
        answer_max: Duration,
    ) -> Result<(Self, Arc<Sandbox>, Timings), ShellError> {
        let streams = Streams::new()?;
        let leaf = cgroup.as_ref().map(|cgroup| cgroup.leaf("0")).transpose()?;
        let start = ProgramStart {
            commands: dialect::commands(),
            streams: streams.borrow(),
            cgroup: leaf.as_ref().map(AsFd::as_fd),
        };
        let began = Instant::now();
        let (mut sandbox, started) =
            Sandbox::launch(launcher, spec, cgroup.as_ref().map(|cgroup| cgroup.as_fd()), start)?;
        let control = sandbox.control.take().ok_or_else(|| io::Error::other("no control directory"))?;
        let sandbox = Arc::new(sandbox);
        let timings = Timings {
            clone_us: sandbox.clone_us,
            assembled_us: sandbox.assembled_us,
            exec_us: started.since_clone_us,
            ready_us: 0,
        };
        let io = ShellIo::new(ControlDir::new(control)?, (*sandbox).as_fd())?;
        let Streams { script, diagnostics, .. } = streams;
        let process = Process::new(started, leaf, diagnostics)?;
        let mut shell = Self {
            sandbox: Arc::clone(&sandbox),
            io,
            process,
            cgroup,
            leaves: 1,
            killed: Vec::new(),
            others_ended: Vec::new(),
            cpu_seen: CpuTime::default(),
            cpu_before: CpuTime::default(),
        };
        shell.boot(script, None, answer_max)?;
        let ready_us = began.elapsed().as_micros() as u32;
        Ok((shell, sandbox, Timings { ready_us, ..timings }))
    }

    /// Replaces the shell by a new one that goes on where the old one could still say it was. Blocks.
    pub(super) fn replace(&mut self, answer_max: Duration) -> Result<(), ShellError> {
        // Before the shell notices that its pipe is gone: it might begin to say so again when it ends.
        let carried = Carried::parse(&self.io.take_state());
        self.kill_shell();
        match self.start(carried.as_ref(), answer_max) {
            // What was carried over can be what keeps the new shell from answering.
            Err(ShellError::Silent { .. } | ShellError::Ended { .. }) if carried.is_some() => {
                self.kill_shell();
                self.start(None, answer_max)
            }
            other => other,
        }
    }

    fn start(&mut self, carried: Option<&Carried>, answer_max: Duration) -> Result<(), ShellError> {
        let streams = Streams::new()?;
        let leaf = self.new_leaf()?;
        let started = self.sandbox.start(ProgramStart {
            commands: dialect::commands(),
            streams: streams.borrow(),
            cgroup: leaf.as_ref().map(AsFd::as_fd),
        })?;
        let Streams { script, diagnostics, .. } = streams;
        self.process = Process::new(started, leaf, diagnostics)?;
        self.boot(script, carried, answer_max)
    }

    fn boot(
        &mut self,
        script: OwnedFd,
        carried: Option<&Carried>,
        answer_max: Duration,
    ) -> Result<(), ShellError> {
        let boot = self.process.dialect.boot_script(carried);
        self.io.attach(script)?;
        // What is carried over may fail in part, as in a folder that is gone.
        self.read(&boot, answer_max).map(drop)?;
        self.cpu_before = CpuTime::default();
        self.note_cpu();
        Ok(())
    }

    /// Makes a shell that was started before its session was known one of that session. Blocks.
    pub(super) fn settle(&mut self, cwd: &Path, answer_max: Duration) -> Result<(), ShellError> {
        let Some(folder) = cwd.to_str() else { return Err(ShellError::Folder(cwd.into())) };
        let status = self.read(&self.process.dialect.settle_script(folder), answer_max)?;
        self.note_cpu();
        match status {
            0 => Ok(()),
            _ => Err(ShellError::Folder(cwd.into())),
        }
    }

    /// Has the shell read a script of ours; its status. Blocks.
    fn read(&mut self, script: &str, answer_max: Duration) -> Result<i32, ShellError> {
        self.io.control().put(name::BOOT, script.as_bytes())?;
        let token = token();
        self.io.send(&self.process.dialect.boot_line(&token));
        let deadline = Instant::now() + answer_max;
        loop {
            match self.sign(&token) {
                Some(Sign::Reported(status)) => return Ok(status),
                Some(Sign::Ended(status)) => {
                    return Err(ShellError::Ended { status, diagnostics: self.process.complaints() });
                }
                Some(Sign::SandboxGone) => return Err(LaunchError::InitLost.into()),
                Some(Sign::Lost) | None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ShellError::Silent {
                    waited: answer_max,
                    diagnostics: self.process.complaints(),
                });
            }
            // Nobody rings here when another thread has learnt of an end.
            let wait = if self.io.sandbox_spoke { left.min(BUSY_WAIT) } else { left };
            self.io.wait_blocking(wait)?;
        }
    }

    /// Hands the code to the shell and returns the token of its report.
    pub(super) fn begin(
        &mut self,
        code: &str,
        stdin: Option<&[u8]>,
        envs: &[(String, String)],
    ) -> io::Result<String> {
        let control = self.io.control();
        control.put_code(code.as_bytes())?;
        if let Some(stdin) = stdin {
            control.put(name::INPUT, stdin)?;
        }
        let token = token();
        self.io.send(&self.process.dialect.run_line(&token, envs));
        Ok(token)
    }

    /// What has happened, if anything has; call after each [`ShellIo::wait`].
    pub(super) fn sign(&mut self, token: &str) -> Option<Sign> {
        if let Some(status) = self.io.reported(token) {
            return Some(Sign::Reported(status));
        }
        while self.io.sandbox_spoke {
            match self.sandbox.next_exit() {
                Exit::Program(id, status) if id == self.process.id => self.process.ended = Some(status),
                Exit::Program(id, status) => self.others_ended.push((id, status)),
                Exit::Sandbox => return Some(Sign::SandboxGone),
                Exit::None => self.io.sandbox_spoke = false,
                // Asked again when that is over.
                Exit::Busy => break,
            }
        }
        if let Some(status) = self.process.ended {
            // A shell that reported and then died has reported.
            self.io.refresh_status();
            return Some(self.io.reported(token).map_or(Sign::Ended(status), Sign::Reported));
        }
        (self.io.at_prompt && self.process.dialect == Dialect::Bash).then_some(Sign::Lost)
    }

    /// What is over with the shell while nothing runs.
    pub(super) fn idle_sign(&mut self) -> Option<Sign> {
        match self.sign("") {
            Some(Sign::Lost | Sign::Reported(_)) | None => None,
            other => other,
        }
    }

    /// After a run: its background processes keep its pipes and its leaf.
    pub(super) fn end_run(&mut self, had_stdin: bool) -> io::Result<()> {
        if had_stdin {
            self.io.control().put(name::INPUT, b"")?;
        }
        self.io.retire_held_pipes()?;
        let left_processes = match &self.process.leaf {
            Some(leaf) => leaf.processes()?.iter().any(|pid| *pid != self.process.pid),
            None => false,
        };
        if left_processes && self.process.ended.is_none() {
            block_in_place(|| {
                let moved = self.move_shell_out();
                // Those of earlier runs, whose processes have ended since.
                self.cgroup.iter().for_each(|cgroup| cgroup.remove_empty_leaves());
                moved
            })
        } else {
            Ok(())
        }
    }

    /// Asks a run to end: the shell by a signal whose trap leaves the code, its processes by SIGINT.
    pub(super) fn interrupt(&mut self) {
        // The shell first: it must know before its child is gone, or it goes on with the next command.
        match self.process.dialect {
            Dialect::Bash => {
                let _ = execd_sys::send_signal(self.process.pidfd.as_fd(), INTERRUPT_SIGNAL);
                // It may have stopped itself.
                let _ = execd_sys::send_signal(self.process.pidfd.as_fd(), SIGCONT);
            }
            // Has no way to leave the code and stay.
            Dialect::Posix => self.kill_shell(),
        }
        self.signal_run(SIGINT);
    }

    /// Whether the shell is the only process of its run.
    pub(super) fn runs_alone(&self) -> bool {
        self.members().iter().all(|pid| *pid == self.process.pid)
    }

    /// The shell's own process, as the daemon numbers it.
    pub(super) fn pid(&self) -> i32 {
        self.process.pid
    }

    /// Whether earlier runs have left processes that no cgroup holds together.
    pub(super) fn has_stragglers(&self) -> bool {
        self.process.leaf.is_none() && !self.runs_alone()
    }

    /// The processes of the run.
    fn members(&self) -> Vec<i32> {
        match &self.process.leaf {
            Some(leaf) => leaf.processes().unwrap_or_default(),
            None => descendants(self.process.pid),
        }
    }

    /// Kills the processes of a run, those included that ignore signals, are stopped or detached themselves,
    /// and leaves the shell to report.
    pub(super) fn kill_run(&mut self) {
        // A stopped shell could not even report.
        let _ = execd_sys::send_signal(self.process.pidfd.as_fd(), SIGCONT);
        if self.process.leaf.is_none() {
            return self.signal_run(SIGKILL);
        }
        let killed = block_in_place(|| self.move_shell_out_keeping()).and_then(|leaf| {
            let Some(leaf) = leaf else { return Ok(()) };
            let members = leaf.processes().unwrap_or_default();
            let members = members.into_iter().take(AWAITED_MAX).filter_map(open_process).collect();
            let killed = leaf.kill();
            self.killed.push((leaf, members));
            killed
        });
        if let Err(error) = killed {
            tracing::warn!(%error, "cgroup.kill failed; killing one by one");
            self.signal_run(SIGKILL);
        }
    }

    /// Whether all processes of the last run that was killed are gone.
    pub(super) fn killed_run_is_gone(&self) -> bool {
        // A process leaves its cgroup a moment before its parent is told of its end.
        self.killed.iter().all(|(leaf, members)| {
            leaf.processes().is_ok_and(|left| left.is_empty()) && members.iter().all(has_ended)
        })
    }

    /// The CPU time of the present run, or since the last one; `None` without a cgroup.
    fn cpu_time(&self) -> Option<CpuTime> {
        let now = self.process.leaf.as_ref()?.cpu_time().ok()?;
        Some(CpuTime {
            user: self.cpu_before.user + now.user.saturating_sub(self.cpu_seen.user),
            system: self.cpu_before.system + now.system.saturating_sub(self.cpu_seen.system),
        })
    }

    /// The CPU time of a run that has just ended; what comes now is the next one's.
    pub(super) fn take_cpu_time(&mut self) -> Option<CpuTime> {
        let taken = self.cpu_time();
        if let Some(CpuTime { user, system }) = taken {
            self.cpu_seen.user += user.saturating_sub(self.cpu_before.user);
            self.cpu_seen.system += system.saturating_sub(self.cpu_before.system);
        }
        self.cpu_before = CpuTime::default();
        taken
    }

    /// What the shell has used until now is no run's.
    pub(super) fn note_cpu(&mut self) {
        self.cpu_seen = CpuTime::default();
        self.take_cpu_time();
    }

    /// How programs that are not the shell have ended since this was last asked.
    pub(super) fn take_others_ended(&mut self) -> Vec<(u32, ExitStatus)> {
        std::mem::take(&mut self.others_ended)
    }

    /// What is needed to work beside the shell; relative paths begin at `workspace`.
    pub(super) fn inside(
        &self,
        workspace: PathBuf,
        uppers: Option<Arc<SessionUppers>>,
        late_mounts: Vec<MountStep>,
    ) -> Inside {
        Inside {
            sandbox: Arc::clone(&self.sandbox),
            control: Arc::clone(self.io.control()),
            cgroup: self.cgroup.clone(),
            dialect: self.process.dialect,
            files: Tree::new(Arc::clone(&self.sandbox), workspace),
            uppers,
            late_mounts,
        }
    }

    /// Asks the idle shell where it is, and returns the token of its answer.
    pub(super) fn begin_ask(&mut self) -> String {
        self.io.take_state();
        let token = token();
        let line = self.process.dialect.ask_line(&token);
        self.io.send(&line);
        token
    }

    /// What it has answered.
    pub(super) fn asked(&mut self) -> Option<Carried> {
        Carried::parse(&self.io.take_state())
    }

    /// Has the shell do nothing and report; the token of that. bash mentions children that were killed at its
    /// next command, and this way not in the output of the next run.
    pub(super) fn begin_nothing(&mut self) -> String {
        self.killed.clear();
        let token = token();
        let line = self.process.dialect.idle_line(&token);
        self.io.send(&line);
        token
    }

    /// Whether its process is there; it ends with its sandbox, too.
    pub(super) fn is_alive(&self) -> bool {
        !has_ended(&self.process.pidfd)
    }

    /// Kills the shell itself.
    pub(super) fn kill_shell(&mut self) {
        self.io.detach();
        self.process.condemned = true;
        let _ = execd_sys::send_signal(self.process.pidfd.as_fd(), SIGKILL);
    }

    /// Whether another shell has to take over before the next run.
    pub(super) fn is_over(&mut self) -> bool {
        self.process.condemned || matches!(self.idle_sign(), Some(Sign::Ended(_)))
    }

    fn new_leaf(&mut self) -> io::Result<Option<Cgroup>> {
        let number = self.leaves;
        self.leaves += 1;
        self.cgroup.as_ref().map(|cgroup| cgroup.leaf(&number.to_string())).transpose()
    }

    fn move_shell_out(&mut self) -> io::Result<()> {
        self.move_shell_out_keeping().map(drop)
    }

    /// Moves the shell to a leaf of its own and returns the one it left. Blocks: moving a process between cgroups can
    /// take a grace period of RCU, some milliseconds.
    fn move_shell_out_keeping(&mut self) -> io::Result<Option<Cgroup>> {
        let Some(leaf) = self.new_leaf()? else { return Ok(None) };
        match leaf.adopt(self.process.pid) {
            Ok(()) => {
                self.cpu_before = self.cpu_time().unwrap_or_default();
                self.cpu_seen = CpuTime::default();
                Ok(self.process.leaf.replace(leaf))
            }
            // The shell is dead, and a leaf without it is what was wanted.
            Err(error) if error.raw_os_error() == Some(3) => Ok(self.process.leaf.take()),
            Err(error) => Err(error),
        }
    }

    /// Sends a signal to the run's processes other than the shell. A pid is only a hint until a pidfd holds
    /// it: membership is looked up again after opening, so a reused number is never hit.
    fn signal_run(&self, signal: i32) {
        let held: Vec<(i32, OwnedFd)> = self
            .members()
            .into_iter()
            .filter(|pid| *pid != self.process.pid)
            .filter_map(|pid| Some((pid, open_process(pid)?)))
            .collect();
        let still = self.members();
        for (_, pidfd) in held.iter().filter(|(pid, _)| still.contains(pid)) {
            let _ = execd_sys::send_signal(pidfd.as_fd(), signal);
        }
    }
}

impl Process {
    fn new(started: Started, leaf: Option<Cgroup>, diagnostics: OwnedFd) -> io::Result<Self> {
        let dialect = dialect::of_command(started.command);
        let pid = pid_of(&started.pidfd)?;
        Ok(Self {
            dialect,
            id: started.id,
            pidfd: started.pidfd,
            pid,
            leaf,
            diagnostics,
            ended: None,
            condemned: false,
        })
    }

    /// The beginning of what the shell wrote to its own standard error.
    fn complaints(&self) -> String {
        let mut text = vec![0; DIAGNOSTICS_BYTES_MAX];
        match rustix::io::read(&self.diagnostics, &mut text) {
            Ok(length @ 1..) => {
                format!(": {}", String::from_utf8_lossy(text.get(..length).unwrap_or_default()).trim())
            }
            _ => String::new(),
        }
    }
}

/// How long the steps of a launch took; microseconds from before the clone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timings {
    /// The clone itself.
    pub(super) clone_us: u32,
    /// All mounts in place.
    pub(super) assembled_us: u32,
    /// The shell executed.
    pub(super) exec_us: u32,
    /// The shell answered.
    pub(super) ready_us: u32,
}

/// A word that the code of a run cannot guess: 64 random bits. Short, because bash reads its script pipe byte
/// by byte.
fn token() -> String {
    let (_, random) = uuid::Uuid::new_v4().as_u64_pair();
    format!("{random:016x}")
}
