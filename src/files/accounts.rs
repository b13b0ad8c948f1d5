//! Names of users and groups, as the session's own passwd(5) and group(5) have them.

use super::error::FileError;
use super::tree::Worker;
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;

/// What is read of either file; bytes. They are the session's, and may be anything.
const BYTES_MAX: u64 = 1 << 20;

/// The accounts of a session. Files that are missing or make no sense are as good as empty: then there are numbers.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    users: Names,
    groups: Names,
}

impl Accounts {
    pub(super) fn read(worker: &Worker<'_>) -> Self {
        let names = |path| Names::parse(&text(worker, path).unwrap_or_default());
        Self { users: names("/etc/passwd"), groups: names("/etc/group") }
    }

    /// The name of a uid inside; the number where there is none.
    pub(super) fn user(&self, uid: u32) -> String {
        self.users.name(uid)
    }

    /// The name of a gid inside; the number where there is none.
    pub(super) fn group(&self, gid: u32) -> String {
        self.groups.name(gid)
    }

    pub(super) fn uid(&self, text: &str) -> Option<u32> {
        self.users.id(text)
    }

    pub(super) fn gid(&self, text: &str) -> Option<u32> {
        self.groups.id(text)
    }
}

#[derive(Debug, Default)]
struct Names {
    by_id: HashMap<u32, String>,
    by_name: HashMap<String, u32>,
}

impl Names {
    /// Both files have the name first and the number third; of several lines for one the first counts.
    fn parse(text: &str) -> Self {
        let mut names = Self::default();
        for line in text.lines() {
            let mut fields = line.split(':');
            if let (Some(name), Some(id)) = (fields.next(), fields.nth(1))
                && !name.is_empty()
                && let Ok(id) = id.parse()
            {
                names.by_id.entry(id).or_insert_with(|| name.to_owned());
                names.by_name.entry(name.to_owned()).or_insert(id);
            }
        }
        names
    }

    fn name(&self, id: u32) -> String {
        self.by_id.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }

    /// A name, or a number, in this order, as chown(1) does.
    fn id(&self, text: &str) -> Option<u32> {
        let id = self.by_name.get(text).copied().or_else(|| text.parse().ok());
        // The call would take this as "leave it".
        id.filter(|id| *id != u32::MAX)
    }
}

fn text(worker: &Worker<'_>, path: &str) -> Result<String, FileError> {
    let path = worker.path(path)?;
    let file: File = worker.regular(&path)?.open(OFlags::RDONLY, &path)?;
    let mut bytes = Vec::new();
    let _ = file.take(BYTES_MAX).read_to_end(&mut bytes);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_counts_and_broken_ones_do_not() {
        let names =
            Names::parse("root:x:0:0::/:\nbroken\n:x:5\ntoor:x:0:0::/:\nann:x:7:7::/:\n42:x:8:8::/:\n");
        assert_eq!((names.name(0), names.name(7), names.name(9)), ("root".into(), "ann".into(), "9".into()));
        assert_eq!((names.id("toor"), names.id("12"), names.id("42")), (Some(0), Some(12), Some(8)));
        assert_eq!((names.id("nobody"), names.id("-1"), names.id("4294967295")), (None, None, None));
    }
}
