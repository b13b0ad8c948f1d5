//! Every `unsafe` block of execd, behind typed and safe functions.
//!
//! What lives here are the system calls that neither `rustix` nor `nix` wraps, or wraps as `unsafe`
//! because of a rule this project can uphold by construction. Each function is named after its call and
//! takes and returns owned or borrowed descriptors, never raw numbers.
//!
//! Nothing here decides anything: no policy, no retries, no logging.
#![deny(unsafe_op_in_unsafe_fn)]

mod block;
mod credentials;
mod fd;
mod keyring;
mod mount;
mod net;
mod process;
#[cfg(feature = "tokio")]
mod reactor;
mod signal;

pub use block::{abandon_file_system, configure_loop_device, free_loop_device};
pub use credentials::{set_fs_gid, set_fs_uid};
pub use fd::{adopt, close_range_from, redirect};
pub use keyring::join_session_keyring;
pub use mount::{MountAttr, Propagation, mount_setattr};
pub use net::set_loopback_up;
pub use process::{CloneFlags, Cloned, SingleThreaded, clone3, exit_now, unshare};
#[cfg(feature = "tokio")]
pub use reactor::watch_readable;
pub use signal::{
    reap_automatically, reset_signals, send_signal, unblock_signals, watch_children, watch_signals,
};

/// Turns the C convention (`-1` and `errno`) into a result.
fn check(result: libc::c_long) -> std::io::Result<libc::c_long> {
    if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}
