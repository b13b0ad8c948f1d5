//! The events of a run: their numbers, coming back to them after a connection was lost, and the report at their end.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use common::run::{Run, Stream};
use common::{Session, Setup, eventually};
use serde_json::{Value, json};
use std::time::Duration;

/// What identifies an event, without the pings, which are not numbered.
fn numbered(events: &[Value]) -> Vec<(u64, String, String)> {
    let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
    let numbered = events.iter().filter(|event| event["type"] != "ping");
    numbered
        .map(|event| {
            let seq = event["seq"].as_u64().unwrap_or_else(|| panic!("no number: {event}"));
            (seq, text(event, "type"), text(event, "text"))
        })
        .collect()
}

fn events_route(session: &Session<'_>, run: &str, after: u64) -> String {
    session.route(&format!("/runs/{run}/events?after={after}"))
}

fn replay(session: &Session<'_>, run: &str, after: u64) -> Run {
    Stream::get(session.daemon, &events_route(session, run, after)).finish()
}

fn id_of(run: &Run) -> String {
    run.events[0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn events_are_numbered_and_can_be_replayed_from_any() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let live = session.run("echo a; echo; printf 'b\\nc'; echo e >&2; exit 3");
    let id = id_of(&live);
    assert_eq!(live.head.header("execd-run-id"), Some(id.as_str()));
    let all = numbered(&live.events);
    assert!(all.iter().map(|event| event.0).eq(1..=all.len() as u64), "{all:?}");
    assert_eq!((all.len(), all[0].1.as_str(), all.last().unwrap().1.as_str()), (7, "init", "error"));
    for after in 0..all.len() {
        let run = replay(&session, &id, after as u64);
        assert_eq!(numbered(&run.events), all[after..], "after {after}");
        assert_eq!(run.terminal()["report"], live.terminal()["report"]);
        assert_eq!(run.terminal()["timestamp"], live.terminal()["timestamp"]);
    }
    // Behind the end there is the end once more, since a stream has to have one.
    assert_eq!(numbered(&replay(&session, &id, 1000).events), all[6..]);
}

#[test]
fn a_run_that_is_to_go_on_outlives_its_client() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkfifo six seven");
    let code = "for i in {1..5}; do echo $i; done; read -r x <six; echo $x; read -r x <seven; echo $x";
    let body = json!({"code": code, "cancel_on_disconnect": false});
    let mut stream = session.open(&body);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.extend(stream.next_event());
    }
    let id = seen[0]["text"].as_str().unwrap().to_owned();
    drop(stream);
    let after = seen.last().unwrap()["seq"].as_u64().unwrap();
    let mut back = Stream::get(&daemon, &events_route(&session, &id, after));
    while seen.len() < 6 {
        seen.extend(back.next_event());
    }
    // A third one, at the same time, from the beginning.
    let other = Stream::get(&daemon, &events_route(&session, &id, 0));
    for name in ["six", "seven"] {
        std::fs::write(daemon.path("w").join(name), format!("{name}\n")).unwrap();
    }
    let other = other.finish();
    assert_eq!(other.stdout(), "1\n2\n3\n4\n5\nsix\nseven\n");
    seen.extend(std::iter::from_fn(|| back.next_event()));
    assert_eq!(numbered(&seen), numbered(&other.events));
    assert_eq!(other.exit_code(), Some(0));
}

#[test]
fn a_run_for_its_clients_ends_with_the_last_of_them() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let first = session.open_until(&json!({"code": "echo go; sleep 4321"}), "go");
    let id = first.head().header("execd-run-id").unwrap().to_owned();
    let second = Stream::get(&daemon, &events_route(&session, &id, 0));
    drop(first);
    let status = || daemon.get(&session.route(&format!("/runs/{id}"))).json();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(status()["running"], true);
    drop(second);
    eventually("the run ends", || status()["running"] == false);
    assert_eq!(status()["error"], "the run was cancelled");
    assert_eq!(replay(&session, &id, 0).error(), ("RuntimeError", "cancelled"));
}

#[test]
fn what_is_kept_is_bounded_and_what_is_lost_is_said() {
    let Some(daemon) = Setup::new().setting("session.run_buffer_max_bytes = 10000").start() else { return };
    let session = daemon.session("w");
    let body =
        json!({"code": "seq 1 200000; sleep 4321", "cancel_on_disconnect": false, "timeout_seconds": 2});
    let stream = session.open(&body);
    let id = stream.head().header("execd-run-id").unwrap().to_owned();
    drop(stream);
    let status = || daemon.get(&session.route(&format!("/runs/{id}"))).json();
    eventually("the run ends", || status()["running"] == false);
    let run = replay(&session, &id, 0);
    assert_eq!(run.error(), ("Timeout", "124"));
    let lost = run.texts("status");
    assert!(lost.len() == 1 && lost[0].contains("no longer kept"), "{lost:?}");
    let out = run.stdout();
    assert!(out.ends_with("\n200000\n") && out.len() < 200_000, "{} bytes", out.len());
    let numbers: Vec<u64> = run.events.iter().filter_map(|event| event["seq"].as_u64()).collect();
    assert!(numbers[1..].windows(2).all(|two| two[0] + 1 == two[1]), "gaps behind the first");
}

