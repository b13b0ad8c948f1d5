//! A session's files over HTTP: what the original got wrong (api 7, lines 27 to 38, each with a test of its name), what
//! the contract says, and what a session of each kind may do.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::files::Part;
use common::{Daemon, OTHER_ID, Session, Setup, eventually, machine, workspace};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

/// A session on a folder with something in it.
fn session<'a>(daemon: &'a Daemon, mode: &str) -> (Session<'a>, PathBuf) {
    let folder = daemon.folder("w");
    fs::create_dir_all(folder.join("dir/sub")).unwrap();
    fs::write(folder.join("low.txt"), "low\n").unwrap();
    fs::write(folder.join("dir/a.rs"), "a\n").unwrap();
    fs::write(folder.join("dir/sub/b.rs"), "b\n").unwrap();
    (daemon.create(&workspace(&folder, mode)), folder)
}

/// Status and code of a failure.
fn failure(answer: &common::http::Answer) -> (u16, String) {
    let (status, code, message) = answer.failure();
    assert!(!message.is_empty(), "no message");
    (status, code)
}

#[test]
fn line_27_writes_are_seen_inside_at_once_and_the_other_way_round() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "overlay");
    // The kernel now remembers that there is no such file, and what the other one holds.
    assert_eq!(session.output("[ -e new.txt ] || cat low.txt; ls dir"), "low\na.rs\nsub\n");
    session.upload("new.txt", "from outside\n");
    session.upload("low.txt", "changed\n");
    session.upload("dir/more/c", "c\n");
    assert_eq!(
        session.output("cat new.txt low.txt dir/more/c; ls dir"),
        "from outside\nchanged\nc\na.rs\nmore\nsub\n"
    );
    session.output("echo inside > made; echo more >> low.txt; mkdir -p x/y; rm new.txt");
    assert_eq!(
        (session.content("made"), session.content("low.txt")),
        ("inside\n".into(), "changed\nmore\n".into())
    );
    assert!(session.exists("x/y") && !session.exists("new.txt"));
    // Also while code runs.
    let run = session
        .open_until(&json!({"code": "echo go; until [ -e stop ]; do sleep 0.01; done; cat stop"}), "go");
    session.upload("stop", "stopped\n");
    assert!(run.finish().stdout().contains("stopped"));
    assert_eq!(fs::read_to_string(folder.join("low.txt")).unwrap(), "low\n");
    assert_eq!(machine::names(&folder).len(), 2, "the lower was touched");
}

#[test]
fn line_28_deletions_are_the_kernels_own() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "overlay");
    session.output("rm low.txt; rm -r dir; mkdir dir; echo n > dir/n");
    assert!(!session.exists("low.txt"));
    assert_eq!(
        session.paths_in(&folder, "/directories/list", &[("path", "."), ("depth", "3")]),
        ["dir", "dir/n"]
    );
    assert_eq!(session.ask("DELETE", "/files", &[("path", "dir/n")]).status, 200);
    assert_eq!(session.ask("DELETE", "/directories", &[("path", "dir")]).status, 200);
    assert_eq!(session.output("ls -A"), "");
    session.upload("low.txt", "again\n");
    assert_eq!(session.output("ls -A; cat low.txt"), "low.txt\nagain\n");
    assert_eq!(machine::names(&folder).len(), 2, "the lower was touched");
}

#[test]
fn line_29_everything_visible_is_reachable_and_nothing_else() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("bound");
    fs::write(folder.join("in-bind"), "bound\n").unwrap();
    let hidden = daemon.folder("hidden");
    fs::write(hidden.join("secret"), "secret\n").unwrap();
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["profile"] = json!("strict");
    body["binds"] = json!([{"source": folder, "dest": "/tmp/bound", "readonly": false}]);
    let session = daemon.create(&body);
    session.output("echo tmp > /tmp/t");
    assert_eq!(session.content("/tmp/t"), "tmp\n");
    assert_eq!(session.content("/tmp/bound/in-bind"), "bound\n");
    session.upload("/tmp/up", "up\n");
    session.upload("/tmp/bound/up", "up\n");
    assert_eq!(session.output("cat /tmp/up /tmp/bound/up"), "up\nup\n");
    assert_eq!(fs::read_to_string(folder.join("up")).unwrap(), "up\n");
    // Not put under the workspace without a word, as the original does.
    assert!(!session.exists("/etc/no-such-file"));
    assert_eq!(
        failure(&session.upload_as(&json!({"path": "/etc/x"}), b"x")),
        (403, "PERMISSION_DENIED".into())
    );
    let upper_root = daemon.upper_root();
    assert!(machine::names(&upper_root).contains(".trash") || upper_root.exists());
    assert_eq!(session.paths("/directories/list", &[("path", upper_root.to_str().unwrap())]), [""; 0]);
}

