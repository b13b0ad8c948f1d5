//! What a run answers: the stream to the letter, output, exit status, variables, input, and the state that the
//! next run finds.

mod common;

use common::{Setup, workspace};
use serde_json::{Value, json};

#[test]
fn the_stream_is_framed_to_the_letter() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let run = session.run("echo '<a&b>'; echo err >&2");
    let header = |name: &str| run.head.header(name).unwrap_or_default().to_owned();
    assert!(header("content-type").contains("text/event-stream"));
    assert_eq!((header("cache-control").as_str(), header("x-accel-buffering").as_str()), ("no-cache", "no"));
    assert_eq!(header("transfer-encoding"), "chunked");
    let first = &run.events[0];
    let id = first["text"].as_str().unwrap();
    assert_eq!((&first["type"], id), (&json!("init"), header("execd-run-id").as_str()));
    assert!(id.len() == 36 && id.bytes().filter(|byte| *byte == b'-').count() == 4, "{id}");
    let kinds: Vec<_> = run.events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1], kinds.len()), ("init", "execution_complete", 4));
    assert!(run.terminal()["execution_time"].is_u64() || run.terminal().get("execution_time").is_none());
    assert!(!run.raw().contains("data:") && !run.raw().contains("event:"));
    // Nothing but frames: putting them together again gives every byte of the body.
    let frames: String = run.raw().split_terminator("\n\n").map(|frame| format!("{frame}\n\n")).collect();
    assert_eq!(frames, run.raw());
    let other = session.run(":").events[0]["text"].clone();
    assert_ne!(other, first["text"]);
}

#[test]
fn timestamps_are_unix_milliseconds_in_order() {
    let Some(daemon) = Setup::new().start() else { return };
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    let began = now();
    let run = daemon.session("w").run("echo a; sleep 0.05; echo b");
    let stamps: Vec<u64> = run.events.iter().map(|event| event["timestamp"].as_u64().unwrap()).collect();
    assert!(stamps.is_sorted() && stamps[0] >= began && stamps[stamps.len() - 1] <= now(), "{stamps:?}");
    assert!(run.terminal()["execution_time"].as_u64().unwrap() >= 50);
}

#[test]
fn silence_is_filled_with_pings() {
    let Some(daemon) = Setup::new().setting("http.ping_interval_seconds = 1").start() else { return };
    let run = daemon.session("w").run("sleep 2.5; echo done");
    let pings = run.events.iter().filter(|event| event["type"] == "ping").count();
    assert!(pings >= 1, "{}", run.raw());
    run.prints("done\n");
    assert_eq!(run.events[0]["type"], "init");
}

#[test]
fn lines_keep_their_newlines() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    for (code, texts) in [
        ("printf 'a\\n\\n\\nb'", vec!["a\n", "\n", "\n", "b"]),
        ("printf '\\n'", vec!["\n"]),
        ("printf 'no newline'", vec!["no newline"]),
        ("printf ''", vec![]),
        ("printf 'cr\\r\\nlone\\rcr\\n'", vec!["cr\r\n", "lone\rcr\n"]),
        ("printf '  both  \\n\\t\\n'", vec!["  both  \n", "\t\n"]),
        ("printf '\"\\\\é€😀\\u2028\\n'", vec!["\"\\é€😀\u{2028}\n"]),
        ("printf 'data: x\\n\\nevent: y\\n'", vec!["data: x\n", "\n", "event: y\n"]),
        ("printf 'ab'; sleep 0.1; printf 'cd\\n'", vec!["abcd\n"]),
    ] {
        let run = session.run(code);
        assert_eq!((run.exit_code(), run.texts("stdout")), (Some(0), texts), "{code}");
    }
    let run = session.run("printf 'a\\n\\nb' >&2");
    assert_eq!((run.texts("stderr"), run.texts("stdout")), (vec!["a\n", "\n", "b"], vec![]));
}

#[test]
fn bytes_that_are_no_utf_8_become_replacement_characters() {
    let Some(daemon) = Setup::new().start() else { return };
    daemon.session("w").run("printf 'a\\xff\\xfeb\\n'").prints("a\u{fffd}\u{fffd}b\n");
}

#[test]
fn large_output_arrives_whole_and_in_order() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let run = session.run("seq 1 200000");
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(run.stdout() == expected, "{} bytes of {}", run.stdout().len(), expected.len());
    let run = session.run("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo end >&2");
    assert!(run.stdout().len() == 3_000_001 && run.stderr() == "end\n");
    let longest = run.raw().split("\n\n").map(str::len).max().unwrap();
    assert!(longest < 4 << 20, "a frame of {longest} bytes is more than the Go SDK reads");
}

#[test]
fn partial_output_comes_when_asked_for() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let body = json!({"code": "printf prompt; read -r line <.go; echo $line", "partial_output": true});
    session.output("mkfifo .go");
    // Without the field the prompt would only come with its line, and this would wait for ever.
    let stream = session.open_until(&body, "prompt");
    std::fs::write(daemon.path("w/.go"), "answer\n").unwrap();
    stream.finish().prints("promptanswer\n");
}

#[test]
fn the_two_outputs_are_kept_apart() {
    let Some(daemon) = Setup::new().start() else { return };
    let run = daemon.session("w").run("echo out; echo err >&2; printf more; exec 2>&1; echo merged");
    assert_eq!((run.stdout().as_str(), run.stderr().as_str()), ("out\nmoremerged\n", "err\n"));
}

