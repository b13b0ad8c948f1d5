//! From a validated request to the spec of a sandbox: resolves paths on the host, allocates uppers, filters
//! the environment. Blocks on the file system.

use super::options::{Mount, MountMode, OptionError, SessionOptions, UidMode, UpperOptions};
use crate::config::Config;
use crate::sandbox::environment;
use crate::sandbox::profile::{self, Access, BindMount, Layout, Profile, Sizes, WorkspaceMount};
use crate::sandbox::seccomp::Filter;
use crate::sandbox::spec::{Namespaces, ROOT_CAPABILITIES, SandboxSpec};
use crate::workspace::home::{EPHEMERAL_INODES_MAX, Limit, Tier};
use crate::workspace::resolve::{self, ResolveError};
use crate::workspace::session_uppers::{Overlay, SessionUppers, Wanted};
use crate::workspace::uppers::{Rung, Uppers};
use execd_init_shim::messages::{IdMap, MountStep, Network, Upper};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Host name inside, as the original has it.
const HOSTNAME: &str = "sandbox";
/// Above the daemon's 0, so that the kernel picks a session's processes first.
const OOM_SCORE_ADJ: i16 = 500;
/// The control directory holds a run's code and input, each at most one request body, and has room to spare.
const CONTROL_BODIES: u64 = 3;

/// What sessions are made from; the same for all of them.
#[derive(Debug)]
pub struct Foundation {
    /// The configuration.
    pub config: Config,
    /// The compiled filter.
    pub filter: Filter,
    /// Where persistent uppers live; `None` for a tool that needs none.
    pub uppers: Option<Arc<Uppers>>,
    /// Whether sandboxes live in cgroup directories.
    pub has_cgroups: bool,
}

impl Foundation {
    /// Where uppers can lie.
    pub fn ladder(&self) -> Vec<Rung> {
        self.uppers.iter().flat_map(|uppers| uppers.ladder()).collect()
    }
}

/// A spec, and what must live as long as its sandbox.
#[derive(Debug)]
pub struct Prepared {
    /// For [`crate::sandbox::launch::Sandbox::launch`].
    pub spec: SandboxSpec,
    /// Removed, or left to be kept, when dropped.
    pub uppers: Option<Arc<SessionUppers>>,
    /// The request with paths as they were resolved, for the answer to "what did I create?".
    pub effective: SessionOptions,
}

