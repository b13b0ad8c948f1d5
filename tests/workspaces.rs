//! What becomes of what sessions change: root overlays, limits, diffs, commits, forks, and what is kept.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::trees::{apply_layer, assert_same, attribute_functions, copy, script, tree};
use common::{Daemon, OTHER_ID, Session, Setup, eventually, machine, workspace};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// What a session of one overlay begins with.
fn overlay(path: &Path) -> Value {
    workspace(path, "overlay")
}

/// The same, with something to say about its upper.
fn persistent(path: &Path, how: &Value) -> Value {
    json!({"overlays": [{"path": path, "persist": how}]})
}

fn changes(session: &Session<'_>, query: &str) -> Vec<String> {
    let answer = session.daemon.get(&session.route(&format!("/diff?format=json{query}")));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let told = |change: &Value| {
        let text = |key: &str| change[key].as_str().unwrap().to_owned();
        format!("{} {} {}", text("change"), text("type"), text("path"))
    };
    answer.json().as_array().unwrap().iter().map(told).collect()
}

fn commit(session: &Session<'_>, body: &Value) -> Value {
    let answer = session.daemon.post(&session.route("/commit"), body);
    assert_eq!(answer.status, 200, "{body}: {}", answer.text());
    answer.json()
}

fn refused(session: &Session<'_>, body: &Value) -> (u16, String, String) {
    session.daemon.post(&session.route("/commit"), body).failure()
}

fn fork<'a>(session: &Session<'a>) -> Session<'a> {
    let answer = session.daemon.request("POST", &session.route("/fork"), b"");
    assert_eq!(answer.status, 201, "{}", answer.text());
    Session { daemon: session.daemon, id: answer.json()["session_id"].as_str().unwrap().to_owned() }
}

fn uppers(daemon: &Daemon) -> Vec<Value> {
    daemon.get("/v1/isolated/uppers").json()["uppers"].as_array().unwrap().clone()
}

