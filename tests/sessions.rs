//! Sessions: their life from creation to deletion, what they see of the host's files, and who they are.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Daemon, OTHER_ID, Session, Setup, eventually, machine, workspace};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("{}: {error}", path.display()))
}

/// A folder with one file in it.
fn filled(daemon: &Daemon, name: &str) -> std::path::PathBuf {
    let folder = daemon.folder(name);
    fs::write(folder.join("file"), "host\n").unwrap();
    folder
}

fn refuses(session: &Session<'_>, code: &str, why: &str) {
    let run = session.run(code);
    assert!(run.exit_code() != Some(0) && run.stderr().contains(why), "{code}: {}", run.raw());
}

#[test]
fn a_session_is_created_shown_listed_and_deleted() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    let answer = daemon.post_session(&workspace(&folder, "rw"));
    assert_eq!((answer.status, answer.head.header("content-type")), (201, Some("application/json")));
    let id = answer.json()["session_id"].as_str().unwrap().to_owned();
    assert_eq!((id.len(), id.as_bytes()[14]), (36, b'4'), "no version 4 UUID: {id}");
    let session = Session { daemon: &daemon, id: id.clone() };
    let state = session.state();
    assert_eq!((&state["status"], &state["session_id"]), (&json!("active"), &json!(id)));
    assert_eq!(state["workspace"], json!({"path": folder, "mode": "rw"}));
    assert_eq!((&state["created_at"], &state["profile"]), (&answer.json()["created_at"], &json!("strict")));
    assert_eq!(state["last_run_at"], state["created_at"]);
    let list = daemon.get("/v1/isolated/sessions").json();
    let entry = &list["sessions"][0];
    for key in ["session_id", "status", "created_at", "last_run_at"] {
        assert_eq!(entry[key], state[key], "{key}");
    }
    session.output(":");
    assert_ne!(session.state()["last_run_at"], state["created_at"]);
    session.delete();
    assert_eq!(daemon.get("/v1/isolated/sessions").json(), json!({"sessions": []}));
    for (method, rest) in [("GET", ""), ("DELETE", ""), ("POST", "/run")] {
        let (status, code, _) = daemon.request(method, &session.route(rest), b"{}").failure();
        assert_eq!((status, code.as_str()), (404, "SESSION_NOT_FOUND"), "{method}");
    }
}

#[test]
fn what_was_asked_for_is_echoed() {
    let Some(daemon) = Setup::new().start() else { return };
    let (a, b, c) = (daemon.folder("a"), daemon.folder("b"), daemon.folder("c"));
    std::os::unix::fs::symlink(&c, daemon.path("link")).unwrap();
    let body = json!({
        "profile": "balanced", "overlays": [{"path": a, "mode": "overlay", "persist": false}, {"path": b, "mode": "ro"}],
        "extra_writable": [daemon.path("link")], "binds": [{"source": c, "dest": a, "readonly": true}],
        "share_net": false, "uid": OTHER_ID, "gid": OTHER_ID, "idle_timeout_seconds": 77,
        "env_passthrough": {"mode": "allow", "keys": ["PATH"]},
    });
    let state = daemon.create(&body).state();
    for key in ["profile", "share_net", "uid", "gid", "idle_timeout_seconds", "env_passthrough", "binds"] {
        assert_eq!(state[key], body[key], "{key}");
    }
    assert_eq!(
        state["overlays"],
        json!([
            {"path": a, "mode": "overlay", "persist": false}, {"path": b, "mode": "ro"},
        ])
    );
    assert_eq!((&state["extra_writable"], &state["uid_mode"]), (&json!([c]), &json!("setpriv")));
    assert_eq!(state.get("workspace"), None, "there is more than one mount");
    assert!(state["idle_remaining_seconds"].as_u64().unwrap() <= 77);
}

#[test]
fn idle_sessions_expire_and_busy_ones_do_not() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["idle_timeout_seconds"] = json!(2);
    let (idle, busy) = (daemon.create(&body), daemon.create(&body));
    let run = busy.open(&json!({"code": "sleep 5; echo survived"}));
    eventually("the idle one is gone", || !daemon.sessions().contains(&idle.id));
    assert!(daemon.sessions().contains(&busy.id));
    run.finish().prints("survived\n");
    eventually("the other one is gone too", || daemon.sessions().is_empty());
    assert_eq!(daemon.get(&busy.route("")).status, 404);
}

#[test]
fn the_idle_timeout_has_a_default_and_can_be_switched_off() {
    let Some(daemon) = Setup::new().setting("session.idle_timeout_seconds = 1").start() else { return };
    let by_default = daemon.session("w");
    assert_eq!(by_default.state()["idle_timeout_seconds"], 1);
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["idle_timeout_seconds"] = json!(0);
    let never = daemon.create(&body);
    assert_eq!(never.state().get("idle_remaining_seconds"), None);
    eventually("only the one without a timeout is left", || daemon.sessions() == [never.id.as_str()]);
    never.run("echo here").prints("here\n");
}

