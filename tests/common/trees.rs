//! Whole trees of files, to compare them.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What there is to know about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    /// A digest of the content, or where a link leads.
    content: String,
    /// Seconds and nanoseconds; compared where both sides are said to have it.
    modified: (i64, i64),
    attributes: Vec<(String, Vec<u8>)>,
    /// The first name of the same file.
    same_as: Option<PathBuf>,
}

/// All files below a folder, and the folder itself, by their paths below it.
pub(crate) type Tree = BTreeMap<PathBuf, Entry>;

/// Looks at everything.
pub(crate) fn tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut first_names = BTreeMap::new();
    let mut left = vec![root.to_path_buf()];
    let mut paths = Vec::new();
    while let Some(path) = left.pop() {
        if path.symlink_metadata().unwrap().is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        paths.push(path);
    }
    paths.sort();
    for path in paths {
        let below = path.strip_prefix(root).unwrap().to_path_buf();
        let mut entry = entry(&path);
        let metadata = path.symlink_metadata().unwrap();
        if !metadata.is_dir() && metadata.nlink() > 1 {
            let id = (metadata.dev(), metadata.ino());
            entry.same_as = Some(first_names.entry(id).or_insert_with(|| below.clone()).clone());
        }
        tree.insert(below, entry);
    }
    tree
}

fn entry(path: &Path) -> Entry {
    let metadata = path.symlink_metadata().unwrap();
    let kind = metadata.file_type();
    let (kind, content) = if kind.is_file() {
        let mut hasher = DefaultHasher::new();
        fs::read(path).unwrap().hash(&mut hasher);
        ("file", format!("{} {:x}", metadata.len(), hasher.finish()))
    } else if kind.is_symlink() {
        ("link", fs::read_link(path).unwrap().display().to_string())
    } else if kind.is_dir() {
        ("directory", String::new())
    } else if kind.is_fifo() {
        ("fifo", String::new())
    } else {
        ("other", format!("{:x}", metadata.rdev()))
    };
    let mode = if kind == "link" { 0 } else { metadata.mode() & 0o7777 };
    Entry {
        kind,
        mode,
        owner: (metadata.uid(), metadata.gid()),
        content,
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        attributes: attributes(path),
        same_as: None,
    }
}

fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0_u8; 64 * 1024];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut attributes: Vec<_> = names
        .map(|name| {
            let mut value = vec![0_u8; 64 * 1024];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (String::from_utf8_lossy(name).into_owned(), value[..length].to_vec())
        })
        .collect();
    attributes.sort();
    attributes
}

/// Panics at the first difference.
pub(crate) fn assert_same(one: &Tree, other: &Tree, with_times: bool, story: &str) {
    let paths = |tree: &Tree| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(one), paths(other), "{story}");
    for (path, left) in one {
        let mut right = other[path].clone();
        if !with_times {
            right.modified = left.modified;
        }
        assert_eq!(*left, right, "{} {story}", path.display());
    }
}

/// A copy of everything.
pub(crate) fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

/// Makes `setattr NAME VALUE PATH` of bash set an attribute, `delattr NAME PATH` remove one: setfattr(1) is not everywhere
/// (numbers of system calls as in asm/unistd_64.h and asm-generic/unistd.h).
pub(crate) fn attribute_functions() -> String {
    let (set, remove) = if cfg!(target_arch = "x86_64") { (188, 197) } else { (5, 14) };
    format!(
        "setattr() {{ perl -e 'exit(syscall({set}, $ARGV[2], $ARGV[0], $ARGV[1], length $ARGV[1], 0) != 0)' \"$@\"; }}\n\
         delattr() {{ perl -e 'exit(syscall({remove}, $ARGV[1], $ARGV[0]) != 0)' \"$@\"; }}\n"
    )
}

/// Runs a script of bash in a folder of the host.
pub(crate) fn script(folder: &Path, code: &str) {
    let mut command = Command::new("bash");
    let mut child = command.current_dir(folder).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("umask 022\n{code}\n").as_bytes()).unwrap();
    child.wait().unwrap();
}

/// Applies a layer as its readers do: deletions first, then what GNU tar unpacks. tar leaves directories the attributes
/// that they have beyond those of their entry, which a layer cannot say are gone, so they are taken away before.
pub(crate) fn apply_layer(layer: &[u8], folder: &Path) {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(layer));
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let is_directory = entry.header().entry_type().is_dir();
        let name = entry.path_bytes().into_owned();
        let path = folder.join(std::ffi::OsStr::from_bytes(&name));
        let Some(last) = path.file_name().map(|last| last.as_bytes().to_vec()) else { continue };
        let parent = path.parent().unwrap();
        if last == b".wh..wh..opq" {
            for entry in fs::read_dir(parent).into_iter().flatten() {
                remove(&entry.unwrap().path());
            }
        } else if is_directory && path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            for (name, _) in attributes(&path).iter().filter(|(name, _)| name.starts_with("user.")) {
                rustix::fs::lremovexattr(&path, name.as_str()).unwrap();
            }
        } else if let Some(gone) = last.strip_prefix(b".wh.") {
            remove(&parent.join(std::ffi::OsStr::from_bytes(gone)));
        }
    }
    let mut command = Command::new("tar");
    command.args([
        "-xpzf",
        "-",
        "--xattrs",
        "--xattrs-include=*",
        "--exclude=.wh.*",
        "--numeric-owner",
        "-C",
    ]);
    let mut child = command.arg(folder).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(layer).unwrap();
    assert!(child.wait().unwrap().success());
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}