#[test]
fn changes_are_listed() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    script(
        &work,
        "echo a >kept; echo b >changed; mkdir -p gone/deep same; echo c >gone/deep/file; echo d >same/file",
    );
    let session = daemon.create(&overlay(&work));
    assert_eq!(changes(&session, ""), [""; 0]);
    session.output("echo B >changed; rm -r gone; mkdir new; mkfifo new/pipe; ln -s x new/link; chmod 700 same; echo é >'new/é'");
    let root = work.display().to_string();
    let at = |below: &str| format!("{root}/{below}");
    let expected = [
        format!("modified file {}", at("changed")),
        format!("deleted directory {}", at("gone")),
        format!("added directory {}", at("new")),
        format!("added symlink {}", at("new/link")),
        format!("added fifo {}", at("new/pipe")),
        format!("added file {}", at("new/é")),
        format!("modified directory {}", at("same")),
    ];
    assert_eq!(changes(&session, ""), expected);
    // Only some of it.
    assert_eq!(changes(&session, &format!("&path={root}/new/link")), expected[2..4]);
    assert_eq!(changes(&session, "&path=changed"), expected[..1]);
    let whole = daemon.get(&session.route("/diff?format=json")).json();
    let of = |path: String| {
        whole.as_array().unwrap().iter().find(|change| change["path"] == path.as_str()).unwrap().clone()
    };
    assert_eq!(
        (of(at("changed"))["size"].as_u64(), of(at("changed"))["mode"].as_u64()),
        (Some(2), Some(644))
    );
    assert_eq!(of(at("same"))["mode"], 700);
    // A dry run tells the same and does nothing.
    let dry = daemon.post(&session.route("/commit"), &json!({"dry_run": true}));
    assert_eq!((dry.status, dry.json()), (200, whole));
    assert_eq!(fs::read_to_string(work.join("changed")).unwrap(), "b\n");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let Some(daemon) = Setup::new().setting("diff_max_bytes = 100000").start() else { return };
    let (one, two) = (daemon.folder("one"), daemon.folder("two"));
    let session = daemon.create(&json!({"overlays": [{"path": one}, {"path": two}]}));
    let get = |query: &str| session.daemon.get(&session.route(&format!("/diff{query}"))).failure();
    let (status, _, message) = get("");
    assert!(status == 400 && message.contains("one") && message.contains("two"), "{message}");
    for query in ["?format=zip", "?path=/etc", "?path=../x", "?path=one//x"] {
        assert_eq!((get(query).0, get(query).1.as_str()), (400, "INVALID_REQUEST_BODY"), "{query}");
    }
    for body in [
        json!({"on_conflict": "maybe"}),
        json!({"paths": ["/etc"]}),
        json!({"paths": "x"}),
        json!([]),
        json!({"dryrun": true}),
    ] {
        assert_eq!(refused(&session, &body).0, 400, "{body}");
    }
    // Limits.
    session.output(&format!("head -c 200000 /dev/urandom >{}/large", one.display()));
    let (status, _, message) = get(&format!("?path={}", one.display()));
    assert!(status == 413 && message.contains("diff_max_bytes"), "{message}");
    assert_eq!(changes(&session, "").len(), 1);
    // Names that a layer cannot carry.
    session.output(&format!("echo x >{}/.wh.trap", two.display()));
    assert_eq!(get(&format!("?path={}", two.display())).0, 409);
    assert_eq!(changes(&session, &format!("&path={}", two.display())).len(), 1);
    // Sessions without overlays, and none.
    let plain = daemon.session("plain");
    assert_eq!(daemon.get(&plain.route("/diff")).failure().0, 400);
    assert_eq!(refused(&plain, &json!({})).0, 400);
    assert_eq!(daemon.request("POST", &plain.route("/fork"), b"").failure().0, 400);
    let none = "/v1/isolated/session/00000000-0000-0000-0000-000000000000";
    for (method, rest) in [("GET", "/diff"), ("POST", "/commit"), ("POST", "/fork")] {
        let (status, code, _) = daemon.request(method, &format!("{none}{rest}"), b"[").failure();
        assert_eq!((status, code.as_str()), (404, "SESSION_NOT_FOUND"), "{rest}");
    }
    for (persist, field) in [
        (json!({"max_bytes": 1}), "overlays[0].persist.max_bytes"),
        (json!({"max_inodes": 1}), "overlays[0].persist.max_inodes"),
        (json!({"retain_seconds": -1}), "overlays[0].persist.retain_seconds"),
        (json!({"retain": 1}), "overlays[0].persist"),
        (json!([1, 2]), "overlays[0].persist"),
        (json!({"max_bytes": 1_u64 << 60}), "persist.max_bytes"),
        (json!({"retain_seconds": 1 << 30}), "persist.retain_seconds"),
    ] {
        let (status, _, message) = daemon.post_session(&persistent(&one, &persist)).failure();
        assert!(status == 400 && message.starts_with(field), "{persist}: {message}");
    }
}