#[test]
fn rw_writes_through() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = filled(&daemon, "w");
    let session = daemon.create(&workspace(&folder, "rw"));
    session.output("cat file; echo inside >file; mkdir d; echo new >d/n; rm -f nonesuch");
    assert_eq!((text(&folder.join("file")), text(&folder.join("d/n"))), ("inside\n".into(), "new\n".into()));
    fs::write(folder.join("later"), "later\n").unwrap();
    session.run("cat later").prints("later\n");
    session.delete();
    assert_eq!(text(&folder.join("d/n")), "new\n");
}

#[test]
fn ro_refuses_writes() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = filled(&daemon, "w");
    let session = daemon.create(&workspace(&folder, "ro"));
    session.run("cat file").prints("host\n");
    for code in
        ["echo x >file", "echo x >new", "mkdir d", "rm file", "chmod 600 file", "mv file other", "ln -s a b"]
    {
        refuses(&session, code, "Read-only file system");
    }
    assert_eq!((text(&folder.join("file")), machine::names(&folder).len()), ("host\n".into(), 1));
}

#[test]
fn an_overlay_keeps_the_host_untouched() {
    let Some(daemon) = Setup::new().start() else { return };
    for persist in [true, false] {
        let folder = filled(&daemon, &format!("w-{persist}"));
        fs::create_dir(folder.join("dir")).unwrap();
        fs::write(folder.join("dir/deep"), "deep\n").unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o751)).unwrap();
        let overlay = json!({"path": folder, "mode": "overlay", "persist": persist});
        let session = daemon.create(&json!({"overlays": [overlay]}));
        session.run("stat -c %a .; cat file dir/deep").prints("751\nhost\ndeep\n");
        session.output("echo inside >file; echo new >new; rm dir/deep; chmod 700 dir; mkdir made");
        session.run("cat file new; ls dir; stat -c %a dir").prints("inside\nnew\n700\n");
        assert_eq!(text(&folder.join("file")) + &text(&folder.join("dir/deep")), "host\ndeep\n");
        assert_eq!(machine::names(&folder).len(), 2);
        assert_eq!(fs::metadata(folder.join("dir")).unwrap().mode() & 0o777, 0o755);
        let uppers = machine::names(&daemon.upper_root());
        assert_eq!(uppers.contains(&session.id), persist && is_upper_usable(&daemon), "{uppers:?}");
        session.delete();
        assert!(!daemon.upper_root().join(&session.id).exists());
        // The next session starts from the host's state again.
        daemon.create(&json!({"overlays": [overlay]})).run("cat file").prints("host\n");
    }
}

/// Where `upper_root` lies on an overlay itself, execd uses memory.
fn is_upper_usable(daemon: &Daemon) -> bool {
    let file_system = rustix::fs::statfs(daemon.upper_root()).unwrap();
    file_system.f_type as u64 != 0x794c_7630
}

#[test]
fn full_uppers_refuse_another_overlay_and_nothing_else() {
    let Some(daemon) = Setup::new().setting("upper_max_bytes = 1000000").start() else { return };
    let folder = daemon.folder("w");
    let full = daemon.create(&workspace(&folder, "overlay"));
    full.output("head -c 2000000 /dev/urandom >file");
    if !is_upper_usable(&daemon) {
        return common::skip("upper_root lies on an overlay itself");
    }
    let mut answer = daemon.post_session(&workspace(&folder, "overlay"));
    // What a file holds is known once it has been written back.
    eventually("the limit is noticed", || {
        full.output("sync file");
        answer = daemon.post_session(&workspace(&folder, "overlay"));
        answer.status != 201
    });
    let (status, code, message) = answer.failure();
    assert_eq!((status, code.as_str()), (507, "RUNTIME_ERROR"), "{message}");
    assert!(message.contains("upper_max_bytes"), "{message}");
    daemon.create(&workspace(&folder, "rw")).run("echo in").prints("in\n");
    daemon.create(&json!({"overlays": [{"path": folder, "persist": false}]})).run("echo in").prints("in\n");
    full.delete();
    eventually("there is room again", || daemon.post_session(&workspace(&folder, "overlay")).status == 201);
}

