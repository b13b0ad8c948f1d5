//! The first process of a sandbox. It sets the sandbox up, then starts programs on request and reaps.
//!
//! In order:
//!
//! 1. keep only the channel to the daemon; every other descriptor is closed (a forked init inherits the
//!    launcher's, and then an end of file would never be seen)
//! 2. ask to be killed with the launcher (`PR_SET_PDEATHSIG`); default signal actions
//! 3. map ids, when born in a user namespace
//! 4. cgroup namespace, network namespace, host name, session keyring, OOM score
//! 5. mounts, and the new root (`mounts`)
//! 6. become undumpable: nothing inside can trace it or read its memory, whatever its uid
//! 7. report, with the descriptors of root, mount namespace and control directory
//! 8. serve: start programs (`program`), report how they end, reap orphans
//!
//! The process ends when the channel does, and the kernel then kills everything else in the PID namespace.
//! It keeps its privileges, since each program's are cut down from them; nothing inside can reach it.

use crate::Failure;
use crate::channel::Channel;
use crate::failure::Call;
use crate::messages::{Event, ExitStatus, IdMap, Network, Plan, Request};
use crate::{mounts, program};
use execd_sys::{CloneFlags, SingleThreaded, exit_now};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, Signal, WaitOptions};
use std::collections::HashMap;
use std::time::Instant;

/// Runs as PID 1 until the daemon is gone. `plan` is an encoded [`Plan`]; `cloned_at` was taken before the
/// clone. Never returns to the caller's stack in a useful way: the caller must exit.
pub fn run(proof: &SingleThreaded, channel: Channel, plan: &[u8], cloned_at: Instant) {
    let Some(channel) = keep_only(channel) else { exit_now(1) };
    match set_up(&channel, plan, cloned_at) {
        Ok(child_signal) => serve(proof, &channel, &child_signal, cloned_at),
        Err(failure) => {
            let _ = channel.send(&Event::Failed(failure), &[], &[]);
        }
    }
}

/// Moves the channel to number 3 and closes everything above. Numbers 0 to 2 are the launcher's null device
/// and log.
fn keep_only(channel: Channel) -> Option<Channel> {
    execd_sys::redirect(channel.as_fd(), 3).ok()?;
    // The old number is closed by the range below, not by a destructor that would close it twice.
    std::mem::forget(channel);
    let channel = execd_sys::adopt(3).ok()?;
    execd_sys::close_range_from(4).ok()?;
    Some(Channel::from_fd(channel))
}

fn set_up(channel: &Channel, plan: &[u8], cloned_at: Instant) -> Result<OwnedFd, Failure> {
    let plan: Plan =
        postcard::from_bytes(plan).map_err(|e| Failure::check("read the plan", e.to_string()))?;
    execd_sys::reset_signals();
    // Modes of what the plan makes are exactly those it names.
    rustix::process::umask(Mode::empty());
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .call(|| "prctl(PR_SET_PDEATHSIG)".into())
        .map_err(|e| e.of("tie init to the launcher"))?;
    let child_signal =
        execd_sys::block_child_signal().call(|| "signalfd".into()).map_err(|e| e.of("watch for children"))?;
    if let Some(map) = &plan.id_map {
        write_id_map(map)?;
    }
    isolate(&plan)?;
    let mount_namespace = open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .call(|| "open(/proc/self/ns/mnt)".into())
        .map_err(|e| e.of("hold the mount namespace"))?;
    let assembled = mounts::assemble(&plan.mounts, plan.id_map.is_some())?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .call(|| "prctl(PR_SET_DUMPABLE, 0)".into())
        .map_err(|e| e.of("protect init"))?;
    let mut fds = vec![assembled.root.as_fd(), mount_namespace.as_fd()];
    fds.extend(assembled.control.as_ref().map(AsFd::as_fd));
    let event = Event::Assembled {
        has_control: assembled.control.is_some(),
        since_clone_us: cloned_at.elapsed().as_micros() as u32,
    };
    channel
        .send(&event, &[], &fds)
        .call(|| "sendmsg(assembled)".into())
        .map_err(|e| e.of("report to the daemon"))?;
    Ok(child_signal)
}

/// A single line that maps execd's own ids needs no privilege (user_namespaces(7)); groups must be frozen
/// first, and stay so.
fn write_id_map(map: &IdMap) -> Result<(), Failure> {
    let write = |file: &str, line: String| {
        std::fs::write(format!("/proc/self/{file}"), &line)
            .call(|| format!("write(/proc/self/{file}, {line:?})"))
            .map_err(|e| e.of("map ids into the user namespace"))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("{} {} 1", map.inside_uid, map.outside_uid))?;
    write("gid_map", format!("{} {} 1", map.inside_gid, map.outside_gid))
}

