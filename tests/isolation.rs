//! Every claim about what a session cannot do, tried from inside it, mostly as uid 0.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::machine::has_program;
use common::{Daemon, OTHER_ID, Session, Setup, skip, workspace};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;

/// What uid 0 keeps: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE.
const ROOT_CAPABILITIES: [u32; 8] = [0, 1, 3, 4, 5, 6, 7, 10];

fn strict(daemon: &Daemon) -> Session<'_> {
    daemon.create(&workspace(&daemon.folder("w"), "overlay"))
}

/// One number of /proc/self/status, in base 16 or 10.
fn status(session: &Session<'_>, key: &str) -> String {
    let line = session.output(&format!("grep '^{key}:' /proc/self/status"));
    line.split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn only_own_processes_are_visible() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, other) = (strict(&daemon), strict(&daemon));
    other.output("sleep 4321 &");
    // Builtins only, so that nothing else runs. Init is there and not shown: it is not the session's own.
    session.run("cd /proc; echo [0-9]*; kill -0 1 && echo init").prints("2\ninit\n");
    if has_program("ps") {
        let shown = session.output("ps -e -o args=");
        assert!(shown.lines().count() <= 4 && !shown.contains("4321"), "{shown}");
    }
    // No number of the host's means anything inside.
    let pid = daemon.pid();
    session.run(&format!("kill -0 {pid} 2>/dev/null || echo none")).prints("none\n");
}

#[test]
fn init_cannot_be_reached_from_inside() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    for signal in ["KILL", "TERM", "STOP", "INT", "HUP", "64"] {
        session.run(&format!("kill -{signal} 1; echo sent")).stdout();
    }
    session.run("echo alive; cd /proc; echo [0-9]*").prints("alive\n2\n");
    for file in ["environ", "maps", "mem", "fd/0", "root/etc", "cwd/.", "exe"] {
        let run =
            session.run(&format!("head -c 1 /proc/1/{file} >/dev/null && echo read || ls /proc/1/{file}"));
        assert!(
            !run.stdout().contains("read") && run.exit_code() != Some(0),
            "/proc/1/{file}: {}",
            run.raw()
        );
    }
    assert_eq!(session.state()["status"], "active");
}

#[test]
fn the_root_is_read_only() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    let folders = ["/", "/usr", "/etc", "/var", "/var/tmp", "/root", "/home", "/opt", "/bin", "/sys"];
    for folder in folders.iter().filter(|folder| fs::exists(folder).unwrap()) {
        let run = session.run(&format!("echo x >{folder}/execd-test-file"));
        assert!(run.exit_code() != Some(0), "{folder}: {}", run.raw());
        assert!(!fs::exists(format!("{folder}/execd-test-file")).unwrap(), "{folder}");
    }
    for code in [
        "echo >>/etc/passwd",
        "chmod 777 /etc",
        "chown 1 /etc/passwd",
        "touch /usr/bin/env",
        "rm /etc/passwd",
    ] {
        let run = session.run(code);
        assert!(run.exit_code() != Some(0) && run.stderr().contains("Read-only"), "{code}: {}", run.raw());
    }
    // Devices on the container's own file systems would go around the mounts.
    let run = session.run("mknod /tmp/d b 7 0");
    assert!(run.exit_code() != Some(0), "{}", run.raw());
    session
        .run("cat /proc/mounts | while read -r _ p _ o _; do [ $p = / ] && echo ${o%%,*}; done; :")
        .prints("ro\n");
}

#[test]
fn the_kernels_settings_are_not_writable() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    // Opening for writing is harmless where it is allowed; nothing is written.
    let opens =
        "n=0; for f in $(find /proc/sys -type f 2>/dev/null) /proc/sysrq-trigger /proc/irq/*/smp_affinity; do
        if (: >>$f) 2>/dev/null; then echo $f; fi; n=$((n+1)); done; [ $n -gt 50 ] && echo tried";
    session.run(opens).prints("tried\n");
    for file in [
        "/sys/kernel/uevent_helper",
        "/sys/power/state",
        "/sys/fs/cgroup/cgroup.procs",
        "/proc/1/oom_score_adj",
    ] {
        let run = session.run(&format!("(: >>{file}) 2>/dev/null && echo opened {file}; :"));
        assert_eq!(run.stdout(), "", "{file}");
    }
    for file in ["kcore", "keys", "timer_list", "interrupts", "latency_stats", "sched_debug"] {
        let run = session.run(&format!("[ ! -e /proc/{file} ] || head -c 1 /proc/{file} | wc -c"));
        assert!(matches!(run.stdout().as_str(), "" | "0\n"), "/proc/{file}: {}", run.raw());
    }
}

