//! What is wrong with a request is told with the right status and code and a message that names the field, and
//! nothing has happened. Also what must not be refused although it looks odd.

mod common;

use common::{Daemon, Setup, http, machine, workspace};
use serde_json::{Value, json};

const INVALID: &str = "INVALID_REQUEST_BODY";
const RUNTIME: &str = "RUNTIME_ERROR";

/// Everything a refused creation could have left behind.
fn traces(
    daemon: &Daemon,
) -> (Vec<String>, std::collections::BTreeSet<String>, std::collections::BTreeSet<String>) {
    (daemon.sessions(), machine::names(&daemon.upper_root()), machine::names(&daemon.path("")))
}

/// Sends creations that must be refused: body, code, and what the message must contain.
fn refuse_all(daemon: &Daemon, cases: Vec<(Value, &str, &str)>) {
    let before = traces(daemon);
    for (body, code, field) in cases {
        let answer = daemon.post_session(&body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.text());
        let (_, got, message) = answer.failure();
        assert_eq!(got, code, "{body}: {message}");
        assert!(message.contains(field), "{body}: {message:?} does not name {field:?}");
        assert_eq!(traces(daemon), before, "{body} left something behind");
    }
}

#[test]
fn mounts_that_make_no_sense_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let new = daemon.path("new");
    let file = daemon.path("file");
    std::fs::write(&file, "").unwrap();
    let too_many: Vec<Value> = (0..17).map(|n| json!({"path": daemon.path(&format!("n{n}"))})).collect();
    let mut cases = vec![
        (json!({}), INVALID, "workspace"),
        (json!({"workspace": null, "overlays": []}), INVALID, "workspace"),
        (json!({"workspace": {}}), INVALID, "workspace.path"),
        (json!({"workspace": {"mode": "rw"}}), INVALID, "workspace.path"),
        (json!({"workspace": {"path": ""}}), INVALID, "workspace.path"),
        (json!({"workspace": {"path": 7}}), INVALID, "workspace.path"),
        (json!({"workspace": "/x"}), INVALID, "workspace"),
        (json!({"workspace": {"path": new, "mode": "write"}}), INVALID, "workspace.mode"),
        (json!({"workspace": {"path": new, "mode": ["rw"]}}), INVALID, "workspace.mode"),
        (json!({"overlays": {"path": new}}), INVALID, "overlays"),
        (json!({"overlays": [{}]}), INVALID, "overlays[0].path"),
        (json!({"overlays": [{"path": new}, {"path": "x"}]}), INVALID, "overlays[1].path"),
        (json!({"overlays": [{"path": new, "mode": "x"}]}), INVALID, "overlays[0].mode"),
        (json!({"overlays": [{"path": new, "mode": "rw", "persist": true}]}), INVALID, "overlays[0].persist"),
        (
            json!({"overlays": [{"path": new, "mode": "ro", "persist": false}]}),
            INVALID,
            "overlays[0].persist",
        ),
        (json!({"overlays": [{"path": new}, {"path": new}]}), INVALID, "overlays"),
        (json!({"workspace": {"path": new}, "overlays": [{"path": new, "mode": "ro"}]}), INVALID, "overlays"),
        (json!({"overlays": too_many}), INVALID, "overlays"),
        (json!({"workspace": {"path": file}}), RUNTIME, "workspace.path"),
        (json!({"workspace": {"path": file.join("below")}}), RUNTIME, "workspace.path"),
        (json!({"workspace": {"path": daemon.upper_root()}}), INVALID, "workspace.path"),
    ];
    let paths = [
        "relative",
        "./x",
        "/a/../b",
        "/..",
        "/a/",
        "/a//b",
        "//a",
        "/a/.",
        "/a\u{0}b",
        "/proc",
        "/proc/1",
        "/dev/shm",
        "/sys",
        "/run",
        "/run/execd",
    ];
    for path in paths {
        cases.push((json!({"workspace": {"path": path}}), INVALID, "workspace.path"));
        cases.push((json!({"overlays": [{"path": path}]}), INVALID, "overlays[0].path"));
    }
    refuse_all(&daemon, cases);
}

