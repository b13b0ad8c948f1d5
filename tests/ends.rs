//! How runs end: by themselves, by taking their shell with them, by a timeout, by a client that goes away; and
//! that the session is usable after each of them. Also the order in which runs wait for each other.

#![expect(clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::run::Run;
use common::{Session, Setup, eventually, workspace};
use serde_json::{Value, json};

/// The session still runs code, as a shell that is at its prompt.
fn is_usable(session: &Session<'_>, after: &str) {
    let run = session.run("echo usable; echo apart >&2");
    let got = (run.exit_code(), run.stdout(), run.stderr());
    assert_eq!(got, (Some(0), "usable\n".into(), "apart\n".into()), "after {after}: {}", run.raw());
    assert_eq!(session.state()["status"], "active", "after {after}");
}

fn timed(session: &Session<'_>, code: &str) -> Run {
    session.run_with(&json!({"code": code, "timeout_seconds": 1}))
}

#[test]
fn exit_ends_the_run_and_not_the_session() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("export KEPT='a b\n$c'; mkdir -p sub; cd sub");
    let run = session.run("echo before; exit 5; echo never");
    assert_eq!((run.exit_code(), run.stdout().as_str()), (Some(5), "before\n"));
    assert_eq!(run.error(), ("ExitError", "5"));
    session.run("echo \"$KEPT ${PWD##*/}\"").prints("a b\n$c sub\n");
    let run = session.run("exit");
    assert_eq!((run.exit_code(), run.terminal()["type"].as_str()), (Some(0), Some("execution_complete")));
    session.run("echo \"$KEPT ${PWD##*/}\"").prints("a b\n$c sub\n");
}

#[test]
fn what_a_shell_leaves_is_carried_over() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkdir -p 'a dir'; cd 'a dir'; export N=0");
    for (code, status) in [
        ("export N=1; set -e; false", 1),
        ("export N=2; set -u; echo $nonesuch", 1),
        ("export N=3; kill -TERM $$; sleep 5", 143),
        ("export N=4; kill -HUP $$; sleep 5", 129),
        ("export N=5; f() { exit 6; }; f", 6),
    ] {
        assert_eq!(session.run(code).exit_code(), Some(status), "{code}");
        let number = code.split('=').nth(1).unwrap().split(';').next().unwrap();
        session.run("echo \"$N ${PWD##*/} $-\"").prints(&format!("{number} a dir {}\n", flags(&session)));
    }
}

/// The options a shell starts with: `set -e` and its like are not carried over.
fn flags(session: &Session<'_>) -> String {
    let flags = session.output("printf %s $-");
    assert!(!flags.contains('e') && !flags.contains('u'), "{flags}");
    flags
}

#[test]
fn code_that_takes_the_shell_away_ends_at_once() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let start = session.output("pwd");
    for (code, status) in [("kill -9 $$", 137), ("exec sleep 0", 0), ("exec sh -c 'exit 7'", 7)] {
        session.output("mkdir -p sub; cd sub");
        let run = session.run(&format!("echo seen; {code}; echo never"));
        assert_eq!((run.exit_code(), run.stdout().as_str()), (Some(status), "seen\n"), "{code}");
        is_usable(&session, code);
        // Nothing could be carried over.
        session.run("pwd").prints(&start);
    }
}