#[test]
fn the_whole_root_can_be_an_overlay() {
    let Some(daemon) = Setup::new().start() else { return };
    if !machine::has_program("dpkg-deb") {
        return common::skip("dpkg-deb is needed to make a package");
    }
    let before = tree(Path::new("/etc"));
    let session = daemon.create(&overlay(Path::new("/")));
    // A package of its own, installed for good as far as the session goes.
    session.output(
        "mkdir -p /root/p/DEBIAN /root/p/usr/bin /root/p/etc/execd-test
         printf 'Package: execd-test\\nVersion: 1\\nArchitecture: all\\nMaintainer: t <t@t>\\nDescription: t\\n' >/root/p/DEBIAN/control
         printf '#!/bin/sh\\necho installed\\n' >/root/p/usr/bin/execd-test-program; chmod 755 /root/p/usr/bin/execd-test-program
         echo x >/root/p/etc/execd-test/config
         dpkg-deb -b /root/p /root/p.deb >/dev/null && dpkg -i /root/p.deb >/dev/null 2>&1",
    );
    session
        .run("execd-test-program; dpkg -s execd-test | grep ^Status")
        .prints("installed\nStatus: install ok installed\n");
    assert!(!Path::new("/usr/bin/execd-test-program").exists());
    assert_eq!(tree(Path::new("/etc")), before);
    let listed = changes(&session, "");
    assert!(listed.contains(&"added file /usr/bin/execd-test-program".to_owned()), "{listed:?}");
    assert!(listed.contains(&"added file /etc/execd-test/config".to_owned()), "{listed:?}");
    // The sandbox's own places are where they are, other mounts are shown and cannot be written.
    session
        .run("[ -c /dev/null ] && [ -r /proc/self/status ] && [ -d /sys/kernel ] && echo ok")
        .prints("ok\n");
    session.run("touch /sys/kernel/x 2>&1 | grep -c 'Read-only'").prints("1\n");
    let hidden = session.output(&format!("ls -A {}", daemon.upper_root().display()));
    assert_eq!(hidden, "");
    // What is committed of it is only what is asked for.
    let work = daemon.folder("work");
    session.output(&format!("cp -r /root/p {}/p", work.display()));
    commit(&session, &json!({"paths": [work]}));
    assert_eq!(fs::read_to_string(work.join("p/etc/execd-test/config")).unwrap(), "x\n");
    assert!(!Path::new("/usr/bin/execd-test-program").exists() && !Path::new("/root/p").exists());
    assert_eq!(tree(Path::new("/etc")), before);
    session.delete();
    // In memory; and where the kernel does not have it.
    let session = daemon.create(&json!({"overlays": [{"path": "/", "persist": false}]}));
    session.run("echo x >/usr/bin/execd-test-file && cat /usr/bin/execd-test-file").prints("x\n");
    let refused = daemon.post_session(&json!({"overlays": [{"path": "/"}], "uid_mode": "userns"})).failure();
    assert_eq!((refused.0, refused.1.as_str()), (503, "NOT_SUPPORTED"));
    assert!(!Path::new("/usr/bin/execd-test-file").exists());
}

#[test]
fn writers_meet_the_limit() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    let other = daemon.create(&overlay(&work));
    let mib = 1 << 20;
    for (body, is_limit) in [
        (persistent(&work, &json!({"max_bytes": 32 * mib, "max_inodes": 2000})), true),
        (json!({"overlays": [{"path": work, "persist": false}]}), false),
    ] {
        let session = daemon.create(&body);
        let max = if is_limit { 32 } else { 1024 };
        let said = session.output(&format!(
            "dd if=/dev/zero of=big bs=1M count={} 2>&1 | head -1; stat -c %s big",
            max * 2
        ));
        assert!(said.contains("No space left on device"), "{said}");
        let size: u64 = said.lines().last().unwrap().parse().unwrap();
        assert!(size >= (max - 1) * mib && size <= (max + 1) * mib, "{size} of {max} MiB");
        // It lives, and room that is made can be used.
        session.output("rm big; echo x >small; cat small");
        if is_limit {
            let said =
                session.output("i=0; while echo -n >f$i; do i=$((i+1)); done 2>&1 | head -1; ls | wc -l");
            assert!(said.contains("No space left on device"), "{said}");
            let files: u64 = said.lines().last().unwrap().parse().unwrap();
            assert!((1800..2200).contains(&files), "{files}");
            let uppers = session.state()["uppers"].clone();
            assert_eq!(
                (uppers["max"]["bytes"].as_u64(), uppers["max"]["inodes"].as_u64()),
                (Some(32 * mib), Some(2000))
            );
            assert!(["image", "memory"].contains(&uppers["tier"].as_str().unwrap()), "{uppers}");
        }
        // Nobody else notices.
        other.output("echo x >file && rm file");
    }
}

#[test]
fn where_the_kernel_has_no_limit_writing_ends_soon() {
    let setup = Setup::new().setting("upper_tiers = [\"directory\"]").setting("spares = 0");
    let Some(daemon) = setup.start() else { return };
    let work = daemon.folder("work");
    let session = daemon.create(&persistent(&work, &json!({"max_bytes": 20 << 20})));
    let other = daemon.create(&overlay(&work));
    assert_eq!(session.state()["uppers"]["tier"], "directory");
    session.output("head -c 30M /dev/zero >big");
    eventually("it is sealed", || session.state()["uppers"]["sealed"].is_string());
    let refused = session.run("echo x >more");
    assert!(refused.stderr().contains("Read-only file system"), "{}", refused.raw());
    assert_eq!(changes(&session, "").len(), 1);
    other.output("echo x >file");
    // Even while something is being written, which ends.
    let session = daemon.create(&persistent(&work, &json!({"max_bytes": 20 << 20})));
    let run = session.run("exec 9>held; while head -c 1M /dev/zero >&9; do sleep 0.01; done; echo over");
    assert_eq!(run.error(), ("QuotaExceeded", "137"), "{}", run.raw());
    eventually("it is sealed", || session.state()["uppers"]["sealed"].is_string());
    session.run("echo alive").prints("alive\n");
}