#[test]
fn other_options_that_make_no_sense_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let cases = [
        ("profile", json!("loose"), RUNTIME, "profile"),
        ("profile", json!(1), INVALID, "profile"),
        ("uid_mode", json!("sudo"), INVALID, "uid_mode"),
        ("uid", json!(-1), INVALID, "uid"),
        ("uid", json!(4_294_967_295_u64), INVALID, "uid"),
        ("uid", json!(4_294_967_296_u64), INVALID, "uid"),
        ("uid", json!("root"), INVALID, "uid"),
        ("gid", json!(1.5), INVALID, "gid"),
        ("gid", json!(-7), INVALID, "gid"),
        ("idle_timeout_seconds", json!("1"), INVALID, "idle_timeout_seconds"),
        ("idle_timeout_seconds", json!(1e300), INVALID, "idle_timeout_seconds"),
        ("share_net", json!("no"), INVALID, "share_net"),
        ("env_passthrough", json!({"mode": "some"}), INVALID, "env_passthrough.mode"),
        ("env_passthrough", json!({"keys": "A"}), INVALID, "env_passthrough.keys"),
        ("env_passthrough", json!("deny"), INVALID, "env_passthrough"),
        ("extra_writable", json!("/x"), INVALID, "extra_writable"),
        ("extra_writable", json!([1]), INVALID, "extra_writable[0]"),
        ("extra_writable", json!(["relative"]), INVALID, "extra_writable"),
        ("binds", json!([{}]), INVALID, "binds.source"),
        ("binds", json!([{"source": "x"}]), INVALID, "binds.source"),
        ("binds", json!([{"source": "/x/../y"}]), INVALID, "binds.source"),
        ("binds", json!([{"source": "/x", "dest": "y"}]), INVALID, "binds.dest"),
        ("binds", json!([{"source": "/x", "readonly": "yes"}]), INVALID, "binds[0].readonly"),
    ];
    let case = |(key, value, code, field): (&str, Value, &'static str, &'static str)| {
        let mut body = workspace(&daemon.path("new"), "rw");
        body[key] = value;
        (body, code, field)
    };
    refuse_all(&daemon, cases.into_iter().map(case).collect());
}

/// serde reads an array as a struct, field by field.
#[test]
fn an_array_is_no_object() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut cases = vec![(json!({"workspace": [daemon.path("new"), "rw"]}), INVALID, "workspace")];
    for (key, value) in [("env_passthrough", json!([])), ("binds", json!([[daemon.path("")]]))] {
        let mut body = workspace(&daemon.path("new"), "rw");
        body[key] = value;
        cases.push((body, INVALID, key));
    }
    refuse_all(&daemon, cases);
}

/// The original takes a negative idle timeout as none; the issue asks for a refusal.
#[test]
fn a_negative_timeout_is_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut body = workspace(&daemon.path("new"), "rw");
    body["idle_timeout_seconds"] = json!(-1);
    refuse_all(&daemon, vec![(body, INVALID, "idle_timeout_seconds")]);
}

#[test]
fn sources_outside_the_allow_list_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let allowed = daemon.path("");
    let beside = daemon.dir.path().join("work-not");
    std::fs::create_dir(&beside).unwrap();
    std::os::unix::fs::symlink("/etc", daemon.path("link")).unwrap();
    std::os::unix::fs::symlink(&beside, daemon.path("aside")).unwrap();
    daemon.folder("good");
    let mut cases = Vec::new();
    for source in [beside, daemon.path("link"), daemon.path("aside"), "/etc".into(), daemon.path("nonesuch")]
    {
        let mut body = workspace(&daemon.path("new"), "rw");
        body["extra_writable"] = json!([source]);
        cases.push((body, RUNTIME, "extra_writable"));
        for readonly in [true, false] {
            let mut body = workspace(&daemon.path("new"), "rw");
            body["binds"] = json!([{"source": source, "dest": "/mnt", "readonly": readonly}]);
            cases.push((body, RUNTIME, "binds.source"));
        }
    }
    for dest in ["/proc", "/dev", "/sys/kernel", "/run/execd"] {
        let mut body = workspace(&daemon.path("new"), "rw");
        body["binds"] = json!([{"source": daemon.path("good"), "dest": dest}]);
        cases.push((body, INVALID, "binds"));
    }
    assert!(allowed.is_dir());
    refuse_all(&daemon, cases);
}

#[test]
fn an_empty_allow_list_refuses_all() {
    let Some(daemon) = Setup::new().setting("allowed_writable = []").start() else { return };
    let folder = daemon.folder("w");
    let mut body = workspace(&folder, "rw");
    body["extra_writable"] = json!([folder]);
    refuse_all(&daemon, vec![(body, RUNTIME, "extra_writable")]);
}