#[test]
fn line_30_links_and_dots_stay_inside() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "rw");
    let outside = daemon.dir.path().join("outside");
    fs::write(&outside, "outside").unwrap();
    // Seen from the host these lead out of the workspace; inside they lead into the session's own root.
    std::os::unix::fs::symlink("/run/execd-canary", folder.join("absolute")).unwrap();
    std::os::unix::fs::symlink(format!("{}etc/hostname", "../".repeat(40)), folder.join("dots")).unwrap();
    std::os::unix::fs::symlink("/proc/self/root/etc/passwd", folder.join("magic")).unwrap();
    std::os::unix::fs::symlink("/proc/1/root/etc/passwd", folder.join("init")).unwrap();
    session.output("echo inside > /run/execd-canary");
    assert_eq!(session.content("absolute"), "inside\n");
    assert_eq!(session.download("dots").status, session.download("/etc/hostname").status);
    for link in
        ["magic", "init", "/proc/1/root/etc/passwd", "/proc/1/environ", "/proc/self/environ", "/dev/stdin"]
    {
        let answer = session.download(link);
        assert!(matches!(answer.status, 400 | 403 | 404), "{link}: {} {}", answer.status, answer.text());
    }
    for path in ["..", "../outside", "dir/../../x", "/..", "/a/../../b"] {
        let answer = session.ask("GET", "/files/info", &[("path", path)]);
        assert_eq!(failure(&answer), (400, "INVALID_REQUEST_BODY".into()), "{path}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "outside");
}

#[test]
fn line_31_refusals_say_what_they_are() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "ro");
    let path = "low.txt";
    let refused = [
        session.upload_as(&json!({"path": path}), b"x"),
        session.upload_as(&json!({"path": "new"}), b"x"),
        session.ask("DELETE", "/files", &[("path", path)]),
        session.ask("DELETE", "/directories", &[("path", "dir")]),
        session.tell("/files/mv", &json!([{"src": path, "dest": "other"}])),
        session.tell("/files/mv", &json!([{"src": path, "dest": "/tmp/other"}])),
        session.tell("/files/permissions", &json!({path: {"mode": 600}})),
        session.tell("/files/replace", &json!({path: {"old": "l", "new": "x"}})),
        session.tell("/directories", &json!({"new/dir": {"mode": 755}})),
        session.send("POST", "/directories/archive?path=.", &[], &tar(&[("f", "x")])).whole(),
    ];
    for (number, answer) in refused.iter().enumerate() {
        assert_eq!(failure(answer), (403, "PERMISSION_DENIED".into()), "{number}");
    }
    assert!(!session.exists("/tmp/other"), "half a move");
    let missing = [
        session.download("nope"),
        session.ask("GET", "/files/info", &[("path", path), ("path", "nope")]),
        session.ask("DELETE", "/files", &[("path", "nope")]),
        session.tell("/files/mv", &json!([{"src": "nope", "dest": "/tmp/x"}])),
        session.tell("/files/permissions", &json!({"nope": {"mode": 600}})),
        session.tell("/files/replace", &json!({"nope": {"old": "a", "new": "b"}})),
        session.ask("GET", "/files/search", &[("path", "nope")]),
        session.ask("GET", "/directories/list", &[("path", "nope")]),
        session.ask("GET", "/directories/archive", &[("path", "nope")]),
        session.ask("GET", "/files/watch", &[("path", "nope")]),
    ];
    for (number, answer) in missing.iter().enumerate() {
        assert_eq!(failure(answer), (404, "FILE_NOT_FOUND".into()), "{number}");
    }
    let no_files = [
        session.download("dir"),
        session.ask("DELETE", "/files", &[("path", "dir")]),
        session.tell("/files/replace", &json!({"dir": {"old": "a", "new": "b"}})),
        session.ask("GET", "/files/search", &[("path", path)]),
        session.ask("GET", "/directories/list", &[("path", path)]),
        session.ask("DELETE", "/directories", &[("path", path)]),
        session.tell("/directories", &json!({path: {}})),
        session.ask("GET", "/files/info", &[("path", "low.txt/below")]),
    ];
    for (number, answer) in no_files.iter().enumerate() {
        assert_eq!(failure(answer), (400, "INVALID_REQUEST_BODY".into()), "{number}");
    }
    assert_eq!(session.ask("DELETE", "/directories", &[("path", "nope")]).status, 200);
    assert_eq!(fs::read_to_string(folder.join(path)).unwrap(), "low\n");
}