#[test]
fn overlays_nest_in_any_order() {
    let Some(daemon) = Setup::new().start() else { return };
    let outer = filled(&daemon, "outer");
    let inner = filled(&daemon, "outer/inner");
    let deepest = filled(&daemon, "outer/inner/deepest");
    let body = json!({"overlays": [
        {"path": deepest, "mode": "ro"}, {"path": outer, "mode": "overlay"}, {"path": inner, "mode": "rw"},
    ]});
    let session = daemon.create(&body);
    session.run(&format!("cd {}; pwd", outer.display())).prints(&format!("{}\n", outer.display()));
    session.output("echo changed >file; echo changed >inner/file");
    refuses(&session, "echo changed >inner/deepest/file", "Read-only file system");
    let seen = [&outer, &inner, &deepest].map(|folder| text(&folder.join("file")));
    assert_eq!(seen, ["host\n", "changed\n", "host\n"]);
    session.run("cat file inner/file inner/deepest/file").prints("changed\nchanged\nhost\n");
}

#[test]
fn extra_writable_folders_and_binds() {
    let Some(daemon) = Setup::new().start() else { return };
    let (folder, extra) = (daemon.folder("w"), filled(&daemon, "extra"));
    let (read, write) = (filled(&daemon, "read"), filled(&daemon, "write"));
    let (here, there) = (daemon.folder("w/here"), daemon.folder("w/there"));
    let file = filled(&daemon, "single").join("file");
    fs::write(folder.join("one"), "").unwrap();
    let mut body = workspace(&folder, "overlay");
    body["extra_writable"] = json!([extra]);
    body["binds"] = json!([
        {"source": read, "dest": here, "readonly": true}, {"source": write, "dest": there},
        {"source": file, "dest": folder.join("one"), "readonly": true},
    ]);
    let session = daemon.create(&body);
    session.output(&format!(
        "echo inside >{}/file; cd {}; echo inside >there/file",
        extra.display(),
        folder.display()
    ));
    assert_eq!(text(&extra.join("file")) + &text(&write.join("file")), "inside\ninside\n");
    session.run("cat here/file one").prints("host\nhost\n");
    refuses(&session, "echo x >here/file", "Read-only file system");
    refuses(&session, "echo x >one", "Read-only file system");
    // What is beside them is the container's root: read-only.
    refuses(&session, &format!("echo x >{}/file", read.display()), "Read-only file system");
}

#[test]
fn tmp_is_private_when_strict_and_shared_when_balanced() {
    let Some(daemon) = Setup::new().start() else { return };
    let on_host = tempfile::Builder::new().prefix("execd-test-").tempfile_in("/tmp").unwrap();
    let name = on_host.path().display().to_string();
    let body = workspace(&daemon.folder("w"), "rw");
    let (one, two) = (daemon.create(&body), daemon.create(&body));
    one.run("ls -A /tmp; stat -c %a /tmp").prints("1777\n");
    one.output("echo secret >/tmp/mine");
    two.run("ls -A /tmp").prints("");
    let mut body = body;
    body["profile"] = json!("balanced");
    let balanced = daemon.create(&body);
    balanced.output(&format!("echo inside >{name}"));
    assert_eq!(text(on_host.path()), "inside\n");
    balanced.run("ls /tmp/mine 2>/dev/null || echo none").prints("none\n");
}

#[test]
fn a_mount_on_tmp_decides_about_tmp() {
    let Some(daemon) = Setup::new().start() else { return };
    let on_host = tempfile::Builder::new().prefix("execd-test-").tempfile_in("/tmp").unwrap();
    let name = on_host.path().display().to_string();
    let rw = daemon.create(&workspace(Path::new("/tmp"), "rw"));
    rw.output(&format!("echo inside >{name}"));
    assert_eq!(text(on_host.path()), "inside\n");
    let overlay = daemon.create(&workspace(Path::new("/tmp"), "overlay"));
    overlay.output(&format!("echo hidden >{name}"));
    assert_eq!(text(on_host.path()), "inside\n");
}

#[test]
fn the_root_can_be_a_read_only_workspace() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.create(&workspace(Path::new("/"), "ro"));
    session.run("pwd; [ -c /dev/null ] && [ -r /proc/self/status ] && echo ok").prints("/\nok\n");
    refuses(&session, "echo x >/execd-test-file", "Read-only file system");
    let (status, code, message) = daemon.post_session(&workspace(Path::new("/"), "rw")).failure();
    assert_eq!((status, code.as_str()), (400, "INVALID_REQUEST_BODY"), "{message}");
}

#[test]
fn a_missing_workspace_folder_is_made() {
    let Some(daemon) = Setup::new().start() else { return };
    for mode in ["rw", "overlay", "ro"] {
        let folder = daemon.path(&format!("missing/{mode}/deep"));
        let session = daemon.create(&workspace(&folder, mode));
        session.run("pwd").prints(&format!("{}\n", folder.display()));
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o755);
    }
}