#[test]
fn the_daemons_secrets_are_not_visible() {
    const SECRET: &str = "sesame-street";
    let names = [
        "MY_API_KEY",
        "EXECD_ACCESS_TOKEN",
        "db_password",
        "AWS_REGION",
        "X_SECRET",
        "KUBE_A",
        "JUPYTER_TOKEN",
    ];
    let mut setup = Setup::new().env("HARMLESS", "shown");
    for name in names {
        setup = setup.env(name, SECRET);
    }
    let Some(mut daemon) = setup.start() else { return };
    daemon.token = Some(SECRET.into());
    let mut modes = vec![Value::Null, json!({"mode": "deny", "keys": ["HARMLESS"]})];
    modes.push(json!({"mode": "allow", "keys": ["EXECD_ACCESS_TOKEN", "JUPYTER_TOKEN", "HARMLESS"]}));
    for passthrough in modes {
        let mut body = workspace(&daemon.folder("w"), "rw");
        body["env_passthrough"] = passthrough.clone();
        let session = daemon.create(&body);
        let shown = if passthrough["mode"] == "deny" { "" } else { "shown" };
        session.run("echo \"$HARMLESS\"").prints(&format!("{shown}\n"));
        let seen = session
            .run("env; set; export -p; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'");
        assert!(
            seen.stdout().contains("PATH=") && !seen.stdout().contains(SECRET),
            "{passthrough}: {}",
            seen.stdout()
        );
    }
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["env_passthrough"] = json!({"mode": "allow", "keys": ["MY_API_KEY"]});
    daemon.create(&body).run("echo $MY_API_KEY-$HARMLESS").prints(&format!("{SECRET}-\n"));
    assert!(!daemon.said().contains(SECRET), "a secret is in the log");
}

#[test]
fn nothing_is_inherited_but_three_streams() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    // The shell itself holds copies of its streams above 10 while a run's redirections are in force.
    session.run("sh -c 'ls /proc/self/fd | head -c 5; echo' | tr '\\n' ' '").prints("0 1 2 ");
    session.run("sleep 4321 & sleep 0.05; echo $(ls /proc/$!/fd); kill $!").prints("0 1 2\n");
    let targets = session.output("for f in /proc/$$/fd/*; do readlink $f; done; :");
    assert!(!targets.contains("socket:") && !targets.contains("anon_inode"), "{targets}");
    session
        .run("(: </dev/tty) 2>/dev/null && echo tty; read -r _ _ _ _ _ sid tty _ </proc/self/stat; echo $tty")
        .prints("0\n");
}

#[test]
fn the_upper_root_is_hidden() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    let other = daemon.create(&workspace(&daemon.folder("other"), "overlay"));
    other.output("echo secret >file");
    session.run(&format!("ls -A {} 2>/dev/null | wc -l", daemon.upper_root().display())).prints("0\n");
    let run = session.run(&format!("echo x >{}/x", daemon.upper_root().display()));
    assert!(run.exit_code() != Some(0), "{}", run.raw());
    session
        .run(&format!("find {} -name file 2>/dev/null | wc -l", daemon.dir.path().display()))
        .prints("0\n");
}

#[test]
fn system_calls_that_change_the_view_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    for code in [
        "mount -t tmpfs none /tmp",
        "mount -o remount,rw /",
        "umount /proc",
        "umount -l /proc",
        "unshare -m true",
        "unshare -U true",
        "unshare -n true",
        "chroot / true",
        "nsenter -t 1 -m true",
        "pivot_root . .",
        "setpriv --reuid 5 --clear-groups mount -t tmpfs none /tmp",
        "hostname other",
        "date -s 2000-01-01",
        "dmesg",
        "losetup -f",
        "insmod x",
        "chattr +i /tmp",
    ] {
        let program = code.split(' ').next().unwrap();
        if has_program(program) {
            assert_ne!(session.run(code).exit_code(), Some(0), "{code}");
        }
    }
    session.run("touch /usr/execd-test-file 2>/dev/null || echo still").prints("still\n");
}

