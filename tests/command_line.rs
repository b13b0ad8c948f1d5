//! The command line: `execd run`, `execd probe`, and `execd serve` under all its names, with what it says when
//! it cannot start.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Daemon, EXECD, Setup, eventually, machine, skipped, temporary_folder};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// `execd run` in a folder, with an optional input.
fn run_in(folder: &Path, words: &[&str], input: Option<&str>) -> Output {
    let mut command = Command::new(EXECD);
    command.arg("run").args(words).current_dir(folder).env_remove("EXECD_ISOLATION_CONFIG");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    if let Some(input) = input {
        stdin.write_all(input.as_bytes()).unwrap();
    }
    drop(stdin);
    child.wait_with_output().unwrap()
}

fn shown(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn says(output: &Output, status: i32, stdout: &str) {
    assert_eq!(shown(output), (Some(status), stdout.to_owned(), String::new()));
}

#[test]
fn run_passes_status_and_streams_on() {
    if skipped() {
        return;
    }
    let dir = temporary_folder();
    let run = |words: &[&str], input| run_in(dir.path(), words, input);
    says(&run(&["--", "sh", "-c", "exit 7"], None), 7, "");
    says(&run(&["--", "true"], None), 0, "");
    says(&run(&["--", "sh", "-c", "kill -9 $$"], None), 137, "");
    says(&run(&["--", "cat"], Some("two\nlines")), 0, "two\nlines");
    says(&run(&["--", "printf", "%s|", "a b", "$HOME", "--", "-x"], None), 0, "a b|$HOME|--|-x|");
    says(&run(&["--", "pwd"], None), 0, &format!("{}\n", dir.path().display()));
    let (status, stdout, stderr) = shown(&run(&["--", "sh", "-c", "echo out; echo err >&2"], None));
    assert_eq!((status, stdout.as_str(), stderr.as_str()), (Some(0), "out\n", "err\n"));
}

#[test]
fn run_says_what_it_cannot_execute() {
    if skipped() {
        return;
    }
    let dir = temporary_folder();
    fs::write(dir.path().join("plain"), "no program").unwrap();
    // As a shell reports them (POSIX, 2.8.2).
    for (command, code) in [("nonesuch-program", 127), ("./nonesuch", 127), ("./plain", 126), ("/etc", 126)] {
        let (status, stdout, stderr) = shown(&run_in(dir.path(), &["--", command], None));
        assert_eq!((status, stdout.as_str()), (Some(code), ""), "{command}: {stderr}");
        assert!(stderr.contains(command.trim_start_matches("./")), "{command}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{command}: {stderr}");
    }
    for words in [&[][..], &["--"], &["true"], &["--mode", "x", "--", "true"], &["--nonesuch", "--", "true"]]
    {
        let (status, _, stderr) = shown(&run_in(dir.path(), words, None));
        assert!(
            status.is_some_and(|status| status != 0) && stderr.starts_with("error: "),
            "{words:?}: {stderr}"
        );
    }
    let missing = run_in(dir.path(), &["--workspace", "/nonesuch/folder", "--", "true"], None);
    let (status, _, stderr) = shown(&missing);
    assert!(status == Some(1) && stderr.contains("/nonesuch/folder"), "{stderr}");
}

#[test]
fn run_writes_only_when_told_to() {
    if skipped() {
        return;
    }
    let dir = temporary_folder();
    let file = dir.path().join("file");
    fs::write(&file, "host\n").unwrap();
    let code = "echo inside >file; echo new >new; cat file new";
    says(&run_in(dir.path(), &["--", "sh", "-c", code], None), 0, "inside\nnew\n");
    assert_eq!(
        (fs::read_to_string(&file).unwrap().as_str(), machine::names(dir.path()).len()),
        ("host\n", 1)
    );
    let (status, _, stderr) =
        shown(&run_in(dir.path(), &["--mode", "ro", "--", "sh", "-c", "echo x >file"], None));
    assert!(status != Some(0) && stderr.contains("Read-only"), "{stderr}");
    says(&run_in(dir.path(), &["--mode", "rw", "--", "sh", "-c", code], None), 0, "inside\nnew\n");
    assert_eq!(fs::read_to_string(dir.path().join("new")).unwrap(), "new\n");
    let other = temporary_folder();
    let named = ["--workspace", dir.path().to_str().unwrap(), "--", "cat", "file"];
    says(&run_in(other.path(), &named, None), 0, "inside\n");
}

#[test]
fn run_takes_identity_network_and_binds() {
    if skipped() {
        return;
    }
    let (dir, extra) = (temporary_folder(), temporary_folder());
    fs::write(extra.path().join("file"), "extra\n").unwrap();
    fs::create_dir(dir.path().join("here")).unwrap();
    let run = |words: &[&str]| run_in(dir.path(), words, None);
    says(&run(&["--uid", "4321", "--gid", "4322", "--", "sh", "-c", "id -u; id -g"]), 0, "4321\n4322\n");
    says(
        &run(&["--no-net", "--", "sh", "-c", "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"]),
        0,
        "lo\n",
    );
    let spec = format!("{}:{}:ro", extra.path().display(), dir.path().join("here").display());
    says(&run(&["--bind", &spec, "--", "cat", "here/file"]), 0, "extra\n");
    let (status, ..) = shown(&run(&["--bind", &spec, "--", "sh", "-c", "echo x >here/file"]));
    assert_ne!(status, Some(0));
    says(&run(&["--", "sh", "-c", "ls -A /tmp; cd /proc; echo [0-9]*"]), 0, "2\n");
    assert!(!shown(&run(&["--profile", "balanced", "--", "ls", "-d", "/tmp"])).1.is_empty());
    says(&run(&["--userns", "--", "id", "-u"]), 0, "0\n");
}

#[test]
fn run_is_ended_by_signals() {
    if skipped() {
        return;
    }
    for (signal, number) in [(Signal::TERM, 15), (Signal::HUP, 1), (Signal::INT, 2)] {
        let dir = temporary_folder();
        let code = format!("trap 'echo got; exit 9' {number}; echo ready; while :; do sleep 0.05; done");
        let mut child = Command::new(EXECD)
            .args(["run", "--", "sh", "-c", &code])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut seen = [0; 6];
        stdout.read_exact(&mut seen).unwrap();
        machine::signal(i32::try_from(child.id()).unwrap(), signal);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!((child.wait().unwrap().code(), rest.as_str()), (Some(9), "got\n"), "{signal:?}");
    }
}

#[test]
fn nothing_outlives_a_run_that_is_killed() {
    if skipped() {
        return;
    }
    let dir = temporary_folder();
    let mut child = Command::new(EXECD)
        .args(["run", "--", "sh", "-c", "setsid sleep 4321 & sleep 4321 & echo ready; wait"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 6]).unwrap();
    let below = machine::descendants(i32::try_from(child.id()).unwrap());
    assert!(below.len() >= 4, "{below:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("all processes are gone", || below.iter().all(|known| !known.is_alive()));
}

#[test]
fn probe_prints_a_table_and_the_same_as_json() {
    if skipped() {
        return;
    }
    let dir = temporary_folder();
    let config = dir.path().join("config.toml");
    fs::write(&config, format!("upper_root = {:?}\n", dir.path().join("uppers"))).unwrap();
    let probe = |words: &[&str]| {
        let output =
            Command::new(EXECD).arg("probe").args(words).arg("--isolation-config").arg(&config).output();
        let (status, stdout, stderr) = shown(&output.unwrap());
        assert_eq!(status, Some(0), "{stderr}");
        stdout
    };
    let table = probe(&[]);
    let json: Value = serde_json::from_str(&probe(&["--json"])).unwrap();
    assert_eq!((&json["available"], &json["setpriv_available"]), (&true.into(), &true.into()));
    let checks = json["checks"].as_array().unwrap();
    let marks = table.lines().filter(|line| line.starts_with("yes  ") || line.starts_with("no   "));
    let marks: Vec<bool> = marks.map(|line| line.starts_with("yes")).collect();
    let available: Vec<bool> = checks.iter().map(|check| check["available"] == true).collect();
    assert_eq!(marks, available, "{table}");
    assert!(checks.iter().all(|check| check["available"] == true || check["reason"].is_string()), "{json}");
    for state in ["cap_drop", "seccomp", "landlock", "ebpf"].map(|name| &json["hardening"][name]["state"]) {
        let known = ["active", "disabled", "degraded", "unsupported"];
        assert!(known.contains(&state.as_str().unwrap()), "{state}");
    }
    // As the daemon says it.
    let daemon = Setup::new().start().unwrap();
    assert_eq!(daemon.get("/v1/isolated/capabilities").json(), json);
}

#[test]
fn serving_needs_no_subcommand_and_ignores_further_words() {
    if skipped() {
        return;
    }
    for words in [
        &["--port", "0", "--log-format", "json", "tail", "-f", "/dev/null"][..],
        &["-port=0", "-log-format=json", "-jupyter-host=http://127.0.0.1:1", "--access-token", ""],
        &["serve", "--port=0", "--log-format=json", "--log-level", "6", "--", "--port", "1"],
    ] {
        let dir = temporary_folder();
        let config = dir.path().join("config.toml");
        fs::write(&config, format!("upper_root = {:?}\n", dir.path().join("uppers"))).unwrap();
        let mut command = Command::new(EXECD);
        command.args(words).env("EXECD_ISOLATION_CONFIG", &config).env_remove("EXECD_ACCESS_TOKEN");
        let daemon = Daemon::spawn(command, dir);
        assert_eq!(daemon.get("/ping").status, 200, "{words:?}");
    }
}

#[test]
fn a_broken_configuration_is_named() {
    let dir = temporary_folder();
    let config = dir.path().join("broken.toml");
    for (text, word) in [
        ("upper_root = [", "broken.toml"),
        ("upper_root = 7", "upper_root"),
        ("upper_root = 'relative'", "upper_root"),
        ("session.sessions_max = -1", "sessions_max"),
        ("http.ping_interval_seconds = 0", "ping_interval_seconds"),
    ] {
        fs::write(&config, text).unwrap();
        for subcommand in ["serve", "probe"] {
            let mut command = Command::new(EXECD);
            command.arg(subcommand);
            if subcommand == "serve" {
                command.args(["--port", "0"]);
            }
            let (status, _, stderr) =
                shown(&command.arg("--isolation-config").arg(&config).output().unwrap());
            assert_eq!(status, Some(1), "{text}: {stderr}");
            assert!(stderr.contains(word) && !stderr.contains("panicked"), "{text}: {stderr}");
        }
    }
}

#[test]
fn a_second_daemon_on_the_same_upper_root_is_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let output = Command::new(EXECD)
        .args(["serve", "--port", "0", "--listen", "127.0.0.1", "--isolation-config"])
        .arg(daemon.dir.path().join("config.toml"))
        .output();
    let (status, _, stderr) = shown(&output.unwrap());
    assert_eq!(status, Some(1), "{stderr}");
    assert!(stderr.contains("in use by another execd"), "{stderr}");
    assert!(stderr.contains(daemon.upper_root().to_str().unwrap()), "{stderr}");
    daemon.session("w").run("echo unharmed").prints("unharmed\n");
}

#[test]
fn an_address_in_use_and_wrong_flags_are_told() {
    let Some(daemon) = Setup::new().start() else { return };
    let dir = temporary_folder();
    let config = dir.path().join("config.toml");
    fs::write(&config, format!("upper_root = {:?}\n", dir.path().join("uppers"))).unwrap();
    let serve = |words: &[&str]| {
        let output =
            Command::new(EXECD).arg("serve").args(words).env("EXECD_ISOLATION_CONFIG", &config).output();
        shown(&output.unwrap())
    };
    let port = daemon.address.port().to_string();
    let (status, _, stderr) = serve(&["--listen", "127.0.0.1", "--port", &port]);
    assert!(status == Some(1) && stderr.contains(&port), "{stderr}");
    for words in [&["--port", "x"][..], &["--port", "70000"], &["--nonesuch", "1"], &["--log-level", "x"]] {
        let (status, _, stderr) = serve(words);
        assert!(status.is_some_and(|status| status != 0) && stderr.contains(words[0]), "{words:?}: {stderr}");
    }
}

#[test]
fn help_and_version_are_printed() {
    for words in [&["--help"][..], &["run", "--help"], &["probe", "--help"], &["serve", "--help"], &["-h"]] {
        let (status, stdout, _) = shown(&Command::new(EXECD).args(words).output().unwrap());
        assert!(status == Some(0) && stdout.contains("Usage: execd"), "{words:?}: {stdout}");
    }
    let (status, stdout, _) = shown(&Command::new(EXECD).arg("--version").output().unwrap());
    assert_eq!((status, stdout), (Some(0), format!("execd {}\n", env!("CARGO_PKG_VERSION"))));
}
