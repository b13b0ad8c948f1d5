//! The host directories behind a session's mounts: which may be shown, where changes go, and what becomes of them.

mod batch;
pub mod changes;
mod clear;
pub mod commit;
pub mod diff;
pub mod duplicate;
pub mod home;
mod image;
pub mod journal;
pub mod layer;
pub mod record;
pub mod resolve;
pub mod retained;
pub mod session_uppers;
mod site;
pub mod timestamp;
mod trash;
#[cfg(test)]
pub(crate) mod trial;
pub mod uppers;
