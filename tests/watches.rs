//! The news of changes to a session's files.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test stops at the first surprise"
)]

mod common;

use common::files::query;
use common::http::Streaming;
use common::{Session, Setup, workspace};
use serde_json::Value;
use std::fs;

/// The frames of a watch.
struct Watch {
    stream: Streaming,
    text: String,
}

impl Watch {
    fn new(session: &Session<'_>, path: &str) -> Self {
        let stream = session.send("GET", &format!("/files/watch{}", query(&[("path", path)])), &[], b"");
        assert_eq!(
            (stream.head.status, stream.head.header("content-type")),
            (200, Some("text/event-stream"))
        );
        let mut watch = Self { stream, text: String::new() };
        assert_eq!(watch.next().unwrap()["type"], "init");
        watch
    }

    fn next(&mut self) -> Option<Value> {
        loop {
            if let Some((frame, rest)) = self.text.split_once("\n\n") {
                let frame = serde_json::from_str(frame).unwrap();
                self.text = rest.to_owned();
                return Some(frame);
            }
            self.text.push_str(&String::from_utf8(self.stream.chunk()?).unwrap());
        }
    }

    /// Reads until something has happened to `last`; what has, as `type path`, with names below `folder`.
    fn until(&mut self, folder: &str, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().map(String::as_str) != Some(last) {
            let frame = self.next().unwrap_or_else(|| panic!("no {last}: {seen:?}"));
            if frame["type"] == "ping" {
                continue;
            }
            let short =
                |key: &str| frame[key].as_str().map(|path| path.strip_prefix(folder).unwrap().to_owned());
            let from = short("from").map(|from| format!("{from} -> ")).unwrap_or_default();
            seen.push(format!("{} {from}{}", frame["type"].as_str().unwrap(), short("path").unwrap()));
        }
        seen
    }
}

#[test]
fn changes_are_told_as_they_happen() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    fs::create_dir_all(folder.join("low/deep")).unwrap();
    fs::write(folder.join("low/deep/f"), "f").unwrap();
    for mode in ["rw", "overlay"] {
        let session = daemon.create(&workspace(&folder, mode));
        let base = format!("{}/", folder.display());
        let mut watch = Watch::new(&session, ".");
        session.output("echo a > a");
        assert_eq!(watch.until(&base, "modified a"), ["created a", "modified a"]);
        // A file of the lower goes up, and is still watched.
        session.output("echo more >> low/deep/f");
        assert_eq!(watch.until(&base, "modified low/deep/f"), ["modified low/deep/f"]);
        session.output("mv a low/b; chmod 600 low/b; rm low/b");
        let seen = watch.until(&base, "removed low/b");
        assert!(
            seen.contains(&"moved a -> low/b".into()) && seen.contains(&"modified low/b".into()),
            "{seen:?}"
        );
        session
            .output("mkdir -p n/m; echo x > n/m/f; mv n n2; sleep 0.1; echo y >> n2/m/f; echo > n2/m/last");
        let seen = watch.until(&base, "created n2/m/last");
        for change in ["created n", "moved n -> n2", "modified n2/m/f"] {
            assert!(seen.contains(&change.into()), "no {change}: {seen:?}");
        }
        session.upload("up", "content");
        let seen = watch.until(&base, "created up");
        assert!(seen.contains(&"created up".into()), "{seen:?}");
        session.output("mv n2 /tmp/execd-moved-out-$$; rm -r /tmp/execd-moved-out-$$");
        let seen = [seen, watch.until(&base, "removed n2")].concat();
        assert!(!seen.iter().any(|change| change.contains('#')), "a file without a name: {seen:?}");
        assert!(!seen.iter().any(|change| change.starts_with("overflow")), "{seen:?}");
        // A single file, and the end of what is watched.
        let mut single = Watch::new(&session, "up");
        session.output("echo > other; echo >> up");
        assert_eq!(single.until(&base, "modified up"), ["modified up"]);
        session.output("mkdir gone; sleep 0.05");
        let mut gone = Watch::new(&session, "gone");
        session.output("rmdir gone");
        assert_eq!(gone.until(&base, "removed gone"), ["removed gone"]);
        assert_eq!(gone.next().unwrap()["type"], "end");
        assert!(gone.next().is_none());
        session.delete();
        while let Some(frame) = watch.next() {
            if frame["type"] == "end" {
                assert_eq!(frame["text"], "the session has ended");
            }
        }
        fs::remove_file(folder.join("up")).ok();
        fs::remove_file(folder.join("other")).ok();
    }
}
