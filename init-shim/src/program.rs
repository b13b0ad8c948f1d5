//! Starts one program inside the sandbox: what happens between fork and exec, in this order.
//!
//! 1. standard streams; every other descriptor closed
//! 2. own session, no core dumps, umask 022
//! 3. signals unblocked (their actions are the default ones already)
//! 4. capability bounding set, no_new_privs, and the seccomp filter unless it forbids some of what follows
//! 5. wait at the gate: the first program is forked while init still mounts
//! 6. working directory
//! 7. groups, gid and uid, then the other capability sets
//! 8. the seccomp filter, if not before
//! 9. exec
//!
//! The working directory is entered before the identity changes: a session may be given a folder below
//! directories that its user cannot search.

use crate::Failure;
use crate::failure::{Call, CallError};
use crate::messages::{Identity, Program};
use execd_sys::{CloneFlags, Cloned, SingleThreaded, clone3, exit_now};
use nix::errno::Errno;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, setrlimit, setsid};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use seccompiler::sock_filter;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::time::Instant;

/// How the step begins in a failure to execute, all other steps having succeeded.
pub const EXECUTE: &str = "execute";

/// A process that prepares itself to become a program and waits at a gate before it does.
pub(crate) struct Waiting {
    pid: Pid,
    pidfd: OwnedFd,
    report: OwnedFd,
    /// The child goes on when it reads a byte, and ends when there is none.
    gate: OwnedFd,
}

/// A program that has been executed.
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    /// Which of the commands it was, and when it was executed.
    pub(crate) exec: Exec,
}

/// The moment before execve(2).
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Exec {
    /// Which of the commands.
    pub(crate) command: usize,
    /// From before the sandbox's clone; microseconds.
    pub(crate) since_clone_us: u32,
}

/// The three standard streams.
pub(crate) type Streams = [OwnedFd; 3];

/// Forks a process that prepares itself while the caller does something else.
pub(crate) fn fork(
    proof: &SingleThreaded,
    program: &Program,
    streams: &Streams,
    cgroup: Option<BorrowedFd<'_>>,
    cloned_at: Instant,
) -> Result<Waiting, Failure> {
    let step = "fork the program";
    let pipe = || pipe_with(PipeFlags::CLOEXEC).call(|| "pipe2".into()).map_err(|e| e.of(step));
    let (report, report_write) = pipe()?;
    let (gate_read, gate) = pipe()?;
    let cloned = clone3(proof, CloneFlags::empty(), cgroup);
    match cloned.call(|| "clone3".into()).map_err(|e| e.of(step))? {
        Cloned::Child => {
            let mut own = Own { report: report_write, gate: gate_read, cloned_at };
            let failure = become_program(program, streams, &mut own);
            own.tell(&Err(failure));
            exit_now(127);
        }
        Cloned::Parent { pid, pidfd } => Ok(Waiting { pid, pidfd, report, gate }),
    }
}

impl Waiting {
    /// Opens the gate. The sandbox has to be complete.
    pub(crate) fn open(self) -> Released {
        let Self { pid, pidfd, report, gate } = self;
        // A child that is gone has left its reason in the report.
        let _ = rustix::io::write(&gate, b"g");
        Released { pid, pidfd, report }
    }
}

/// A process that is about to become a program.
pub(crate) struct Released {
    pid: Pid,
    pidfd: OwnedFd,
    report: OwnedFd,
}

impl Released {
    /// Waits until the program has been executed or a step has failed.
    pub(crate) fn finish(self) -> Result<Started, Failure> {
        let exec = read_report(self.report)?;
        Ok(Started { pid: self.pid, pidfd: self.pidfd, exec })
    }
}

/// What the child keeps of its own until it executes; all close-on-exec.
struct Own {
    /// The last thing written here before it closes is the outcome.
    report: OwnedFd,
    gate: OwnedFd,
    cloned_at: Instant,
}

impl Own {
    /// Says which command is about to be executed.
    fn executing(&mut self, command: usize) {
        let since_clone_us = self.cloned_at.elapsed().as_micros() as u32;
        self.tell(&Ok(Exec { command, since_clone_us }));
    }

    /// Nobody is left to tell if the pipe breaks.
    fn tell(&mut self, outcome: &Result<Exec, Failure>) {
        if let Ok(bytes) = postcard::to_stdvec(outcome) {
            let _ = rustix::io::write(&self.report, &bytes);
        }
    }

    /// Returns when init says so. End of file means that init has failed or was killed: then the sandbox is
    /// not complete, and nothing may be executed in what there is of it.
    fn wait_at_gate(&self) -> Result<(), CallError> {
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.gate, &mut [0_u8; 1])) {
            Ok(0) => Err(CallError::what("init is gone")),
            other => other.map(drop).call(|| "read(gate)".into()),
        }
    }
}

fn read_report(pipe: OwnedFd) -> Result<Exec, Failure> {
    let mut bytes = Vec::new();
    File::from(pipe).read_to_end(&mut bytes).call(|| "read(report)".into()).map_err(|e| e.of("exec"))?;
    let mut last = Err(Failure::check("exec", "the program's process died before it was executed"));
    let mut rest = bytes.as_slice();
    while let Ok((outcome, after)) = postcard::take_from_bytes::<Result<Exec, Failure>>(rest) {
        last = outcome;
        rest = after;
    }
    last
}

/// Only returns when a step failed (or ends the process, for a program without commands).
fn become_program(program: &Program, streams: &Streams, own: &mut Own) -> Failure {
    match prepare(program, streams, own) {
        Err(failure) => failure,
        Ok(()) if program.commands.is_empty() => {
            own.executing(0);
            exit_now(0)
        }
        Ok(()) => execute(program, own),
    }
}