/// Calls without a program of their own, by number; both architectures number those above 424 alike.
#[test]
fn system_calls_are_refused_one_by_one() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    if session.run("python3 -c 'import ctypes'").exit_code() != Some(0) {
        return skip("python3 with ctypes is needed for this one");
    }
    const EPERM: i32 = 1;
    const ENOSYS: i32 = 38;
    let mut calls = vec![
        ("open_tree", 428, ENOSYS),
        ("move_mount", 429, ENOSYS),
        ("fsopen", 430, ENOSYS),
        ("fsconfig", 431, ENOSYS),
        ("fsmount", 432, ENOSYS),
        ("fspick", 433, ENOSYS),
        ("clone3", 435, ENOSYS),
        ("mount_setattr", 442, ENOSYS),
    ];
    if cfg!(target_arch = "x86_64") {
        calls.extend([
            ("ptrace", 101, EPERM),
            ("setns", 308, EPERM),
            ("unshare", 272, EPERM),
            ("bpf", 321, EPERM),
            ("keyctl", 250, EPERM),
            ("perf_event_open", 298, EPERM),
            ("process_vm_readv", 310, EPERM),
            ("io_uring_setup", 425, ENOSYS),
            ("userfaultfd", 323, EPERM),
            ("init_module", 175, EPERM),
            ("kexec_load", 246, EPERM),
            ("reboot", 169, EPERM),
            ("open_by_handle_at", 304, EPERM),
            ("pidfd_getfd", 438, EPERM),
            ("settimeofday", 164, EPERM),
        ]);
    }
    for (name, number, _) in calls {
        let code = format!(
            "python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); \
             print(c.syscall({number}, 0, 0, 0, 0, 0, 0), ctypes.get_errno())'"
        );
        let output = session.output(&code);
        let (result, errno) = output.trim().split_once(' ').unwrap();
        let errno: i32 = errno.parse().unwrap();
        assert!(result == "-1" && [EPERM, ENOSYS].contains(&errno), "{name}: {output}");
    }
    namespaces_by_clone_are_refused(&session);
}

fn namespaces_by_clone_are_refused(session: &Session<'_>) {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    // CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
    for flag in [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000] {
        let code = format!(
            "python3 -c 'import ctypes, os; c = ctypes.CDLL(None, use_errno=True)
r = c.syscall(56, {flag} | 17, 0, 0, 0, 0)
if r == 0: os._exit(0)
print(r, ctypes.get_errno())'"
        );
        session.run(&code).prints("-1 1\n");
    }
}

#[test]
fn uid_0_keeps_the_documented_capabilities_only() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    let mask = ROOT_CAPABILITIES.iter().fold(0_u64, |mask, bit| mask | 1 << bit);
    let mask = format!("{mask:016x}");
    for (key, value) in [
        ("CapEff", mask.as_str()),
        ("CapPrm", &mask),
        ("CapBnd", &mask),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        assert_eq!(status(&session, key), value, "{key}");
    }
    let mut body = workspace(&daemon.folder("w"), "rw");
    body["uid"] = json!(OTHER_ID);
    let other = daemon.create(&body);
    assert_eq!(
        [status(&other, "CapEff"), status(&other, "CapPrm")],
        ["0000000000000000", "0000000000000000"]
    );
    assert_eq!([status(&other, "NoNewPrivs"), status(&other, "Seccomp")], ["1", "2"]);
    // A new shell is no stronger than the first one.
    session.run("exit");
    assert_eq!([status(&session, "CapEff"), status(&session, "Seccomp")], [mask.as_str(), "2"]);
}