#[test]
fn exit_codes_are_told_as_the_sdk_reads_them() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    for (code, status) in
        [("true", 0), ("false", 1), ("(exit 3)", 3), ("return 42", 42), ("nonesuch-program", 127)]
    {
        assert_eq!(session.run(code).exit_code(), Some(status), "{code}");
    }
    assert_eq!(session.run("sh -c 'kill -9 $$'").exit_code(), Some(137));
    let run = session.run("(exit 3)");
    assert_eq!(run.terminal()["text"], "command exited with code 3");
    assert_eq!(run.terminal()["error"], json!({"ename": "ExitError", "evalue": "3", "traceback": []}));
    let run = session.run("if then");
    assert!(run.stderr().contains("syntax error") && run.exit_code() != Some(0), "{}", run.raw());
}

#[test]
fn variables_of_a_run_are_exact_and_gone_after_it() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let long = "0123456789".repeat(1024);
    let values = [
        "plain",
        "",
        "it's \"quoted\"",
        "line\nbreak\n",
        "$HOME `id` $(id) \\",
        "*",
        "é€😀",
        "-n",
        " spaces ",
        "; exit 9 #",
        "\t\r\u{1}",
        long.as_str(),
    ];
    for value in values {
        let body = json!({"code": "printf %s \"$V\" | od -An -v -tx1 | tr -d ' \\n'", "envs": {"V": value}});
        let hex: String = value.bytes().map(|byte| format!("{byte:02x}")).collect();
        session.run_with(&body).prints(&hex);
        let child = json!({"code": "printenv V | wc -c", "envs": {"V": value}});
        session.run_with(&child).prints(&format!("{}\n", value.len() + 1));
        session.run("echo \"${V-unset}\"").prints("unset\n");
    }
}

/// bash drops the variables in front of `builtin .` when the sourced code calls its first builtin.
#[test]
fn variables_of_a_run_last_as_long_as_it_does() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("export KEPT=before");
    for first in [
        "cd .",
        "true",
        "f() { :; }; f",
        "export A=1",
        "read -r x",
        "[ a = b ]",
        "X=1 true",
        "eval :",
        ". /dev/null",
    ] {
        let code = format!("{first}; echo \"$KEPT $V $(printenv KEPT V | tr '\\n' ' ')\"");
        let run = session.run_with(&json!({"code": code, "envs": {"V": "1", "KEPT": "shadow"}}));
        assert_eq!((run.stdout().as_str(), run.stderr().as_str()), ("shadow 1 shadow 1 \n", ""), "{first}");
        session.run("echo \"$KEPT ${V-unset}\"").prints("before unset\n");
    }
}

#[test]
fn a_run_with_variables_still_changes_the_session() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("export KEPT=before; mkdir -p sub");
    let code = "cd sub; OTHER=$KEPT$V; f() { echo f; }";
    session.run_with(&json!({"code": code, "envs": {"V": "1", "KEPT": "shadow"}})).prints("");
    session.run("echo $KEPT $OTHER ${PWD##*/} $(f)").prints("before shadow1 sub f\n");
    let many: serde_json::Map<String, Value> =
        (0..500).map(|n| (format!("V{n}"), json!(n.to_string()))).collect();
    session.run_with(&json!({"code": "echo $V0 $V499", "envs": many})).prints("0 499\n");
}

#[test]
fn input_is_what_the_request_says_or_nothing() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.run_with(&json!({"code": "cat", "stdin": "two\nlines"})).prints("two\nlines");
    session.run_with(&json!({"code": "read a; read b; echo $b$a", "stdin": "1\n2\n"})).prints("21\n");
    // Code is no input: neither of these eats what follows.
    session.run("cat; echo after").prints("after\n");
    assert_eq!(session.run("read x || echo nothing; cat").stdout(), "nothing\n");
    let large = "x".repeat(2_000_000);
    session.run_with(&json!({"code": "wc -c", "stdin": large})).prints("2000000\n");
}

#[test]
fn state_stays_from_run_to_run() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkdir -p a/b; cd a/b; x=1; export Y=2; f() { echo \"f$1\"; }; declare -A m=([k]=v)");
    session.output("alias z='echo alias'; shopt -s expand_aliases; set -o pipefail; umask 027");
    session.run("echo ${PWD##*/} $x $(printenv Y) $(f 1) ${m[k]}").prints("b 1 2 f1 v\n");
    session.run("z; umask; set -o | grep pipefail | tr -s '\\t ' ' '").prints("alias\n0027\npipefail on\n");
    assert_eq!(session.run("false").exit_code(), Some(1));
    session.run("echo $x").prints("1\n");
}

#[test]
fn a_session_starts_in_its_first_mount() {
    let Some(daemon) = Setup::new().start() else { return };
    let (first, second) = (daemon.folder("first"), daemon.folder("second"));
    let here = format!("{}\n", first.display());
    daemon.create(&workspace(&first, "rw")).run("pwd").prints(&here);
    let body = json!({"overlays": [{"path": first}, {"path": second, "mode": "rw"}]});
    daemon.create(&body).run("pwd").prints(&here);
}

#[test]
fn the_shell_is_process_two() {
    let Some(daemon) = Setup::new().start() else { return };
    daemon.session("w").run("echo $$").prints("2\n");
}

#[test]
fn code_is_taken_as_it_is() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.run("cat <<'EOF'\n$x 'q' \"d\" \\\nEOF").prints("$x 'q' \"d\" \\\n");
    session.run("\n\n  # only a comment\n\n").prints("");
    session.run("   ").prints("");
    let run = session.run("echo 1\nnonesuch\necho $LINENO");
    assert_eq!(run.stdout(), "1\n3\n");
    assert!(run.stderr().contains("line 2"), "{}", run.stderr());
    let long = format!(": {}\necho end", "x".repeat(1_000_000));
    session.run(&long).prints("end\n");
    session.run("echo 'é😀'").prints("é😀\n");
}