fn isolate(plan: &Plan) -> Result<(), Failure> {
    std::fs::write("/proc/self/oom_score_adj", plan.oom_score_adj.to_string())
        .call(|| "write(/proc/self/oom_score_adj)".into())
        .map_err(|e| e.of("set the OOM score"))?;
    if plan.cgroup_namespace {
        execd_sys::unshare(CloneFlags::NEWCGROUP)
            .call(|| "unshare(CLONE_NEWCGROUP)".into())
            .map_err(|e| e.of("make the cgroup namespace"))?;
    }
    if plan.network == Network::Loopback {
        make_network().map_err(|e| e.of("make the network namespace"))?;
    }
    if let Some(hostname) = &plan.hostname {
        rustix::system::sethostname(hostname.as_bytes())
            .call(|| format!("sethostname({hostname:?})"))
            .map_err(|e| e.of("set the host name"))?;
    }
    match execd_sys::join_session_keyring() {
        Ok(()) => Ok(()),
        // No keyrings in this kernel, or a container's seccomp profile closes keyctl for everybody in it.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOSYS | Errno::PERM)) => Ok(()),
        Err(error) => Err(error)
            .call(|| "keyctl(KEYCTL_JOIN_SESSION_KEYRING)".into())
            .map_err(|e| e.of("make the session keyring")),
    }
}

fn make_network() -> Result<(), crate::failure::CallError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    execd_sys::unshare(CloneFlags::NEWNET).call(|| "unshare(CLONE_NEWNET)".into())?;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .call(|| "socket(AF_INET)".into())?;
    execd_sys::set_loopback_up(socket.as_fd()).call(|| "ioctl(SIOCSIFFLAGS, lo, IFF_UP)".into())
}

fn serve(proof: &SingleThreaded, channel: &Channel, child_signal: &OwnedFd, cloned_at: Instant) {
    let mut programs = HashMap::new();
    loop {
        let mut fds = [PollFd::new(channel, PollFlags::IN), PollFd::new(child_signal, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let [requests, children] = fds.map(|fd| !fd.revents().is_empty());
        if children {
            // One signal may stand for many children; the descriptor is only the bell.
            let _ = rustix::io::read(child_signal, &mut [0_u8; 128]);
            reap(channel, &mut programs);
        }
        if requests {
            match channel.recv::<Request>() {
                Ok(Some(request)) => {
                    let Request::Start { id, program, into_cgroup } = request.message;
                    let outcome = start(proof, &program, request.fds, into_cgroup, cloned_at);
                    if let Ok(started) = &outcome {
                        programs.insert(started.pid, id);
                    }
                    announce(channel, id, outcome);
                }
                Ok(None) | Err(_) => return,
            }
        }
    }
}

fn start(
    proof: &SingleThreaded,
    program: &crate::messages::Program,
    mut fds: std::vec::IntoIter<OwnedFd>,
    into_cgroup: bool,
    cloned_at: Instant,
) -> Result<program::Started, Failure> {
    let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(Failure::check("start a program", "the request has no standard streams"));
    };
    let cgroup = fds.next().filter(|_| into_cgroup);
    program::start(proof, program, &[stdin, stdout, stderr], cgroup.as_ref().map(AsFd::as_fd), cloned_at)
}

fn announce(channel: &Channel, id: u32, outcome: Result<program::Started, Failure>) {
    let (event, pidfd) = match outcome {
        Ok(started) => {
            let program::Exec { command, since_clone_us } = started.exec;
            (Event::Started { id, command, since_clone_us }, Some(started.pidfd))
        }
        Err(failure) => (Event::NotStarted { id, failure }, None),
    };
    let fds: Vec<BorrowedFd<'_>> = pidfd.iter().map(AsFd::as_fd).collect();
    // A send fails only when the daemon is gone, which the loop notices by itself.
    let _ = channel.send(&event, &[], &fds);
}

fn reap(channel: &Channel, programs: &mut HashMap<Pid, u32>) {
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        let status = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => ExitStatus::Code(code),
            (None, Some(signal)) => ExitStatus::Signal(signal),
            (None, None) => continue,
        };
        if let Some(id) = programs.remove(&pid) {
            let _ = channel.send(&Event::Exited { id, status }, &[], &[]);
        }
    }
}
