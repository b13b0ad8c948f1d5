//! The daemon's side of the launcher: starts it, keeps it alive, asks it to fork.
//!
//! The launcher executes a sealed memfd copy of this binary, so nothing that ever runs in a sandbox can write
//! to execd's own file through a /proc link (CVE-2019-5736). It starts with an empty environment.
//!
//! One thread starts it and waits for it as long as the daemon lives. It has to be one lasting thread,
//! because the launcher's death signal is tied to the thread that forked it (PR_SET_PDEATHSIG).

use super::launch::{Forked, LaunchError};
use execd_init_shim::channel::Channel;
use execd_init_shim::messages::{Launch, Launched, Plan};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// How long the pages of the executable's copy may be in use by the kernel.
const SEAL_WAIT_MAX: Duration = Duration::from_secs(5);
/// Between two tries.
const SEAL_INTERVAL: Duration = Duration::from_millis(10);

/// The hidden first argument that makes this binary a launcher.
pub const ROLE: &str = "--launcher-role";
/// How long a fork may take before the launcher counts as stuck.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);
/// Pause before a launcher that died is replaced, so that one that cannot live does not spin.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// A handle to the launcher; all threads may use it.
#[derive(Debug)]
pub struct Launcher {
    channel: Mutex<Option<Channel>>,
    generation: AtomicU64,
}

impl Launcher {
    /// Starts the launcher and the thread that keeps it.
    ///
    /// # Errors
    /// When the copy cannot be made or executed.
    pub fn start() -> io::Result<Arc<Self>> {
        let executable = sealed_copy_of_self()?;
        let launcher = Arc::new(Self { channel: Mutex::new(None), generation: AtomicU64::new(0) });
        let (started, first_start) = mpsc::channel();
        let keeper = Arc::clone(&launcher);
        std::thread::Builder::new()
            .name("launcher-keeper".into())
            .spawn(move || keeper.keep(&executable, &started))?;
        first_start.recv().map_err(io::Error::other)??;
        Ok(launcher)
    }

    /// Counts the launchers there have been. A sandbox from an earlier one is dead.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether the launcher of that generation is gone. A sandbox that its death has killed finds it so at once: a
    /// process closes its files before its children get their death signal, so the socket hangs up first.
    pub fn is_lost(&self, generation: u64) -> bool {
        self.generation() != generation || self.slot().as_ref().is_none_or(hung_up)
    }

    /// Forks an init that gets `plan` and `channel`. Blocks for a fraction of a millisecond.
    ///
    /// # Errors
    /// [`LaunchError::LauncherLost`] when the launcher is gone; the next call finds its successor.
    pub fn fork(
        &self,
        plan: &Plan,
        channel: Channel,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Forked, LaunchError> {
        let plan_bytes = postcard::to_stdvec(plan).map_err(io::Error::other)?;
        let request = Launch { user_namespace: plan.id_map.is_some(), into_cgroup: cgroup.is_some() };
        let mut fds = vec![channel.as_fd()];
        fds.extend(cgroup);
        let mut slot = self.slot();
        let control = slot.as_ref().ok_or(LaunchError::LauncherLost)?;
        let answer = control.send(&request, &plan_bytes, &fds).and_then(|()| control.recv::<Launched>());
        let Ok(Some(mut answer)) = answer else {
            // A stuck or dead launcher is not asked again; dropping its socket ends it.
            *slot = None;
            return Err(LaunchError::LauncherLost);
        };
        match answer.message {
            Launched::Running { pid, clone_us } => Ok(Forked { pidfd: answer.fd()?, pid, clone_us }),
            Launched::Refused(failure) => Err(LaunchError::Step(failure)),
        }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, executable: &OwnedFd, started: &mpsc::Sender<io::Result<()>>) {
        loop {
            match spawn(executable) {
                Ok((mut child, channel)) => {
                    *self.slot() = Some(channel);
                    let _ = started.send(Ok(()));
                    let status = child.wait();
                    *self.slot() = None;
                    self.generation.fetch_add(1, Ordering::AcqRel);
                    tracing::error!(
                        ?status,
                        "the launcher is gone and with it every session; starting another"
                    );
                }
                Err(error) => {
                    tracing::error!(%error, "the launcher cannot be started");
                    if started.send(Err(error)).is_ok() && self.generation() == 0 {
                        return;
                    }
                }
            }
            std::thread::sleep(RESTART_PAUSE);
        }
    }
}

fn hung_up(channel: &Channel) -> bool {
    let mut fds = [PollFd::new(channel, PollFlags::empty())];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
}

fn spawn(executable: &OwnedFd) -> io::Result<(Child, Channel)> {
    let (ours, theirs) = Channel::pair()?;
    rustix::net::sockopt::set_socket_timeout(
        &ours,
        rustix::net::sockopt::Timeout::Recv,
        Some(ANSWER_WAIT_MAX),
    )?;
    let child = Command::new(format!("/proc/self/fd/{}", executable.as_raw_fd()))
        .arg0("execd")
        .arg(ROLE)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(theirs.into_fd()))
        .stdout(Stdio::null())
        // What a terminal sends on Ctrl-C is for the daemon, which ends its sessions in order.
        .process_group(0)
        .spawn()?;
    Ok((child, ours))
}

fn sealed_copy_of_self() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // MFD_EXEC is required where vm.memfd_noexec is set and unknown before kernel 6.3.
    let copy = memfd_create("execd", flags | MemfdFlags::EXEC).or_else(|_| memfd_create("execd", flags))?;
    io::copy(&mut File::open("/proc/self/exe")?, &mut File::from(copy.try_clone()?))?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    let deadline = Instant::now() + SEAL_WAIT_MAX;
    loop {
        match fcntl_add_seals(&copy, seals) {
            // The kernel looks at its pages for other reasons just now, such as moving them (memfd_wait_for_pins).
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(SEAL_INTERVAL),
            sealed => return sealed.map(|()| copy).map_err(io::Error::from),
        }
    }
}
