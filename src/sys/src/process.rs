//! clone3(2) used as fork(2) with namespaces.

use crate::check;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::process::Pid;
use std::io;
use std::marker::PhantomData;

/// Proof that the process had exactly one thread when the proof was made.
///
/// A child made by [`clone3`] gets a copy of the address space but only the calling thread. If another
/// thread had held a lock (the allocator's, stdio's) at that moment, nobody in the child would ever
/// release it. The proof is neither `Send` nor `Sync`: the code holding it is the one thread there is.
#[derive(Debug)]
pub struct SingleThreaded(PhantomData<*const ()>);

impl SingleThreaded {
    /// Asks the kernel whether this process is single-threaded.
    ///
    /// `unshare(CLONE_THREAD)` does nothing but fail with `EINVAL` when there is a second thread
    /// (unshare(2)), so this works without procfs.
    ///
    /// # Errors
    /// `EINVAL` when the process has more than one thread.
    pub fn verify() -> io::Result<Self> {
        // SAFETY: unshare takes no pointers, and CLONE_THREAD changes nothing on success.
        check(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_THREAD) })?;
        Ok(Self(PhantomData))
    }
}

/// The namespaces a child is born into (namespaces(7)). No other flag of clone3(2) can be expressed, above
/// all none that would share memory with the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CloneFlags(u64);

impl CloneFlags {
    /// `CLONE_NEWNS`
    pub const NEWNS: Self = Self(libc::CLONE_NEWNS as u64);
    /// `CLONE_NEWPID`
    pub const NEWPID: Self = Self(libc::CLONE_NEWPID as u64);
    /// `CLONE_NEWUTS`
    pub const NEWUTS: Self = Self(libc::CLONE_NEWUTS as u64);
    /// `CLONE_NEWIPC`
    pub const NEWIPC: Self = Self(libc::CLONE_NEWIPC as u64);
    /// `CLONE_NEWUSER`
    pub const NEWUSER: Self = Self(libc::CLONE_NEWUSER as u64);
    /// `CLONE_NEWNET`
    pub const NEWNET: Self = Self(libc::CLONE_NEWNET as u64);
    /// `CLONE_NEWCGROUP`
    pub const NEWCGROUP: Self = Self(libc::CLONE_NEWCGROUP as u64);

    /// No new namespace.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which side of [`clone3`] this is.
#[derive(Debug)]
pub enum Cloned {
    /// The new process.
    Child,
    /// The process that called.
    Parent {
        /// The child, as the caller's PID namespace numbers it.
        pid: Pid,
        /// A handle that always means this child, however pids are reused (pidfd_open(2)).
        pidfd: OwnedFd,
    },
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks into new namespaces, and where `cgroup` is given, straight into that cgroup v2 directory
/// (`CLONE_INTO_CGROUP`, kernel 5.7). Signals with a handler have their default action in the child
/// (`CLONE_CLEAR_SIGHAND`, kernel 5.5), where a handler of the parent would mean nothing.
///
/// The child returns from this call like from fork(2) and may run ordinary Rust, because `_proof` rules
/// out the locks that a second thread could have held. glibc's cached thread id is stale in the child, so
/// the child must not use `pthread_*` calls on itself.
///
/// # Errors
/// Those of clone3(2): `EPERM` without the privilege for a namespace, `ENOSPC` when a limit of
/// namespaces is reached, `ENOSYS` before kernel 5.3 or under an older seccomp profile.
pub fn clone3(
    _proof: &SingleThreaded,
    namespaces: CloneFlags,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: namespaces.0 | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND,
        pidfd: std::ptr::from_mut(&mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = dir.as_raw_fd() as u64;
    }
    // SAFETY: `args` is the kernel's `struct clone_args` (88 bytes, kernel 5.7) and outlives the call;
    // `pidfd` is writable. Without CLONE_VM and with a null stack the child runs on a copy of this stack,
    // exactly as after fork(2); one thread exists, so no lock is held by anybody else.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, std::mem::size_of::<CloneArgs>()) })?;
    match Pid::from_raw(pid as i32) {
        None => Ok(Cloned::Child),
        Some(pid) => {
            // SAFETY: with CLONE_PIDFD the kernel stored a new descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid, pidfd })
        }
    }
}

/// Moves the calling thread into new namespaces (unshare(2)); of the flags only namespaces can be expressed,
/// so no table that Rust believes to be shared stops being so.
///
/// # Errors
/// `EPERM` without the privilege, `ENOSPC` when a limit of namespaces is reached.
pub fn unshare(namespaces: CloneFlags) -> io::Result<()> {
    // SAFETY: no pointers; namespace flags change no memory and no descriptor.
    check(unsafe { libc::syscall(libc::SYS_unshare, namespaces.0) }).map(drop)
}

/// Ends the process at once, without destructors or exit handlers (`_exit(2)`): what a cloned child must
/// use, since the parent's buffers and handlers were copied into it.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}