#[test]
fn code_that_is_cut_off_or_closes_things_ends() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut hung = Vec::new();
    for code in [
        "echo 'open",
        "echo \"open",
        "cat <<EOF\nno end",
        "(",
        "{",
        "if true; then",
        "echo a \\",
        "true &&",
        "true |",
        "set -n",
        "exec >&-",
        "exec 2>&-",
        "exec <&-",
        "exec >&- 2>&- <&-",
        "exec >/dev/null",
        "exec < /dev/zero",
        "break",
        "continue",
        "return",
        "return 9",
        "set -x",
        "set -v",
        "set -e",
        "set -o posix",
        "trap 'echo t' EXIT",
        "trap 'false' DEBUG",
        "trap '' 64",
        "trap - EXIT",
        "enable -n echo",
        "enable -n eval",
        "enable -n builtin",
        "builtin() { false; }",
        "echo() { false; }",
        "command() { false; }",
        "alias echo=false",
        "readonly IFS PATH",
        "shopt -s extdebug",
        "ulimit -n 3",
        "umask 777",
        "cd /; rmdir /",
        "unset PATH",
        "PATH=",
        "IFS=",
        "BASHOPTS=1",
        "rm -rf /run/execd",
        "echo x >/run/execd/s",
        "coproc cat",
        "exec 3<>/dev/null",
        "bg",
        "printf '\\0'",
        "set -f",
        "set -- a b c",
        "disown -a",
        "stty -echo",
        "logout",
        ":(){ :; }",
    ] {
        let fresh = daemon.session("w");
        // Far more than any of them needs: none may hang until then.
        let run = fresh.run_with(&json!({"code": code, "timeout_seconds": 10}));
        if run.error().0 == "Timeout" {
            hung.push(code);
        }
        let after = fresh.run("printf 'usable\\n'");
        assert_eq!(after.stdout(), "usable\n", "after {code:?}: {} then {}", run.raw(), after.raw());
        fresh.delete();
    }
    assert_eq!(hung, Vec::<&str>::new());
}

#[test]
fn a_timeout_ends_the_run_and_keeps_the_state() {
    let Some(daemon) = Setup::new().setting("session.interrupt_grace_ms = 200").start() else { return };
    let session = daemon.session("w");
    session.output("x=kept; mkdir -p sub; cd sub");
    for code in [
        "sleep 60",
        "sleep 60; echo never",
        "while :; do :; done",
        "while :; do sleep 0.01; done",
        "read -r line < <(sleep 60)",
        "sleep 60 | cat",
        "sleep 60 & wait",
        "(trap '' INT TERM; sleep 60)",
        "setsid sleep 60 & wait",
        "sh -c 'trap \"\" INT TERM HUP; while :; do sleep 1; done'",
        "sh -c 'kill -STOP $$'",
    ] {
        let run = timed(&session, &format!("echo started; {code}"));
        assert_eq!((run.error(), run.exit_code()), (("Timeout", "124"), Some(124)), "{code}");
        assert_eq!(run.stdout(), "started\n", "{code}");
        assert!(run.terminal()["text"].as_str().unwrap().contains("timed out"), "{code}");
        assert!(run.terminal()["execution_time"].as_u64().unwrap() >= 1000, "{code}");
        is_usable(&session, code);
        session.run("echo $x ${PWD##*/}").prints("kept sub\n");
    }
}

#[test]
fn a_timeout_beats_what_resists_it() {
    let Some(daemon) = Setup::new().setting("session.interrupt_grace_ms = 200").start() else { return };
    let session = daemon.session("w");
    for code in [
        "trap '' INT TERM; sleep 60",
        "trap '' INT TERM HUP 64; while :; do :; done",
        "trap : INT TERM HUP 64; while :; do sleep 60; done",
        "kill -STOP $$",
        "f() { while :; do :; done; }; f",
        "exec sleep 60",
        "exec sh -c 'trap \"\" INT TERM; while :; do :; done'",
        "sleep 60 >/dev/null 2>&1 < /dev/null & disown; setsid setsid sleep 60 & wait; sleep 60",
        "cat /dev/zero >/dev/null",
        "yes",
    ] {
        let run = timed(&session, code);
        assert_eq!(run.error(), ("Timeout", "124"), "{code}");
        is_usable(&session, code);
    }
}

#[test]
fn a_timeout_kills_every_process_of_the_run() {
    let Some(daemon) = Setup::new().setting("session.interrupt_grace_ms = 200").start() else { return };
    let session = daemon.session("w");
    let code = "setsid sleep 4321 & (trap '' INT; sleep 4321 & sleep 4321 & wait) & sleep 4321";
    assert_eq!(timed(&session, code).error(), ("Timeout", "124"));
    eventually("all of the run are gone", || sleepers(&session) == 0);
}

