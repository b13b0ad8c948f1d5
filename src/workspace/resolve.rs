//! From the paths of a request to the paths that are mounted: links resolved, allow-list applied, missing
//! workspaces made. What is returned contains no symbolic link; init refuses to follow one that appears later.

use procfs::process::Process;
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, mkdirat, openat, openat2};
use rustix::io::Errno;
use std::io;
use std::path::{Component, Path, PathBuf};

/// A path that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Not below an allowed path.
    #[error("{} is not below an allowed path ({})", .path.display(), listed(.allowed))]
    NotAllowed {
        /// The path after resolving links.
        path: PathBuf,
        /// The allow-list.
        allowed: Vec<PathBuf>,
    },
    /// Does not exist, is no directory, or cannot be made.
    #[error("{}: {error}", .path.display())]
    Unusable {
        /// The path as given.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

fn listed(list: &[PathBuf]) -> String {
    if list.is_empty() {
        return "none is".into();
    }
    list.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A path that is absolute and equals its own lexical cleaning: no `.`, `..`, `//` or trailing `/`.
pub fn is_clean(path: &str) -> bool {
    path == "/"
        || (path.starts_with('/')
            && !path.contains('\0')
            && path.split('/').skip(1).all(|part| !matches!(part, "" | "." | "..")))
}

/// Resolves a workspace, making it (mode 0755, parents too) when it is missing. A directory made here is given
/// to `owner`, so that a session of that user can use it.
///
/// # Errors
/// [`ResolveError::Unusable`] when it is no directory or cannot be made.
pub fn workspace(path: &Path, owner: Option<(u32, u32)>) -> Result<PathBuf, ResolveError> {
    let unusable = |error| ResolveError::Unusable { path: path.into(), error };
    let resolved = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path, owner).map_err(unusable)?,
        other => other.map_err(unusable)?,
    };
    if resolved.is_dir() { Ok(resolved) } else { Err(unusable(io::ErrorKind::NotADirectory.into())) }
}

