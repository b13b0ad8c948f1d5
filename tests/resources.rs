//! What is left on the machine: nothing, after two hundred sessions, after the daemon or its launcher is
//! killed, after it is asked to stop. And daemons that have fewer privileges than root usually has.

#![expect(clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::machine::{self, Known, has_program};
use common::{Daemon, OTHER_ID, Session, Setup, eventually, settled, skip, workspace};
use rustix::process::Signal;
use serde_json::json;

/// Everything that a session could leave, counted.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    descriptors: usize,
    launcher_descriptors: usize,
    processes: usize,
    zombies: usize,
    mounts: usize,
    launcher_mounts: usize,
    cgroup_directories: Option<usize>,
    uppers: Vec<String>,
}

fn left(daemon: &Daemon) -> Left {
    let launcher = launcher(daemon).pid;
    Left {
        descriptors: machine::descriptors(daemon.pid()),
        launcher_descriptors: machine::descriptors(launcher),
        processes: machine::descendants(daemon.pid()).len(),
        zombies: machine::zombies(daemon.pid()) + machine::zombies(launcher),
        mounts: machine::mounts(daemon.pid()),
        launcher_mounts: machine::mounts(launcher),
        cgroup_directories: machine::cgroup_of_daemon(daemon.pid()).map(|dir| machine::directories(&dir)),
        uppers: machine::uppers(&daemon.upper_root()),
    }
}

/// The daemon's only child.
fn launcher(daemon: &Daemon) -> Known {
    let mut found = Vec::new();
    eventually("there is a launcher", || {
        found = machine::children(daemon.pid());
        !found.is_empty()
    });
    assert_eq!(found.len(), 1, "the daemon has children besides its launcher");
    found[0]
}

/// What runs when there are no sessions, once there has been one: each spare is an init and a shell.
const LAUNCHER_AND_SPARES: usize = 1 + 2 * 2;

#[test]
fn two_hundred_sessions_leave_nothing() {
    let Some(daemon) = Setup::new().start() else { return };
    let (one, two) = (daemon.folder("one"), daemon.folder("two"));
    let cycle = |n: usize| {
        let body = match n % 4 {
            0 => workspace(&one, "overlay"),
            1 => json!({"overlays": [{"path": one}, {"path": two}], "share_net": false}),
            2 => json!({"overlays": [{"path": one, "persist": false}], "uid": OTHER_ID}),
            _ => workspace(&one, "rw"),
        };
        let session = daemon.create(&body);
        match n % 5 {
            0 => {}
            1 => drop(session.run("echo x >file; sleep 4321 & setsid sleep 4321 &")),
            2 => drop(session.run("exit 1")),
            3 => drop(session.open_until(&json!({"code": "echo go; sleep 4321"}), "go")),
            _ => session.run("echo hi").prints("hi\n"),
        }
        session.delete();
    };
    // The first ones may load what is kept: thread pools, the resolver's file.
    (0..20).for_each(cycle);
    let before = settled(|| left(&daemon));
    (0..200).for_each(cycle);
    let mut after = left(&daemon);
    let deadline = std::time::Instant::now() + common::HANG;
    while after != before && std::time::Instant::now() < deadline {
        after = left(&daemon);
    }
    assert_eq!(after, before);
    assert_eq!(after.processes, LAUNCHER_AND_SPARES, "only the launcher and the spares");
    assert_eq!(after.uppers, [""; 0]);
    eventually("the trash is empty", || machine::names(&daemon.upper_root().join(".trash")).is_empty());
    if after.cgroup_directories.is_none() {
        skip("no cgroup v2 tree is mounted, so its directories were not counted");
    }
}

#[test]
fn creations_that_fail_leave_nothing() {
    let Some(daemon) = Setup::new().setting("session.spares = 0").start() else { return };
    daemon.session("w").delete();
    daemon.folder("w/sub");
    let before = settled(|| left(&daemon));
    // The mount point cannot be made: it is refused while the sandbox is built, or before.
    let mut body = workspace(&daemon.path("w"), "rw");
    body["binds"] = json!([{"source": daemon.path("w/sub"), "dest": "/etc/nonesuch/deep"}]);
    for _ in 0..20 {
        let answer = daemon.post_session(&body);
        assert!(answer.status == 400 || answer.status == 500, "{}", answer.text());
        assert!(answer.failure().2.contains("nonesuch"), "{}", answer.text());
    }
    eventually("all is as before", || left(&daemon) == before);
}