#[test]
fn namespaces_and_host_name_are_its_own() {
    let Some(daemon) = Setup::new().start() else { return };
    let (session, other) = (strict(&daemon), strict(&daemon));
    session
        .run("echo $(cat /proc/sys/kernel/hostname) $(uname -n) $HOSTNAME")
        .prints("sandbox sandbox sandbox\n");
    let has_cgroups =
        daemon.get("/v1/isolated/capabilities").text().contains(r#""name":"cgroup","available":true"#);
    for kind in ["mnt", "pid", "uts", "ipc", "cgroup"] {
        if kind == "cgroup" && !has_cgroups {
            skip("no cgroup v2 tree");
            continue;
        }
        let host = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string();
        let inside = session.output(&format!("readlink /proc/self/ns/{kind}"));
        assert_ne!(inside.trim(), host, "{kind}");
        assert_ne!(inside, other.output(&format!("readlink /proc/self/ns/{kind}")), "{kind}");
    }
    let cgroup = session.output("grep ^0:: /proc/self/cgroup || :");
    assert!(!cgroup.contains("execd-"), "the host's cgroup path is visible: {cgroup}");
}

#[test]
fn set_uid_programs_gain_nothing() {
    let Some(daemon) = Setup::new().start() else { return };
    let folder = daemon.folder("w");
    // Set-uid copies in the workspace, owned by root.
    let copy = folder.join("id");
    let id = ["/usr/bin/id", "/bin/id"].into_iter().find(|path| fs::exists(path).unwrap()).unwrap();
    fs::copy(id, &copy).unwrap();
    fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o6755)).unwrap();
    for mode in ["rw", "ro", "overlay"] {
        let mut body = workspace(&folder, mode);
        body["uid"] = json!(65534);
        body["gid"] = json!(65534);
        let session = daemon.create(&body);
        session.run("./id -u; ./id -g; [ -u id ] && echo set").prints("65534\n65534\nset\n");
        for program in ["su", "sudo", "mount", "passwd"].into_iter().filter(|program| has_program(program)) {
            let run = session.run_with(&json!({"code": format!("{program} -h >/dev/null 2>&1; su -c id </dev/null"), "timeout_seconds": 5}));
            assert!(!run.stdout().contains("uid=0"), "{program}: {}", run.raw());
        }
    }
}

#[test]
fn devices_are_the_few_that_are_needed() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    session
        .run("cd /dev; for d in null zero full random urandom; do [ -c $d ] && (: <$d) && echo $d; done")
        .prints("null\nzero\nfull\nrandom\nurandom\n");
    session.run("find /dev -type b; ls /dev | grep -E 'mem|kmsg|sd|vd|loop|fuse|kvm'; :").prints("");
    session.output("echo x >/dev/shm/x; rm /dev/shm/x; echo >/dev/null; [ -e /dev/ptmx ]; [ -d /dev/pts ]");
    session.run("echo /dev/fd/0 $(readlink /dev/fd) >/dev/stdout").prints("/dev/fd/0 /proc/self/fd\n");
}

#[test]
fn the_shells_own_files_cannot_be_tampered_with() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    for code in [
        "rm -f /run/execd/*",
        "mv /run/execd/c /run/execd/x",
        "echo x >/run/execd/c",
        "ln -s / /run/execd/l",
        "mkdir /run/execd/d",
        "chmod 777 /run/execd",
    ] {
        assert_ne!(session.run(code).exit_code(), Some(0), "{code}");
        session.run("echo fine").prints("fine\n");
    }
    // A status forged without the run's token is none.
    session.run("echo deadbeef 0 >/run/execd/s; echo 0 >/run/execd/s").prints("");
    assert_eq!(session.run("echo deadbeef 0 >/run/execd/s; (exit 4)").exit_code(), Some(4));
    // A line that is not ended spoils the report behind it; that harms nobody but its author.
    assert_ne!(session.run("printf %s 'no newline' >/run/execd/s; (exit 4)").exit_code(), Some(0));
    assert_eq!(session.run("(exit 5)").exit_code(), Some(5));
}