#[test]
fn where_no_upper_can_lie_it_is_in_memory() {
    // As in a container without a volume: its own file system is an overlay.
    let on_overlay = r#"for a; do case $a in *.toml) c=$a;; esac; done
        r=$(sed -n 's/^upper_root = "\(.*\)"/\1/p' "$c"); mkdir "$r" "$r.l" "$r.u" "$r.w" &&
        mount -t overlay overlay -o lowerdir="$r.l",upperdir="$r.u",workdir="$r.w" "$r" && exec "$@""#;
    let setup = Setup::new().setting("upper_tiers = [\"directory\", \"memory\"]");
    let Some(daemon) = setup.wrapper(&["unshare", "--mount", "sh", "-c", on_overlay, "sh"]).start() else {
        return;
    };
    let capabilities = daemon.get("/v1/isolated/capabilities").json();
    let tiers = capabilities["uppers"].as_array().unwrap();
    let available = |name: &str| tiers.iter().find(|rung| rung["tier"] == name).unwrap()["available"] == true;
    assert!(!available("directory") && available("memory"), "{capabilities}");
    assert!(capabilities["diff_supported"] == true && capabilities["commit_supported"] == true);
    let work = daemon.folder("work");
    let session = daemon.create(&persistent(&work, &json!({"max_bytes": 16 << 20})));
    assert_eq!(session.state()["uppers"]["tier"], "memory");
    session.run("head -c 20M /dev/zero 2>/dev/null >big; echo $?; rm big; echo x >file").prints("1\n");
    commit(&fork(&session), &json!({}));
    assert!(work.join("file").exists());
    let (status, code, _) = daemon.post_session(&persistent(&work, &json!({"retain_seconds": 9}))).failure();
    assert_eq!((status, code.as_str()), (503, "NOT_SUPPORTED"));
}

#[test]
fn a_commit_is_alone_with_the_files() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    let session = daemon.create(&overlay(&work));
    session.output("mkdir d; for i in $(seq 200); do echo $i >d/$i; done");
    // A background process writes all the time; while a commit goes on it does not.
    session.output("(i=0; while :; do i=$((i+1)); echo $i >one; cp one two; done) >/dev/null 2>&1 &");
    for _ in 0..5 {
        commit(&session, &json!({}));
    }
    let count = |session: &Session<'_>| session.output("cat one");
    let before = count(&session);
    eventually("it goes on afterwards", || count(&session) != before);
    // A run is waited for, or not.
    let stream = session.open_until(&json!({"code": "echo go; sleep 0.5; echo done >late"}), "go");
    let (status, code, message) = refused(&session, &json!({"wait": false}));
    assert_eq!((status, code.as_str()), (409, "CONFLICT"), "{message}");
    assert!(!work.join("late").exists());
    // Whoever only looks goes on.
    assert!(changes(&session, "").len() > 200);
    assert_eq!(daemon.get(&session.route("/diff")).status, 200);
    commit(&session, &json!({}));
    assert_eq!(fs::read_to_string(work.join("late")).unwrap(), "done\n");
    stream.finish();
    assert_eq!(fs::read_dir(work.join("d")).unwrap().count(), 200);
}

