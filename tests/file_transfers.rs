//! Content on its way in and out of a session's files: downloads and uploads, and what ends them.

mod common;

use common::files::{Part, query, tar_of};
use common::http::Streaming;
use common::{OTHER_ID, Session, Setup, eventually, machine, workspace};
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

fn download_with(session: &Session<'_>, path: &str, headers: &[(&str, &str)]) -> common::http::Answer {
    session.send("GET", &format!("/files/download{}", query(&[("path", path)])), headers, b"").whole()
}

#[test]
fn downloads_come_whole_in_ranges_and_in_lines() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.upload("f", "0123456789");
    let whole = session.download("f");
    let header =
        |answer: &common::http::Answer, name: &str| answer.head.header(name).unwrap_or("none").to_owned();
    assert_eq!((whole.status, whole.text().as_str()), (200, "0123456789"));
    assert_eq!(header(&whole, "content-type"), "application/octet-stream");
    assert_eq!(header(&whole, "content-length"), "10");
    assert_eq!(header(&whole, "content-disposition"), "attachment; filename=\"f\"");
    for (range, content, told) in [
        ("bytes=2-4", "234", "bytes 2-4/10"),
        ("bytes=7-", "789", "bytes 7-9/10"),
        ("bytes=-2", "89", "bytes 8-9/10"),
        ("bytes=8-100", "89", "bytes 8-9/10"),
        ("bytes=50-60,1-1", "1", "bytes 1-1/10"),
    ] {
        let part = download_with(&session, "f", &[("Range", range)]);
        assert_eq!((part.status, part.text().as_str()), (206, content), "{range}");
        assert_eq!(header(&part, "content-range"), told);
    }
    for range in ["bytes=5-2", "bytes=x", "apples=1-2"] {
        let refused = download_with(&session, "f", &[("Range", range)]);
        assert_eq!(
            (refused.status, refused.json()),
            (416, json!({"code": "UNKNOWN", "message": ""})),
            "{range}"
        );
    }
    let beyond = download_with(&session, "f", &[("Range", "bytes=10-")]);
    assert_eq!((beyond.failure().0, header(&beyond, "content-range").as_str()), (416, "bytes */10"));
    let modified = header(&whole, "last-modified");
    assert_eq!(download_with(&session, "f", &[("If-Modified-Since", &modified)]).status, 304);
    // A large one comes in pieces, and no byte of it is another.
    let large: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    session.upload("large", &large);
    assert!(session.download("large").body == large);
    let part = download_with(&session, "large", &[("Range", "bytes=1000000-11000000")]);
    assert!(part.status == 206 && part.body == large[1_000_000..=11_000_000]);
    session.upload("lines", "one\r\ntwo\n\nfour\nfive");
    let lines = |pairs: &[(&str, &str)]| {
        let answer = session.ask("GET", "/files/download", &[&[("path", "lines")], pairs].concat());
        assert_eq!(
            (answer.status, header(&answer, "content-type").as_str()),
            (200, "text/plain; charset=utf-8")
        );
        answer.text()
    };
    assert_eq!(lines(&[("offset", "2"), ("limit", "2")]), "two\n");
    assert_eq!(lines(&[("offset", "3")]), "\nfour\nfive");
    assert_eq!(lines(&[("limit", "1")]), "one");
    assert_eq!(lines(&[("offset", "99")]), "");
    for wrong in [("offset", "0"), ("limit", "0"), ("offset", "-1"), ("limit", "x")] {
        let answer = session.ask("GET", "/files/download", &[("path", "lines"), wrong]);
        assert_eq!(answer.failure().1, "INVALID_REQUEST_BODY", "{wrong:?}");
    }
    let both = format!("/files/download{}", query(&[("path", "lines"), ("offset", "1")]));
    assert_eq!(session.send("GET", &both, &[("Range", "bytes=0-1")], b"").whole().failure().0, 400);
    assert_eq!(session.ask("GET", "/files/download", &[]).failure().1, "MISSING_QUERY");
    session.upload("ä \"b\".txt", "");
    let named = session.download("ä \"b\".txt");
    assert!(header(&named, "content-disposition").ends_with("filename*=UTF-8''%C3%A4%20%22b%22.txt"));
    assert_eq!((named.status, named.text().as_str()), (200, ""));
}