#[test]
fn line_32_search_answers_absolute_paths_and_knows_two_stars() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "overlay");
    session.output(
        "mkdir -p new/deep; touch new/deep/c.rs new/c.txt .hidden.rs; ln -s dir link; ln -s a.rs dir/l.rs",
    );
    let search =
        |pattern: &str| session.paths_in(&folder, "/files/search", &[("path", "."), ("pattern", pattern)]);
    let all = [".hidden.rs", "dir/a.rs", "dir/l.rs", "dir/sub/b.rs", "new/deep/c.rs"];
    assert_eq!(search("**/*.rs"), all);
    assert_eq!(search("*.rs"), all);
    assert_eq!(search("dir/*.rs"), ["dir/a.rs", "dir/l.rs"]);
    assert_eq!(search("dir/**"), ["dir/a.rs", "dir/l.rs", "dir/sub/b.rs"]);
    assert_eq!(search("*.{txt,md}"), ["low.txt", "new/c.txt"]);
    assert_eq!(search("[b-c].rs"), ["dir/sub/b.rs", "new/deep/c.rs"]);
    assert_eq!(search("nothing"), [""; 0]);
    // A link to a folder is no folder, and nothing in it is found twice.
    assert_eq!(search("link"), ["link"]);
    let whole = session.ask("GET", "/files/search", &[("path", folder.join("dir").to_str().unwrap())]);
    let paths: Vec<_> = whole.json().as_array().unwrap().iter().map(|info| info["path"].clone()).collect();
    assert_eq!(paths[0], json!(folder.join("dir/a.rs")));
    assert_eq!(whole.json()[0]["type"], "file");
    let answer = session.ask("GET", "/files/search", &[("path", "."), ("pattern", "a[")]);
    assert_eq!(failure(&answer), (400, "INVALID_REQUEST_BODY".into()));
    assert_eq!(failure(&session.ask("GET", "/files/search", &[])), (400, "MISSING_QUERY".into()));
}

#[test]
fn line_33_infos_are_filled_in_and_special_files_are_named() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "rw");
    session.output("mkfifo fifo; ln -s nowhere link; chmod 640 low.txt; chown 1:2 low.txt; touch -d 2001-02-03T04:05:06Z low.txt");
    let info = session.info("low.txt");
    let name = |file: &str, id: u32| {
        let text = fs::read_to_string(file).unwrap();
        let line =
            text.lines().find(|line| line.split(':').nth(2) == Some(&id.to_string())).map(str::to_owned);
        line.map_or(id.to_string(), |line| line.split(':').next().unwrap().to_owned())
    };
    assert_eq!(info["path"], "low.txt");
    assert_eq!((&info["type"], &info["size"], &info["mode"]), (&json!("file"), &json!(4), &json!(640)));
    assert_eq!(info["modified_at"], "2001-02-03T04:05:06Z");
    assert!(info["created_at"].as_str().unwrap() > "2020", "{info}");
    assert_eq!(info["owner"], json!(name("/etc/passwd", 1)));
    assert_eq!(info["group"], json!(name("/etc/group", 2)));
    session.output(&format!("chown {OTHER_ID}:{OTHER_ID} low.txt"));
    assert_eq!(session.info("low.txt")["owner"], json!(OTHER_ID.to_string()));
    for (path, kind) in [
        ("fifo", "other"),
        ("link", "symlink"),
        ("dir", "directory"),
        ("/dev/null", "other"),
        ("/", "directory"),
    ] {
        assert_eq!(session.info(path)["type"], kind, "{path}");
    }
    let listed = session.ask("GET", "/directories/list", &[("path", "."), ("depth", "2")]).json();
    let kinds: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|info| (info["path"].as_str().unwrap().to_owned(), info["type"].as_str().unwrap().to_owned()))
        .collect();
    let at = |name: &str| folder.join(name).display().to_string();
    let expected = [
        ("dir", "directory"),
        ("dir/a.rs", "file"),
        ("dir/sub", "directory"),
        ("fifo", "other"),
        ("link", "symlink"),
        ("low.txt", "file"),
    ];
    assert_eq!(kinds, expected.map(|(path, kind)| (at(path), kind.to_owned())));
    assert_eq!(session.ask("GET", "/files/info", &[]).json(), json!({}));
    assert_eq!(session.paths("/directories/list", &[("path", "."), ("depth", "0")]), [""; 0]);
    for depth in ["-1", "x", ""] {
        assert_eq!(session.ask("GET", "/directories/list", &[("path", "."), ("depth", depth)]).status, 400);
    }
}

