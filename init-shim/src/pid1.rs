//! The first process of a sandbox. It sets the sandbox up, then starts programs on request and reaps.
//!
//! In order:
//!
//! 1. keep only the channel to the daemon; every other descriptor is closed (a forked init inherits the
//!    launcher's, and then an end of file would never be seen)
//! 2. ask to be killed with the launcher (`PR_SET_PDEATHSIG`)
//! 3. map ids, when born in a user namespace
//! 4. mount, uts, ipc and cgroup namespace, network namespace, host name, session keyring, OOM score
//! 5. fork the first program, if it has been asked for already; it prepares itself and waits
//! 6. mounts, and the new root (`mounts`); then those that the daemon has made meanwhile
//! 7. become undumpable: nothing inside can trace it or read its memory, whatever its uid
//! 8. let the first program go
//! 9. report, with the descriptors of root, mount namespace and control directory
//! 10. serve: start programs (`program`), attach further mounts, report how programs end, reap orphans
//!
//! The process ends when the channel does, and the kernel then kills everything else in the PID namespace.
//! It keeps its privileges, since each program's are cut down from them; nothing inside can reach it.

use crate::Failure;
use crate::channel::{Channel, Received};
use crate::failure::Call;
use crate::messages::{Event, ExitStatus, IdMap, Network, Plan, Program, Request};
use crate::program::{Released, Waiting};
use crate::{mounts, program};
use execd_sys::{CloneFlags, SingleThreaded, exit_now};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, Signal, WaitOptions};
use std::collections::HashMap;
use std::time::Instant;

/// Runs as PID 1 until the daemon is gone; the caller must exit then. `plan` is an encoded [`Plan`], `cloned_at`
/// was taken before the clone. Signals have to have their default actions, SIGCHLD excepted.
pub fn run(proof: &SingleThreaded, channel: Channel, plan: &[u8], cloned_at: Instant) {
    let Some(channel) = keep_only(channel) else { exit_now(1) };
    let mut init = Init { proof, channel, programs: HashMap::new(), cloned_at, root: None };
    match init.set_up(plan) {
        Ok(child_signal) => init.serve(&child_signal),
        Err(failure) => {
            let _ = init.channel.send(&Event::Failed(failure), &[], &[]);
        }
    }
}

struct Init<'a> {
    proof: &'a SingleThreaded,
    channel: Channel,
    /// Programs that run, and the daemon's names for them.
    programs: HashMap<Pid, u32>,
    cloned_at: Instant,
    /// `/`, once it is complete.
    root: Option<OwnedFd>,
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