/// Sessions with all kinds of processes, and those processes.
fn busy(daemon: &Daemon) -> Vec<Known> {
    let quiet = daemon.create(&workspace(&daemon.folder("w"), "overlay"));
    quiet.output("sleep 4321 & (setsid sleep 4321 &); (trap '' HUP INT TERM; sleep 4321) &");
    daemon.session("w").output(":");
    let mut userns = workspace(&daemon.folder("w"), "rw");
    userns["uid"] = json!(OTHER_ID);
    daemon.create(&userns).output("nohup sleep 4321 >/dev/null 2>&1 &");
    let below = machine::descendants(daemon.pid());
    // The launcher, three inits, three shells, and four or more sleeps.
    assert!(below.len() >= 11, "{below:?}");
    below
}

#[test]
fn a_killed_daemon_takes_every_process_with_it() {
    let Some(mut daemon) = Setup::new().start() else { return };
    let below = busy(&daemon);
    let session = daemon.session("running");
    let _stream = session.open_until(&json!({"code": "echo go; trap '' TERM HUP; sleep 4321"}), "go");
    let below = [below, machine::descendants(daemon.pid())].concat();
    daemon.signal(Signal::KILL);
    daemon.wait();
    eventually("all processes are gone", || below.iter().all(|known| !known.is_alive()));
}

#[test]
fn a_stopped_daemon_takes_every_process_with_it() {
    let Some(mut daemon) = Setup::new().start() else { return };
    let below = busy(&daemon);
    let cgroup = machine::cgroup_of_daemon(daemon.pid());
    let id = daemon.sessions()[0].clone();
    let session = Session { daemon: &daemon, id };
    let stream = session.open_until(&json!({"code": "echo go; trap '' TERM INT; sleep 4321"}), "go");
    daemon.signal(Signal::TERM);
    let run = stream.finish();
    assert_eq!((run.terminal()["type"].as_str(), run.error().0), (Some("error"), "RuntimeError"));
    assert_eq!(daemon.wait().code(), Some(0));
    eventually("all processes are gone", || below.iter().all(|known| !known.is_alive()));
    assert_eq!(machine::uppers(&daemon.upper_root()), [""; 0]);
    assert!(cgroup.is_none_or(|dir| !dir.exists()), "the cgroup directory is left");
}

#[test]
fn an_interrupted_daemon_stops_too() {
    let Some(mut daemon) = Setup::new().start() else { return };
    daemon.signal(Signal::INT);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn what_a_terminal_sends_is_for_the_daemon_alone() {
    if !has_program("setsid") {
        return skip("setsid is not installed, which gives the daemon a process group of its own");
    }
    let Some(mut daemon) = Setup::new().wrapper(&["setsid"]).start() else { return };
    let session = daemon.session("w");
    session.output("sleep 4321 &");
    let group = rustix::process::Pid::from_raw(daemon.pid()).unwrap();
    rustix::process::kill_process_group(group, Signal::INT).unwrap();
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!daemon.said().contains("the launcher is gone"), "{}", daemon.said());
}

#[test]
fn sessions_die_with_their_launcher_and_say_so() {
    let Some(daemon) = Setup::new().start() else { return };
    let (idle, running) = (daemon.session("w"), daemon.session("w"));
    let stream = running.open_until(&json!({"code": "echo go; sleep 4321"}), "go");
    let old = launcher(&daemon);
    let below = machine::descendants(daemon.pid());
    machine::signal(old.pid, Signal::KILL);
    let run = stream.finish();
    assert_eq!((run.terminal()["type"].as_str(), run.error().0), (Some("error"), "RuntimeError"));
    for session in [&idle, &running] {
        eventually("the session is dead", || session.state()["status"] == "dead");
        let run =
            common::run::Stream::open(daemon.address, None, &session.route("/run"), &json!({"code": ":"}))
                .finish();
        assert_eq!((run.terminal()["type"].as_str(), run.events.len()), (Some("error"), 1));
        let text = run.terminal()["text"].as_str().unwrap();
        assert!(text.contains("launcher"), "no reason: {text}");
    }
    eventually("all processes are gone", || below.iter().all(|known| !known.is_alive()));
    let mut answer = daemon.post_session(&workspace(&daemon.folder("w"), "rw"));
    eventually("a session can be created again", || {
        if answer.status != 201 {
            assert_eq!(answer.failure().0, 503);
            answer = daemon.post_session(&workspace(&daemon.folder("w"), "rw"));
        }
        answer.status == 201
    });
    assert_ne!(launcher(&daemon).pid, old.pid);
    for session in [idle, running] {
        session.delete();
    }
    assert_eq!(daemon.sessions().len(), 1);
}

