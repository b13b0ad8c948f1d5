//! Files, as a session sees them.
//!
//! Every operation asks the kernel and simulates nothing: a path is resolved by openat2(2) with the session's own `/`
//! as its root, in the session's own mounts, and what is done there is done with the session user's identity. So
//! overlays, whiteouts, read-only places, links and permissions are what a program in the session would find, and a
//! change shows at once on both sides.
//!
//! - [`tree`]: a session's files; a [`Worker`] is a thread that has taken on the session's [`identity`] and can open
//!   things in it. All operations are methods of the worker, each kind in a module of its own.
//! - [`path`]: what a caller may write as a path.
//! - [`info`], [`accounts`]: what is told about a file. [`walk`]: whole trees of them.
//! - [`stage`]: how content gets into a file, in one step. [`change`], [`relocate`], `remove`, [`replace`]: the rest
//!   that changes files; `copy`: one entry from one place to another.
//! - [`download`]: ranges of bytes and of lines. [`archive`]: subtrees as tar.gz. [`watch`]: what happens to files.
//!
//! Nothing here knows of HTTP, or of how a session lives; who calls has to hold the session's mounts in place for as
//! long (`session::inside`). All calls block.

pub mod accounts;
pub mod archive;
pub mod change;
pub(crate) mod copy;
pub mod download;
pub mod error;
mod identity;
pub mod info;
pub mod path;
pub mod relocate;
pub(crate) mod remove;
pub mod replace;
pub mod stage;
pub(crate) mod stream;
pub mod tree;
pub mod walk;
pub mod watch;
pub(crate) mod xattr;

pub use error::{Class, FileError};
pub use tree::{Tree, Worker};
