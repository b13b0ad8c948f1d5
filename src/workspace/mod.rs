//! The host directories behind a session's mounts: which may be shown, and where changes go.

pub mod changes;
pub mod layer;
pub mod resolve;
pub mod uppers;