#[test]
fn conflicts_are_found() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    script(&work, "echo a >one; echo b >two; mkdir d; echo c >d/three");
    std::thread::sleep(Duration::from_millis(50));
    let session = daemon.create(&overlay(&work));
    session.output("echo A >one; echo B >two; rm -r d; echo N >new");
    std::thread::sleep(Duration::from_millis(50));
    script(&work, "echo theirs >one; echo theirs >d/three");
    let (status, code, message) = refused(&session, &json!({}));
    assert_eq!((status, code.as_str()), (409, "CONFLICT"), "{message}");
    assert!(!work.join("new").exists(), "something was done");
    let report = commit(&session, &json!({"on_conflict": "skip"}));
    assert_eq!(report["skipped_count"], 2, "{report}");
    let read = |name: &str| fs::read_to_string(work.join(name)).unwrap_or_default();
    assert_eq!(
        (read("one").as_str(), read("two").as_str(), read("d/three").as_str()),
        ("theirs\n", "B\n", "theirs\n")
    );
    // What a commit of one's own has changed is no conflict.
    session.output("echo BB >two; echo NN >new");
    let report = commit(&session, &json!({"paths": ["two", "new"]}));
    assert_eq!((read("two").as_str(), read("new").as_str()), ("BB\n", "NN\n"), "{report}");
    commit(&session, &json!({"on_conflict": "overwrite"}));
    assert_eq!(read("one"), "A\n");
    assert!(!work.join("d").exists());
}

#[test]
fn privileges_stay_inside() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    let session = daemon.create(&overlay(&work));
    let code = "cp /bin/true suid; chmod 6755 suid; mkdir shared; chmod 2775 shared
        setattr user.overlay.redirect ../../etc shared && setattr user.overlay.opaque y shared";
    session.output(&format!("{}{code}", attribute_functions()));
    commit(&session, &json!({}));
    assert_eq!(fs::metadata(work.join("suid")).unwrap().permissions().mode() & 0o7777, 0o755);
    let mut names = [0_u8; 1024];
    let length = rustix::fs::llistxattr(work.join("shared"), &mut names[..]).unwrap_or(0);
    assert!(!String::from_utf8_lossy(&names[..length]).contains("overlay"));
    commit(&session, &json!({"allow_privileged": true}));
    assert_eq!(fs::metadata(work.join("suid")).unwrap().permissions().mode() & 0o7777, 0o6755);
}

#[test]
fn a_fork_begins_where_its_source_is() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    script(&work, "mkdir -p d/e; echo l >d/file; echo k >kept");
    for body in [
        json!({"overlays": [{"path": work}], "uid": OTHER_ID, "gid": OTHER_ID}),
        json!({"overlays": [{"path": work, "persist": false}]}),
        json!({"overlays": [{"path": work}], "uid_mode": "userns"}),
    ] {
        fs::set_permissions(&work, fs::Permissions::from_mode(0o777)).unwrap();
        let source = daemon.create(&body);
        source.output(
            "rm kept; mkdir n; echo one >n/a; ln n/a n/b; ln -s a n/l; truncate -s 1G n/hole; mkfifo n/p",
        );
        let look = "find . -printf '%P|%y|%m|%U|%T@|%l|%n\\n' | sort; cat n/a";
        let child = fork(&source);
        assert_eq!(child.output(look), source.output(look), "{body}");
        child.output("echo two >n/a; echo x >child");
        source.run("cat n/b; ls child 2>&1 | grep -c No").prints("one\n1\n");
        child.run("cat n/b").prints("two\n");
        let grandchild = fork(&child);
        grandchild.run("cat n/b; ls child").prints("two\nchild\n");
        source.delete();
        grandchild.run("cat n/b; pwd").prints(&format!("two\n{}\n", work.display()));
    }
    assert!(work.join("kept").exists());
}

