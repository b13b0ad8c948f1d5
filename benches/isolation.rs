//! What isolation costs: medians and ratios from one run, each beside the target it was designed for. It
//! prints and asserts nothing, since timings depend on the machine and on what else it does.
//!
//! `make bench` runs it on the release binary (EXECD_BIN) and against bwrap (BWRAP). Two things that are
//! compared take turns in one loop, so that a change of the machine's mood meets both. Extra mounts are made in
//! a mount namespace of their own: the part that needs them is run again below `unshare -m`.

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CREATES: usize = 200;
const RUNS: usize = 2000;
const SPAWNS: usize = 200;
const IDLE_SESSIONS: usize = 50;
const EXTRA_MOUNTS: usize = 500;
/// A pause after which another spare is ready.
const BETWEEN_SESSIONS: Duration = Duration::from_millis(20);
/// Rounds before measuring begins: caches, allocator arenas, the first page faults.
const WARM_UP: usize = 20;
const START_MAX: Duration = Duration::from_secs(20);
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

/// What is measured.
struct Machine {
    execd: PathBuf,
    bwrap: Option<PathBuf>,
}

impl Machine {
    fn new() -> anyhow::Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let execd = set("EXECD_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_execd").into());
        let execd = execd.canonicalize().with_context(|| execd.display().to_string())?;
        Ok(Self { execd, bwrap: set("BWRAP") })
    }

    fn describe(&self) {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let release = read("/proc/sys/kernel/osrelease");
        let load = read("/proc/loadavg");
        let size = fs::metadata(&self.execd).map_or(0, |metadata| metadata.len());
        println!("execd    {} ({:.1} MB)", self.execd.display(), size as f64 / 1e6);
        println!(
            "machine  {} CPUs, Linux {}, {} mounts, load {}",
            std::thread::available_parallelism().map_or(0, usize::from),
            release.trim(),
            mounts(),
            load.split(' ').next().unwrap_or_default(),
        );
        println!();
    }

    /// A command with an environment that costs no program anything: cargo's has a library search path.
    fn command(program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin").stdin(Stdio::null());
        command
    }
}

fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").map_or(0, |text| text.lines().count())
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

/// A running `execd serve` with an upper root of its own.
struct Daemon {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Daemon {
    fn start(machine: &Machine, scratch: &Path, setting: &str) -> anyhow::Result<Self> {
        let config = scratch.join("isolation.toml");
        fs::write(&config, format!("upper_root = {:?}\n{setting}\n", scratch.join("uppers")))?;
        let log = scratch.join("execd.log");
        let process = Machine::command(&machine.execd)
            .args(["serve", "--listen", "127.0.0.1", "--port", "0", "--log-format", "json"])
            .arg("--isolation-config")
            .arg(config)
            .stdout(File::create(&log)?)
            .spawn()
            .context("start execd")?;
        let mut daemon = Self { process, port: 0, log };
        let began = Instant::now();
        while daemon.port == 0 {
            ensure!(
                daemon.process.try_wait()?.is_none(),
                "execd ended:\n{}",
                fs::read_to_string(&daemon.log)?
            );
            ensure!(began.elapsed() < START_MAX, "execd does not say that it listens");
            std::thread::sleep(Duration::from_millis(10));
            let port = daemon.log_values("listening", "port")?.first().copied().unwrap_or(0);
            daemon.port = u16::try_from(port)?;
        }
        Ok(daemon)
    }

    /// A number from each record of one kind.
    fn log_values(&self, message: &str, field: &str) -> anyhow::Result<Vec<u64>> {
        let log = fs::read_to_string(&self.log)?;
        let records =
            log.lines().filter_map(|line| serde_json::from_str::<BTreeMap<String, Value>>(line).ok());
        let of_kind = records.filter(|record| record.get("message").is_some_and(|found| found == message));
        Ok(of_kind.filter_map(|record| record.get(field)?.as_u64()).collect())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.process.id())
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            // It stops its sessions; there is nobody left to tell if it cannot.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = self.process.wait();
        }
    }
}

/// As much of HTTP/1.1 as is needed, on one connection; measures less of the client than a library would.
struct Client {
    stream: BufReader<TcpStream>,
}

struct Response {
    status: u16,
    body: Vec<u8>,
}

impl Response {
    fn json(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

impl Client {
    fn connect(port: u16) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(START_MAX))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    fn create(&mut self, request: &Value) -> anyhow::Result<String> {
        let response = self.call("POST", "/v1/isolated/session", Some(&request.to_string()))?;
        let body = response.json()?;
        match (response.status, body.get("session_id").and_then(Value::as_str)) {
            (201, Some(id)) => Ok(id.to_owned()),
            (status, _) => bail!("create answered {status}: {body}"),
        }
    }

    fn delete(&mut self, session: &str) -> anyhow::Result<()> {
        let response = self.call("DELETE", &format!("/v1/isolated/session/{session}"), None)?;
        ensure!(response.status == 200, "delete answered {}", response.status);
        Ok(())
    }

    /// Sends a request and reads the answer to its end.
    fn call(&mut self, method: &str, path: &str, body: Option<&str>) -> anyhow::Result<Response> {
        let body = body.unwrap_or_default();
        let length = body.len();
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: execd\r\nContent-Length: {length}\r\n\r\n{body}");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let line = self.line()?;
        let status =
            line.split(' ').nth(1).and_then(|code| code.parse().ok()).with_context(|| line.clone())?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            match line.split_once(": ") {
                _ if line.is_empty() => break,
                Some(("content-length", value)) => length = value.parse()?,
                Some(("transfer-encoding", value)) => chunked = value == "chunked",
                _ => {}
            }
        }
        let mut body = Vec::new();
        if !chunked {
            self.read(&mut body, length)?;
        }
        while chunked {
            length = usize::from_str_radix(&self.line()?, 16)?;
            self.read(&mut body, length)?;
            ensure!(self.line()?.is_empty(), "a chunk is longer than it says");
            chunked = length > 0;
        }
        Ok(Response { status, body })
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "execd closed the connection");
        Ok(line.trim_end_matches("\r\n").to_owned())
    }

    fn read(&mut self, body: &mut Vec<u8>, length: usize) -> anyhow::Result<()> {
        let read = self.stream.by_ref().take(length as u64).read_to_end(body)?;
        ensure!(read == length, "execd closed the connection within a body");
        Ok(())
    }
}

/// Processes whose parent is `pid`. The kernel's own list (/proc/PID/task/TID/children) is not always there.
fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(child) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that has just ended is no child any more.
        if field(&format!("/proc/{child}/status"), "PPid:").is_ok_and(|parent| parent == u64::from(pid)) {
            children.push(child);
        }
    }
    Ok(children)
}

fn resident_kb(pid: u32) -> anyhow::Result<u64> {
    field(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// Shared pages count by their share (proc_pid_smaps(5)).
fn proportional_kb(pid: u32) -> anyhow::Result<u64> {
    field(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

fn field(path: &str, name: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    Ok(value.with_context(|| format!("{path} has no {name}"))?.parse()?)
}

fn timed<T>(action: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Duration)> {
    let began = Instant::now();
    let outcome = action()?;
    Ok((outcome, began.elapsed()))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn mb(kb: u64) -> String {
    format!("{:.2} MB", kb as f64 / 1e3)
}

fn row(what: &str, value: String, target: &str) {
    let target = if target.is_empty() { String::new() } else { format!("   (target {target})") };
    println!("{what:<44}{value:>10}{target}");
}