/// Why a session cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The request.
    #[error(transparent)]
    Invalid(#[from] OptionError),
    /// A path of the request.
    #[error("{field}: {error}")]
    Path {
        /// The field, as in JSON.
        field: &'static str,
        /// What is wrong.
        error: ResolveError,
    },
    /// All uppers together hold as much as they may; bytes.
    #[error("the uppers of all sessions hold {used} bytes, and upper_max_bytes is {max}")]
    UppersFull {
        /// What they hold.
        used: u64,
        /// What they may.
        max: u64,
    },
    /// What was asked of the uppers cannot be had on this machine.
    #[error("{0}")]
    NotSupported(String),
    /// The file system refused.
    #[error("no upper can be allocated")]
    Upper(#[source] io::Error),
}

/// Resolves everything the request names.
///
/// # Errors
/// See [`PrepareError`]; directories made for missing workspaces stay.
pub fn prepare(
    foundation: &Foundation,
    id: Uuid,
    options: &SessionOptions,
) -> Result<Prepared, PrepareError> {
    options.check()?;
    let mut effective = options.clone();
    let binds = resolve_binds(foundation, &mut effective)?;
    let (uid, gid) = ids(options);
    let resolved = resolve_workspaces(foundation, options)?;
    let uppers = begin_uppers(foundation, id, options, &resolved)?;
    let workspaces = mount_workspaces(foundation, options, resolved, uppers.as_deref())?;
    let cwd = workspaces.first().map_or_else(|| PathBuf::from("/"), |mount| mount.dest.clone());
    let layout = Layout {
        profile: options.profile,
        workspaces,
        binds,
        hidden: foundation.uppers.iter().map(|uppers| uppers.root().to_path_buf()).collect(),
        resolver: if options.share_net { resolve::resolver() } else { None },
        submounts: if has_root_overlay(options) { resolve::submounts() } else { Vec::new() },
        sizes: sizes(&foundation.config),
    };
    let mounts = profile::mounts(&layout);
    check_mount_points(&mounts)?;
    let (mounts, late_mounts) = match options.uid_mode {
        UidMode::Setpriv => split(mounts, layout),
        // Only init may mount there.
        UidMode::Userns => (mounts, Vec::new()),
    };
    let spec = SandboxSpec {
        namespaces: Namespaces {
            user: (options.uid_mode == UidMode::Userns).then(|| IdMap {
                inside_uid: uid,
                outside_uid: own_uid(),
                inside_gid: gid,
                outside_gid: own_gid(),
            }),
            network: if options.share_net { Network::Shared } else { Network::Loopback },
            cgroup: foundation.has_cgroups,
        },
        mounts,
        late_mounts,
        hostname: Some(HOSTNAME.into()),
        oom_score_adj: OOM_SCORE_ADJ,
        uid,
        gid,
        capabilities: ROOT_CAPABILITIES.bits(),
        seccomp: foundation.filter.clone(),
        environment: environment::build(std::env::vars_os(), &options.environment, &account(options, &cwd)),
        cwd,
        new_session: true,
    };
    Ok(Prepared { spec, uppers, effective })
}

/// The mounts that are the same for every session of this kind, and those of this one alone; all and none, where
/// that cannot be told apart.
fn split(mounts: Vec<MountStep>, layout: Layout) -> (Vec<MountStep>, Vec<MountStep>) {
    let base = profile::mounts(&Layout {
        workspaces: Vec::new(),
        binds: Vec::new(),
        submounts: Vec::new(),
        // Whoever writes it replaces it, so it has to be fresh.
        resolver: None,
        ..layout
    });
    match profile::split(&mounts, &base) {
        Some(late) => (base, late),
        None => (mounts, Vec::new()),
    }
}

/// The ids inside; execd's own where the request names none.
pub fn ids(options: &SessionOptions) -> (u32, u32) {
    (options.uid.unwrap_or_else(own_uid), options.gid.unwrap_or_else(own_gid))
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn own_gid() -> u32 {
    rustix::process::getegid().as_raw()
}

fn sizes(config: &Config) -> Sizes {
    Sizes {
        private_bytes_max: config.sizes.private_max_bytes,
        control_bytes_max: CONTROL_BODIES * config.http.body_max_bytes as u64,
    }
}

fn resolve_binds(
    foundation: &Foundation,
    effective: &mut SessionOptions,
) -> Result<Vec<BindMount>, PrepareError> {
    let resolve = |field, path: &Path| {
        resolve::bind_source(path, &foundation.config.allowed_writable)
            .map_err(|error| PrepareError::Path { field, error })
    };
    let mut binds = Vec::new();
    for path in &mut effective.extra_writable {
        *path = resolve("extra_writable", path)?;
        binds.push(BindMount { source: path.clone(), dest: path.clone(), read_only: false });
    }
    for bind in &mut effective.binds {
        bind.source = resolve("binds.source", &bind.source)?;
        let bind = bind.clone();
        // Beneath the private places there are no links of the host.
        let is_private = bind.dest.starts_with("/tmp") || bind.dest.starts_with("/run");
        let dest = if is_private { bind.dest } else { resolve::destination(&bind.dest) };
        if profile::is_reserved(&dest) || dest == Path::new("/") {
            let reason = format!("{} is one of the sandbox's own places", dest.display());
            return Err(OptionError::new("binds.dest", reason).into());
        }
        binds.push(BindMount { source: bind.source, dest, read_only: bind.read_only });
    }
    Ok(binds)
}

fn has_root_overlay(options: &SessionOptions) -> bool {
    options
        .mounts
        .iter()
        .any(|mount| mount.path == Path::new("/") && matches!(mount.mode, MountMode::Overlay { .. }))
}

/// Sources and destinations of the workspaces, in the order of the request.
fn resolve_workspaces(
    foundation: &Foundation,
    options: &SessionOptions,
) -> Result<Vec<(PathBuf, PathBuf)>, PrepareError> {
    let (uid, gid) = ids(options);
    let owner = match options.uid_mode {
        UidMode::Setpriv => Some((uid, gid)),
        UidMode::Userns => None,
    };
    // All paths first: a request that is wrong in its last path should not have allocated for its first.
    let mut sources = Vec::new();
    for mount in &options.mounts {
        let source = resolve::workspace(&mount.path, owner)
            .map_err(|error| PrepareError::Path { field: "workspace.path", error })?;
        // Beneath a private /tmp there are no links of the host; elsewhere a link leads to where the mount is.
        let is_private = options.profile == Profile::Strict && mount.path.starts_with("/tmp");
        let dest = if is_private { mount.path.clone() } else { source.clone() };
        check_workspace(foundation, mount, &source, &dest)?;
        if sources.iter().any(|(_, other)| *other == dest) {
            let reason = format!("{} is mounted twice", dest.display());
            return Err(OptionError::new("workspace.path", reason).into());
        }
        sources.push((source, dest));
    }
    Ok(sources)
}

fn mount_workspaces(
    foundation: &Foundation,
    options: &SessionOptions,
    resolved: Vec<(PathBuf, PathBuf)>,
    uppers: Option<&SessionUppers>,
) -> Result<Vec<WorkspaceMount>, PrepareError> {
    let mut mounts = Vec::new();
    for (mount, (source, dest)) in options.mounts.iter().zip(resolved) {
        let access = match (mount.mode, uppers) {
            (MountMode::ReadWrite, _) => Access::ReadWrite,
            (MountMode::ReadOnly, _) => Access::ReadOnly,
            (MountMode::Overlay { persist }, Some(uppers)) => {
                let overlay = Overlay { dest: &dest, lower: &source, persist };
                Access::Overlay(uppers.allocate(&overlay).map_err(PrepareError::Upper)?)
            }
            (MountMode::Overlay { .. }, None) => Access::Overlay(Upper::Tmpfs {
                bytes_max: foundation.config.sizes.ephemeral_upper_max_bytes,
                inodes_max: EPHEMERAL_INODES_MAX,
            }),
        };
        mounts.push(WorkspaceMount { dest, source, access });
    }
    Ok(mounts)
}

/// The uppers of a session that has overlays.
fn begin_uppers(
    foundation: &Foundation,
    id: Uuid,
    options: &SessionOptions,
    resolved: &[(PathBuf, PathBuf)],
) -> Result<Option<Arc<SessionUppers>>, PrepareError> {
    if has_root_overlay(options) && options.uid_mode == UidMode::Userns {
        // In a user namespace the kernel keeps the mounts on the root where they are, and overlayfs shows none.
        let reason = "the root cannot be an overlay in a user namespace";
        return Err(PrepareError::NotSupported(reason.into()));
    }
    let Some(uppers) = &foundation.uppers else { return Ok(None) };
    let retain_max = foundation.config.retain_max_seconds;
    if options.uppers.retain.as_secs() > retain_max {
        let reason = format!("must be at most {retain_max}, as is configured");
        return Err(OptionError::new("persist.retain_seconds", reason).into());
    }
    let persists = |mount: &Mount| mount.mode == MountMode::Overlay { persist: true };
    let persistent = options.mounts.iter().zip(resolved).filter(|(mount, _)| persists(mount));
    let lowers: Vec<&Path> = persistent.map(|(_, (source, _))| source.as_path()).collect();
    let wanted = Wanted {
        limit: limit(options, uppers.limit())?,
        retain: options.uppers.retain,
        lowers: &lowers,
        userns: options.uid_mode == UidMode::Userns,
    };
    if !lowers.is_empty() {
        let max = foundation.config.upper_max_bytes;
        if max > 0 && uppers.used_bytes() >= max {
            return Err(PrepareError::UppersFull { used: uppers.used_bytes(), max });
        }
        if !wanted.retain.is_zero() && uppers.tier(&wanted) == Tier::Memory {
            let reason = "uppers of such a session are in memory on this machine and cannot be retained";
            return Err(PrepareError::NotSupported(reason.into()));
        }
    }
    let has_overlay = options.mounts.iter().any(|mount| matches!(mount.mode, MountMode::Overlay { .. }));
    Ok(has_overlay.then(|| uppers.session(id, &wanted)))
}

/// The limit a request asks for, which must not be beyond the configured one.
fn limit(options: &SessionOptions, configured: Limit) -> Result<Option<Limit>, OptionError> {
    let UpperOptions { bytes_max, inodes_max, .. } = options.uppers;
    if bytes_max.is_none() && inodes_max.is_none() {
        return Ok(None);
    }
    let within = |field, asked: Option<u64>, configured: u64| match asked {
        Some(asked) if configured > 0 && asked > configured => {
            Err(OptionError::new(field, format!("must be at most {configured}, as is configured")))
        }
        asked => Ok(asked.unwrap_or(configured)),
    };
    Ok(Some(Limit {
        bytes: within("persist.max_bytes", bytes_max, configured.bytes)?,
        inodes: within("persist.max_inodes", inodes_max, configured.inodes)?,
    }))
}

/// What a workspace must not be, whatever links led there: the sandbox's own places would be the host's, the root would
/// be writable or show the host's /proc elsewhere, an upper would be another session's.
fn check_workspace(
    foundation: &Foundation,
    mount: &Mount,
    source: &Path,
    dest: &Path,
) -> Result<(), OptionError> {
    let wrong =
        |what: &str| Err(OptionError::new("workspace.path", format!("{} {what}", mount.path.display())));
    let root = Path::new("/");
    if profile::is_reserved(source) || profile::is_reserved(dest) {
        return wrong("leads to one of the sandbox's own places");
    }
    let is_root_overlay = mount.path == root && mount.mode != MountMode::ReadWrite;
    if source == root && (dest != root || !(is_root_overlay || mount.mode == MountMode::ReadOnly)) {
        return wrong("leads to the root, which can only be mounted ro, or overlay by its own name");
    }
    if foundation.uppers.as_ref().is_some_and(|uppers| source.starts_with(uppers.root())) {
        return wrong("lies inside execd's own upper_root");
    }
    Ok(())
}

/// The root is read-only, so a bind's destination has to exist, or lie where a mount before it can be written.
fn check_mount_points(mounts: &[MountStep]) -> Result<(), PrepareError> {
    let mut writable: Vec<PathBuf> = Vec::new();
    for step in mounts {
        match step {
            MountStep::Bind { dest, read_only, .. } => {
                if !resolve::is_mount_point(dest, &writable) {
                    let reason = format!(
                        "{} does not exist and cannot be made: its place is read-only",
                        dest.display()
                    );
                    return Err(OptionError::new("binds.dest", reason).into());
                }
                if !read_only {
                    writable.push(dest.clone());
                }
            }
            MountStep::Tmpfs { dest, .. }
            | MountStep::Private { dest, .. }
            | MountStep::Overlay { dest, .. } => writable.push(dest.clone()),
            _ => {}
        }
    }
    Ok(())
}

/// `HOME` and its kin for a session with an id of its own; execd's would name somebody else's folder.
fn account(options: &SessionOptions, cwd: &Path) -> Vec<(&'static str, String)> {
    let Some(uid) = options.uid else { return Vec::new() };
    // An id without an account is nothing unusual in a container.
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    match passwd_entry(&accounts, uid) {
        Some((name, home)) => {
            vec![("HOME", home.to_owned()), ("USER", name.to_owned()), ("LOGNAME", name.to_owned())]
        }
        None => vec![("HOME", cwd.display().to_string())],
    }
}

/// Name and home of a uid, from the text of passwd(5). Not by getpwuid(3): that loads modules of the C library,
/// which a static binary must not do.
fn passwd_entry(accounts: &str, uid: u32) -> Option<(&str, &str)> {
    accounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields.as_slice() {
            [name, _, id, _, _, home, ..] if id.parse() == Ok(uid) => Some((*name, *home)),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_uid() {
        let accounts = "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1000::/home/ann:/bin/sh\n";
        assert_eq!(passwd_entry(accounts, 1000), Some(("ann", "/home/ann")));
        assert_eq!(passwd_entry(accounts, 0), Some(("root", "/root")));
        assert_eq!(passwd_entry(accounts, 12345), None);
    }
}
