//! Sessions: sandboxes with a life and a shell.
//!
//! A [`Registry`](registry::Registry) creates, finds and ends them. Each [`Session`](session::Session) has one
//! task (`task`) that owns its shell and takes runs in order; [`state`] draws its life. [`options`] is what
//! a caller may ask, [`prepare`] turns that into a sandbox spec, [`launchpad`] launches that, `spares` keeps some
//! ready, [`probe`] finds out what the machine can do.
//!
//! Others come in through `inside`, above all those who work in its [`files`], and in its [`overlays`].
//!
//! The shell protocol lies in three modules: `dialect` is what is said, `shell_io` the descriptors it is
//! said through, `shell` who says it when. `control` is the directory both sides share.

mod background;
mod control;
pub mod dialect;
pub mod files;
mod inside;
pub mod journal;
pub mod launchpad;
mod lines;
pub mod log;
mod oom;
pub mod options;
pub mod overlays;
pub mod prepare;
pub mod probe;
mod process;
pub mod registry;
pub mod run;
#[expect(clippy::module_inception, reason = "the session itself, in the module about sessions")]
pub mod session;
mod shell;
pub mod shell_io;
mod spares;
pub mod state;
mod task;

pub use background::BackgroundError;
pub use shell::ShellError;
