//! Sessions that are made of spare sandboxes: nobody can tell, except by the time it takes.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::{Daemon, OTHER_ID, Session, Setup, eventually, machine, workspace};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

/// How many a daemon keeps by default.
const SPARES: usize = 2;

/// A daemon whose mounts nobody else changes: other tests mount things, and that would throw its spares away.
fn undisturbed() -> Setup {
    Setup::new().wrapper(&["unshare", "--mount"])
}

/// Waits until a daemon with this many sessions, each an init and an idle shell, has all its spares.
fn spares_are_ready(daemon: &Daemon, sessions: usize) {
    eventually("the spares are ready", || {
        machine::descendants(daemon.pid()).len() == 1 + 2 * (sessions + SPARES)
            && daemon.said().matches("\"session created\"").count() >= sessions
    });
}

/// Whether each session so far was made of a spare.
fn from_spare(daemon: &Daemon) -> Vec<bool> {
    let said = daemon.said();
    let records = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let created = records.filter(|record| record["message"] == "session created");
    created.map(|record| record["from_spare"].as_bool().unwrap()).collect()
}

/// A second session, made of a spare, of a daemon that has one already.
fn made_of_spare<'a>(daemon: &'a Daemon, body: &Value) -> Session<'a> {
    daemon.create(body);
    spares_are_ready(daemon, 1);
    let session = daemon.create(body);
    made(daemon, &[false, true]);
    session
}

/// Asserts that the last sessions were made of spares or not; the log is read a moment later.
fn made(daemon: &Daemon, expected: &[bool]) {
    eventually(&format!("the log ends in {expected:?}"), || from_spare(daemon).ends_with(expected));
}

/// Everything a program can find out about where and what it is, one thing a line.
const WHO_AM_I: &str = r#"
pwd; echo "$PWD $$ $- $0 $SHLVL $#"; env | sort; declare -p OLDPWD; shopt; trap -p; umask; ulimit -a
((SECONDS < 60)) && echo "young"
cut -d' ' -f4- /proc/self/mountinfo | sed 's|/fd/[0-9]*|/fd/N|g' | sort
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp):' /proc/self/status
readlink /proc/self/fd/* /proc/$$/cwd | sed 's|:.*||; s|^/proc/.*|/proc|'
cat /proc/self/cgroup | sed 's/execd.*//'; hostname; id; ls -ld . /tmp /run /dev/shm; jobs; alias; declare -F
echo "${BASH_SOURCE[@]}" "$LINENO"; kill -l | wc -l; cat /proc/self/oom_score_adj
"#;

#[test]
fn a_session_made_of_a_spare_is_like_any_other() {
    let Some(fresh) = undisturbed().setting("session.spares = 0").start() else { return };
    let Some(daemon) = undisturbed().start() else { return };
    let body = |daemon: &Daemon| {
        let (one, deep) = (daemon.folder("one"), daemon.folder("one/deep it's"));
        json!({
            "overlays": [{"path": one}, {"path": deep, "mode": "rw"}],
            "extra_writable": [daemon.folder("extra")],
            "binds": [{"source": daemon.folder("ro"), "readonly": true}],
        })
    };
    let spare = made_of_spare(&daemon, &body(&daemon));
    let told = |session: &Session<'_>| {
        let run = session.run(WHO_AM_I);
        assert_eq!(run.exit_code(), Some(0), "{}", run.raw());
        // Each daemon has a folder of its own, and file systems have numbers.
        let dir = session.daemon.dir.path().file_name().unwrap().to_str().unwrap().to_owned();
        format!("{}{}", run.stdout(), run.stderr()).replace(&dir, "DIR")
    };
    let expected = told(&fresh.create(&body(&fresh)));
    assert!(expected.contains("young") && expected.contains("declare -x OLDPWD"), "{expected}");
    similar(&told(&spare), &expected);
    spare.run("touch \"deep it's/through\" here; ls").prints("deep it's\nhere\n");
    assert!(daemon.path("one/deep it's/through").exists() && !daemon.path("one/here").exists());
    // Also after its shell had to be replaced without a word of where it was.
    assert_eq!(spare.run("cd /; kill -9 $$").exit_code(), Some(137));
    spare.run("pwd").prints(&format!("{}\n", daemon.path("one").display()));
}

