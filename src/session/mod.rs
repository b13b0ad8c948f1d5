//! Sessions.

pub mod options;
pub mod prepare;