#[test]
fn special_files_are_listed_and_never_opened() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkfifo fifo; exec 7<>fifo 8</dev/null; ln -s fifo link; ln -s /dev/zero zero; ln -s /proc/self/fd/0 fd");
    for path in ["fifo", "link", "zero", "/dev/tty", "/dev/null", "/dev/full", "."] {
        assert_eq!(session.download(path).failure().0, 400, "{path}");
        assert_eq!(session.upload_as(&json!({"path": path}), b"x").failure().0, 400, "{path}");
        let replaced = session.tell("/files/replace", &json!({path: {"old": "a", "new": "b"}}));
        assert_eq!(replaced.failure().0, 400, "{path}");
    }
    for path in [
        "/proc/version",
        "/proc/1/cmdline",
        "/sys/kernel/ostype",
        "/sys/kernel/mm",
        "/proc/sys/kernel/hostname",
        "fd",
    ] {
        for answer in [session.download(path), session.upload_as(&json!({"path": path}), b"x")] {
            assert!(matches!(answer.failure().0, 403 | 404), "{path}: {}", answer.text());
        }
    }
    for folder in ["/proc", "/sys", "/proc/1", "/sys/kernel", "/sys/fs/cgroup/cpu"] {
        for route in ["/directories/list", "/files/search", "/directories/archive", "/files/watch"] {
            let answer = session.ask("GET", route, &[("path", folder)]);
            assert!(matches!(answer.failure().0, 403 | 404), "{route} {folder}: {}", answer.text());
        }
    }
    // Nor does a walk that starts above them go there.
    let found = session.paths("/files/search", &[("path", "/"), ("pattern", "ostype")]);
    assert!(found.iter().all(|path| !path.starts_with("/proc") && !path.starts_with("/sys")), "{found:?}");
    // Nothing was read from it, and nobody waits for it.
    assert_eq!(session.output("echo still >&7; read -r line <&7; echo $line"), "still\n");
}