fn prepare(program: &Program, streams: &Streams, own: &mut Own) -> Result<(), Failure> {
    move_descriptors(streams, own).map_err(|e| e.of("set up the standard streams"))?;
    enter_session(program).map_err(|e| e.of("make a session"))?;
    execd_sys::unblock_signals();
    bound_capabilities(kept_capabilities(program)).map_err(|e| e.of("bound the capabilities"))?;
    rustix::thread::set_no_new_privs(true)
        .call(|| "prctl(PR_SET_NO_NEW_PRIVS)".into())
        .map_err(|e| e.of("set no_new_privs"))?;
    let install = || install_filter(program).map_err(|e| e.of("install the seccomp filter"));
    if program.seccomp_early {
        install()?;
    }
    own.wait_at_gate().map_err(|e| e.of("wait for the sandbox to be complete"))?;
    rustix::process::chdir(&program.cwd)
        .call(|| "chdir".into())
        .map_err(|e| e.of(format!("enter {}", program.cwd.display())))?;
    let Identity { uid, gid, .. } = program.identity;
    switch_identity(program).map_err(|e| e.of(format!("become uid {uid} gid {gid}")))?;
    if program.seccomp_early { Ok(()) } else { install() }
}

/// The child's own descriptors, above the streams.
const REPORT: i32 = 3;
const GATE: i32 = 4;

fn move_descriptors(streams: &Streams, own: &mut Own) -> Result<(), CallError> {
    // The numbers up to GATE are init's streams, channel and signalfd, of which this copy is not needed; whatever
    // still is to be moved was opened after them.
    for (number, fd) in (0..).zip(streams) {
        execd_sys::redirect(fd.as_fd(), number).call(|| format!("dup2({number})"))?;
    }
    own.report = keep(&own.report, REPORT)?;
    own.gate = keep(&own.gate, GATE)?;
    execd_sys::close_range_from(GATE as u32 + 1).call(|| "close_range".into())
}

/// Moves a descriptor to a number.
fn keep(fd: &OwnedFd, number: i32) -> Result<OwnedFd, CallError> {
    execd_sys::redirect(fd.as_fd(), number).call(|| format!("dup2({number})"))?;
    execd_sys::adopt(number).call(|| format!("fcntl({number}, F_SETFD, FD_CLOEXEC)"))
}

fn enter_session(program: &Program) -> Result<(), CallError> {
    if program.new_session {
        setsid().call(|| "setsid".into())?;
    }
    rustix::process::umask(rustix::fs::Mode::from(0o022));
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .call(|| "setrlimit(RLIMIT_CORE, 0)".into())
}

fn switch_identity(program: &Program) -> Result<(), CallError> {
    let (uid, gid) = (program.identity.uid, program.identity.gid);
    if program.identity.switch {
        nix::unistd::setgroups(&[]).call(|| "setgroups([])".into())?;
        let (uid, gid) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(gid));
        nix::unistd::setresgid(gid, gid, gid).call(|| format!("setresgid({gid})"))?;
        nix::unistd::setresuid(uid, uid, uid).call(|| format!("setresuid({uid})"))?;
    }
    let held = capabilities(None).call(|| "capget".into())?.permitted;
    let keep = kept_capabilities(program).intersection(held);
    // The ambient set empties itself as the inheritable one does (capabilities(7)).
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).call(|| format!("capset({keep:?})"))
}

/// Leaves nothing but `keep` in the bounding set. Does not read it first, since each bit is a call of its own.
fn bound_capabilities(keep: CapabilitySet) -> Result<(), CallError> {
    use rustix::io::Errno;
    use rustix::thread::{capability_is_in_bounding_set, remove_capability_from_bounding_set};
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no capability of that number, nor any above.
            Err(Errno::INVAL) => break,
            // Without CAP_SETPCAP; nothing is lost if it was gone already.
            Err(Errno::PERM) if capability_is_in_bounding_set(capability) == Ok(false) => {}
            Err(errno) => return Err(errno).call(|| format!("prctl(PR_CAPBSET_DROP, {capability:?})")),
        }
    }
    Ok(())
}

/// uid 0 keeps the plan's capabilities, every other user none.
fn kept_capabilities(program: &Program) -> CapabilitySet {
    if program.identity.uid == 0 {
        CapabilitySet::from_bits_retain(program.capabilities)
    } else {
        CapabilitySet::empty()
    }
}

fn install_filter(program: &Program) -> Result<(), CallError> {
    if program.seccomp.is_empty() {
        return Ok(());
    }
    let filter: Vec<sock_filter> =
        program.seccomp.iter().map(|i| sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    seccompiler::apply_filter(&filter).map_err(|error| CallError::what(format!("seccomp: {error}")))
}

fn execute(program: &Program, own: &mut Own) -> Failure {
    let mut worst = Errno::ENOENT;
    for (index, command) in program.commands.iter().enumerate() {
        // What is not there need not be tried, and then the report usually has one entry.
        if rustix::fs::access(&command.path, rustix::fs::Access::EXISTS) == Err(rustix::io::Errno::NOENT) {
            continue;
        }
        own.executing(index);
        match nix::unistd::execve(&command.path, &command.argv, &program.environment) {
            Ok(never) => match never {},
            // "Not found" in one place says less than any other reason does.
            Err(Errno::ENOENT) => {}
            Err(errno) => worst = errno,
        }
    }
    let name = program.commands.iter().find_map(|command| command.argv.first());
    let name = name.map(|name| name.to_string_lossy()).unwrap_or_default();
    Failure { step: format!("{EXECUTE} {name}"), call: "execve".into(), errno: worst as i32 }
}