/// Compares line by line, which shows what differs.
fn similar(got: &str, expected: &str) {
    for (got, expected) in got.lines().zip(expected.lines()) {
        assert_eq!(got, expected);
    }
    assert_eq!(got.lines().count(), expected.lines().count(), "{got}\n---\n{expected}");
}

/// A file system on a folder of the host, for as long as this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: PathBuf) -> Self {
        mount("none", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn spares_do_not_outlive_a_change_of_the_hosts_mounts() {
    let Some(daemon) = Setup::new().start() else { return };
    let body = workspace(&daemon.folder("w"), "overlay");
    let volume = daemon.folder("volume");
    daemon.create(&body);
    spares_are_ready(&daemon, 1);
    let mounted = Mounted::new(volume.clone());
    fs::write(volume.join("file"), "on the volume\n").unwrap();
    let session = daemon.create(&body);
    let show = format!("cat {}/file", volume.display());
    session.run(&show).prints("on the volume\n");
    spares_are_ready(&daemon, 2);
    drop(mounted);
    assert_ne!(daemon.create(&body).run(&show).exit_code(), Some(0), "an old view of the host");
}

#[test]
fn spares_become_of_the_kind_that_is_asked_for() {
    let Some(daemon) = undisturbed().start() else { return };
    let folder = daemon.folder("w");
    let plain = workspace(&folder, "overlay");
    let mut other = workspace(&folder, "overlay");
    other["uid"] = json!(OTHER_ID);
    other["share_net"] = json!(false);
    daemon.create(&plain).delete();
    spares_are_ready(&daemon, 0);
    for body in [&other, &plain, &other, &other] {
        daemon.create(body).delete();
        eventually("things are quiet", || machine::descendants(daemon.pid()).len() == 1 + 2 * SPARES);
    }
    // One of another kind in between does not change the spares; the second in a row does.
    made(&daemon, &[false, false, true, false, false]);
    eventually("the spares are of the other kind", || {
        daemon.create(&other).delete();
        from_spare(&daemon).last() == Some(&true)
    });
    spares_are_ready(&daemon, 0);
    let session = daemon.create(&other);
    made(&daemon, &[true]);
    session.run("id -u; cut -s -d: -f1 /proc/net/dev | tr -d ' '").prints(&format!("{OTHER_ID}\nlo\n"));
}

#[test]
fn hurt_spares_are_replaced() {
    let Some(daemon) = undisturbed().start() else { return };
    let body = workspace(&daemon.folder("w"), "rw");
    daemon.create(&body).delete();
    spares_are_ready(&daemon, 0);
    for spare in machine::descendants(daemon.pid()).into_iter().skip(1).rev() {
        machine::signal(spare.pid, Signal::KILL);
    }
    daemon.create(&body).run("echo alive").prints("alive\n");
    spares_are_ready(&daemon, 1);
    daemon.create(&body).run("echo alive").prints("alive\n");
    made(&daemon, &[true]);
}

#[test]
fn nothing_is_passed_on_from_session_to_session() {
    let Some(daemon) = undisturbed().start() else { return };
    let body = workspace(&daemon.folder("w"), "overlay");
    let look = "cat /tmp/mark /run/mark /dev/shm/mark mark; echo $MARK; compgen -A function mark; set -o";
    let clean = daemon.create(&body).run(look).raw();
    assert!(!clean.contains("SECRET"));
    for _ in 0..30 {
        let session = daemon.create(&body);
        assert!(!session.run(look).raw().contains("SECRET"));
        session.output("export MARK=SECRET; mark() { echo SECRET; }; set -f");
        session.output("for dir in /tmp /run /dev/shm .; do echo SECRET >$dir/mark; done");
        session.delete();
    }
    assert!(from_spare(&daemon).into_iter().filter(|spare| *spare).count() > 15, "hardly any spares");
}
