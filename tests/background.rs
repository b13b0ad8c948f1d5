//! Runs in the background: how they start, what they are given, their logs, and how they end.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::run::Stream;
use common::{Daemon, OTHER_ID, Session, Setup, eventually, machine, settled, workspace};
use serde_json::{Value, json};

/// A background run.
struct Background<'a> {
    session: &'a Session<'a>,
    id: String,
}

fn start<'a>(session: &'a Session<'a>, body: &Value) -> Background<'a> {
    let mut body = body.clone();
    body["background"] = json!(true);
    let answer = session.daemon.post(&session.route("/run"), &body);
    assert_eq!(answer.status, 202, "{}", answer.text());
    let handle = answer.json();
    assert_eq!(handle["session_id"], json!(session.id));
    assert!(handle["started_at"].is_string(), "{handle}");
    Background { session, id: handle["run_id"].as_str().unwrap().to_owned() }
}

fn start_code<'a>(session: &'a Session<'a>, code: &str) -> Background<'a> {
    start(session, &json!({"code": code}))
}

impl Background<'_> {
    fn route(&self, rest: &str) -> String {
        self.session.route(&format!("/runs/{}{rest}", self.id))
    }

    fn status(&self) -> Value {
        let answer = self.session.daemon.get(&self.route(""));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    /// The text behind a cursor, and the next cursor.
    fn log(&self, cursor: u64) -> (String, u64) {
        let answer = self.session.daemon.get(&self.route(&format!("/logs?cursor={cursor}")));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.head.header("content-type"), Some("text/plain; charset=utf-8"));
        let next = answer.head.header("EXECD-ISOLATED-TAIL-CURSOR").unwrap().parse().unwrap();
        (answer.text(), next)
    }

    fn says(&self, text: &str) {
        eventually(&format!("the log has {text:?}"), || self.log(0).0.contains(text));
    }

    /// Waits for its end; its status then, and the whole log.
    fn finish(&self) -> (Value, String) {
        eventually("the run ends", || self.status()["running"] == false);
        (self.status(), self.log(0).0)
    }
}

#[test]
fn a_background_run_is_started_watched_and_read() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkfifo go");
    let run = start_code(&session, "echo one; echo two >&2; read -r x <go; echo $x; exit 3");
    run.says("one\ntwo\n");
    let (text, cursor) = run.log(0);
    assert_eq!((text.as_str(), cursor), ("one\ntwo\n", 8));
    assert_eq!(run.log(4), ("two\n".into(), 8));
    assert_eq!(run.log(999), (String::new(), 8));
    let status = run.status();
    assert_eq!(status["running"], true);
    assert_eq!((&status["exit_code"], &status["finished_at"]), (&Value::Null, &Value::Null), "{status}");
    std::fs::write(daemon.path("w/go"), "three\n").unwrap();
    let (status, log) = run.finish();
    assert_eq!((&status["exit_code"], status.get("error")), (&json!(3), None));
    assert!(status["finished_at"].as_str() >= status["started_at"].as_str(), "{status}");
    assert_eq!((&log, run.log(cursor)), (&"one\ntwo\nthree\n".into(), ("three\n".into(), 14)));
    let list = daemon.get(&session.route("/runs")).json();
    let of_run = list["runs"].as_array().unwrap().iter().find(|entry| entry["run_id"] == json!(run.id));
    assert_eq!(of_run.unwrap(), &status);
    // Nothing of all that is in the user's folder.
    assert_eq!(machine::names(&daemon.path("w")).into_iter().collect::<Vec<_>>(), ["go"]);
}

#[test]
fn it_works_in_every_kind_of_workspace_and_for_every_user() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    std::fs::write(folder.join("file"), "host\n").unwrap();
    for mount in [
        json!({"path": folder, "mode": "rw"}),
        json!({"path": folder, "mode": "ro"}),
        json!({"path": folder, "mode": "overlay"}),
        json!({"path": folder, "mode": "overlay", "persist": false}),
    ] {
        for identity in [json!({}), json!({"uid": OTHER_ID, "gid": OTHER_ID}), json!({"uid_mode": "userns"})]
        {
            let mut body = json!({"overlays": [mount]});
            body.as_object_mut().unwrap().extend(identity.as_object().unwrap().clone());
            let session = daemon.create(&body);
            let (status, log) = start_code(&session, "pwd; cat file; id -u").finish();
            let id = identity.get("uid").map_or(0, |uid| uid.as_u64().unwrap());
            assert_eq!(log, format!("{}\nhost\n{id}\n", folder.display()), "{body}");
            assert_eq!(status["exit_code"], 0);
            session.delete();
        }
    }
}

