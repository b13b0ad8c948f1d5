//! A session that works against the files API: swaps what paths lead to while they are resolved, and dies in the middle
//! of it. Whatever it does, nothing outside of its view is read or written.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::files::{Part, form, form_type, query};
use common::machine::{self, has_program};
use common::{Daemon, OTHER_ID, Session, Setup, eventually, skip, workspace};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What must never be seen.
const CANARY: &str = "canary-content-7c1f";
/// What must never be there.
const WRITTEN: &str = "written-by-the-attack";
/// Requests of each kind while things are swapped.
const ROUNDS: usize = 300;
/// Sessions that die in the middle of transfers.
const DEATHS: usize = 12;

/// A tree outside every session's view.
struct Canary {
    folder: PathBuf,
    before: BTreeMap<PathBuf, String>,
}

impl Canary {
    /// Of a mode that lets everybody in, where it is the view alone that has to keep it safe.
    fn plant(folder: PathBuf, mode: u32) -> Self {
        fs::create_dir_all(folder.join("sub/deep")).unwrap();
        for path in ["", "sub", "sub/deep"] {
            fs::set_permissions(folder.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        for path in ["f", "sub/f", "sub/deep/f", "a.rs"] {
            fs::write(folder.join(path), format!("{CANARY} {path}\n")).unwrap();
            fs::set_permissions(folder.join(path), fs::Permissions::from_mode(0o666)).unwrap();
        }
        let before = look(&folder);
        Self { folder, before }
    }

    fn is_untouched(&self) {
        assert_eq!(look(&self.folder), self.before, "{} was touched", self.folder.display());
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The identities that threads of a process have; one, unless some are at work for a session.
fn identities(pid: i32) -> BTreeSet<String> {
    let statuses = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).ok();
    let identity = |status: String| {
        let lines = status
            .lines()
            .filter(|line| ["Uid:", "Gid:", "CapEff:", "Groups:"].iter().any(|key| line.starts_with(key)));
        lines.collect::<Vec<_>>().join(" ")
    };
    statuses.filter_map(status).map(identity).collect()
}

/// Everything about each file, except when it was read.
fn look(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut look = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stat = fs::symlink_metadata(&path).unwrap();
        if stat.is_dir() {
            look.extend(self::look(&path));
        }
        let content = if stat.is_file() { fs::read_to_string(&path).unwrap() } else { String::new() };
        let told = (
            stat.ino(),
            stat.mode(),
            stat.uid(),
            stat.nlink(),
            stat.mtime(),
            stat.ctime(),
            stat.ctime_nsec(),
        );
        look.insert(path, format!("{told:?} {content}"));
    }
    look
}

/// Exchanges names as fast as a process can (renameat2, RENAME_EXCHANGE).
const SWAPPER: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pairs = [pair.encode().split(b":") for pair in sys.argv[1:]]
print("go", flush=True)
while True:
    for a, b in pairs:
        libc.renameat2(-100, a, -100, b, 2)
"#;

/// One request of each kind about a path, as bytes of the answer.
fn requests(session: &Session<'_>, path: &str, number: usize) -> Vec<(String, Vec<u8>)> {
    let below = |name: &str| format!("{path}/{name}");
    let (file, fresh) = (below("f"), below(&format!("new-{number}")));
    let ask = |method: &str, route: &str, path: &str| {
        (format!("{method} {route} {path}"), session.ask(method, route, &[("path", path)]).body)
    };
    let tell = |route: &str, body: Value| (format!("{route} {body}"), session.tell(route, &body).body);
    let upload = |path: &str| {
        let metadata = json!({"path": path, "mode": 666}).to_string();
        let answer = session.upload_form(&[Part::metadata(&metadata), Part::file(WRITTEN.as_bytes())]);
        (format!("upload {path}"), answer.body)
    };
    let archive = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(WRITTEN.len() as u64);
        header.set_mode(0o666);
        builder.append_data(&mut header, "sub/f", WRITTEN.as_bytes()).unwrap();
        builder.into_inner().unwrap()
    };
    let unpacked =
        session.send("POST", &format!("/directories/archive{}", query(&[("path", path)])), &[], &archive);
    let packed = session.route(&format!("/directories/archive{}", query(&[("path", path)])));
    let packed = exchange(
        session.daemon,
        format!("GET {packed} HTTP/1.1\r\nHost: execd\r\nConnection: close\r\n\r\n").as_bytes(),
    );
    let mut plain = Vec::new();
    // It may break off, like any archive of what changes meanwhile.
    let _ = flate2::read::GzDecoder::new(content(&packed).as_slice()).read_to_end(&mut plain);
    vec![
        ask("GET", "/files/info", &file),
        ask("GET", "/files/download", &file),
        ask("GET", "/files/download", &below("sub/deep/f")),
        ask("GET", "/files/search", path),
        (
            format!("list {path}"),
            session.ask("GET", "/directories/list", &[("path", path), ("depth", "5")]).body,
        ),
        (format!("archive {path}"), plain),
        upload(&file),
        upload(&below("sub/f")),
        upload(&fresh),
        tell("/files/permissions", json!({file.clone(): {"mode": 777, "owner": OTHER_ID}})),
        tell("/files/replace", json!({file.clone(): {"old": "a", "new": WRITTEN}})),
        tell("/files/mv", json!([{"src": fresh, "dest": below("moved")}])),
        tell("/files/mv", json!([{"src": below("sub"), "dest": below("sub2")}])),
        tell("/files/mv", json!([{"src": below("sub2"), "dest": below("sub")}])),
        tell("/directories", json!({below("made/deep"): {"mode": 777}})),
        ask("DELETE", "/directories", &below("made")),
        ask("DELETE", "/files", &below("moved")),
        (format!("unpack {path}"), unpacked.whole().body),
    ]
}

fn must_not_tell(answers: &[(String, Vec<u8>)]) {
    for (request, body) in answers {
        assert!(!tells(body), "{request} has read the canary");
    }
}

fn tells(answer: &[u8]) -> bool {
    String::from_utf8_lossy(answer).contains(CANARY)
}

fn swaps(mode: &str, uid: u32) {
    let Some(daemon) = Setup::new().start() else { return };
    if !has_program("python3") {
        return skip("python3 is not installed, which swaps fast");
    }
    let folder = daemon.folder("w");
    // One that is masked, one beneath a private place, one that is there inside and closed to all but root.
    let masked = Canary::plant(daemon.upper_root().join("canary"), 0o777);
    fs::set_permissions(daemon.upper_root(), fs::Permissions::from_mode(0o755)).unwrap();
    let private = Canary::plant(PathBuf::from(format!("/run/execd-canary-{}-{mode}", daemon.pid())), 0o777);
    let beside = Canary::plant(daemon.dir.path().join("beside"), 0o700);
    let mut body = workspace(&folder, mode);
    (body["uid"], body["gid"]) = (json!(uid), json!(uid));
    rustix::fs::chown(&folder, Some(rustix::fs::Uid::from_raw(uid)), None).unwrap();
    let session = &daemon.create(&body);
    let links = [&masked, &private].map(|canary| canary.folder.display().to_string());
    let setup = format!(
        "mkdir -p swap/sub/deep other/sub/deep; echo own > swap/f; echo own > swap/sub/f; echo own > swap/sub/deep/f; \
         ln -s {} masked; ln -s {} private; ln -s {}{} dots; ln -s /proc/self/root/{} magic; \
         mkdir -p d; ln -s {}/sub d/link; mkfifo fifo; cat > /tmp/swapper-$$.py <<'END'\n{SWAPPER}\nEND\n",
        links[0],
        links[1],
        "../".repeat(30),
        links[0],
        links[0],
        links[1],
    );
    session.output(&setup);
    let swap = "python3 /tmp/swapper-$$.py swap:masked swap:private swap:dots swap:magic swap/sub:d/link swap/f:fifo";
    let swapper = session.open_until(&json!({"code": swap}), "go");
    // From a second client, too, so that requests meet each other.
    let done = AtomicBool::new(false);
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for path in ["swap", "masked"] {
            let (done, count, session) = (&done, &count, &session);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    must_not_tell(&requests(session, path, count.fetch_add(1, Ordering::Relaxed)));
                    if count.load(Ordering::Relaxed) >= ROUNDS {
                        done.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(count.load(Ordering::Relaxed) >= ROUNDS);
    let closed = (uid != 0).then_some(&beside.folder);
    for path in [&masked.folder, &private.folder].into_iter().chain(closed) {
        let answers = requests(session, path.to_str().unwrap(), 0);
        must_not_tell(&answers);
    }
    drop(swapper);
    for canary in [&masked, &private, &beside] {
        canary.is_untouched();
    }
    eventually("every thread of the daemon is itself again", || identities(daemon.pid()).len() == 1);
    assert!(!daemon.said().contains("panicked"), "{}", daemon.said());
    assert_eq!(session.state()["status"], "active");
    session.delete();
}

#[test]
fn swapped_paths_lead_nowhere_else_in_rw() {
    swaps("rw", 0);
}

#[test]
fn swapped_paths_lead_nowhere_else_in_an_overlay() {
    swaps("overlay", OTHER_ID);
}

/// Transfers in a loop until they are told to stop; what they have seen must not be the canary, and what they write must
/// not be outside.
fn transfer(daemon: &Daemon, session: &Session<'_>, canary: &Path, done: &AtomicBool) -> usize {
    let mut count = 0;
    let upload = |path: &str| {
        let metadata = json!({"path": path}).to_string();
        let body = form(&[Part::metadata(&metadata), Part::file(WRITTEN.as_bytes())]);
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: execd\r\nConnection: close\r\nContent-Length: {}\r\nContent-Type: {}\r\n\r\n",
            session.route("/files/upload"),
            body.len(),
            form_type()
        );
        exchange(daemon, &[head.as_bytes(), &body].concat())
    };
    while !done.load(Ordering::Relaxed) {
        for path in [canary.join("f"), PathBuf::from("low"), PathBuf::from("/run/execd-canary")] {
            let path = query(&[("path", path.to_str().unwrap())]);
            let head = format!(
                "GET {} HTTP/1.1\r\nHost: execd\r\nConnection: close\r\n\r\n",
                session.route(&format!("/files/download{path}"))
            );
            let answer = exchange(daemon, head.as_bytes());
            assert!(!tells(&answer), "{path} has read the canary");
            count += 1;
        }
        for path in [
            canary.join("f"),
            canary.join("new"),
            PathBuf::from("low"),
            PathBuf::from("new"),
            PathBuf::from("/etc/execd-new"),
        ] {
            let answer = upload(path.to_str().unwrap());
            assert!(!tells(&answer));
            count += 1;
        }
    }
    count
}

/// The content of an answer in chunks, as far as it goes.
fn content(answer: &[u8]) -> Vec<u8> {
    let split = |bytes: &[u8], at: &[u8]| {
        let at_byte = bytes.windows(at.len()).position(|window| window == at)?;
        Some((bytes[..at_byte].to_vec(), bytes[at_byte + at.len()..].to_vec()))
    };
    let mut content = Vec::new();
    let (_, mut rest) = split(answer, b"\r\n\r\n").unwrap_or_default();
    while let Some((size, after)) = split(&rest, b"\r\n") {
        let size = usize::from_str_radix(&String::from_utf8_lossy(&size), 16).unwrap_or(0).min(after.len());
        if size == 0 {
            break;
        }
        content.extend(&after[..size]);
        rest = after[(size + 2).min(after.len())..].to_vec();
    }
    content
}

/// Sends a request and reads what comes, whole or not.
fn exchange(daemon: &Daemon, request: &[u8]) -> Vec<u8> {
    let mut stream = std::net::TcpStream::connect(daemon.address).unwrap();
    stream.set_read_timeout(Some(common::HANG)).unwrap();
    let mut answer = Vec::new();
    let _ = stream.write_all(request);
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn an_init_that_dies_amid_transfers_lets_nothing_through() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    fs::write(folder.join("low"), "lower\n").unwrap();
    let canary = Canary::plant(daemon.upper_root().join("canary"), 0o777);
    let lower = look(&folder);
    let launcher = machine::children(daemon.pid()).first().unwrap().pid;
    for round in 0..DEATHS {
        let known = machine::children(launcher);
        let session = daemon.create(&workspace(&folder, "overlay"));
        session.output("true");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let transfers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| transfer(&daemon, &session, &canary.folder, &done))).collect();
            std::thread::sleep(std::time::Duration::from_millis(30 + 5 * round as u64));
            // Whichever of these is the session's, and not a spare one.
            for init in
                machine::children(launcher).into_iter().filter(|init| !known.contains(init) || round > 0)
            {
                machine::signal(init.pid, Signal::KILL);
            }
            eventually("it is dead", || session.state()["status"] == "dead");
            std::thread::sleep(std::time::Duration::from_millis(30));
            done.store(true, Ordering::Relaxed);
            assert!(transfers.into_iter().map(|transfer| transfer.join().unwrap()).sum::<usize>() > 20);
        });
        session.delete();
    }
    canary.is_untouched();
    assert_eq!(look(&folder), lower, "the lower was touched");
    assert!(!Path::new("/etc/execd-new").exists());
}