#[test]
fn bodies_that_are_not_the_json_expected_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let deep = "[".repeat(100_000);
    for route in ["/v1/isolated/session".to_owned(), session.route("/run")] {
        for body in [
            "",
            "{",
            "nonsense",
            "[]",
            "7",
            "\"text\"",
            "{\"code\": \"a\" \"b\"}",
            "\u{0}",
            "{'code': 1}",
            &deep,
        ] {
            let (status, code, message) = daemon.request("POST", &route, body.as_bytes()).failure();
            assert_eq!((status, code.as_str()), (400, INVALID), "{route} {body:.20}: {message}");
            assert!(!message.is_empty());
        }
        let (status, code, _) =
            daemon.request("POST", &route, b"{\"code\": \"\xff\", \"profile\": \"\xff\"}").failure();
        assert_eq!((status, code.as_str()), (400, INVALID), "{route}");
    }
    assert_eq!(daemon.sessions(), [session.id]);
}

#[test]
fn runs_that_make_no_sense_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let cases = [
        (json!({}), "code"),
        (json!({"code": null}), "code"),
        (json!({"code": ""}), "code"),
        (json!({"code": 1}), "code"),
        (json!({"code": "a\u{0}b"}), "code"),
        (json!({"code": ":", "timeout_seconds": -1}), "timeout_seconds"),
        (json!({"code": ":", "timeout_seconds": "1"}), "timeout_seconds"),
        (json!({"code": ":", "timeout_seconds": 0.5}), "timeout_seconds"),
        (json!({"code": ":", "stdin": 5}), "stdin"),
        (json!({"code": ":", "background": "yes"}), "background"),
        (json!({"code": ":", "envs": ["A=1"]}), "envs"),
        (json!({"code": ":", "envs": {"A": 1}}), "envs.A"),
        (json!({"code": ":", "envs": {"A": "\u{0}"}}), "envs.A"),
        (json!({"code": ":", "envs": {"": "x"}}), "envs"),
        (json!({"code": ":", "envs": {"1A": "x"}}), "envs.1A"),
        (json!({"code": ":", "envs": {"A B": "x"}}), "envs.A B"),
        (json!({"code": ":", "envs": {"A=1; touch hacked #": "x"}}), "envs"),
        (json!({"code": ":", "envs": {"é": "x"}}), "envs"),
        (json!({"code": ":", "envs": {"UID": "1"}}), "envs.UID"),
        (json!({"code": ":", "envs": {"SHELLOPTS": "x"}}), "envs.SHELLOPTS"),
    ];
    for (body, field) in cases {
        let (status, code, message) = daemon.post(&session.route("/run"), &body).failure();
        assert_eq!((status, code.as_str()), (400, INVALID), "{body}: {message}");
        assert!(message.contains(field), "{body}: {message:?} does not name {field:?}");
    }
    session.run("ls; echo fine").prints("fine\n");
}

#[test]
fn unknown_sessions_come_before_their_bodies() {
    let Some(daemon) = Setup::new().start() else { return };
    for id in ["00000000-0000-4000-8000-000000000000", "nonesuch", "%2e%2e", "a%20b"] {
        let path = format!("/v1/isolated/session/{id}");
        for (method, path, body) in [
            ("GET", path.clone(), ""),
            ("DELETE", path.clone(), ""),
            ("POST", format!("{path}/run"), "{\"code\":\":\"}"),
            ("POST", format!("{path}/run"), "nonsense"),
        ] {
            let (status, code, message) = daemon.request(method, &path, body.as_bytes()).failure();
            assert_eq!((status, code.as_str()), (404, "SESSION_NOT_FOUND"), "{method} {path}: {message}");
        }
    }
}

#[test]
fn unknown_routes_and_methods_are_plain_404s() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let (own, run) = (session.route(""), session.route("/run"));
    for (method, path) in [
        ("GET", "/"),
        ("GET", "/nonesuch"),
        ("GET", "/v1/isolated"),
        ("GET", "/v1/isolated/session"),
        ("PUT", "/v1/isolated/session"),
        ("POST", "/v1/isolated/sessions"),
        ("POST", "/ping"),
        ("POST", own.as_str()),
        ("GET", run.as_str()),
        ("DELETE", run.as_str()),
        ("GET", "/v1/isolated/session/"),
        ("GET", "/ping/"),
    ] {
        let answer = daemon.request(method, path, b"");
        assert_eq!((answer.status, answer.text().as_str()), (404, "404 page not found"), "{method} {path}");
        let kind = answer.head.header("content-type").unwrap_or_default().to_owned();
        assert!(kind.starts_with("text/plain"), "{method} {path}: {kind}");
    }
}

#[test]
fn large_bodies_are_refused_with_413() {
    let Some(daemon) = Setup::new().setting("http.body_max_bytes = 100000").start() else { return };
    let session = daemon.session("w");
    let large = json!({"code": format!(": {}", "x".repeat(100_000)), "profile": "x"});
    for route in ["/v1/isolated/session", session.route("/run").as_str()] {
        let (status, code, message) = daemon.post(route, &large).failure();
        assert_eq!((status, code.as_str()), (413, INVALID), "{message}");
        assert!(message.contains("100000"), "{message}");
    }
    session.run(&format!(": {}", "x".repeat(90_000))).prints("");
    assert_eq!(daemon.sessions().len(), 1);
}

