//! What isolation costs: medians and ratios from one run, each beside the target it was designed for. It
//! prints and asserts nothing, since timings depend on the machine and on what else it does.
//!
//! `make bench` runs it on the release binary (EXECD_BIN) and against bwrap (BWRAP). Two things that are
//! compared take turns in one loop, so that a change of the machine's mood meets both. Extra mounts are made in
//! a mount namespace of their own: the part that needs them is run again below `unshare -m`.

#[path = "support.rs"]
mod support;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{
    Client, Daemon, Machine, children, mb, median, mounts, ms, proportional_kb, resident_kb, row, timed,
};

const CREATES: usize = 200;
const RUNS: usize = 2000;
const SPAWNS: usize = 200;
const IDLE_SESSIONS: usize = 50;
const EXTRA_MOUNTS: usize = 500;
/// A pause after which another spare is ready.
const BETWEEN_SESSIONS: Duration = Duration::from_millis(20);
/// Rounds before measuring begins: caches, allocator arenas, the first page faults.
const WARM_UP: usize = 20;
/// What memory is given to settle in.
const SETTLE: Duration = Duration::from_millis(500);
/// The internal argument that asks for one comparison with extra mounts, made in the folder that follows.
const WITH_EXTRA_MOUNTS: &str = "--with-extra-mounts";

fn main() -> anyhow::Result<()> {
    let args: Vec<OsString> = std::env::args_os().collect();
    // Test runners start benches too, without this argument.
    if !args.iter().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let machine = Machine::new()?;
    if let Some(at) = args.iter().position(|arg| arg == WITH_EXTRA_MOUNTS) {
        let folder = args.get(at + 1).context("a folder is missing")?;
        return with_extra_mounts(&machine, Path::new(folder));
    }
    machine.describe();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    daemon(&machine, scratch.path())?;
    compare(&machine, scratch.path(), "as the host is")?;
    compare_with_extra_mounts(&machine, scratch.path())
}

/// Everything that is asked of daemons: memory first, while one is fresh; then sessions that are made from the ground
/// up, and those made of spares.
fn daemon(machine: &Machine, scratch: &Path) -> anyhow::Result<()> {
    let daemon = Daemon::start(machine, scratch, "session.spares = 0")?;
    let mut client = Client::connect(daemon.port)?;
    let capabilities = client.call("GET", "/v1/isolated/capabilities", None)?.json()?;
    let works = |name: &str| capabilities.get(name).and_then(Value::as_bool).unwrap_or(false);
    let uid_mode = match (works("setpriv_available"), works("userns_available")) {
        (true, _) => "setpriv",
        (_, true) => "userns",
        _ => {
            println!("no session can be created here; see `execd probe`");
            return Ok(());
        }
    };
    let workspace = scratch.join("workspace");
    let request = json!({
        "profile": "strict",
        "workspace": {"path": workspace, "mode": "overlay"},
        "uid_mode": uid_mode,
    });
    memory(&daemon, &mut client, &request)?;
    from_the_ground_up(&daemon, &mut client, &request)?;
    drop(daemon);
    let daemon = Daemon::start(machine, scratch, "")?;
    latency(&daemon, &mut Client::connect(daemon.port)?, &request)
}

fn memory(daemon: &Daemon, client: &mut Client, request: &Value) -> anyhow::Result<()> {
    std::thread::sleep(SETTLE);
    let pid = daemon.process.id();
    let launcher = *children(pid)?.first().context("the daemon has no launcher")?;
    row("daemon idle, RSS", mb(resident_kb(pid)?), "≤ 12 MB");
    row("launcher idle, RSS", mb(resident_kb(launcher)?), "");
    let Ok(before_kb) = proportional_kb(pid) else {
        println!("per idle session: not measured, since smaps_rollup cannot be read here");
        return Ok(());
    };
    let sessions: Vec<String> =
        (0..IDLE_SESSIONS).map(|_| client.create(request)).collect::<anyhow::Result<_>>()?;
    std::thread::sleep(SETTLE);
    let (mut inits_kb, mut shells_kb) = (0, 0);
    for init in children(launcher)? {
        inits_kb += proportional_kb(init)?;
        for shell in children(init)? {
            shells_kb += proportional_kb(shell)?;
        }
    }
    let growth_kb = proportional_kb(pid)?.saturating_sub(before_kb);
    let each_kb = |kb: u64| format!("{} KB", kb / IDLE_SESSIONS as u64);
    row(
        "idle session, PSS of init + daemon growth",
        mb((inits_kb + growth_kb) / IDLE_SESSIONS as u64),
        "≤ 0.4 MB",
    );
    row("   of which the daemon's growth", each_kb(growth_kb), "");
    row("   and besides it, bash", each_kb(shells_kb), "");
    for session in sessions {
        client.delete(&session)?;
    }
    Ok(())
}

/// Creates and deletes one session after the other; the times of both.
fn lives(client: &mut Client, request: &Value) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut creates, mut deletes) = (Vec::new(), Vec::new());
    for _ in 0..WARM_UP + CREATES {
        let (session, took) = timed(|| client.create(request))?;
        creates.push(took);
        deletes.push(timed(|| client.delete(&session))?.1);
    }
    Ok((creates.split_off(WARM_UP), deletes.split_off(WARM_UP)))
}