#[test]
fn ids_need_no_account() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut body = workspace(&daemon.path("made"), "rw");
    body["uid"] = json!(OTHER_ID);
    body["gid"] = json!(OTHER_ID + 1);
    let session = daemon.create(&body);
    let ids = format!("{OTHER_ID} {} {}\n", OTHER_ID + 1, OTHER_ID + 1);
    session.run("echo $(id -u) $(id -g) $(id -G)").prints(&ids);
    session.run("grep Groups: /proc/self/status | tr -d '\\t '").prints("Groups:\n");
    session
        .run("grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status | cut -f2 | sort -u")
        .prints("0000000000000000\n");
    session.output("echo mine >file");
    let metadata = fs::metadata(daemon.path("made/file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (OTHER_ID, OTHER_ID + 1));
    let root_file = filled(&daemon, "roots");
    refuses(&session, &format!("echo x >{}/file", root_file.display()), "Read-only file system");
    body["gid"] = Value::Null;
    daemon.create(&body).run("id -g").prints("0\n");
}

#[test]
fn userns_maps_an_id_without_privilege() {
    let Some(daemon) = Setup::new().start() else { return };
    let capabilities = daemon.get("/v1/isolated/capabilities").json();
    if capabilities["userns_available"] != true {
        return common::skip(&format!("no user namespaces: {capabilities}"));
    }
    for (uid, mode) in [(json!(OTHER_ID), "rw"), (json!(0), "overlay"), (Value::Null, "rw")] {
        let mut body = workspace(&daemon.folder("w"), mode);
        body["uid_mode"] = json!("userns");
        body["uid"] = uid.clone();
        body["gid"] = uid.clone();
        let session = daemon.create(&body);
        assert_eq!(session.state()["uid_mode"], "userns");
        let uid = uid.as_u64().unwrap_or(0);
        session.run("echo $(id -u) $(id -g)").prints(&format!("{uid} {uid}\n"));
        session.output("echo x >file; rm file");
        let map = session.output("echo $(cat /proc/self/uid_map)");
        assert_eq!(map, format!("{uid} 0 1\n"));
    }
}

#[test]
fn a_private_network_has_loopback_only() {
    let Some(daemon) = Setup::new().start() else { return };
    let port = daemon.address.port();
    let connect = format!("(: </dev/tcp/127.0.0.1/{port}) 2>/dev/null && echo reached || echo refused");
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["share_net"] = json!(false);
    let private = daemon.create(&body);
    private.run("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '").prints("lo\n");
    // IFF_UP is the lowest bit; an address on lo exists once it is up.
    private
        .run("grep -c ' 127.0.0.1$\\|-- 127.0.0.1' /proc/net/fib_trie >/dev/null && echo up")
        .prints("up\n");
    private.run(&connect).prints("refused\n");
    let own = machine_network(std::process::id());
    assert_eq!(daemon.session("w").output("readlink /proc/self/ns/net"), own);
    assert_ne!(private.output("readlink /proc/self/ns/net"), own);
}

fn machine_network(pid: u32) -> String {
    format!("{}\n", fs::read_link(format!("/proc/{pid}/ns/net")).unwrap().display())
}

#[test]
fn twenty_sessions_at_once_see_only_their_own_files() {
    let Some(daemon) = Setup::new().start() else { return };
    let daemon = &daemon;
    let shared = filled(daemon, "shared");
    let shared = &shared;
    std::thread::scope(|scope| {
        for n in 0..20 {
            scope.spawn(move || {
                let own = daemon.folder(&format!("own-{n}"));
                let body = json!({"overlays": [{"path": shared}, {"path": own, "mode": "rw"}]});
                let session = daemon.create(&body);
                session.output(&format!("echo {n} >mine-{n}; echo {n} >file; echo {n} >/tmp/t-{n}"));
                session.output(&format!("x={n}; echo {n} >{}/out", own.display()));
                session
                    .run("ls; cat file; ls /tmp; echo $x")
                    .prints(&format!("file\nmine-{n}\n{n}\nt-{n}\n{n}\n"));
                assert_eq!(text(&own.join("out")), format!("{n}\n"));
                session.delete();
            });
        }
    });
    assert_eq!((text(&shared.join("file")), machine::names(shared).len()), ("host\n".into(), 1));
    assert_eq!(daemon.sessions(), Vec::<String>::new());
}

#[test]
fn sessions_of_one_overlay_do_not_see_each_other() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = filled(&daemon, "w");
    let body = workspace(&folder, "overlay");
    let (one, two) = (daemon.create(&body), daemon.create(&body));
    one.output("echo one >file; export X=1");
    two.run("cat file; echo ${X-unset}").prints("host\nunset\n");
    one.delete();
    two.run("cat file").prints("host\n");
}