#[test]
fn it_starts_where_the_shell_is_and_with_its_exports() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output(
        "mkdir -p 'a b/c'; cd 'a b'; export E='x\ny \"z\" $w'; L=local; f() { :; }; set -u; shopt -s extglob",
    );
    let look = "pwd; echo \"$E\"; echo ${L-unset}; declare -F; echo $-; cd c; echo $RANDOM >/dev/null";
    let expected = format!("{}\nx\ny \"z\" $w\nunset\nhBc\n", daemon.path("w/a b").display());
    assert_eq!(start_code(&session, look).finish().1, expected);
    // Its own changes are its own.
    session.run("echo ${PWD##*/}").prints("a b\n");
    let variables = json!({"code": "echo $E $N", "envs": {"E": "mine", "N": "it's \"new\""}});
    assert_eq!(start(&session, &variables).finish().1, "mine it's \"new\"\n");
    session.run("echo ${N-unset}").prints("unset\n");
    // Also beside a run that goes on.
    session.output("cd c; export E=later");
    eventually("the session is idle for a moment", || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        true
    });
    let busy = session.open_until(&json!({"code": "cd /; export E=never; echo go; sleep 4321"}), "go");
    assert_eq!(start_code(&session, "echo ${PWD##*/} $E").finish().1, "c later\n");
    drop(busy);
    let input = json!({"code": "cat; echo end", "stdin": "some\ninput"});
    assert_eq!(start(&session, &input).finish().1, "some\ninputend\n");
    assert_eq!(start_code(&session, "cat; read x; echo end").finish().1, "end\n");
}

#[test]
fn a_folder_that_is_gone_does_not_keep_it_from_running() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkdir gone; cd gone; set -e; rmdir ../gone");
    let (status, log) = start_code(&session, "echo runs").finish();
    assert!(log.ends_with("runs\n") && status["exit_code"] == 0, "{log} {status}");
    session.run("echo usable").prints("usable\n");
}

#[test]
fn several_go_on_beside_the_foreground_up_to_a_limit() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let runs: Vec<_> = (0..16).map(|n| start_code(&session, &format!("echo {n}; sleep 4321"))).collect();
    for (n, run) in runs.iter().enumerate() {
        run.says(&format!("{n}\n"));
        session.run(&format!("echo {n}")).prints(&format!("{n}\n"));
    }
    let refused = daemon.post(&session.route("/run"), &json!({"code": ":", "background": true}));
    assert_eq!((refused.failure().0, refused.failure().1.as_str()), (429, "TOO_MANY_REQUESTS"));
    let delete = |run: &Background<'_>| daemon.request("DELETE", &run.route(""), b"").status;
    assert_eq!(delete(&runs[0]), 200);
    runs[0].finish();
    start_code(&session, "echo again").finish();
    session.delete();
}

#[test]
fn a_run_can_be_ended_with_everything_it_started() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let code = "trap '' INT TERM HUP; setsid sleep 4321 & (sleep 4321 & disown); sleep 4321 & echo up; wait";
    let (hit, spared) = (start_code(&session, code), start_code(&session, code));
    hit.says("up");
    spared.says("up");
    let before = machine::descendants(daemon.pid()).len();
    assert_eq!(daemon.request("DELETE", &hit.route(""), b"").status, 200);
    let (status, _) = hit.finish();
    assert_eq!((&status["exit_code"], &status["report"]["signal"]), (&json!(137), &json!(9)));
    assert!(status["error"].as_str().unwrap().contains("SIGKILL"), "{status}");
    eventually("its processes are gone", || machine::descendants(daemon.pid()).len() == before - 4);
    assert_eq!(spared.status()["running"], true);
    // Again is fine, and the other one goes on.
    assert_eq!(daemon.request("DELETE", &hit.route(""), b"").status, 200);
    let unknown = daemon.request("DELETE", &session.route("/runs/00000000-0000-4000-8000-000000000000"), b"");
    assert_eq!((unknown.failure().0, unknown.failure().1.as_str()), (404, "SESSION_NOT_FOUND"));
}