#[test]
fn line_34_permissions_set_owners_by_name_and_number() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, _) = session(&daemon, "overlay");
    let stat = || session.output("stat -c '%a %u %g' low.txt");
    let permit = |wanted: Value| session.tell("/files/permissions", &json!({"low.txt": wanted})).status;
    assert_eq!(permit(json!({"mode": 4750, "owner": "daemon", "group": OTHER_ID})), 200);
    assert_eq!(stat(), format!("4750 1 {OTHER_ID}\n"));
    assert_eq!(permit(json!({"mode": 0, "owner": "0", "group": "root"})), 200);
    assert_eq!(stat(), "750 0 0\n");
    assert_eq!(permit(json!({"mode": 644})), 200);
    assert_eq!(stat(), "644 0 0\n");
    assert_eq!(permit(json!({})), 200);
    for wrong in [
        json!({"mode": 888}),
        json!({"mode": 77_777}),
        json!({"mode": -1}),
        json!({"owner": "no such user"}),
        json!({"mode": "rw"}),
    ] {
        assert_eq!(permit(wrong.clone()), 400, "{wrong}");
    }
    // Of a request that names a missing file nothing is done.
    let answer =
        session.tell("/files/permissions", &json!({"low.txt": {"mode": 600}, "nope": {"mode": 600}}));
    assert_eq!((answer.status, stat().as_str()), (404, "644 0 0\n"));
}

#[test]
fn line_35_moves_and_replacements_of_lower_files_lose_nothing() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    fs::create_dir_all(folder.join("dir/sub/empty")).unwrap();
    fs::write(folder.join("dir/f"), "content").unwrap();
    fs::hard_link(folder.join("dir/f"), folder.join("dir/sub/hard")).unwrap();
    std::os::unix::fs::symlink("../f", folder.join("dir/sub/soft")).unwrap();
    let sparse = fs::File::create(folder.join("dir/sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", 32 << 20).unwrap();
    for (path, mode) in [("dir/f", 0o2751), ("dir/sub", 0o1711), ("dir", 0o700)] {
        std::os::unix::fs::chown(folder.join(path), Some(7), Some(8)).unwrap();
        fs::set_permissions(folder.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut body = workspace(&folder, "overlay");
    body["profile"] = json!("strict");
    let session = daemon.create(&body);
    session.output("touch -h -d @1000000000 dir/sub/soft; touch -d @1000000002 dir/sub dir; setfattr -n user.tag -v kept dir/f 2>/dev/null; mkfifo dir/fifo; touch -d @1000000002 dir");
    let look = "find . -type d -printf '%p %y %m %U %G %Ts\\n' -o -printf '%p %y %m %U %G %n %Ts %l\\n' | sort; cat f; du -k sparse | cut -f1; cmp sparse sub/../sparse";
    let before = session.output(&format!("(cd dir; {look})"));
    assert!(before.contains("sub/hard f 2751 7 8 2"), "{before}");
    let moved = session.tell("/files/mv", &json!([{"src": "dir", "dest": "a/new/place"}]));
    assert_eq!(moved.status, 200, "{}", moved.text());
    assert_eq!(session.output(&format!("(cd a/new/place; {look})")), before);
    assert_eq!(session.output("ls"), "a\n");
    assert_eq!(machine::names(&folder).into_iter().collect::<Vec<_>>(), ["dir"], "the lower was touched");
    // Across file systems, and back over what is there.
    session.output("mkdir back; touch back/old");
    for (src, dest) in
        [("a/new/place", "/tmp/place"), ("/tmp/place/sparse", "back/old"), ("/tmp/place", "a/new/place")]
    {
        let moved = session.tell("/files/mv", &json!([{"src": src, "dest": dest}]));
        assert_eq!(moved.status, 200, "{src} {dest}: {}", moved.text());
        assert!(!session.exists(src));
    }
    assert!(
        session.output("du -k back/old | cut -f1").trim().parse::<u64>().unwrap() < 1024,
        "no longer sparse"
    );
    assert_eq!(
        session.output("stat -c '%a %u %g' a/new/place/f a/new/place/sub; readlink a/new/place/sub/soft"),
        "2751 7 8\n1711 7 8\n../f\n"
    );
    // Text is replaced without reading the file whole, and mode and owner stay.
    session.output(
        "yes 0123456789abcde | head -c 32000000 > big; chmod 4604 big; chown 3:4 big; chmod 4604 big",
    );
    let before = machine::resident_kb(daemon.pid());
    let answer = session.tell("/files/replace?verbose=true", &json!({"big": {"old": "9ab", "new": "-"}}));
    assert_eq!(answer.json(), json!({"big": {"replacedCount": 2_000_000}}));
    assert!(machine::resident_kb(daemon.pid()) < before + 20_000, "the file was in memory");
    assert_eq!(
        session.output("stat -c '%a %u %g %s' big; head -c 30 big; cmp -n 27000000 big <(yes 012345678-cde)"),
        "4604 3 4 28000000\n012345678-cde\n012345678-cde\n01"
    );
}

#[test]
fn line_36_replace_always_answers_with_counts() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "rw");
    let inode = fs::metadata(folder.join("dir/a.rs")).unwrap().ino();
    let wanted =
        json!({"low.txt": {"old": "low", "new": "high\nhigh"}, "dir/a.rs": {"old": "zzz", "new": ""}});
    let answer = session.tell("/files/replace", &wanted);
    assert_eq!(
        (answer.status, answer.json()),
        (200, json!({"low.txt": {"replacedCount": 1}, "dir/a.rs": {"replacedCount": 0}}))
    );
    assert_eq!(session.output("cat low.txt dir/a.rs"), "high\nhigh\na\n");
    assert_eq!(
        fs::metadata(folder.join("dir/a.rs")).unwrap().ino(),
        inode,
        "a file without an occurrence was rewritten"
    );
    // Nothing is done of a request that is wrong in one place.
    for wrong in [json!({"old": "", "new": "x"}), json!({"old": "a"}), json!({"new": "a"})] {
        let answer =
            session.tell("/files/replace", &json!({"dir/a.rs": {"old": "a", "new": "x"}, "low.txt": wrong}));
        assert_eq!(failure(&answer), (400, "INVALID_REQUEST_BODY".into()));
    }
    assert_eq!(session.content("dir/a.rs"), "a\n");
}