/// Makes what is missing of a path, each directory through a descriptor of the one before: a link that somebody plants
/// meanwhile makes it fail instead of leading somewhere else.
fn make(path: &Path, owner: Option<(u32, u32)>) -> io::Result<PathBuf> {
    let (base, missing) = existing_part(path)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = openat2(CWD, &base, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let mut made = false;
    for name in missing.components() {
        let name = name.as_os_str();
        made = match mkdirat(&dir, name, Mode::from(0o755)) {
            Err(Errno::EXIST) => false,
            other => other.map(|()| true)?,
        };
        dir = openat(&dir, name, flags | OFlags::NOFOLLOW, Mode::empty())?;
    }
    if let Some((uid, gid)) = owner.filter(|_| made) {
        fchown(&dir, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    Ok(base.join(missing))
}

/// The part of a path that exists, links resolved, and the rest.
fn existing_part(path: &Path) -> io::Result<(PathBuf, PathBuf)> {
    for ancestor in path.ancestors() {
        if let Ok(base) = ancestor.canonicalize() {
            let missing = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return Ok((base, missing.into()));
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// A destination with the links of the part that exists resolved.
pub fn destination(path: &Path) -> PathBuf {
    match existing_part(path) {
        // Joining nothing would add a slash.
        Ok((base, missing)) if missing.as_os_str().is_empty() => base,
        Ok((base, missing)) => base.join(missing),
        Err(_) => path.into(),
    }
}

/// Resolves the source of a bind and checks it against the allow-list, whose entries are resolved too.
///
/// # Errors
/// When it does not exist or is not allowed.
pub fn bind_source(path: &Path, allowed: &[PathBuf]) -> Result<PathBuf, ResolveError> {
    let resolved =
        path.canonicalize().map_err(|error| ResolveError::Unusable { path: path.into(), error })?;
    // `starts_with` compares whole components: /workspace does not allow /workspace-other.
    let is_allowed =
        allowed.iter().filter_map(|entry| entry.canonicalize().ok()).any(|e| resolved.starts_with(e));
    if is_allowed {
        Ok(resolved)
    } else {
        Err(ResolveError::NotAllowed { path: resolved, allowed: allowed.to_vec() })
    }
}

/// Where name resolution finds its servers, when that is a file below /run: /run is private to a session, so
/// the file has to be shown again.
pub fn resolver() -> Option<PathBuf> {
    let path = Path::new("/etc/resolv.conf").canonicalize().ok()?;
    (path.starts_with("/run") && path.is_file()).then_some(path)
}

/// What is mounted on the container's root, mounts on mounts left out: they come along with those. /proc and /dev are the
/// sandbox's own.
pub fn submounts() -> Vec<PathBuf> {
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map(|mounts| mounts.0);
    let points: Vec<PathBuf> =
        mounts.unwrap_or_default().into_iter().map(|mount| mount.mount_point).collect();
    topmost(points).into_iter().filter(|path| path.exists()).collect()
}

fn topmost(mut points: Vec<PathBuf>) -> Vec<PathBuf> {
    let own = ["/proc", "/dev"].map(Path::new);
    points.retain(|point| point != Path::new("/") && !own.iter().any(|own| point.starts_with(own)));
    points.sort();
    points.dedup();
    let mut topmost: Vec<PathBuf> = Vec::new();
    for point in points {
        if !topmost.iter().any(|above| point.starts_with(above)) {
            topmost.push(point);
        }
    }
    topmost
}

/// Whether a mount point exists in the container, or lies below one of the places that a session can make it
/// in.
pub fn is_mount_point(dest: &Path, writable: &[PathBuf]) -> bool {
    dest.exists() || writable.iter().any(|place| dest.starts_with(place))
}

/// A path that is absolute and has no `..`: what a bind's destination must be.
pub fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_paths() {
        for path in ["/", "/a", "/a/b.c", "/..a"] {
            assert!(is_clean(path), "{path}");
        }
        for path in ["", "a", "./a", "/a/", "//a", "/a//b", "/a/./b", "/a/..", "/a\0b"] {
            assert!(!is_clean(path), "{path:?}");
        }
    }

    #[test]
    fn mounts_on_mounts_come_along() {
        let points = ["/", "/sys/fs/cgroup", "/sys", "/proc", "/dev/pts", "/etc/hosts", "/sysadmin", "/sys"];
        let topmost = topmost(points.map(PathBuf::from).to_vec());
        assert_eq!(topmost, ["/etc/hosts", "/sys", "/sysadmin"].map(PathBuf::from));
    }

    #[test]
    fn the_allow_list_is_compared_by_component_after_resolving_links() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for name in ["allowed/inner", "allowed-not", "secret"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(root.join("secret"), root.join("allowed/link")).unwrap();
        std::os::unix::fs::symlink(root.join("allowed"), root.join("alias")).unwrap();
        let allowed = [root.join("alias")];
        assert_eq!(bind_source(&root.join("allowed/inner"), &allowed).unwrap(), root.join("allowed/inner"));
        assert_eq!(bind_source(&root.join("alias"), &allowed).unwrap(), root.join("allowed"));
        for outside in ["allowed-not", "allowed/link", "secret", "allowed/../secret"] {
            let error = bind_source(&root.join(outside), &allowed).unwrap_err();
            assert!(matches!(error, ResolveError::NotAllowed { .. }), "{outside}: {error}");
        }
        assert!(matches!(bind_source(&root.join("none"), &allowed), Err(ResolveError::Unusable { .. })));
        assert!(bind_source(&root, &[]).is_err());
    }

    #[test]
    fn a_missing_workspace_is_made_and_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = dir.path().join("a/b");
        workspace(&wanted, None).unwrap();
        assert!(wanted.is_dir());
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(workspace(&dir.path().join("file"), None).is_err());
    }
}