impl Init<'_> {
    fn set_up(&mut self, plan: &[u8]) -> Result<OwnedFd, Failure> {
        let plan: Plan =
            postcard::from_bytes(plan).map_err(|e| Failure::check("read the plan", e.to_string()))?;
        // Modes of what the plan makes are exactly those it names.
        rustix::process::umask(Mode::empty());
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .call(|| "prctl(PR_SET_PDEATHSIG)".into())
            .map_err(|e| e.of("tie init to the launcher"))?;
        let child_signal =
            execd_sys::watch_children().call(|| "signalfd".into()).map_err(|e| e.of("watch for children"))?;
        if let Some(map) = &plan.id_map {
            write_id_map(map)?;
        }
        isolate(&plan)?;
        // The first program prepares itself while init mounts; pivot_root moves it along.
        let mut request = self.channel.try_recv::<Request>().ok().flatten();
        let first = match request.as_mut() {
            Some(Received { message: Request::Start { id, program, into_cgroup }, fds, .. }) => {
                Some((*id, self.fork(program, *into_cgroup, fds)))
            }
            _ => None,
        };
        let mut awaited = mounts::AwaitedMounts::new(&self.channel, plan.awaited_mounts);
        let assembled = mounts::assemble(&plan.mounts, plan.id_map.is_some(), &mut awaited)?;
        awaited.attach_rest(assembled.root.as_fd())?;
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .call(|| "prctl(PR_SET_DUMPABLE, 0)".into())
            .map_err(|e| e.of("protect init"))?;
        let first = first.map(|(id, waiting)| (id, waiting.map(Waiting::open)));
        self.report_assembled(&assembled)?;
        if let Some((id, released)) = first {
            self.announce(id, released.and_then(Released::finish));
        }
        // Not before: giving its memory back means copying the pages that are shared with the program's process.
        drop(request);
        self.root = Some(assembled.root);
        Ok(child_signal)
    }

    fn report_assembled(&self, assembled: &mounts::Assembled) -> Result<(), Failure> {
        let namespace = open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .call(|| "open(/proc/self/ns/mnt)".into())
            .map_err(|e| e.of("hold the mount namespace"))?;
        let mut fds = vec![assembled.root.as_fd(), namespace.as_fd()];
        fds.extend(assembled.control.as_ref().map(AsFd::as_fd));
        let event = Event::Assembled {
            has_control: assembled.control.is_some(),
            since_clone_us: self.cloned_at.elapsed().as_micros() as u32,
        };
        self.channel
            .send(&event, &[], &fds)
            .call(|| "sendmsg(assembled)".into())
            .map_err(|e| e.of("report to the daemon"))
    }

    fn serve(&mut self, child_signal: &OwnedFd) {
        loop {
            let mut fds =
                [PollFd::new(&self.channel, PollFlags::IN), PollFd::new(child_signal, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            let [requests, children] = fds.map(|fd| !fd.revents().is_empty());
            if children {
                // One signal may stand for many children; the descriptor is only the bell.
                let _ = rustix::io::read(child_signal, &mut [0_u8; 128]);
                self.reap();
            }
            if requests {
                let Ok(Some(request)) = self.channel.recv::<Request>() else { return };
                self.answer(request);
            }
        }
    }

    fn root(&self) -> Result<&OwnedFd, Failure> {
        self.root.as_ref().ok_or_else(|| Failure::check("change mounts", "there is no root yet"))
    }

    fn answer(&mut self, request: Received<Request>) {
        let mut fds = request.fds;
        match request.message {
            Request::Start { id, program, into_cgroup } => {
                let waiting = self.fork(&program, into_cgroup, &mut fds);
                self.announce(id, waiting.map(Waiting::open).and_then(Released::finish));
            }
            Request::Attach { places } => {
                let outcome = self.root().and_then(|root| mounts::attach_all(places, fds, root.as_fd()));
                let _ = self.channel.send(&Event::Attached(outcome), &[], &[]);
            }
            Request::Seal { dests } => {
                let sealed = self.root().and_then(|root| mounts::seal(&dests, root.as_fd()));
                let _ = self.channel.send(&Event::Attached(sealed), &[], &[]);
            }
            Request::Replace { places } => {
                let event = match self.root().and_then(|root| mounts::hold(&places, root.as_fd())) {
                    Ok(old) => Event::Attached(
                        self.root().and_then(|root| mounts::replace(&old, places, fds, root.as_fd())),
                    ),
                    Err(failure) => Event::NotReplaced(failure),
                };
                let _ = self.channel.send(&event, &[], &[]);
            }
        }
    }

    fn fork(
        &self,
        program: &Program,
        into_cgroup: bool,
        fds: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Waiting, Failure> {
        let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(Failure::check("start a program", "the request has no standard streams"));
        };
        let cgroup = fds.next().filter(|_| into_cgroup);
        let streams = [stdin, stdout, stderr];
        let cgroup = cgroup.as_ref().map(AsFd::as_fd);
        program::fork(self.proof, program, &streams, cgroup, self.cloned_at)
    }

    fn announce(&mut self, id: u32, outcome: Result<program::Started, Failure>) {
        let (event, pidfd) = match outcome {
            Ok(started) => {
                self.programs.insert(started.pid, id);
                let program::Exec { command, since_clone_us } = started.exec;
                (Event::Started { id, command, since_clone_us }, Some(started.pidfd))
            }
            Err(failure) => (Event::NotStarted { id, failure }, None),
        };
        let fds: Vec<BorrowedFd<'_>> = pidfd.iter().map(AsFd::as_fd).collect();
        // A send fails only when the daemon is gone, which the loop notices by itself.
        let _ = self.channel.send(&event, &[], &fds);
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let status = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ExitStatus::Code(code),
                (None, Some(signal)) => ExitStatus::Signal(signal),
                (None, None) => continue,
            };
            if let Some(id) = self.programs.remove(&pid) {
                let _ = self.channel.send(&Event::Exited { id, status }, &[], &[]);
            }
        }
    }
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
    let mut namespaces = CloneFlags::NEWNS.union(CloneFlags::NEWUTS).union(CloneFlags::NEWIPC);
    if plan.cgroup_namespace {
        // Rooted at the cgroup init was born in, the session's own.
        namespaces = namespaces.union(CloneFlags::NEWCGROUP);
    }
    execd_sys::unshare(namespaces)
        .call(|| "unshare(mount, uts, ipc, cgroup)".into())
        .map_err(|e| e.of("make the namespaces"))?;
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