#[test]
fn overlays_can_begin_anew_after_a_commit() {
    let Some(daemon) = Setup::new().start() else { return };
    let (work, other) = (daemon.folder("work"), daemon.folder("other"));
    script(&work, "mkdir -p d inner; echo l >d/file");
    let body =
        json!({"overlays": [{"path": work}, {"path": work.join("inner")}, {"path": other, "mode": "rw"}]});
    let session = daemon.create(&body);
    session.output("cd d; export KEPT=yes; head -c 5M /dev/zero >big; rm file; echo i >../inner/i");
    let reset = json!({"reset_upper_after": true});
    let busy = session.run("sleep 60 >/dev/null 2>&1 & echo started");
    busy.prints("started\n");
    assert_eq!(refused(&session, &reset).0, 409);
    assert!(!work.join("d/big").exists(), "something was done");
    session.run("kill %1; wait; echo ended");
    commit(&session, &reset);
    assert_eq!(changes(&session, ""), [""; 0]);
    assert!(work.join("d/big").exists() && !work.join("d/file").exists() && work.join("inner/i").exists());
    session.run("pwd; echo $KEPT; ls").prints(&format!("{}\nyes\nbig\n", work.join("d").display()));
    // The lower shows as it is now, and changes go on being kept from it.
    script(&work, "echo theirs >d/theirs");
    session.run("cat theirs; echo mine >mine; rm big; ls; ls ../inner").prints("theirs\nmine\ntheirs\ni\n");
    assert!(work.join("d/big").exists());
    assert_eq!(changes(&session, "").len(), 2);
    commit(&session, &reset);
    assert!(!work.join("d/big").exists());
    session.run(&format!("echo w >{}/through; ls", other.display())).prints("mine\ntheirs\n");
    assert!(other.join("through").exists());
    // One that cannot says so before it does anything.
    let root = daemon.create(&overlay(Path::new("/")));
    root.output("echo x >/usr/execd-test-file");
    assert_eq!(refused(&root, &reset).1, "NOT_SUPPORTED");
    assert!(!Path::new("/usr/execd-test-file").exists());
}

#[test]
fn what_is_kept_outlives_its_session_and_its_daemon() {
    let Some(daemon) = Setup::new().start() else { return };
    let (work, other) = (daemon.folder("work"), daemon.folder("other"));
    script(&work, "echo old >file; echo gone >gone");
    let original = daemon.path("original");
    copy(&work, &original);
    let kept = daemon.create(&persistent(&work, &json!({"retain_seconds": 3600})));
    kept.output("echo new >file; rm gone; mkdir d; echo x >d/x");
    let short = daemon.create(&persistent(&other, &json!({"retain_seconds": 4})));
    short.output("echo short >short");
    let none = daemon.create(&overlay(&other));
    none.output("echo none >none");
    let deleted = daemon.create(&persistent(&other, &json!({"retain_seconds": 3600})));
    deleted.output("echo deleted >deleted");
    deleted.delete();
    let listed = uppers(&daemon);
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0]["session_id"], deleted.id.as_str());
    let ids = [&kept, &short, &none, &deleted].map(|session| session.id.clone());
    let [kept, short, none, deleted] = ids;
    let daemon = daemon.killed_and_started_again();
    let listed = uppers(&daemon);
    let of = |id: &str| listed.iter().find(|upper| upper["session_id"] == id).cloned();
    assert_eq!(listed.len(), 3, "{listed:?}");
    assert!(of(&none).is_none());
    let of_kept = of(&kept).unwrap();
    assert_eq!(of_kept["overlays"][0]["path"], work.to_str().unwrap());
    assert!(of_kept["expires_at"].is_string() && of_kept["ended_at"].is_string(), "{of_kept}");
    // As the session's own route, and as that of the uppers.
    let as_session = Session { daemon: &daemon, id: kept.clone() };
    assert_eq!(changes(&as_session, "").len(), 4);
    assert_eq!(daemon.get(&as_session.route("")).status, 404);
    let layer = daemon.get(&format!("/v1/isolated/uppers/{kept}/diff"));
    assert_eq!(layer.status, 200);
    apply_layer(&layer.body, &original);
    commit(&as_session, &json!({}));
    assert_same(&tree(&original), &tree(&work), true, "applied and committed");
    assert_eq!(fs::read_to_string(work.join("file")).unwrap(), "new\n");
    assert!(!work.join("gone").exists());
    assert_eq!(daemon.request("DELETE", &format!("/v1/isolated/uppers/{kept}"), b"").status, 200);
    assert_eq!(daemon.request("DELETE", &format!("/v1/isolated/uppers/{kept}"), b"").status, 404);
    eventually("one expires", || !uppers(&daemon).iter().any(|upper| upper["session_id"] == short.as_str()));
    assert_eq!(daemon.get(&format!("/v1/isolated/uppers/{short}/diff")).status, 404);
    assert_eq!(uppers(&daemon).len(), 1);
    assert_eq!(machine::uppers(&daemon.upper_root()), [deleted]);
    assert_eq!(fs::read_dir(&other).unwrap().count(), 0);
}