#[test]
fn the_token_guards_all_but_ping() {
    let Some(mut daemon) = Setup::new().args(&["--access-token", "sesame"]).start() else { return };
    assert_eq!((daemon.get("/ping").status, daemon.get("/ping").text().as_str()), (200, ""));
    for token in [None, Some(""), Some("sesam"), Some("sesame2"), Some("SESAME")] {
        for (method, path) in [
            ("GET", "/v1/isolated/capabilities"),
            ("GET", "/v1/isolated/sessions"),
            ("POST", "/v1/isolated/session"),
            ("GET", "/v1/isolated/session/x"),
            ("POST", "/v1/isolated/session/x/run"),
        ] {
            let answer = http::request(daemon.address, token, method, path, b"nonsense");
            let error = answer.json()["error"].as_str().unwrap().to_owned();
            assert_eq!(answer.status, 401, "{token:?} {method} {path}");
            assert_eq!(error, "Unauthorized: invalid or missing header X-EXECD-ACCESS-TOKEN");
        }
    }
    daemon.token = Some("sesame".into());
    daemon.session("w").run("echo in").prints("in\n");
    assert!(!daemon.said().contains("sesame"), "the token is in the log");
}

#[test]
fn the_token_also_comes_from_the_environment() {
    let Some(mut daemon) = Setup::new().env("EXECD_ACCESS_TOKEN", "sesame").start() else { return };
    assert_eq!(daemon.get("/v1/isolated/sessions").status, 401);
    daemon.token = Some("sesame".into());
    assert_eq!(daemon.sessions(), Vec::<String>::new());
}

#[test]
fn nulls_unknown_fields_and_trailing_bytes_are_accepted() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    let body = json!({
        "workspace": {"path": folder, "mode": null, "x": 1}, "overlays": null, "profile": null, "extra_writable": null,
        "binds": null, "share_net": null, "env_passthrough": {"mode": null, "keys": null}, "uid": null, "gid": null,
        "uid_mode": null, "idle_timeout_seconds": null, "future": {"deep": [1, null]},
    });
    let state = daemon.create(&body).state();
    assert_eq!((&state["profile"], &state["workspace"]["mode"]), (&json!("strict"), &json!("overlay")));
    assert_eq!(state["idle_timeout_seconds"], 1800);
    let trailing = format!("{} trailing }} bytes", workspace(&folder, "rw"));
    assert_eq!(daemon.request("POST", "/v1/isolated/session", trailing.as_bytes()).status, 201);
    let go = json!({"workspace": {"path": "", "mode": ""}, "overlays": [{"path": folder, "mode": ""}], "uid_mode": ""});
    let session = daemon.create(&go);
    let body = json!({"code": "echo ${A-unset}", "envs": {"A": null}, "timeout_seconds": null, "stdin": null, "x": 1});
    session.run_with(&body).prints("unset\n");
    session
        .run_with(&json!({"code": "echo 1", "envs": null, "background": null, "timeout_seconds": 0}))
        .prints("1\n");
}

#[test]
fn more_sessions_than_allowed_are_refused_until_one_goes() {
    let Some(daemon) = Setup::new().setting("session.sessions_max = 2").start() else { return };
    let body = workspace(&daemon.folder("w"), "rw");
    let (first, _second) = (daemon.create(&body), daemon.create(&body));
    let (status, code, message) = daemon.post_session(&body).failure();
    assert_eq!((status, code.as_str()), (429, "TOO_MANY_REQUESTS"), "{message}");
    first.delete();
    // A refused creation does not take a place.
    assert_eq!(daemon.post_session(&json!({})).status, 400);
    daemon.create(&body).run("echo in").prints("in\n");
    assert_eq!(daemon.sessions().len(), 2);
}

#[test]
fn malformed_http_does_not_disturb_others() {
    use std::io::{Read, Write};
    let Some(daemon) = Setup::new().start() else { return };
    for bytes in [
        &b"nonsense\r\n\r\n"[..],
        b"GET /ping HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/1.1\r\n",
    ] {
        let mut stream = std::net::TcpStream::connect(daemon.address).unwrap();
        stream.set_read_timeout(Some(common::HANG)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2") && !answer.starts_with(b"HTTP/1.1 5"), "{bytes:?}");
    }
    assert_eq!(daemon.get("/ping").status, 200);
    assert!(!daemon.said().contains("panicked"), "{}", daemon.said());
}
