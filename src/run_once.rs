//! `execd run`: one command in a throw-away session, without a daemon.
//!
//! The sandbox is forked from this very process, which is single-threaded, so there is no launcher and no
//! runtime to start. Everything in it dies when this process does.

use crate::cli::{RunArgs, RunMode, RunProfile};
use crate::config::Config;
use crate::sandbox::launch::{Exit, LaunchError, ProgramStart, Sandbox};
use crate::sandbox::profile::Profile;
use crate::sandbox::seccomp;
use crate::session::options::{Bind, Mount, MountMode, SessionOptions, UidMode};
use crate::session::prepare::{Foundation, prepare};
use anyhow::Context;
use execd_init_shim::EXECUTE;
use execd_init_shim::messages::{Command, MountStep};
use execd_sys::SingleThreaded;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::ffi::{CString, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// What signalfd(2) writes for a signal (`struct signalfd_siginfo`); bytes.
const SIGNAL_INFO_BYTES: usize = 128;
/// Exit statuses of a shell for a command that is not there, or cannot be executed (POSIX, 2.8.2).
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
const ENOENT: i32 = 2;
const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGQUIT: i32 = 3;
const SIGTERM: i32 = 15;

/// Runs the command and returns its exit status as a shell would report it.
///
/// # Errors
/// When the sandbox cannot be built or the command not be started.
pub fn run(args: &RunArgs) -> anyhow::Result<i32> {
    let proof = SingleThreaded::verify().context("execd run needs to be single-threaded")?;
    // The sandbox inherits the actions, and Rust ignores SIGPIPE.
    execd_sys::reset_signals();
    let foundation = foundation(args)?;
    let options = options(args)?;
    let mut prepared = prepare(&foundation, uuid::Uuid::new_v4(), &options)?;
    let terminal = std::io::stdin().is_terminal();
    // With a terminal the command keeps it, job control included; the filter blocks typing into it (TIOCSTI).
    prepared.spec.new_session = !terminal || prepared.spec.seccomp.program.is_empty();
    let new_session = prepared.spec.new_session;
    // Only the shell of a session is talked to.
    prepared.spec.mounts.retain(|step| !matches!(step, MountStep::Control { .. }));
    let commands = commands(&args.command, &prepared.spec.environment)?;
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let signals = Signals::register()?;
    let start = ProgramStart { commands, streams, cgroup: None };
    let (mut sandbox, program) = match Sandbox::fork(&proof, prepared.spec, start) {
        Err(LaunchError::Step(failure)) if failure.step.starts_with(EXECUTE) => {
            eprintln!("execd: {failure}");
            return Ok(if failure.errno == ENOENT { NOT_FOUND } else { NOT_EXECUTABLE });
        }
        other => other?,
    };
    // Whoever closes the last descriptor of a mount namespace takes it down, which takes a while; that is better
    // done by init, whom nobody waits for.
    sandbox.view = None;
    if args.timings {
        let (clone, mounts, exec) = (sandbox.clone_us, sandbox.assembled_us, program.since_clone_us);
        eprintln!("{{\"clone_us\":{clone},\"assembled_us\":{mounts},\"exec_us\":{exec}}}");
    }
    let status = supervise(&sandbox, &signals, program.id, &program.pidfd, new_session);
    // init ends with this process. Killing it first would have it take down its namespaces while we wait.
    std::mem::forget(sandbox);
    status
}

/// Signals that are for the command rather than for execd (signalfd(2)).
struct Signals(OwnedFd);

impl Signals {
    fn register() -> anyhow::Result<Self> {
        Ok(Self(execd_sys::watch_signals(&[SIGINT, SIGQUIT, SIGTERM, SIGHUP]).context("watch for signals")?))
    }

    /// Waits until a signal has come or `other` is readable.
    fn wait(&self, other: &impl AsFd) -> anyhow::Result<()> {
        match poll(&mut [PollFd::new(other, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)], None) {
            Err(rustix::io::Errno::INTR) | Ok(_) => Ok(()),
            Err(errno) => Err(errno).context("poll"),
        }
    }

    /// The next signal that has come.
    fn next(&self) -> Option<i32> {
        let mut info = [0; SIGNAL_INFO_BYTES];
        rustix::io::read(&self.0, &mut info).ok()?;
        // `ssi_signo` comes first.
        Some(i32::from_ne_bytes(*info.first_chunk()?))
    }
}

/// Waits for the end, passing on the signals that are meant for the command.
fn supervise(
    sandbox: &Sandbox,
    signals: &Signals,
    id: u32,
    pidfd: &OwnedFd,
    own_session: bool,
) -> anyhow::Result<i32> {
    loop {
        match sandbox.next_exit() {
            Exit::Program(of, status) if of == id => return Ok(status.shell_code()),
            Exit::Program(..) | Exit::Busy => continue,
            Exit::Sandbox => anyhow::bail!("the sandbox died"),
            Exit::None => {}
        }
        signals.wait(sandbox)?;
        while let Some(signal) = signals.next() {
            // What the terminal sends reaches a command in our session by itself.
            if own_session || matches!(signal, SIGTERM | SIGHUP) {
                let _ = execd_sys::send_signal(pidfd.as_fd(), signal);
            }
        }
    }
}

fn foundation(args: &RunArgs) -> anyhow::Result<Foundation> {
    let (mut config, _) = Config::load(args.isolation_config.as_ref())?;
    // The allow-list guards a daemon's host against its clients; here the caller is the user.
    config.allowed_writable = vec!["/".into()];
    let filter = config.seccomp.deny.as_deref().map_or_else(seccomp::builtin, seccomp::from_names);
    Ok(Foundation { config, filter, uppers: None, has_cgroups: false })
}

fn options(args: &RunArgs) -> anyhow::Result<SessionOptions> {
    let workspace = match &args.workspace {
        Some(path) => path.canonicalize().with_context(|| format!("{}", path.display()))?,
        None => std::env::current_dir().context("the current folder")?,
    };
    let mode = match args.mode {
        RunMode::Overlay => MountMode::Overlay { persist: false },
        RunMode::Rw => MountMode::ReadWrite,
        RunMode::Ro => MountMode::ReadOnly,
    };
    let unprivileged = !rustix::process::geteuid().is_root();
    Ok(SessionOptions {
        profile: match args.profile {
            RunProfile::Strict => Profile::Strict,
            RunProfile::Balanced => Profile::Balanced,
        },
        binds: args.binds.iter().map(|spec| bind(spec)).collect::<Result<_, _>>()?,
        share_net: !args.no_net,
        uid: args.uid,
        gid: args.gid,
        uid_mode: if args.userns || unprivileged { UidMode::Userns } else { UidMode::Setpriv },
        ..SessionOptions::new(vec![Mount { path: workspace, mode }])
    })
}

fn bind(spec: &str) -> anyhow::Result<Bind> {
    let parts: Vec<&str> = spec.split(':').collect();
    let (source, dest, read_only) = match *parts.as_slice() {
        [source] => (source, source, false),
        [source, dest] => (source, dest, false),
        [source, dest, "ro"] => (source, dest, true),
        _ => anyhow::bail!("--bind {spec}: write SOURCE, SOURCE:DEST or SOURCE:DEST:ro"),
    };
    Ok(Bind { source: source.into(), dest: dest.into(), read_only })
}

/// The places where the command may be, in the order of `PATH`.
fn commands(words: &[OsString], environment: &[CString]) -> anyhow::Result<Vec<Command>> {
    let argv = words
        .iter()
        .map(|word| CString::new(word.clone().into_vec()).context("a NUL byte in the command"))
        .collect::<Result<Vec<_>, _>>()?;
    let name = words.first().context("no command")?;
    let paths: Vec<PathBuf> = if name.as_bytes().contains(&b'/') {
        vec![name.into()]
    } else {
        let path = environment.iter().find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="));
        let path = std::ffi::OsStr::from_bytes(path.unwrap_or_default());
        std::env::split_paths(path).map(|dir| dir.join(name)).collect()
    };
    paths
        .into_iter()
        .map(|path| Ok(Command { path: CString::new(path.into_os_string().into_vec())?, argv: argv.clone() }))
        .collect()
}