#[test]
fn a_foreground_run_is_listed_and_can_be_ended_too() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let stream = session.open_until(&json!({"code": "x=kept; echo go; sleep 4321"}), "go");
    let list = daemon.get(&session.route("/runs")).json();
    let [run] = list["runs"].as_array().unwrap().as_slice() else { panic!("{list}") };
    assert_eq!((&run["running"], &run["background"]), (&json!(true), &json!(false)));
    let route = session.route(&format!("/runs/{}", run["run_id"].as_str().unwrap()));
    assert_eq!(daemon.get(&format!("{route}/logs")).failure().0, 400);
    assert_eq!(daemon.request("DELETE", &route, b"").status, 200);
    assert_eq!(stream.finish().error(), ("RuntimeError", "cancelled"));
    assert_eq!(daemon.get(&route).json()["running"], false);
    session.run("echo $x").prints("kept\n");
}

#[test]
fn its_end_is_its_shells_and_late_output_still_comes() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let run = start_code(&session, "(while [ ! -e go ]; do sleep 0.01; done; echo late) & echo now");
    let (status, log) = run.finish();
    assert_eq!((&status["exit_code"], log.as_str()), (&json!(0), "now\n"));
    session.output(": >go");
    run.says("now\nlate\n");
    for (code, exit_code) in
        [("kill -9 $$", 137), ("exec sh -c 'exit 4'", 4), ("echo 'open", 2), ("set -e; false", 1)]
    {
        assert_eq!(start_code(&session, code).finish().0["exit_code"], exit_code, "{code}");
    }
}

#[test]
fn its_log_is_whole_and_an_endless_one_keeps_its_end() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let run = start_code(&session, "seq 1 300000");
    let (_, log) = run.finish();
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    assert!(log == expected, "{} bytes instead of {}", log.len(), expected.len());
    let run = start_code(&session, "yes | head -c 40000000; echo the end");
    run.finish();
    // At most 16 MiB at once, of which more than one such piece is hardly kept.
    let (first, cursor) = run.log(0);
    let (second, end) = run.log(cursor);
    assert!(first.len() == 16 << 20 && second.len() <= 2 << 20, "{} {}", first.len(), second.len());
    assert!((first + &second).ends_with("y\ny\nthe end\n"));
    assert_eq!(end, 40_000_008);
    assert_eq!(run.log(40_000_000), ("the end\n".into(), 40_000_008));
}

#[test]
fn a_flood_neither_hides_the_end_nor_resists_it() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let left_behind = start_code(&session, "yes & exit 5");
    eventually("the run ends", || left_behind.status()["running"] == false);
    assert_eq!(left_behind.status()["exit_code"], 5);
    assert_eq!(daemon.request("DELETE", &left_behind.route(""), b"").status, 200);
    let flood = start_code(&session, "yes");
    // Somebody who reads its events and does not take them holds up nothing.
    let unread = Stream::get(&daemon, &flood.route("/events"));
    flood.says("y\ny\n");
    session.run("echo beside").prints("beside\n");
    assert_eq!(daemon.request("DELETE", &flood.route(""), b"").status, 200);
    eventually("the run ends", || flood.status()["running"] == false);
    assert_eq!(unread.finish().exit_code(), Some(137));
    eventually("nobody writes any more", || {
        let cursor = left_behind.log(u64::MAX).1;
        std::thread::sleep(std::time::Duration::from_millis(50));
        left_behind.log(u64::MAX).1 == cursor
    });
}

#[test]
fn its_session_is_busy_as_long_and_ends_it() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["idle_timeout_seconds"] = json!(1);
    let session = daemon.create(&body);
    let run = start_code(&session, "sleep 3");
    eventually("the run ends", || run.status()["running"] == false);
    eventually("the session expires", || daemon.sessions().is_empty());
    let session = daemon.session("w");
    let run = start_code(&session, "echo up; trap '' TERM; sleep 4321");
    run.says("up");
    let events = Stream::get(&daemon, &run.route("/events"));
    session.delete();
    assert_eq!(events.finish().error(), ("RuntimeError", "session terminated"));
    assert_eq!(daemon.get(&run.route("")).failure().0, 404);
}

