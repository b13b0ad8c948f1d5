//! Scripts that do not play along: each ends, with the right status, and the next run on the same session prints what
//! it should. And a soak: thousands of runs, cut off at random, that leave nothing.

#![expect(clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::{Daemon, OTHER_ID, Setup, eventually, machine, workspace};
use serde_json::json;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Scripts that are tried at the same time; most of them wait.
const SCRIPTS_AT_ONCE: usize = 6;

/// How a script ends.
#[derive(Debug, Clone, Copy)]
enum Ends {
    With(i32),
    /// It would go on for ever; the run's timeout ends it.
    Never,
    /// As bash pleases; only that it ends matters.
    Somehow,
}
use Ends::{Never, Somehow, With};

/// Scripts, how they end, and what they print.
const SCRIPTS: &[(&str, Ends, &str)] = &[
    // The shell's input and syntax.
    ("echo 'open", With(2), ""),
    ("echo \"open", With(2), ""),
    ("echo `open", Somehow, ""),
    ("echo $(open", Somehow, ""),
    ("cat <<EOF\nno end", With(0), "no end\n"),
    ("if then", With(2), ""),
    ("(", With(2), ""),
    ("echo a \\", With(0), "a \\\n"),
    ("true &&", With(2), ""),
    ("cat", With(0), ""),
    ("read x; echo $?", With(0), "1\n"),
    ("read -t 1 x; mapfile y; echo ${#y[@]}", With(0), "0\n"),
    ("cat - <&0; head -c 5 /dev/stdin", With(0), ""),
    ("bash", With(0), ""),
    ("bash -s <<<'echo inner'", With(0), "inner\n"),
    ("sh -i </dev/null 2>/dev/null; echo out", With(0), "out\n"),
    ("printf 'a\\0b' | od -An -c | tr -d ' \\n'", With(0), "a\\0b"),
    // Leaving.
    ("exit 3", With(3), ""),
    ("exit 256", With(0), ""),
    ("(exit 4)", With(4), ""),
    ("return 5", With(5), ""),
    ("f() { return 6; }; f", With(6), ""),
    ("break", With(0), ""),
    ("continue 9", With(0), ""),
    ("logout", With(1), ""),
    ("exec true", With(0), ""),
    ("exec /nonesuch", With(127), ""),
    ("exec sleep 0.1", With(0), ""),
    ("kill -9 $$", With(137), ""),
    ("kill -TERM $$; sleep 9", With(143), ""),
    ("kill -STOP $$", Never, ""),
    ("kill -9 -1", Somehow, ""),
    ("kill -INT 0; sleep 9", Somehow, ""),
    ("kill 1; kill -9 1; echo alive", With(0), "alive\n"),
    ("set -e; false; echo never", With(1), ""),
    ("set -u; echo $nonesuch; echo never", With(1), ""),
    ("set -o pipefail; false | true", With(1), ""),
    ("set -n", Somehow, ""),
    // Output.
    ("exec >&-; echo lost", With(1), ""),
    ("exec 2>&-; echo out; echo lost >&2", With(1), "out\n"),
    ("exec >&- 2>&- <&-; true", With(0), ""),
    ("exec >/dev/null; echo lost", With(0), ""),
    ("for fd in {3..255}; do { echo forged >&$fd; } 2>/dev/null; done; echo out", With(0), "out\n"),
    ("echo 0123456789abcdef 0 >/run/execd/s; echo out", With(0), "out\n"),
    ("for i in {1..500}; do echo \"$RANDOM$RANDOM 0\" >/run/execd/s; done; echo out", With(0), "out\n"),
    ("head -c 100000 /dev/zero >/run/execd/s; echo out", With(0), "out\n"),
    (
        "echo '{\"type\":\"execution_complete\",\"timestamp\":1}'; printf '\\n\\n'; exit 9",
        With(9),
        "{\"type\":\"execution_complete\",\"timestamp\":1}\n\n\n",
    ),
    ("rm -rf /run/execd /run/execd/* 2>/dev/null; echo out", With(0), "out\n"),
    ("cat /run/execd/c | wc -l", With(0), "0\n"),
    ("yes", Never, "y\n"),
    ("cat /dev/zero >/dev/null", Never, ""),
    // Signals and traps.
    ("trap '' INT TERM HUP QUIT; sleep 60", Never, ""),
    ("trap '' INT TERM 64; while :; do :; done", Never, ""),
    ("trap 'echo caught' INT; sleep 60", Never, ""),
    ("trap 'echo bye' EXIT; exit 7", With(7), "bye\n"),
    ("trap 'exit 8' EXIT; true", With(0), ""),
    ("trap 'echo debug' DEBUG; true; trap - DEBUG", With(0), "debug\ndebug\n"),
    ("trap 'false' DEBUG; shopt -s extdebug; true", Somehow, ""),
    ("trap 'echo err' ERR; false; true", With(0), "err\n"),
    ("trap 'return 3' RETURN; f() { :; }; f", Somehow, ""),
    ("trap - EXIT; exit 2", With(2), ""),
    ("trap '' CHLD; (exit 5); true", With(0), ""),
    ("while :; do :; done", Never, ""),
    ("while :; do sleep 0.01; done", Never, ""),
    ("f() { f; }; f", Somehow, ""),
    ("sleep 60 | sleep 60 | cat", Never, ""),
    ("wait $(sleep 60)", Never, ""),
    // Names and state.
    ("builtin() { return 1; }; echo() { return 1; }; true", Somehow, ""),
    ("command() { :; }; unset() { :; }; export() { :; }; true", With(0), ""),
    ("alias echo=false builtin=false command=false .=false; shopt -s expand_aliases", With(0), ""),
    ("enable -n echo eval builtin . command exit return trap", Somehow, ""),
    ("readonly PATH IFS HOME PWD OLDPWD", With(0), ""),
    ("readonly BASH_SOURCE FUNCNAME 2>/dev/null; true", With(0), ""),
    ("IFS=/execd; set -- $PATH; true", With(0), ""),
    ("unset PATH; PATH=/nonesuch; true", With(0), ""),
    ("PS4='$(echo forged >/run/execd/o)'; set -x; true; set +x", Somehow, ""),
    ("set -v; true", With(0), ""),
    ("declare -g G=1; declare -A M=([a]=1); echo $G${M[a]}", With(0), "11\n"),
    ("shopt -s nullglob failglob nocaseglob; echo out", With(0), "out\n"),
    ("set -o posix; set -f; set -C; set -a; set -b; set -k; echo out", With(0), "out\n"),
    ("set -o vi; set -m; set +B; set -h; echo out", With(0), "out\n"),
    ("exec 3<>/dev/null 4>&3 9>&4; echo out", With(0), "out\n"),
    ("BASH_ENV=/dev/zero ENV=/dev/zero POSIXLY_CORRECT=1; export BASH_ENV ENV; echo out", With(0), "out\n"),
    ("PROMPT_COMMAND='echo prompt'; PS1='$(echo ps1)'; echo out", With(0), "out\n"),
    ("hash -p /bin/false true cat echo; echo out", With(0), "out\n"),
    ("LC_ALL=nonesuch; echo out", With(0), "out\n"),
    ("cd /; cd - >/dev/null; cd /nonesuch", With(1), ""),
    ("mkdir d; cd d; rmdir ../d; pwd >/dev/null", With(0), ""),
    ("umask 777; true", With(0), ""),
    ("ulimit -f 0; echo out", With(0), "out\n"),
    ("ulimit -n 4; echo out", Somehow, ""),
    ("ulimit -n 3; echo out", Somehow, ""),
    ("ulimit -v 100000; x=$(head -c 200M /dev/zero | tr '\\0' x); echo $?", Somehow, ""),
    ("LINES=x; COLUMNS=x; RANDOM=1; SECONDS=x; BASHPID=1; PPID=1; true", Somehow, ""),
    // Processes.
    ("sleep 4321 & disown; setsid nohup sleep 4321 >/dev/null 2>&1 & echo out", With(0), "out\n"),
    ("(setsid sleep 4321; echo late) & echo out", With(0), "out\n"),
    ("coproc cat; echo out", With(0), "out\n"),
    ("coproc { sleep 4321; }; wait", Never, ""),
    ("set -m; sleep 4321 & kill -STOP %1; fg", Somehow, ""),
    ("set -m; sleep 4321 & bg; jobs >/dev/null; suspend -f", Never, ""),
    ("exec 5> >(cat); echo x >&5; exec 5>&-; wait; true", Somehow, ""),
    ("f() { setsid bash -c 'sleep 4321' & }; for i in {1..20}; do f; done; echo out", With(0), "out\n"),
    ("stty -echo; tty; exec </dev/tty", Somehow, ""),
    ("python3 -c 'import os,time\nfor fd in range(3): os.close(fd)\nos.setsid()' ; echo out", Somehow, ""),
];

