//! The isolation core: a [`SandboxSpec`](spec::SandboxSpec) in, a running [`Sandbox`](launch::Sandbox) out.
//!
//! Pure parts first: [`profile`] turns what a caller asked for into an ordered list of mounts, [`spec`] is
//! plain data, [`plan`] turns it into the messages that init carries out, [`seccomp`] compiles the filter,
//! [`environment`] filters variables. Then what touches the kernel: [`cgroup`] directories, and [`launch`].
//!
//! Nothing here knows of HTTP, of tokio or of sessions; `execd run` uses the same core as the daemon.

pub mod cgroup;
pub mod environment;
pub mod launch;
pub mod launcher;
pub mod plan;
pub mod profile;
pub mod seccomp;
pub mod spec;