#[test]
fn a_session_whose_init_is_killed_says_so() {
    let Some(daemon) = Setup::new().start() else { return };
    let (hit, spared) = (daemon.session("w"), daemon.session("w"));
    let run = hit.open_until(&json!({"code": "echo go; sleep 4321"}), "go");
    let inits = machine::children(launcher(&daemon).pid);
    let init = inits.iter().find(|init| machine::descendants(init.pid).len() == 2).unwrap();
    machine::signal(init.pid, Signal::KILL);
    assert_eq!(run.finish().error().0, "RuntimeError");
    eventually("it is dead", || hit.state()["status"] == "dead");
    spared.run("echo alive").prints("alive\n");
    hit.delete();
}

#[test]
fn a_new_daemon_clears_what_a_killed_one_left() {
    let Some(mut daemon) = Setup::new().start() else { return };
    let session = daemon.create(&workspace(&daemon.folder("w"), "overlay"));
    session.output("echo x >file; mkdir -p a/b/c");
    let cgroup = machine::cgroup_of_daemon(daemon.pid());
    daemon.signal(Signal::KILL);
    daemon.wait();
    let config = daemon.dir.path().join("config.toml");
    let mut command = std::process::Command::new(common::EXECD);
    command.args([
        "serve",
        "--port",
        "0",
        "--listen",
        "127.0.0.1",
        "--log-format",
        "json",
        "--isolation-config",
    ]);
    command.arg(config);
    let next = Daemon::spawn(command, common::temporary_folder());
    assert_eq!(next.sessions(), Vec::<String>::new());
    let trash = daemon.upper_root().join(".trash");
    let uppers = || machine::uppers(&daemon.upper_root());
    eventually("the uppers are gone", || uppers().is_empty() && machine::names(&trash).is_empty());
    eventually("the cgroup directory is gone", || cgroup.as_ref().is_none_or(|dir| !dir.exists()));
}

/// A whole life under each identity, in a daemon started through setpriv(1) with fewer capabilities.
fn works_without(capabilities: &[&str]) {
    if common::skipped() {
        return;
    }
    if !has_program("setpriv") {
        return skip("setpriv is needed to take capabilities away");
    }
    let set: String = capabilities.iter().map(|name| format!(",-{name}")).collect();
    let set = set.trim_start_matches(',');
    let words = ["setpriv", "--inh-caps", set, "--bounding-set", set];
    let Some(daemon) = Setup::new().wrapper(&words).start() else { return };
    let capabilities = daemon.get("/v1/isolated/capabilities").json();
    assert_eq!(capabilities["available"], true, "{capabilities}");
    for uid in [0, OTHER_ID] {
        for (mode, persist) in [("rw", None), ("overlay", Some(true)), ("overlay", Some(false)), ("ro", None)]
        {
            let mut mount = json!({"path": daemon.path(&format!("w-{uid}")), "mode": mode});
            if let Some(persist) = persist {
                mount["persist"] = json!(persist);
            }
            let session = daemon.create(&json!({"overlays": [mount], "uid": uid, "gid": uid}));
            session.run("id -u; id -g").prints(&format!("{uid}\n{uid}\n"));
            if mode != "ro" {
                session.run("echo x >file; cat file; rm file").prints("x\n");
            }
            let run =
                session.run_with(&json!({"code": "setsid sleep 4321 & sleep 4321", "timeout_seconds": 1}));
            assert_eq!(run.error(), ("Timeout", "124"));
            session.run("exit 3; :").exit_code();
            session.run("echo next").prints("next\n");
            session.delete();
        }
    }
    eventually("nothing is left but spares", || {
        machine::descendants(daemon.pid()).len() == LAUNCHER_AND_SPARES
    });
}

#[test]
fn it_works_without_ptrace() {
    works_without(&["sys_ptrace"]);
}

/// Docker's default set, less what OpenSandbox's server drops, plus SYS_ADMIN. What Docker's default has:
/// CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD
/// AUDIT_WRITE SETFCAP.
#[test]
fn it_works_with_opensandboxs_capabilities_in_docker() {
    works_without(&[
        "audit_control",
        "audit_read",
        "audit_write",
        "block_suspend",
        "bpf",
        "checkpoint_restore",
        "dac_read_search",
        "ipc_lock",
        "ipc_owner",
        "lease",
        "linux_immutable",
        "mac_admin",
        "mac_override",
        "mknod",
        "net_admin",
        "net_broadcast",
        "net_raw",
        "perfmon",
        "sys_boot",
        "sys_module",
        "sys_nice",
        "sys_pacct",
        "sys_ptrace",
        "sys_rawio",
        "sys_resource",
        "sys_time",
        "sys_tty_config",
        "syslog",
        "wake_alarm",
    ]);
}