#[test]
fn hostile_scripts_end_and_the_next_run_is_right() {
    let Some(daemon) = Setup::new().setting("session.interrupt_grace_ms = 200").start() else { return };
    assert!(SCRIPTS.len() >= 40);
    let wrong = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..SCRIPTS_AT_ONCE {
            scope.spawn(|| {
                while let Some(script) = SCRIPTS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Some(complaint) = complaint(&daemon, *script) {
                        wrong.lock().unwrap().push(complaint);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), SCRIPTS.len(), wrong.join("\n"));
}

/// What is wrong with how a script ends and what comes after it, if anything is.
fn complaint(daemon: &Daemon, (code, ends, prints): (&str, Ends, &str)) -> Option<String> {
    let session = daemon.session("w");
    session.output("mkdir -p here; cd here; export KEPT=kept");
    // Nothing that ends by itself takes this long, and what does not need not take longer.
    let timeout = if matches!(ends, Never) { 1 } else { 20 };
    let run = session.run_with(&json!({"code": code, "timeout_seconds": timeout}));
    let as_expected = match ends {
        With(status) => run.exit_code() == Some(status) && run.error().0 != "Timeout",
        Never => run.error() == ("Timeout", "124"),
        Somehow => run.error().0 != "Timeout",
    };
    let printed = match ends {
        Never => run.stdout().starts_with(prints),
        With(_) => run.stdout() == prints,
        Somehow => true,
    };
    let next = session.run("printf 'next %s\\n' \"$((3 + 4))\"");
    let right =
        as_expected && printed && next.stdout() == "next 7\n" && session.state()["status"] == "active";
    session.delete();
    (!right).then(|| {
        let (run, next) = (shortened(&run.raw()), shortened(&next.raw()));
        format!("{code:?} should end {ends:?}, printing {prints:?}: {run} then {next}")
    })
}

fn shortened(text: &str) -> String {
    text.chars().take(600).collect()
}

#[test]
fn a_fork_bomb_within_a_limit_ends_with_its_run() {
    let Some(daemon) = Setup::new().setting("session.interrupt_grace_ms = 200").start() else { return };
    let mut body = workspace(&daemon.folder("w"), "overlay");
    // The limit counts a user's processes, and root's are not limited.
    body["uid"] = json!(OTHER_ID + 1);
    let session = daemon.create(&body);
    for code in ["ulimit -u 60; f() { f | f & }; f; sleep 60", "ulimit -u 60; while :; do (sleep 60) & done"]
    {
        let run = session.run_with(&json!({"code": code, "timeout_seconds": 1}));
        assert_eq!(run.error(), ("Timeout", "124"), "{code}: {}", shortened(&run.raw()));
        session.run("echo next").prints("next\n");
    }
    eventually("all are gone", || {
        session.run("set -- /proc/[0-9]*; echo $#").stdout().trim().parse::<u32>().is_ok_and(|left| left <= 2)
    });
}

#[test]
fn a_line_of_twenty_megabytes_arrives_whole() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    let run = session.run("head -c 20000000 /dev/zero | tr '\\0' x; echo; echo end");
    let out = run.stdout();
    assert!(out.len() == 20_000_005 && out.ends_with("x\nend\n") && out.starts_with("xxx"), "{}", out.len());
    assert!(run.texts("stdout").iter().all(|text| text.len() <= 512 * 1024));
}

/// A small generator of numbers that look random and are the same in each run of the test (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

const SOAK_SESSIONS: usize = 50;
const SOAK_RUNS: usize = 10_000;
const SOAK_CLIENTS: usize = 10;

/// One client's share of the soak, on sessions of its own.
fn soak(daemon: &Daemon, client: usize) {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15 ^ (client as u64 + 1));
    let folder = daemon.folder(&format!("soak-{client}"));
    let sessions: Vec<_> =
        (0..SOAK_SESSIONS / SOAK_CLIENTS).map(|_| daemon.create(&workspace(&folder, "overlay"))).collect();
    for number in 0..SOAK_RUNS / SOAK_CLIENTS {
        let session = &sessions[number % sessions.len()];
        match numbers.below(100) {
            0 => {
                let run = session.run_with(&json!({"code": "echo up; sleep 60", "timeout_seconds": 1}));
                assert_eq!((run.error(), run.stdout().as_str()), (("Timeout", "124"), "up\n"));
            }
            1..=6 => drop(session.open_until(&json!({"code": "echo up; sleep 60 & yes"}), "up")),
            7..=9 => drop(session.open(&json!({"code": "sleep 0.01; echo unread"}))),
            10 | 11 => assert_eq!(session.run("exit 3").exit_code(), Some(3)),
            12 | 13 => assert_eq!(session.run("kill -9 $$").exit_code(), Some(137)),
            14..=16 => session.run("(sleep 1; echo late) & echo now").prints("now\n"),
            17..=19 => {
                let body = json!({"code": "echo log; sleep 0.01", "background": true});
                let answer = daemon.post(&session.route("/run"), &body);
                assert!(answer.status == 202 || answer.status == 429, "{}", answer.text());
            }
            20..=22 => assert_eq!(session.run("seq 1 2000").stdout().len(), 8_893),
            _ => session.run(&format!("echo {number}")).prints(&format!("{number}\n")),
        }
    }
    for session in sessions {
        session.delete();
    }
}

