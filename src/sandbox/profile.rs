//! The profiles `strict` and `balanced`, as ordered mounts.
//!
//! Every sandbox starts from the container's whole file system, read-only and nosuid. Over it come, shallow
//! before deep, the private places (/tmp, /run, /dev, /proc) and what the caller asked for. Sorting by depth
//! keeps one rule for all of them: what lies deeper is visible.
//!
//! The profiles differ in one thing: `strict` has a private /tmp, `balanced` shares the container's.

use execd_init_shim::messages::{MountStep, Upper};
use std::path::{Path, PathBuf};

/// Where the control directory of the shell protocol appears inside.
pub const CONTROL_DIR: &str = "/run/execd";

/// How much of the container a session shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Private /tmp.
    #[default]
    Strict,
    /// The container's /tmp, writable.
    Balanced,
}

/// What the caller asked to see, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The profile.
    pub profile: Profile,
    /// Workspaces: same path inside as outside.
    pub workspaces: Vec<WorkspaceMount>,
    /// Mounts on the container's root that a root of the caller's would leave out; shown read-only.
    pub submounts: Vec<PathBuf>,
    /// Extra binds, writable folders included.
    pub binds: Vec<BindMount>,
    /// Host paths no session may see into.
    pub hidden: Vec<PathBuf>,
    /// A file below /run that name resolution needs, to be shown read-only although /run is private.
    pub resolver: Option<PathBuf>,
    /// Sizes of the private places.
    pub sizes: Sizes,
}

/// One workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceMount {
    /// Where it appears.
    pub dest: PathBuf,
    /// The host directory, links resolved.
    pub source: PathBuf,
    /// How.
    pub access: Access,
}

/// How a workspace is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Writes go through.
    ReadWrite,
    /// No writes.
    ReadOnly,
    /// Writes go to an upper.
    Overlay(Upper),
}

/// One bind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// The host path, links resolved.
    pub source: PathBuf,
    /// Where it appears.
    pub dest: PathBuf,
    /// No writes.
    pub read_only: bool,
}

/// Sizes of the private tmpfs mounts; bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// /tmp, /run and /dev/shm together.
    pub private_bytes_max: u64,
    /// The control directory: holds the code and the input of one run.
    pub control_bytes_max: u64,
}

/// Inodes of the private places; a flood of empty files is memory too.
const INODES_MAX: u64 = 262_144;

/// /proc entries that tell about the whole machine what no session should know (as OCI runtimes mask).
const PROC_MASKED: [&str; 9] =
    ["acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list"];
/// Places below /sys that are the same.
const MASKED: [&str; 3] = ["/sys/firmware", "/sys/kernel/debug", "/sys/kernel/tracing"];
/// Places that a caller's mount may neither be nor be beneath: the sandbox's own.
const RESERVED: [&str; 4] = ["/proc", "/dev", "/sys", CONTROL_DIR];

/// The mounts of a session, in order. Pure.
pub fn mounts(layout: &Layout) -> Vec<MountStep> {
    let root = layout.workspaces.iter().find(|mount| mount.dest == Path::new("/"));
    let mut steps = vec![
        root.map_or_else(read_only_root, workspace),
        MountStep::Scratch {
            dest: "/proc".into(),
            bytes_max: layout.sizes.private_bytes_max,
            inodes_max: INODES_MAX,
        },
    ];
    let mut above: Vec<MountStep> =
        layout.submounts.iter().map(|path| bind(path, path, true, true)).collect();
    above.extend(tmp(layout));
    above.push(MountStep::Private { dest: "/run".into(), mode: 0o755 });
    above.push(MountStep::Control { dest: CONTROL_DIR.into(), bytes_max: layout.sizes.control_bytes_max });
    above.push(MountStep::Dev { dest: "/dev".into() });
    above.push(MountStep::Proc {
        dest: "/proc".into(),
        read_only: true,
        masked: PROC_MASKED.map(String::from).to_vec(),
    });
    above.extend(MASKED.map(|path| MountStep::Mask { dest: path.into() }));
    if let Some(resolver) = &layout.resolver {
        above.push(bind(resolver, resolver, true, false));
    }
    above.extend(layout.workspaces.iter().filter(|mount| mount.dest != Path::new("/")).map(workspace));
    above.extend(layout.hidden.iter().map(|path| MountStep::Mask { dest: path.clone() }));
    above.extend(layout.binds.iter().map(|b| bind(&b.source, &b.dest, b.read_only, true)));
    above.extend(hidden_elsewhere(layout));
    above.sort_by_key(|step| depth(step.dest()));
    steps.append(&mut above);
    steps
}