#[test]
fn forms_are_taken_in_any_order_and_refused_with_the_right_code() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let (a, b) = (r#"{"path":"a","mode":600}"#, r#"{"path":"new/b","owner":"daemon","group":2,"mode":0}"#);
    let part = |name, file_name, content| Part { name, file_name, content };
    let taken = session.upload_form(&[
        Part::file(b"content of a"),
        part("comment", None, b"of no interest"),
        Part::metadata(a),
        part("metadata", None, b"does not count"),
        Part::metadata(b),
        part("attachment", Some("x"), b"neither does this"),
        Part::file(b"content of b"),
    ]);
    assert_eq!((taken.status, taken.text().as_str()), (200, ""));
    assert_eq!(
        session.output("cat a new/b; stat -c '%a %u %g' a new new/b"),
        "content of acontent of b600 0 0\n755 0 0\n644 1 2\n"
    );
    for (parts, code) in [
        (vec![Part::metadata(a)], "INVALID_FILE_CONTENT"),
        (vec![Part::file(b"x")], "INVALID_FILE_METADATA"),
        (vec![part("metadata", None, a.as_bytes()), Part::file(b"x")], "INVALID_FILE_METADATA"),
        (vec![Part::metadata(a), part("file", None, b"x")], "INVALID_FILE_CONTENT"),
        (vec![Part::metadata(a), Part::metadata(b), Part::file(b"x")], "INVALID_FILE"),
        (vec![Part::metadata("{"), Part::file(b"x")], "INVALID_FILE_METADATA"),
        (vec![Part::metadata("{}"), Part::file(b"x")], "INVALID_FILE_METADATA"),
        (vec![Part::metadata(r#"{"path":""}"#), Part::file(b"x")], "INVALID_FILE_METADATA"),
        (vec![Part::metadata(r#"{"path":"a","mode":9}"#), Part::file(b"x")], "INVALID_FILE_METADATA"),
        (vec![], "INVALID_FILE_METADATA"),
    ] {
        let (status, found, message) = session.upload_form(&parts).failure();
        assert_eq!((status, found.as_str()), (400, code), "{message}");
    }
    for (content_type, body) in [
        ("application/json", "{}"),
        ("multipart/form-data", "x"),
        ("multipart/form-data; boundary=b", "--b\r\nbroken"),
    ] {
        let answer =
            session.send("POST", "/files/upload", &[("Content-Type", content_type)], body.as_bytes()).whole();
        assert_eq!(answer.failure().1, "INVALID_FILE", "{content_type}");
    }
    assert_eq!(session.content("a"), "content of a");
    let many: Vec<String> = (0..300).map(|n| format!(r#"{{"path":"many/{n}"}}"#)).collect();
    let parts: Vec<_> = many
        .iter()
        .flat_map(|metadata| [Part::metadata(metadata), Part::file(metadata.as_bytes())])
        .collect();
    assert_eq!(session.upload_form(&parts).status, 200);
    assert_eq!(session.output("ls many | wc -l; cat many/299"), "300\n{\"path\":\"many/299\"}");
}

#[test]
fn uploads_go_where_a_programs_writes_would() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("bound");
    fs::write(folder.join("single"), "old\n").unwrap();
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["binds"] = json!([{"source": folder.join("single"), "dest": daemon.folder("w").join("single"), "readonly": false}]);
    fs::write(daemon.folder("w").join("single"), "").unwrap();
    let session = daemon.create(&body);
    session.output("echo target > target; ln -s target link; ln -s new/made dangling; ln target hard");
    session.upload("link", "through the link\n");
    session.upload("dangling", "made\n");
    assert_eq!(
        session.output("readlink link dangling; cat target new/made; cat hard"),
        "target\nnew/made\nthrough the link\nmade\ntarget\n"
    );
    // A file that is a mount of its own cannot be replaced, but it can be written.
    let inode = fs::metadata(folder.join("single")).unwrap().ino();
    session.upload("single", "new\n");
    assert_eq!(fs::read_to_string(folder.join("single")).unwrap(), "new\n");
    assert_eq!(fs::metadata(folder.join("single")).unwrap().ino(), inode);
    assert_eq!(session.tell("/files/replace", &json!({"single": {"old": "new", "new": "a"}})).status, 200);
    assert_eq!(session.output("cat single"), "a\n");
    let synced = session.send(
        "POST",
        "/files/upload?fsync=true",
        &[("Content-Type", &common::files::form_type())],
        &common::files::form(&[Part::metadata(r#"{"path":"safe"}"#), Part::file(b"on disk")]),
    );
    assert_eq!((synced.whole().status, session.content("safe").as_str()), (200, "on disk"));
    assert_eq!(session.output("ls -A | grep execd; true"), "");
}

#[test]
fn files_belong_to_the_sessions_user_and_its_rights_count() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    fs::write(folder.join("secret"), "secret").unwrap();
    fs::set_permissions(folder.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(folder.join("closed")).unwrap();
    fs::write(folder.join("closed/in"), "in").unwrap();
    fs::set_permissions(folder.join("closed"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777)).unwrap();
    for mode in ["setpriv", "userns"] {
        let mut body = workspace(&folder, "rw");
        body["uid_mode"] = json!(mode);
        if mode == "setpriv" {
            (body["uid"], body["gid"]) = (json!(OTHER_ID), json!(OTHER_ID));
        }
        let session = daemon.create(&body);
        let name = format!("own-{mode}");
        session.upload_as(&json!({"path": format!("{name}/f"), "mode": 640}), b"mine");
        let told = session.output(&format!("stat -c '%a %u %g' {name} {name}/f; id -u"));
        let id = told.lines().last().unwrap();
        assert_eq!(told, format!("755 {id} {id}\n640 {id} {id}\n{id}\n"), "{mode}");
        if mode == "userns" {
            assert_eq!(session.info(&format!("{name}/f"))["owner"], "root");
            let answer =
                session.tell("/files/permissions", &json!({format!("{name}/f"): {"owner": "daemon"}}));
            assert_eq!(answer.failure().0, 403, "an id that is not mapped");
            session.delete();
            continue;
        }
        assert_eq!(session.info(&format!("{name}/f"))["owner"], json!(OTHER_ID.to_string()));
        for answer in [
            session.download("secret"),
            session.upload_as(&json!({"path": "closed/new"}), b"x"),
            session.ask("GET", "/directories/list", &[("path", "closed")]),
            session.ask("DELETE", "/files", &[("path", "secret")]),
            session.tell("/files/mv", &json!([{"src": "secret", "dest": "mine"}])),
            session.tell("/files/permissions", &json!({"secret": {"mode": 666}})),
            session.tell("/files/permissions", &json!({format!("{name}/f"): {"owner": "root"}})),
            session.ask("DELETE", "/directories", &[("path", "closed")]),
            session.download("/etc/shadow"),
        ] {
            assert_eq!(answer.failure().0, 403);
        }
        assert_eq!(session.content("closed/in"), "in");
        session.delete();
    }
    assert_eq!(fs::read_to_string(folder.join("secret")).unwrap(), "secret");
}

#[test]
fn a_full_workspace_answers_507_and_keeps_what_it_had() {
    let Some(daemon) = Setup::new().setting("sizes.ephemeral_upper_max_bytes = 2097152").start() else {
        return;
    };
    let folder = daemon.folder("w");
    fs::write(folder.join("f"), "old").unwrap();
    let session =
        daemon.create(&json!({"overlays": [{"path": folder, "mode": "overlay", "persist": false}]}));
    let large = vec![b'x'; 8 << 20];
    let answer = session.upload_as(&json!({"path": "f"}), &large);
    assert_eq!((answer.failure().0, session.content("f").as_str()), (507, "old"));
    let archive =
        session.send("POST", "/directories/archive?path=.", &[], &tar_of(&[("big", &large)])).whole();
    assert_eq!(archive.failure().0, 507);
    // The room is free again.
    session.output("rm -f big");
    session.upload("f", vec![b'y'; 1 << 20]);
    let grow = session.tell("/files/replace", &json!({"f": {"old": "y", "new": "yyyy"}}));
    assert_eq!((grow.failure().0, session.download("f").body.len()), (507, 1 << 20));
}

/// Reads the head of an answer and no more.
fn stalled(session: &Session<'_>, rest: &str) -> Streaming {
    let stream = session.send("GET", rest, &[], b"");
    assert_eq!(stream.head.status, 200, "{rest}");
    stream
}

#[test]
fn a_session_ends_whatever_its_clients_do() {
    let Some(mut daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    fs::File::create(folder.join("large")).unwrap().set_len(1 << 30).unwrap();
    fs::write(folder.join("noise"), fs::read(common::EXECD).unwrap()).unwrap();
    let session = daemon.create(&workspace(&folder, "overlay"));
    let clients = [
        stalled(&session, "/files/download?path=large"),
        stalled(&session, "/files/download?path=large&offset=1"),
        stalled(&session, "/directories/archive?path=."),
        stalled(&session, "/files/watch?path=."),
    ];
    let mut upload = TcpStream::connect(daemon.address).unwrap();
    let form = common::files::form(&[Part::metadata(r#"{"path":"up"}"#), Part::file(b"half of it")]);
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: execd\r\nContent-Length: 1000000\r\nContent-Type: {}\r\n\r\n",
        session.route("/files/upload"),
        common::files::form_type()
    );
    upload.write_all(&[head.as_bytes(), &form[..form.len() - 40]].concat()).unwrap();
    let mut archive = TcpStream::connect(daemon.address).unwrap();
    let head = format!(
        "POST {}?path=. HTTP/1.1\r\nHost: execd\r\nContent-Length: 1000000\r\n\r\n",
        session.route("/directories/archive")
    );
    archive.write_all(&[head.as_bytes(), &tar_of(&[("x", b"y")])[..600]].concat()).unwrap();
    // A replacement that writes without end, and that no full disk stops: zeros become holes.
    session.output("head -c 262144 /dev/zero | tr '\\0' a > a");
    let body = json!({"a": {"old": "a", "new": "\0".repeat(20_000)}}).to_string();
    let mut replace = TcpStream::connect(daemon.address).unwrap();
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: execd\r\nContent-Length: {}\r\n\r\n",
        session.route("/files/replace"),
        body.len()
    );
    replace.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    session.delete();
    assert_eq!(machine::uppers(&daemon.upper_root()), [""; 0]);
    for (stream, what) in [(&mut upload, "upload"), (&mut archive, "archive")] {
        stream.set_read_timeout(Some(common::HANG)).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404"), "{what}: {answer}");
    }
    drop(clients);
    let gone = daemon.get(&session.route("/files/info?path=x"));
    assert_eq!(gone.failure().1, "SESSION_NOT_FOUND");
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn a_file_that_shrinks_breaks_its_download_off() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("truncate -s 1G large");
    let mut stream = TcpStream::connect(daemon.address).unwrap();
    stream.set_read_timeout(Some(common::HANG)).unwrap();
    let request =
        format!("GET {} HTTP/1.1\r\nHost: execd\r\n\r\n", session.route("/files/download?path=large"));
    stream.write_all(request.as_bytes()).unwrap();
    stream.read_exact(&mut [0; 1000]).unwrap();
    session.output("truncate -s 1M large");
    let mut rest = Vec::new();
    // Reset or end of file: either way it is no complete answer.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 1 << 30);
}

#[test]
fn work_in_files_keeps_a_session_and_watching_does_not() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["idle_timeout_seconds"] = json!(1);
    let (used, watched) = (daemon.create(&body), daemon.create(&body));
    let _watch = stalled(&watched, "/files/watch?path=.");
    for _ in 0..10 {
        std::thread::sleep(std::time::Duration::from_millis(250));
        used.info(".");
    }
    assert_eq!(daemon.sessions().len(), 1, "the session was not kept");
    eventually("it is deleted", || daemon.sessions().is_empty());
}

#[test]
fn every_route_knows_whether_there_is_such_a_session() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let routes = [
        ("GET", "/files/info?path=x"),
        ("GET", "/files/search?path=x"),
        ("GET", "/files/download?path=x"),
        ("GET", "/files/watch?path=x"),
        ("POST", "/files/upload"),
        ("POST", "/files/mv"),
        ("POST", "/files/permissions"),
        ("POST", "/files/replace"),
        ("DELETE", "/files?path=x"),
        ("POST", "/directories"),
        ("DELETE", "/directories?path=x"),
        ("GET", "/directories/list?path=x"),
        ("GET", "/directories/archive?path=x"),
        ("POST", "/directories/archive?path=x"),
    ];
    // One that died stays listed for a while.
    machine::signal(
        machine::children(machine::children(daemon.pid())[0].pid)[0].pid,
        rustix::process::Signal::KILL,
    );
    for id in ["00000000-0000-4000-8000-000000000000", "no-uuid", &session.id] {
        for (method, rest) in routes {
            let answer = || daemon.request(method, &format!("/v1/isolated/session/{id}{rest}"), b"");
            if id == session.id {
                eventually("it is dead", || session.state()["status"] == "dead");
            }
            let (status, code, _) = answer().failure();
            let is_body_first = id == session.id && method == "POST" && !rest.contains('?');
            let expected =
                if is_body_first { (400, "INVALID_REQUEST_BODY") } else { (404, "SESSION_NOT_FOUND") };
            if is_body_first && rest == "/files/upload" {
                assert_eq!((status, code.as_str()), (404, "SESSION_NOT_FOUND"));
                continue;
            }
            assert_eq!((status, code.as_str()), expected, "{method} {rest} {id}");
        }
    }
}

#[test]
fn holes_stay_holes() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    let file = fs::File::create(folder.join("f")).unwrap();
    file.set_len(100 << 20).unwrap();
    file.write_all_at(b"word", 50 << 20).unwrap();
    let session = daemon.create(&workspace(&folder, "rw"));
    let answer = session.tell("/files/replace", &json!({"f": {"old": "word", "new": "WORD"}}));
    assert_eq!(answer.json()["f"]["replacedCount"], 1);
    let after = fs::metadata(folder.join("f")).unwrap();
    assert_eq!((after.len(), after.blocks() < 2048), (100 << 20, true), "{} blocks", after.blocks());
    assert_eq!(session.output("tail -c +52428801 f | head -c 4"), "WORD");
}