#[test]
fn what_is_the_machines_keeps_its_mode_and_owner() {
    let Some(daemon) = Setup::new().start() else { return };
    let before = fs::metadata("/dev/full").unwrap();
    for uid_mode in ["setpriv", "userns"] {
        let mut body = workspace(&daemon.folder("w"), "overlay");
        body["uid_mode"] = json!(uid_mode);
        let session = daemon.create(&body);
        for path in ["/dev/full", "/proc/uptime", "/proc/sys/kernel/ostype", "/sys/kernel/uevent_seqnum"] {
            let code = format!(
                "chmod 600 {path} && echo changed; chown 1 {path} && echo given; touch {path} && echo touched; :"
            );
            assert_eq!(session.run(&code).stdout(), "", "{path} with {uid_mode}");
        }
        // Devices can be written all the same.
        session.run("echo gone >/dev/null && head -c 2 /dev/zero | wc -c").prints("2\n");
    }
    let after = fs::metadata("/dev/full").unwrap();
    assert_eq!((before.mode(), before.mtime()), (after.mode(), after.mtime()));
}

#[test]
fn sockets_to_the_hypervisor_are_refused() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = strict(&daemon);
    if session.run("python3 -c 'import socket'").exit_code() != Some(0) {
        return skip("python3 is needed for this one");
    }
    let code = "python3 -c 'import socket
for family in (socket.AF_UNIX, 40):
    try: print(socket.socket(family, 1).close())
    except OSError as error: print(error.errno)'";
    const EAFNOSUPPORT: i32 = 97;
    session.run(code).prints(&format!("None\n{EAFNOSUPPORT}\n"));
}

#[test]
fn links_lead_no_workspace_to_what_is_not_for_it() {
    use std::os::unix::fs::symlink;
    let Some(daemon) = Setup::new().setting("session.spares = 0").start() else { return };
    let folder = daemon.folder("w");
    let other = daemon.create(&workspace(&daemon.folder("other"), "overlay"));
    other.output("echo SECRET >secret");
    for (name, target) in
        [("proc", "/proc"), ("sys", "/sys"), ("dev", "/dev"), ("run", "/run"), ("root", "/")]
    {
        symlink(target, folder.join(name)).unwrap();
        for mode in ["rw", "ro", "overlay"] {
            let answer = daemon.post_session(&workspace(&folder.join(name), mode));
            if (name, mode) == ("root", "ro") {
                // As it is when it is named directly.
                assert_eq!(answer.status, 201, "{}", answer.text());
                continue;
            }
            let (status, _, message) = answer.failure();
            assert!(status == 400 && message.starts_with("workspace.path: "), "{name} {mode}: {message}");
        }
        let mut body = workspace(&folder, "rw");
        body["binds"] = json!([{"source": folder, "dest": folder.join(name)}]);
        assert_eq!(daemon.post_session(&body).failure().0, 400, "bind on {name}");
    }
    // The folder of all uppers, by another name.
    symlink(daemon.dir.path(), folder.join("above")).unwrap();
    let session = daemon.create(&workspace(&folder.join("above"), "ro"));
    let seen = session.run("pwd; cat $PWD/uppers/*/0/upper/secret; ls uppers").raw();
    assert!(!seen.contains("SECRET"), "{seen}");
}

#[test]
fn links_that_change_while_a_workspace_is_made_lead_nowhere() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let Some(daemon) = Setup::new().setting("session.spares = 0").start() else { return };
    let (shared, victim) = (daemon.folder("shared"), daemon.folder("victim"));
    std::fs::write(victim.join("file"), "").unwrap();
    std::fs::create_dir_all(victim.join("dir/kept")).unwrap();
    symlink(&victim, shared.join("link")).unwrap();
    std::fs::create_dir(shared.join("dir")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            let (link, dir) = (shared.join("link"), shared.join("dir"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                renameat_with(CWD, &link, CWD, &dir, RenameFlags::EXCHANGE).unwrap();
            }
        });
        for _ in 0..150 {
            for name in ["file", "dir"] {
                let mut body = workspace(&shared.join("dir").join(name), "rw");
                body["uid"] = json!(OTHER_ID);
                let answer = daemon.post_session(&body);
                if answer.status == 201 {
                    let id = answer.json()["session_id"].as_str().unwrap().to_owned();
                    daemon.request("DELETE", &format!("/v1/isolated/session/{id}"), b"");
                }
                for place in [shared.join("dir"), shared.join("link")] {
                    if !place.is_symlink() {
                        let _ = std::fs::remove_dir(place.join(name));
                    }
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for name in ["file", "dir"] {
        assert_eq!(std::fs::metadata(victim.join(name)).unwrap().uid(), 0, "{name} was given away");
    }
}
