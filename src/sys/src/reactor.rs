//! Registration of a descriptor with tokio's reactor.

use rustix::fd::OwnedFd;
use std::io;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches `fd` for readability; call inside a tokio runtime.
///
/// # Errors
/// When epoll refuses the descriptor, such as a regular file, or a limit of watches is reached.
pub fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: tokio requires that the number stays open and means the same file until the AsyncFd is gone.
    // An OwnedFd that the AsyncFd owns is exactly that.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
