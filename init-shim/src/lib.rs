//! Everything on the far side of execd's private sockets.
//!
//! [`launcher`] is a small single-threaded copy of execd that forks sandboxes; [`pid1`] is the first
//! process of a sandbox, which builds its surroundings and then starts programs on request. Both speak the
//! [`messages`] of this crate over a [`channel`]. There is no async runtime here, no configuration, and no
//! policy: the daemon decides, this side carries out, in the order given.
//!
//! The order in which a sandbox comes up is the table of contents of [`pid1`].
#![forbid(unsafe_code)]

pub mod channel;
pub mod detached;
pub mod failure;
pub mod launcher;
pub mod messages;
mod mounts;
pub mod pid1;
mod program;

pub use failure::Failure;
pub use program::EXECUTE;