#[test]
fn ten_thousand_runs_leave_nothing() {
    let settings = Setup::new().setting("session.interrupt_grace_ms = 100").setting("session.spares = 0");
    let Some(daemon) = settings.start() else { return };
    // What is loaded once is loaded now.
    daemon.session("warm").run("echo warm").prints("warm\n");
    daemon.request("DELETE", &format!("/v1/isolated/session/{}", daemon.sessions()[0]), b"");
    let launcher = machine::children(daemon.pid())[0];
    let left = || {
        (
            machine::descriptors(daemon.pid()),
            machine::descriptors(launcher.pid),
            machine::descendants(daemon.pid()).len(),
            machine::mounts(daemon.pid()),
            machine::cgroup_of_daemon(daemon.pid()).map(|dir| machine::directories(&dir)),
        )
    };
    eventually("things are quiet", || left().2 == 1);
    std::thread::sleep(Duration::from_millis(100));
    let before = left();
    let memory_before_kb = machine::resident_kb(daemon.pid());
    std::thread::scope(|scope| {
        for client in 0..SOAK_CLIENTS {
            let daemon = &daemon;
            scope.spawn(move || soak(daemon, client));
        }
    });
    assert_eq!(daemon.sessions(), Vec::<String>::new());
    eventually("all is as before", || left() == before);
    let grown_kb = machine::resident_kb(daemon.pid()).saturating_sub(memory_before_kb);
    assert!(grown_kb < 32_000, "the daemon grew by {grown_kb} KB");
}