fn from_the_ground_up(daemon: &Daemon, client: &mut Client, request: &Value) -> anyhow::Result<()> {
    let (creates, _) = lives(client, request)?;
    let of_launcher = |field: &str| {
        let micros = daemon.log_values("session created", field)?;
        let last = micros.iter().rev().take(CREATES);
        anyhow::Ok(last.map(|us| Duration::from_micros(*us)).collect::<Vec<_>>())
    };
    row("fork in the launcher (clone3)", ms(median(of_launcher("clone_us")?)), "≤ 0.2 ms");
    row("   clone to the last mount", ms(median(of_launcher("assembled_us")?)), "");
    row("clone to exec of the workload", ms(median(of_launcher("exec_us")?)), "≤ 1 ms");
    row("   clone to the shell's first answer", ms(median(of_launcher("ready_us")?)), "");
    row("POST session → 201, without spares", ms(median(creates)), "");
    Ok(())
}

fn latency(daemon: &Daemon, client: &mut Client, request: &Value) -> anyhow::Result<()> {
    let (creates, deletes) = lives(client, request)?;
    row("POST session → 201", ms(median(creates)), "≤ 3 ms");
    row("DELETE session → 200", ms(median(deletes)), "");
    let mut creates = Vec::new();
    for _ in 0..CREATES / 4 {
        std::thread::sleep(BETWEEN_SESSIONS);
        let (session, took) = timed(|| client.create(request))?;
        creates.push(took);
        client.delete(&session)?;
    }
    row("POST session → 201, one now and then", ms(median(creates)), "");

    let session = client.create(request)?;
    let path = format!("/v1/isolated/session/{session}/run");
    let mut runs = Vec::new();
    for _ in 0..WARM_UP + RUNS {
        let (response, took) = timed(|| client.call("POST", &path, Some(r#"{"code":":"}"#)))?;
        ensure!(
            response.status == 200 && response.body.windows(18).any(|window| window == b"execution_complete"),
            "a run answered {}: {}",
            response.status,
            String::from_utf8_lossy(&response.body)
        );
        runs.push(took);
    }
    client.delete(&session)?;
    let mut runs = runs.split_off(WARM_UP);
    runs.sort_unstable();
    let p99 = runs.get(runs.len() * 99 / 100).copied().unwrap_or_default();
    row("run of `:`, connection kept alive", ms(median(runs)), "≤ 0.3 ms");
    row("   its 99th percentile", ms(p99), "");
    row("daemon after all this, RSS", mb(resident_kb(daemon.process.id())?), "");
    Ok(())
}

/// `execd run -- true` against bwrap with the same namespaces and mounts.
fn compare(machine: &Machine, scratch: &Path, which: &str) -> anyhow::Result<()> {
    let Some(bwrap) = &machine.bwrap else {
        println!("execd run against bwrap: skipped, since BWRAP names no bwrap");
        return Ok(());
    };
    let workspace = scratch.join("lower");
    fs::create_dir_all(&workspace)?;
    let mut ours = Machine::command(&machine.execd);
    ours.args(["run", "--workspace"]).arg(&workspace).args(["--", "/bin/true"]);
    let mut theirs = Machine::command(bwrap);
    theirs
        .args(["--unshare-pid", "--unshare-uts", "--unshare-ipc", "--unshare-cgroup-try"])
        .args(["--hostname", "sandbox", "--die-with-parent", "--new-session"])
        .args(["--ro-bind", "/", "/", "--tmpfs", "/tmp", "--tmpfs", "/run"])
        .args(["--dev", "/dev", "--proc", "/proc"])
        .arg("--overlay-src")
        .args([&workspace, Path::new("--tmp-overlay"), &workspace, Path::new("--chdir"), &workspace])
        .args(["--", "/bin/true"]);
    for command in [&mut ours, &mut theirs] {
        let output = command.output()?;
        if !output.status.success() {
            let program = Path::new(command.get_program()).display().to_string();
            let said = String::from_utf8_lossy(&output.stderr);
            println!("execd run against bwrap: skipped, since {program} fails here: {}", said.trim());
            return Ok(());
        }
        command.stdout(Stdio::null());
    }
    let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
    for _ in 0..WARM_UP + SPAWNS {
        our_times.push(timed(|| Ok(ours.status()?))?.1);
        their_times.push(timed(|| Ok(theirs.status()?))?.1);
    }
    let our_time = median(our_times.split_off(WARM_UP));
    let their_time = median(their_times.split_off(WARM_UP));
    let target = if mounts() >= EXTRA_MOUNTS { "≤ 0.3" } else { "≤ 0.6" };
    println!("{} mounts, {which}:", mounts());
    row("   execd run -- true", ms(our_time), "");
    row("   bwrap the same", ms(their_time), "");
    row("   ratio", format!("{:.2}", our_time.as_secs_f64() / their_time.as_secs_f64()), target);
    Ok(())
}

/// Runs this program again in a mount namespace of its own.
fn compare_with_extra_mounts(machine: &Machine, scratch: &Path) -> anyhow::Result<()> {
    if machine.bwrap.is_none() {
        return Ok(());
    }
    for number in 0..EXTRA_MOUNTS {
        fs::create_dir_all(scratch.join(format!("mounts/{number}")))?;
    }
    fs::create_dir_all(scratch.join("mounted"))?;
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args([OsStr::new("--bench"), OsStr::new(WITH_EXTRA_MOUNTS), scratch.as_os_str()])
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => {
            println!("with {EXTRA_MOUNTS} extra mounts: skipped, since `unshare -m` ended with {status}")
        }
        Err(error) => println!("with {EXTRA_MOUNTS} extra mounts: skipped, since `unshare` fails: {error}"),
    }
    Ok(())
}

fn with_extra_mounts(machine: &Machine, scratch: &Path) -> anyhow::Result<()> {
    for number in 0..EXTRA_MOUNTS {
        rustix::mount::mount_bind(scratch.join("mounted"), scratch.join(format!("mounts/{number}")))
            .context("make a bind mount")?;
    }
    compare(machine, scratch, &format!("{EXTRA_MOUNTS} of them extra"))
}