#[test]
fn a_commit_that_is_killed_is_finished_later() {
    let Some(mut daemon) = Setup::new().start() else { return };
    let (work, plain) = (daemon.path("work"), daemon.path("plain"));
    fs::create_dir(&work).unwrap();
    let beginning = "mkdir -p a/b c; for i in $(seq 40); do head -c ${i}0000 /dev/zero | tr '\\0' l >a/$i; echo $i >c/$i; done; mkdir swap";
    script(&work, beginning);
    let change = "for i in $(seq 40); do head -c ${i}1111 /dev/zero | tr '\\0' u >a/$i; done; rm -r c; echo file >c; rm -r swap; mkdir swap swap/in; echo s >swap/in/s
        mkdir a/new; ln a/1 a/new/hard; ln -s x a/new/soft; rm a/2; chmod 751 a";
    // What it is to come to.
    copy(&work, &plain);
    script(&plain, change);
    let whole = tree(&plain);
    // How long one takes.
    let session = daemon.create(&persistent(&work, &json!({"retain_seconds": 3600})));
    session.output(change);
    let began = Instant::now();
    commit(&session, &json!({}));
    let takes = began.elapsed();
    assert_same(&tree(&work), &whole, false, "without being killed");
    session.delete();
    let mut cut_off = 0;
    for round in 0..50_u32 {
        fs::remove_dir_all(&work).unwrap();
        fs::create_dir(&work).unwrap();
        script(&work, beginning);
        let session = daemon.create(&persistent(&work, &json!({"retain_seconds": 3600})));
        session.output(change);
        let id = session.id.clone();
        let (address, route) = (daemon.address, session.route("/commit"));
        let asked = std::thread::spawn(move || {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let _ = stream.write_all(
                format!(
                    "POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
                )
                .as_bytes(),
            );
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer.contains("200 OK")
        });
        std::thread::sleep(takes * round / 50);
        daemon = daemon.killed_and_started_again();
        cut_off += u32::from(!asked.join().unwrap());
        commit(&Session { daemon: &daemon, id: id.clone() }, &json!({"on_conflict": "fail"}));
        assert_same(&tree(&work), &whole, false, &format!("round {round}"));
        assert_eq!(daemon.request("DELETE", &format!("/v1/isolated/uppers/{id}"), b"").status, 200);
    }
    assert!(cut_off > 10, "only {cut_off} commits were cut off");
}

#[test]
fn a_half_committed_upper_is_kept_unasked() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    let session = daemon.create(&overlay(&work));
    session.output("for i in $(seq 3000); do echo $i >$i; done; head -c 200M /dev/zero >big");
    let id = session.id.clone();
    let (address, route) = (daemon.address, session.route("/commit"));
    std::thread::spawn(move || common::http::request(address, None, "POST", &route, b"{}").status);
    eventually("it has begun", || fs::read_dir(&work).unwrap().count() > 10);
    let daemon = daemon.killed_and_started_again();
    let session = Session { daemon: &daemon, id };
    let listed = uppers(&daemon);
    if listed.is_empty() {
        // It was through already.
        assert_eq!(fs::read_dir(&work).unwrap().count(), 3001);
        return;
    }
    assert_eq!((listed.len(), listed[0]["half_committed"].as_bool()), (1, Some(true)));
    commit(&session, &json!({}));
    assert_eq!(fs::read_dir(&work).unwrap().count(), 3001);
    assert_eq!(fs::metadata(work.join("big")).unwrap().size(), 200 << 20);
}