/// Processes in the session that were started as `sleep 4321`.
fn sleepers(session: &Session<'_>) -> usize {
    let code = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null";
    session.run(code).stdout().lines().filter(|line| line.trim() == "sleep 4321").count()
}

#[test]
fn an_earlier_background_process_survives_a_later_timeout() {
    let Some(daemon) = Setup::new().setting("session.interrupt_grace_ms = 200").start() else { return };
    let session = daemon.session("w");
    session.output("sleep 4321 & echo $! >pid");
    for code in ["sleep 60", "trap '' INT TERM 64; sleep 60"] {
        assert_eq!(timed(&session, code).error(), ("Timeout", "124"));
        session.run("kill -0 $(cat pid) && echo alive").prints("alive\n");
    }
    // It also survives the replacement of its shell.
    assert_eq!(session.run("kill -9 $$").exit_code(), Some(137));
    assert_eq!(sleepers(&session), 1);
}

#[test]
fn late_output_stays_out_of_later_runs() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let code = "(while [ ! -e go ]; do sleep 0.01; done; echo late; echo late >&2; : >done) & echo now";
    session.run(code).prints("now\n");
    session.run("echo one").prints("one\n");
    session.run(": >go; while [ ! -e done ]; do sleep 0.01; done; echo two").prints("two\n");
    session.run("echo three").prints("three\n");
    // A flood that nobody reads neither blocks nor shows.
    let code = "(while [ ! -e flood ]; do sleep 0.01; done; exec yes flood) & echo now";
    session.run(code).prints("now\n");
    session.run(": >flood").prints("");
    for _ in 0..20 {
        session.run("echo clean").prints("clean\n");
    }
}

#[test]
fn a_run_does_not_wait_for_what_it_left_behind() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.run("sleep 4321 & echo done").prints("done\n");
    session.run("(setsid sleep 4321 &) ; echo done").prints("done\n");
    assert_eq!(sleepers(&session), 2);
}

#[test]
fn a_client_that_goes_away_cancels_its_run() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("x=kept");
    for code in
        ["sleep 4321", "while :; do :; done", "yes", "setsid sleep 4321 & wait", "sleep 4321 & sleep 4321"]
    {
        let code = format!("echo started; {code}; echo after >>log");
        drop(session.open_until(&json!({"code": code}), "started"));
        is_usable(&session, &code);
        session.run("echo $x; cat log 2>/dev/null || :").prints("kept\n");
    }
    eventually("all of the runs are gone", || sleepers(&session) == 0);
}

#[test]
fn a_client_that_goes_away_while_it_waits_leaves_nothing() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkfifo go");
    let first = session.open_until(&json!({"code": "echo started; read -r x <go"}), "started");
    drop(session.open(&json!({"code": ": >must-not-exist"})));
    let last = session.open(&json!({"code": "echo last"}));
    std::fs::write(daemon.path("w/go"), "x\n").unwrap();
    assert_eq!(first.finish().exit_code(), Some(0));
    last.finish().prints("last\n");
    // The dropped one may have begun before its end was noticed, but it is never reported to anybody else.
    session.run("echo next").prints("next\n");
}

#[test]
fn runs_take_turns_in_order_and_at_most_sixteen_wait() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkfifo go");
    let first =
        session.open_until(&json!({"code": "echo started; read -r x <go; echo 0 >>order"}), "started");
    let waiting: Vec<_> =
        (1..=16).map(|n| session.open(&json!({"code": format!("echo {n} >>order; echo {n}")}))).collect();
    let refused = daemon.post(&session.route("/run"), &json!({"code": ": >refused"}));
    let (status, code, message) = refused.failure();
    assert_eq!((status, code.as_str()), (429, "TOO_MANY_REQUESTS"), "{message}");
    assert!(message.contains("16"), "{message}");
    // Other sessions are not held up.
    daemon.session("other").run("echo free").prints("free\n");
    std::fs::write(daemon.path("w/go"), "x\n").unwrap();
    assert_eq!(first.finish().exit_code(), Some(0));
    for (n, stream) in (1..).zip(waiting) {
        stream.finish().prints(&format!("{n}\n"));
    }
    let order: String = (0..=16).map(|n| format!("{n}\n")).collect();
    session.run("cat order; ls refused 2>/dev/null || :").prints(&order);
}