#[test]
fn when_the_session_dies_the_run_says_so() {
    let Some(daemon) = Setup::new().setting("session.spares = 0").start() else { return };
    let session = daemon.session("w");
    let run = start_code(&session, "echo up; sleep 4321");
    run.says("up");
    let launcher = machine::children(daemon.pid())[0];
    let init = machine::children(launcher.pid)[0];
    machine::signal(init.pid, rustix::process::Signal::KILL);
    let (status, log) = run.finish();
    assert_eq!((&status["error"], status.get("exit_code")), (&json!("session terminated"), None));
    assert_eq!(log, "up\n");
    eventually("the session is dead", || session.state()["status"] == "dead");
    let refused = daemon.post(&session.route("/run"), &json!({"code": ":", "background": true}));
    assert_eq!(refused.failure().0, 404);
}

#[test]
fn a_program_that_is_stopped_while_it_starts_costs_its_session_and_no_other() {
    let Some(daemon) = Setup::new().start() else { return };
    let (hostile, other) = (daemon.session("w"), daemon.session("other"));
    // Whatever comes next is stopped before it is executed.
    let code = "echo go; for ((;;)); do kill -STOP $(($(cut -d' ' -f5 /proc/loadavg) + 1)) $(($(cut -d' ' -f5 /proc/loadavg) + 2)); done 2>/dev/null";
    let run = hostile.open_until(&json!({"code": code}), "go");
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| daemon.post(&hostile.route("/run"), &json!({"code": ":", "background": true})));
        }
        for _ in 0..20 {
            other.run("echo free").prints("free\n");
            assert_eq!(start_code(&other, "echo free").finish().1, "free\n");
        }
        daemon.session("third").delete();
        hostile.delete();
    });
    drop(run);
}

#[test]
fn what_is_wrong_is_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let run = start_code(&session, "echo x");
    run.finish();
    for cursor in ["-1", "x", "1.5", "99999999999999999999999"] {
        let answer = daemon.get(&run.route(&format!("/logs?cursor={cursor}")));
        let (status, code, message) = answer.failure();
        assert_eq!((status, code.as_str()), (400, "INVALID_REQUEST_BODY"), "{cursor}");
        assert!(message.starts_with("cursor: "), "{message}");
        assert_eq!(daemon.get(&run.route(&format!("/events?after={cursor}"))).failure().0, 400);
    }
    for run in ["nonesuch", "00000000-0000-4000-8000-000000000000"] {
        for rest in ["", "/logs", "/events"] {
            let answer = daemon.get(&session.route(&format!("/runs/{run}{rest}")));
            assert_eq!((answer.failure().0, answer.failure().1.as_str()), (404, "SESSION_NOT_FOUND"));
        }
    }
    for body in [
        json!({"code": "", "background": true}),
        json!({"code": ":", "background": true, "envs": {"A-B": "1"}}),
    ] {
        assert_eq!(daemon.post(&session.route("/run"), &body).failure().0, 400, "{body}");
    }
    assert_eq!(daemon.get("/v1/isolated/session/nonesuch/runs").failure().0, 404);
}

#[test]
fn background_runs_leave_nothing() {
    let Some(daemon) = Setup::new().setting("session.spares = 0").start() else { return };
    let cycle = |daemon: &Daemon| {
        let session = daemon.session("w");
        let runs: Vec<_> = ["exit 1", "yes", "setsid sleep 4321 & sleep 4321", "kill -9 $$", "sleep 4321"]
            .into_iter()
            .map(|code| start_code(&session, code))
            .collect();
        daemon.request("DELETE", &runs[1].route(""), b"");
        session.delete();
    };
    (0..5).for_each(|_| cycle(&daemon));
    let left = || (machine::descriptors(daemon.pid()), machine::descendants(daemon.pid()).len());
    eventually("things are quiet", || left().1 == 1);
    let before = settled(left);
    (0..30).for_each(|_| cycle(&daemon));
    eventually("all is as before", || left() == before);
}