/// Hidden paths as they show up in what is mounted in another place than its own.
fn hidden_elsewhere(layout: &Layout) -> impl Iterator<Item = MountStep> {
    let workspaces = layout.workspaces.iter().map(|mount| (&mount.source, &mount.dest));
    let moved = workspaces.chain(layout.binds.iter().map(|bind| (&bind.source, &bind.dest)));
    moved.filter(|(source, dest)| source != dest).flat_map(|(source, dest)| {
        let below = layout.hidden.iter().filter_map(move |path| path.strip_prefix(source).ok());
        below.map(move |below| MountStep::Mask { dest: dest.join(below) })
    })
}

/// Splits the mounts `all` into those of `base` and the rest, which is returned if it can be made outside of the
/// sandbox and attached to it later, with the same result: binds, and overlays with an upper on disk, that cover
/// nothing of the base. Pure.
pub fn split(all: &[MountStep], base: &[MountStep]) -> Option<Vec<MountStep>> {
    let mut base_left = base.iter().peekable();
    let mut late = Vec::new();
    for step in all {
        if base_left.next_if_eq(&step).is_some() {
            continue;
        }
        let can_wait = matches!(
            step,
            MountStep::Bind { .. }
                | MountStep::Overlay { upper: Upper::Directory { .. } | Upper::Held(_), .. }
        );
        let covers =
            |other: &MountStep| other.dest() != Path::new("/") && other.dest().starts_with(step.dest());
        if !can_wait || base.iter().any(covers) {
            return None;
        }
        late.push(step.clone());
    }
    base_left.peek().is_none().then_some(late)
}

/// Whether a caller's mount at `path` would take the place of something the sandbox itself provides.
pub fn is_reserved(path: &Path) -> bool {
    path == Path::new("/run") || RESERVED.iter().any(|reserved| path.starts_with(reserved))
}

fn read_only_root() -> MountStep {
    bind(Path::new("/"), Path::new("/"), true, true)
}

fn tmp(layout: &Layout) -> Option<MountStep> {
    // A mount of the caller on /tmp, or on what contains it, decides about /tmp.
    if layout.workspaces.iter().any(|mount| Path::new("/tmp").starts_with(&mount.dest)) {
        return None;
    }
    Some(match layout.profile {
        Profile::Strict => MountStep::Private { dest: "/tmp".into(), mode: 0o1777 },
        Profile::Balanced => bind(Path::new("/tmp"), Path::new("/tmp"), false, true),
    })
}

fn workspace(mount: &WorkspaceMount) -> MountStep {
    match &mount.access {
        Access::ReadWrite => bind(&mount.source, &mount.dest, false, true),
        Access::ReadOnly => bind(&mount.source, &mount.dest, true, true),
        Access::Overlay(upper) => {
            MountStep::Overlay { lower: mount.source.clone(), upper: upper.clone(), dest: mount.dest.clone() }
        }
    }
}

fn bind(source: &Path, dest: &Path, read_only: bool, recursive: bool) -> MountStep {
    MountStep::Bind { source: source.into(), dest: dest.into(), read_only, recursive }
}