#[test]
fn a_slow_reader_holds_up_only_itself() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let flood = session.open_until(&json!({"code": "seq 1 300000; echo end"}), "1\n");
    let other = daemon.session("other");
    for _ in 0..20 {
        other.run("echo free").prints("free\n");
    }
    let run = flood.finish();
    assert!(run.exit_code() == Some(0) && run.stdout().ends_with("300000\nend\n"));
}

#[test]
fn a_client_that_never_reads_does_not_keep_the_session() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    // More than the buffers of the connection take.
    let unread = session.open(&json!({"code": "yes | head -c 100000000", "timeout_seconds": 1}));
    session.run("echo free").prints("free\n");
    drop(unread);
}

#[test]
fn a_session_can_be_deleted_while_its_shell_is_being_replaced() {
    let Some(daemon) = Setup::new().setting("session.shell_start_max_ms = 600000").start() else { return };
    let session = daemon.session("w");
    // What this shell leaves to its successor keeps that busy for ever.
    let code =
        "trap '{ pwd; echo \"while :; do :; done\"; echo EXECD-STATE-END; } >/run/execd/t' EXIT; exit 3";
    assert_eq!(session.run(code).exit_code(), Some(3));
    session.delete();
}

#[test]
fn a_session_lives_without_bash() {
    let Some(daemon) = Setup::new().start() else { return };
    let mut body = workspace(&daemon.folder("w"), "overlay");
    let nothing = daemon.folder("w").join("nothing");
    std::fs::write(&nothing, "").unwrap();
    let shells = ["/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"];
    let mut shells: Vec<_> = shells.iter().filter_map(|path| std::fs::canonicalize(path).ok()).collect();
    shells.dedup();
    body["binds"] =
        shells.iter().map(|path| json!({"source": nothing, "dest": path, "readonly": true})).collect();
    let session = daemon.create(&body);
    session.run("x=kept; cd /usr; echo $0").prints("sh\n");
    session.run("echo $x; pwd").prints("kept\n/usr\n");
    assert_eq!(session.run("export Y=2; exit 5").exit_code(), Some(5));
    session.run("echo $Y; pwd").prints("2\n/usr\n");
    for code in ["sleep 60; echo never", "while :; do :; done", "echo 'open", "cat", "set -e; false"] {
        let run = timed(&session, code);
        assert_eq!(run.stdout(), "", "after {code}");
        is_usable(&session, code);
    }
}

#[test]
fn many_background_jobs_do_not_spoil_the_run_after_a_timeout() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    for _ in 0..3 {
        timed(&session, "for i in {1..400}; do sleep 4321 & done; sleep 4321");
        is_usable(&session, "a timeout with 400 jobs");
    }
}

#[test]
fn deleting_a_session_ends_its_streams() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let running = session.open_until(&json!({"code": "echo started; trap '' INT TERM; sleep 60"}), "started");
    let waiting = session.open(&json!({"code": "echo never"}));
    session.delete();
    let run: Run = running.finish();
    assert_eq!((run.terminal()["type"].as_str(), run.error().0), (Some("error"), "RuntimeError"));
    let text = |run: &Run| run.terminal()["text"].as_str().map(str::to_owned);
    assert!(text(&run).is_some_and(|text| text.contains("session")), "{}", run.raw());
    let run = waiting.finish();
    assert_eq!((run.terminal()["type"].as_str(), run.texts("stdout").len()), (Some("error"), 0));
    assert!(text(&run).is_some());
    let after = daemon.post(&session.route("/run"), &json!({"code": "echo"}));
    assert_eq!((after.status, &after.json()["code"]), (404, &Value::from("SESSION_NOT_FOUND")));
}