#[test]
fn a_reader_that_is_slow_loses_nothing() {
    let Some(daemon) = Setup::new().setting("session.run_buffer_max_bytes = 10000").start() else { return };
    let session = daemon.session("w");
    let mut stream = session.open_until(&json!({"code": "seq 1 100000"}), "1\n");
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(10));
        stream.next_event();
    }
    let run = stream.finish();
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(run.stdout() == expected && run.texts("status").is_empty());
}

/// A number of a run's report.
fn reported(run: &Run, key: &str) -> u64 {
    run.terminal()["report"][key].as_u64().unwrap_or_else(|| panic!("no {key}: {}", run.terminal()))
}

#[test]
fn the_report_tells_what_a_run_cost() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let cpu = |run: &Run| reported(run, "user_cpu_us") + reported(run, "system_cpu_us");
    let idle = session.run("sleep 0.3");
    assert!(reported(&idle, "wall_us") >= 300_000 && cpu(&idle) < 100_000, "{}", idle.raw());
    // In the shell, in a child, in a pipeline; and what stays behind does not count for the next run.
    for code in [
        "for ((i = 0; i < 300000; i++)); do :; done",
        "bash -c 'for ((i = 0; i < 300000; i++)); do :; done'",
        "head -c 300M /dev/zero | md5sum >/dev/null",
    ] {
        let busy = session.run(code);
        assert!(
            cpu(&busy) > 50_000 && cpu(&busy) <= 3 * reported(&busy, "wall_us"),
            "{code}: {}",
            busy.raw()
        );
        let next = session.run(":");
        assert!(cpu(&next) < 20_000, "after {code}: {}", next.raw());
    }
    session.output("(while :; do :; done) &");
    assert!(cpu(&session.run("sleep 0.2")) < 50_000);
    let killed = session.run("for ((i = 0; i < 300000; i++)); do :; done; kill -9 $$");
    assert_eq!((reported(&killed, "exit_code"), reported(&killed, "signal")), (137, 9));
    assert!(cpu(&killed) > 50_000, "{}", killed.raw());
    let code = "for ((i = 0; i < 300000; i++)); do :; done; sleep 60";
    let late = session.run_with(&json!({"code": code, "timeout_seconds": 3}));
    assert!(reported(&late, "exit_code") == 124 && cpu(&late) > 50_000, "{}", late.raw());
    assert!(cpu(&session.run(":")) < 20_000);
}

#[test]
fn a_signal_is_named() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let text = |code: &str| session.run(code).terminal()["text"].as_str().unwrap().to_owned();
    assert_eq!(text("sh -c 'kill -SEGV $$'"), "command exited with code 139, as after SIGSEGV");
    assert!(text("kill -9 $$").contains("killed by signal 9 (SIGKILL)"));
}

#[test]
fn lack_of_memory_is_named() {
    const GROUPS: &str = "/sys/fs/cgroup/memory";
    if common::skipped() {
        return;
    }
    let group = std::path::Path::new(GROUPS).join(format!("execd-test-{}", std::process::id()));
    if !std::path::Path::new(GROUPS).join("memory.limit_in_bytes").exists()
        || std::fs::create_dir(&group).is_err()
    {
        return common::skip("no memory controller of cgroup v1 to run out of memory in");
    }
    std::fs::write(group.join("memory.limit_in_bytes"), "200000000").unwrap();
    let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", group.display());
    {
        let words = ["sh", "-c", &enter, "sh"];
        let Some(daemon) = Setup::new().wrapper(&words).start() else { return };
        let session = daemon.session("w");
        // A child, and the shell itself.
        for code in
            ["head -c 1G /dev/zero | tail -c 1G >/dev/null", "x=$(printf '%*s' 400000000 x); echo never"]
        {
            let run = session.run(&format!("set -o pipefail; {code}"));
            assert_eq!(run.error(), ("OutOfMemory", "137"), "{code}: {}", run.raw());
            assert!(run.terminal()["text"].as_str().unwrap().contains("memory"), "{}", run.raw());
            session.run("echo usable").prints("usable\n");
        }
        // The same end without such a cause.
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(session.run("sh -c 'kill -9 $$'").error(), ("ExitError", "137"));
    }
    eventually("the group can be removed", || std::fs::remove_dir(&group).is_ok());
}