#[test]
fn what_is_written_through_a_mapping_is_committed() {
    let Some(daemon) = Setup::new().start() else { return };
    if !machine::has_program("python3") {
        return common::skip("python3 is needed to map a file into memory");
    }
    let code = "import mmap, os, time
f = open('mapped', 'w+b'); f.write(b'0' * 4096); f.flush(); m = mmap.mmap(f.fileno(), 4096); m[0:5] = b'FIRST'
open('first', 'w').close()
while not os.path.exists('go'): time.sleep(0.01)
m[0:6] = b'SECOND'
open('second', 'w').close(); time.sleep(60)";
    for persist in [true, false] {
        let work = daemon.folder(&format!("work-{persist}"));
        let session = daemon.create(&json!({"overlays": [{"path": work, "persist": persist}]}));
        session.output(&format!(
            "python3 -c \"{code}\" >/dev/null 2>&1 & while [ ! -e first ]; do sleep 0.01; done"
        ));
        // Until its times are so old that a file counts as settled.
        std::thread::sleep(Duration::from_millis(200));
        commit(&session, &json!({}));
        assert!(fs::read(work.join("mapped")).unwrap().starts_with(b"FIRST0"));
        session.output("touch go; while [ ! -e second ]; do sleep 0.01; done");
        commit(&session, &json!({}));
        assert!(fs::read(work.join("mapped")).unwrap().starts_with(b"SECOND"), "persist {persist}");
        session.delete();
        assert_eq!(machine::uppers(&daemon.upper_root()), [""; 0]);
    }
}

#[test]
fn broken_records_harm_nobody() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    let session = daemon.create(&persistent(&work, &json!({"retain_seconds": 3600})));
    session.output("echo x >file");
    let id = session.id.clone();
    session.delete();
    let root = daemon.upper_root();
    let record = fs::read_to_string(root.join(&id).join("record.json")).unwrap();
    let place = |name: &str, text: &str| {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join("record.json"), text).unwrap();
    };
    let other = "00000000-0000-4000-8000-000000000001";
    let mut endless: Value = serde_json::from_str(&record).unwrap();
    endless["session"] = json!(other);
    endless["retain_seconds"] = json!(u64::MAX);
    place(other, &endless.to_string());
    endless["ended"] = json!({"sec": i64::MAX, "nsec": 0});
    endless["session"] = json!("00000000-0000-4000-8000-000000000002");
    place("00000000-0000-4000-8000-000000000002", &endless.to_string());
    place("00000000-0000-4000-8000-000000000003", "{");
    place("00000000-0000-4000-8000-000000000004", &record);
    place("no-session", &record);
    fs::create_dir(root.join("pipe")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("pipe/record.json"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    fs::write(root.join("stray"), "x").unwrap();
    let daemon = daemon.killed_and_started_again();
    let listed = uppers(&daemon);
    let ids: Vec<&str> = listed.iter().map(|upper| upper["session_id"].as_str().unwrap()).collect();
    assert!(ids.contains(&id.as_str()) && ids.contains(&other) && ids.len() == 3, "{ids:?}");
    assert_eq!(daemon.get(&format!("/v1/isolated/uppers/{other}/diff")).status, 500);
    let kept = Session { daemon: &daemon, id };
    commit(&kept, &json!({}));
    assert!(work.join("file").exists());
    // What looks after them still does.
    let short = daemon.create(&persistent(&work, &json!({"retain_seconds": 1})));
    short.delete();
    eventually("it expires", || {
        !uppers(&daemon).iter().any(|upper| upper["session_id"] == short.id.as_str())
    });
}

#[test]
fn what_was_made_for_no_session_is_not_kept() {
    let Some(daemon) = Setup::new().start() else { return };
    let work = daemon.folder("work");
    let mut body = persistent(&work, &json!({"retain_seconds": 3600}));
    body["binds"] = json!([{"source": work, "dest": "/no/such/place"}]);
    assert_eq!(daemon.post_session(&body).failure().0, 400);
    assert_eq!(uppers(&daemon), [Value::Null; 0]);
    assert_eq!(machine::uppers(&daemon.upper_root()), [""; 0]);
}

#[test]
fn all_uppers_together_have_a_limit() {
    let Some(daemon) = Setup::new().setting("upper_max_bytes = 30000000").start() else { return };
    let work = daemon.folder("work");
    let (small, large) = (daemon.create(&overlay(&work)), daemon.create(&overlay(&work)));
    small.output("head -c 5M /dev/urandom >file");
    large.output("head -c 40M /dev/urandom >file");
    eventually("the largest is sealed", || large.state()["uppers"]["sealed"].is_string());
    assert!(large.run("echo x >more").stderr().contains("Read-only file system"));
    small.output("echo x >more");
    // Deleting it makes room again.
    large.delete();
    eventually("there is room", || daemon.post_session(&overlay(&work)).status == 201);
}