fn depth(path: &Path) -> usize {
    path.components().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(profile: Profile, workspaces: &[(&str, Access)]) -> Layout {
        Layout {
            profile,
            workspaces: workspaces
                .iter()
                .map(|(path, access)| WorkspaceMount {
                    dest: path.into(),
                    source: path.into(),
                    access: access.clone(),
                })
                .collect(),
            submounts: vec![],
            binds: vec![],
            hidden: vec!["/var/lib/execd/isolation".into()],
            resolver: None,
            sizes: Sizes { private_bytes_max: 1, control_bytes_max: 2 },
        }
    }

    fn dests(layout: &Layout) -> Vec<String> {
        mounts(layout).iter().map(|step| step.dest().display().to_string()).collect()
    }

    #[test]
    fn strict_is_a_read_only_root_with_private_places_over_it() {
        let dests = dests(&layout(Profile::Strict, &[("/workspace", Access::ReadWrite)]));
        assert_eq!(
            dests,
            [
                "/",
                "/proc",
                "/tmp",
                "/run",
                "/dev",
                "/proc",
                "/workspace",
                "/run/execd",
                "/sys/firmware",
                "/sys/kernel/debug",
                "/sys/kernel/tracing",
                "/var/lib/execd/isolation"
            ]
        );
        assert_eq!(mounts(&layout(Profile::Strict, &[]))[0], read_only_root());
    }

    #[test]
    fn tmp_is_private_shared_or_the_callers() {
        let tmp = |layout: &Layout| {
            mounts(layout).into_iter().filter(|step| step.dest() == Path::new("/tmp")).collect::<Vec<_>>()
        };
        assert!(matches!(tmp(&layout(Profile::Strict, &[])).as_slice(), [MountStep::Private { .. }]));
        assert!(matches!(
            tmp(&layout(Profile::Balanced, &[])).as_slice(),
            [MountStep::Bind { read_only: false, .. }]
        ));
        for profile in [Profile::Strict, Profile::Balanced] {
            let own = layout(profile, &[("/tmp", Access::ReadOnly)]);
            assert!(matches!(tmp(&own).as_slice(), [MountStep::Bind { read_only: true, .. }]));
        }
    }

    #[test]
    fn deeper_mounts_come_later_whatever_their_kind() {
        let mut layout = layout(Profile::Strict, &[("/a/b/c", Access::ReadOnly), ("/a", Access::ReadWrite)]);
        layout.binds.push(BindMount { source: "/mnt".into(), dest: "/a/b".into(), read_only: true });
        let dests = dests(&layout);
        let place = |path| dests.iter().position(|dest| dest == path).unwrap();
        assert!(place("/a") < place("/a/b") && place("/a/b") < place("/a/b/c"));
    }

    #[test]
    fn workspaces_can_be_attached_later_unless_they_cover_something() {
        let base = mounts(&layout(Profile::Strict, &[]));
        let upper = Upper::Directory { upper: "/u/upper".into(), work: "/u/work".into() };
        let memory = Upper::Tmpfs { bytes_max: 1, inodes_max: 1 };
        let with =
            |workspaces: &[(&str, Access)]| split(&mounts(&layout(Profile::Strict, workspaces)), &base);
        let found = with(&[("/w", Access::Overlay(upper.clone())), ("/w/deep", Access::ReadOnly)]).unwrap();
        assert_eq!(
            found.iter().map(MountStep::dest).collect::<Vec<_>>(),
            [Path::new("/w"), Path::new("/w/deep")]
        );
        assert_eq!(with(&[]), Some(vec![]));
        // Covers the hidden uppers; decides about /tmp; is the root; needs a place inside for its upper.
        assert_eq!(with(&[("/var", Access::ReadOnly)]), None);
        assert_eq!(with(&[("/tmp", Access::ReadWrite)]), None);
        assert_eq!(with(&[("/", Access::ReadOnly)]), None);
        assert_eq!(with(&[("/w", Access::Overlay(memory))]), None);
        assert_eq!(split(&mounts(&layout(Profile::Balanced, &[])), &base), None);
    }

    #[test]
    fn what_is_hidden_is_hidden_wherever_it_shows_up() {
        let mut layout = layout(Profile::Strict, &[]);
        layout.binds.push(BindMount { source: "/var".into(), dest: "/mnt".into(), read_only: true });
        let dests = dests(&layout);
        let place = |path| dests.iter().position(|dest| dest == path).unwrap();
        assert!(place("/mnt") < place("/mnt/lib/execd/isolation"));
    }

    #[test]
    fn the_sandboxs_own_places_are_reserved() {
        for path in ["/proc", "/proc/self", "/dev/shm", "/sys", "/run", "/run/execd", "/run/execd/x"] {
            assert!(is_reserved(Path::new(path)), "{path}");
        }
        for path in ["/", "/processes", "/run/user/1000", "/workspace", "/tmp"] {
            assert!(!is_reserved(Path::new(path)), "{path}");
        }
    }
}
