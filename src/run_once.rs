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
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use std::ffi::{CString, OsString};
use std::io::{IsTerminal, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Exit statuses of a shell for a command that is not there, or cannot be executed (POSIX, 2.8.2).
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
const ENOENT: i32 = 2;

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
    let mut prepared = prepare(&foundation, "run", &options)?;
    let terminal = std::io::stdin().is_terminal();
    // With a terminal the command keeps it, job control included; the filter blocks typing into it (TIOCSTI).
    prepared.spec.new_session = !terminal || prepared.spec.seccomp.is_empty();
    let new_session = prepared.spec.new_session;
    // Only the shell of a session is talked to.
    prepared.spec.mounts.retain(|step| !matches!(step, MountStep::Control { .. }));
    let commands = commands(&args.command, &prepared.spec.environment)?;
    let streams = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let mut signals = Signals::register()?;
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
    supervise(&sandbox, &mut signals, program.id, &program.pidfd, new_session)
}

/// Signals that are for the command rather than for execd; each rings a socket.
struct Signals(Vec<(i32, UnixStream)>);

impl Signals {
    fn register() -> anyhow::Result<Self> {
        let mut bells = Vec::new();
        for signal in [SIGINT, SIGQUIT, SIGTERM, SIGHUP] {
            let (bell, write) = UnixStream::pair()?;
            signal_hook::low_level::pipe::register(signal, write)?;
            bells.push((signal, bell));
        }
        Ok(Self(bells))
    }

    /// Waits until a signal has come or `other` is readable; the signals that have come.
    fn wait(&mut self, other: &impl AsFd) -> anyhow::Result<Vec<i32>> {
        let mut fds = vec![PollFd::new(other, PollFlags::IN)];
        fds.extend(self.0.iter().map(|(_, bell)| PollFd::new(bell, PollFlags::IN)));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) | Ok(_) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let rung: Vec<bool> = fds.iter().skip(1).map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let rung = self.0.iter_mut().zip(rung).filter(|(_, rung)| *rung);
        Ok(rung
            .map(|((signal, bell), _)| {
                let _ = bell.read(&mut [0; 16]);
                *signal
            })
            .collect())
    }
}

/// Waits for the end, passing on the signals that are meant for the command.
fn supervise(
    sandbox: &Sandbox,
    signals: &mut Signals,
    id: u32,
    pidfd: &OwnedFd,
    own_session: bool,
) -> anyhow::Result<i32> {
    loop {
        match sandbox.next_exit() {
            Exit::Program(of, status) if of == id => return Ok(status.shell_code()),
            Exit::Program(..) => continue,
            Exit::Sandbox => anyhow::bail!("the sandbox died"),
            Exit::None => {}
        }
        for signal in signals.wait(sandbox)? {
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
