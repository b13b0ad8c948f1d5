//! The launcher: a copy of execd with one thread, an empty environment and few pages, whose only work is to
//! fork.
//!
//! Set-up code must never run in a child of the threaded daemon: a lock held by another thread at the fork
//! would hang it, and `PR_SET_PDEATHSIG` fires when the forking *thread* ends. Here both cannot happen, so
//! the children may run ordinary Rust. The launcher never reads a sandbox's plan; it hands the bytes to the
//! child it forks.
//!
//! When the daemon dies the socket closes and the launcher ends, and every init with it.

use crate::channel::{Channel, Received};
use crate::failure::CallError;
use crate::messages::{Launch, Launched};
use crate::pid1;
use execd_sys::{CloneFlags, Cloned, SingleThreaded, clone3, exit_now};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io;
use std::time::Instant;

/// Serves launch requests on standard input until the daemon is gone.
///
/// # Errors
/// When the process is not what the daemon starts: standard input is no socket, or there is a second thread.
pub fn serve() -> io::Result<()> {
    let proof = SingleThreaded::verify()?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Forked processes inherit these actions, so none of them has to set them.
    execd_sys::reset_signals();
    execd_sys::reap_automatically()?;
    lower_oom_score();
    // The socket moves off number 0, which every child needs for its own standard input.
    let control = Channel::from_fd(fcntl_dupfd_cloexec(io::stdin(), 3)?);
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
    execd_sys::redirect(null.as_fd(), 0)?;
    execd_sys::redirect(null.as_fd(), 1)?;
    drop(null);
    while let Some(request) = control.recv::<Launch>()? {
        let (answer, pidfd) = launch(&proof, request);
        let fds: Vec<_> = pidfd.iter().map(AsFd::as_fd).collect();
        control.send(&answer, &[], &fds)?;
    }
    Ok(())
}

fn launch(proof: &SingleThreaded, mut request: Received<Launch>) -> (Launched, Option<OwnedFd>) {
    let refuse = |failure| (Launched::Refused(failure), None);
    let step = "fork the sandbox's init";
    let channel = match request.fd() {
        Ok(fd) => Channel::from_fd(fd),
        Err(error) => return refuse(CallError::new("recvmsg(init channel)", &error).of(step)),
    };
    let cgroup = request.fds.next().filter(|_| request.message.into_cgroup);
    let started = Instant::now();
    match clone3(proof, namespaces(request.message.user_namespace), cgroup.as_ref().map(AsFd::as_fd)) {
        Ok(Cloned::Child) => {
            pid1::run(proof, channel, &request.rest, started);
            exit_now(0);
        }
        Ok(Cloned::Parent { pid, pidfd }) => {
            let clone_us = started.elapsed().as_micros() as u32;
            (Launched::Running { pid: pid.as_raw_pid(), clone_us }, Some(pidfd))
        }
        Err(error) => refuse(CallError::new("clone3(new namespaces)", &error).of(step)),
    }
}

/// The namespaces init has to be born into. It makes the others itself: they cost more than the fork, and the
/// launcher serves one request at a time.
pub fn namespaces(user: bool) -> CloneFlags {
    if user { CloneFlags::NEWPID.union(CloneFlags::NEWUSER) } else { CloneFlags::NEWPID }
}

/// All sessions die with the launcher, so it should be the last to be picked. Lowering the score needs
/// CAP_SYS_RESOURCE; without it the launcher simply keeps the daemon's.
fn lower_oom_score() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
}