#[test]
fn line_37_uploads_land_whole_or_not_at_all() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "rw");
    let inode = || fs::metadata(folder.join("low.txt")).unwrap().ino();
    let before = inode();
    // The form promises more than it brings, and the client goes away.
    let mut body =
        common::files::form(&[Part::metadata(r#"{"path":"low.txt"}"#), Part::file(&[b'x'; 1 << 20])]);
    body.truncate(900_000);
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: execd\r\nContent-Length: 2000000\r\nContent-Type: {}\r\n\r\n",
        session.route("/files/upload"),
        common::files::form_type()
    );
    let mut client = std::net::TcpStream::connect(daemon.address).unwrap();
    std::io::Write::write_all(&mut client, &[head.as_bytes(), &body].concat()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(200));
    // Nothing of it shows meanwhile, either.
    assert_eq!(session.output("ls -A; cat low.txt"), "dir\nlow.txt\nlow\n");
    drop(client);
    eventually("the upload is given up", || descriptors_below(&daemon, "(deleted)") == 0);
    assert_eq!((fs::read_to_string(folder.join("low.txt")).unwrap().as_str(), inode()), ("low\n", before));
    // A batch whose last file cannot be is refused as a whole.
    let answer = session.upload_form(&[
        Part::metadata(r#"{"path":"low.txt"}"#),
        Part::file(b"one"),
        Part::metadata(r#"{"path":"dir"}"#),
        Part::file(b"two"),
    ]);
    assert_eq!(failure(&answer), (400, "INVALID_REQUEST_BODY".into()));
    assert_eq!(session.content("low.txt"), "low\n");
    // Whoever has the old file open keeps it, and modes and owners of old files stay.
    session.output("chmod 604 low.txt; chown 5:6 low.txt; exec 7< low.txt");
    session.upload("low.txt", "new\n");
    assert_eq!(session.output("cat <&7; cat low.txt; stat -c '%a %u %g' low.txt"), "low\nnew\n604 5 6\n");
    assert_eq!(session.output("ls -A"), "dir\nlow.txt\n");
}

#[test]
fn mounts_stay_where_they_are() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    for name in ["ro", "empty", "full", "bound"] {
        fs::create_dir(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("f"), name).unwrap();
    }
    fs::remove_file(folder.join("empty/f")).unwrap();
    fs::write(folder.join("single"), "under").unwrap();
    let source = daemon.folder("source");
    fs::write(source.join("single"), "over").unwrap();
    let at = |name: &str| folder.join(name);
    let session = daemon.create(&json!({
        "overlays": [
            {"path": folder, "mode": "rw"},
            {"path": at("ro"), "mode": "ro"},
            {"path": at("empty"), "mode": "overlay"},
            {"path": at("full"), "mode": "overlay"},
        ],
        "binds": [
            {"source": source.join("single"), "dest": at("single"), "readonly": true},
            {"source": source, "dest": at("bound")},
        ],
    }));
    let mounts = || session.output("cut -d' ' -f5 /proc/self/mountinfo");
    let (before, look) = (mounts(), session.output("find . | sort"));
    for name in ["ro", "empty", "bound", "single"] {
        let there = format!("{name}2");
        let moved = session.tell("/files/mv", &json!([{"src": name, "dest": there}]));
        assert_eq!(failure(&moved), (409, "CONFLICT".into()), "{name}");
        session.upload("f", "f");
        let over = session.tell(
            "/files/mv",
            &json!([{"src": if name == "single" { "f" } else { "full/.." }, "dest": name}]),
        );
        assert!(matches!(over.status, 400 | 409), "{name}: {}", over.status);
        let route = if name == "single" { "/files" } else { "/directories" };
        if name == "empty" || name == "single" {
            assert_eq!(
                failure(&session.ask("DELETE", route, &[("path", name)])),
                (409, "CONFLICT".into()),
                "{name}"
            );
        }
    }
    assert_eq!(session.upload_as(&json!({"path": "single"}), b"x").failure().0, 403);
    for name in ["ro", "full"] {
        assert_eq!(failure(&session.ask("DELETE", "/directories", &[("path", name)])).0, 409);
    }
    session.output("rm f");
    assert_eq!((mounts(), session.output("find . | sort")), (before, look));
    assert_eq!(fs::read_to_string(at("single")).unwrap(), "under");
    assert_eq!(fs::read_to_string(source.join("single")).unwrap(), "over");
}

#[test]
fn a_refusal_reaches_a_client_that_is_still_sending() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, _) = session(&daemon, "ro");
    let form = common::files::form(&[Part::metadata(r#"{"path":"x"}"#), Part::file(&vec![b'x'; 20 << 20])]);
    for (rest, status) in [
        (session.route("/files/upload"), 403),
        ("/v1/isolated/session/none/files/upload".into(), 404),
        ("/nowhere".into(), 404),
    ] {
        let head = format!(
            "POST {rest} HTTP/1.1\r\nHost: execd\r\nContent-Length: {}\r\nContent-Type: {}\r\n\r\n",
            form.len(),
            common::files::form_type()
        );
        let mut client = std::net::TcpStream::connect(daemon.address).unwrap();
        // Everything is taken, and only then somebody looks for the answer.
        std::io::Write::write_all(&mut client, head.as_bytes()).unwrap();
        std::io::Write::write_all(&mut client, &form).unwrap_or_else(|error| panic!("{rest}: {error}"));
        let mut answer = [0; 12];
        std::io::Read::read_exact(&mut client, &mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {status}"), "{rest}");
    }
}

#[test]
fn line_38_info_fails_as_a_whole_for_one_missing_path() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, folder) = session(&daemon, "overlay");
    let low = folder.join("low.txt");
    let answer = session.ask("GET", "/files/info", &[("path", "low.txt"), ("path", low.to_str().unwrap())]);
    assert_eq!(
        answer.json().as_object().unwrap().keys().cloned().collect::<Vec<_>>(),
        [low.to_str().unwrap(), "low.txt"]
    );
    let answer = session.ask("GET", "/files/info", &[("path", "low.txt"), ("path", "nope")]);
    assert_eq!(failure(&answer), (404, "FILE_NOT_FOUND".into()));
}

/// Open files of the daemon whose name says so.
fn descriptors_below(daemon: &Daemon, what: &str) -> usize {
    let links = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let target = |entry: fs::DirEntry| fs::read_link(entry.path()).unwrap_or_default().display().to_string();
    links
        .flatten()
        .map(target)
        .filter(|name| name.starts_with('/') && name.contains(what) && !name.contains("memfd"))
        .count()
}

/// An archive with these files.
fn tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}
