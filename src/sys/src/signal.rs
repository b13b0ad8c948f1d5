//! Signal dispositions of a process that was forked and is about to exec, or about to be PID 1; and
//! signals whose number only the C library knows how to name.

use crate::check;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::io;

/// Puts every signal back to its default action and unblocks all of them.
///
/// An ignored or blocked signal survives execve(2): without this a program would inherit Rust's ignored
/// `SIGPIPE` and whatever nohup(1) did to the daemon.
pub fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid action and runs no handler; a signal number that refuses (KILL, STOP, the
        // C library's own two) is left as it is.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    unblock_signals();
}

/// Unblocks all signals.
pub fn unblock_signals() {
    // SAFETY: the empty mask is initialised by sigemptyset, and only read.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Gives `SIGCHLD` its default action (an inherited "ignore" would reap children unseen), and watches for it: the
/// descriptor becomes readable when a child changes state.
///
/// # Errors
/// As [`watch_signals`].
pub fn watch_children() -> io::Result<OwnedFd> {
    // SAFETY: SIG_DFL runs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    watch_signals(&[libc::SIGCHLD])
}

/// Blocks `signals` and returns a non-blocking signalfd(2) that becomes readable when one of them comes. A program
/// that is executed has to unblock them again.
///
/// # Errors
/// `EMFILE` and `ENFILE`; `EINVAL` for a number that is no signal.
pub fn watch_signals(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use, and only read.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            check(libc::sigaddset(&raw mut set, *signal).into())?;
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()).into())?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Sends signal number `signal` to the process behind `pidfd` (pidfd_send_signal(2)); real-time signals
/// included, which the safe wrappers do not name.
///
/// # Errors
/// `ESRCH` when it has ended, `EPERM` when the credentials forbid it.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo makes the kernel fill one in as kill(2) does.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Ignores `SIGCHLD`, so that children leave no zombies (wait(2), NOTES).
///
/// # Errors
/// None on Linux; the call is checked all the same.
pub fn reap_automatically() -> io::Result<()> {
    // SAFETY: SIG_IGN runs no handler.
    let previous = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if previous == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}
