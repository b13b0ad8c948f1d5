//! What all benches need: the binary under test, a daemon of it, and a client that costs little itself.

#![allow(dead_code, reason = "each bench uses its own part of this")]

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const START_MAX: Duration = Duration::from_secs(20);

/// What is measured.
pub(crate) struct Machine {
    pub(crate) execd: PathBuf,
    pub(crate) bwrap: Option<PathBuf>,
}

impl Machine {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let execd = set("EXECD_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_execd").into());
        let execd = execd.canonicalize().with_context(|| execd.display().to_string())?;
        Ok(Self { execd, bwrap: set("BWRAP") })
    }

    pub(crate) fn describe(&self) {
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
    pub(crate) fn command(program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin").stdin(Stdio::null());
        command
    }
}

pub(crate) fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").map_or(0, |text| text.lines().count())
}

/// A running `execd serve` with an upper root of its own.
pub(crate) struct Daemon {
    pub(crate) process: Child,
    pub(crate) port: u16,
    pub(crate) log: PathBuf,
}

impl Daemon {
    pub(crate) fn start(machine: &Machine, scratch: &Path, setting: &str) -> anyhow::Result<Self> {
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
    pub(crate) fn log_values(&self, message: &str, field: &str) -> anyhow::Result<Vec<u64>> {
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
pub(crate) struct Client {
    pub(crate) stream: BufReader<TcpStream>,
}

pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn json(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

impl Client {
    pub(crate) fn connect(port: u16) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(START_MAX))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub(crate) fn create(&mut self, request: &Value) -> anyhow::Result<String> {
        let response = self.call("POST", "/v1/isolated/session", Some(&request.to_string()))?;
        let body = response.json()?;
        match (response.status, body.get("session_id").and_then(Value::as_str)) {
            (201, Some(id)) => Ok(id.to_owned()),
            (status, _) => bail!("create answered {status}: {body}"),
        }
    }

    pub(crate) fn delete(&mut self, session: &str) -> anyhow::Result<()> {
        let response = self.call("DELETE", &format!("/v1/isolated/session/{session}"), None)?;
        ensure!(response.status == 200, "delete answered {}", response.status);
        Ok(())
    }

    /// Sends a request and reads the answer to its end.
    pub(crate) fn call(&mut self, method: &str, path: &str, body: Option<&str>) -> anyhow::Result<Response> {
        let body = body.unwrap_or_default();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: execd\r\nContent-Length: {length}\r\n\r\n");
        self.send(format!("{head}{body}").as_bytes(), b"")
    }

    /// The same, with a buffer for the answer's body; the status.
    pub(crate) fn call_into(&mut self, method: &str, path: &str, into: &mut Vec<u8>) -> anyhow::Result<u16> {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: execd\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        self.answer(into)
    }

    /// Sends what has been made ready, and reads the answer to its end.
    pub(crate) fn send(&mut self, head: &[u8], body: &[u8]) -> anyhow::Result<Response> {
        self.stream.get_mut().write_all(head)?;
        self.stream.get_mut().write_all(body)?;
        let mut body = Vec::new();
        let status = self.answer(&mut body)?;
        Ok(Response { status, body })
    }

    fn answer(&mut self, body: &mut Vec<u8>) -> anyhow::Result<u16> {
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
        if !chunked {
            self.read(body, length)?;
        }
        while chunked {
            length = usize::from_str_radix(&self.line()?, 16)?;
            self.read(body, length)?;
            ensure!(self.line()?.is_empty(), "a chunk is longer than it says");
            chunked = length > 0;
        }
        Ok(status)
    }

    pub(crate) fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "execd closed the connection");
        Ok(line.trim_end_matches("\r\n").to_owned())
    }

    pub(crate) fn read(&mut self, body: &mut Vec<u8>, length: usize) -> anyhow::Result<()> {
        let read = self.stream.by_ref().take(length as u64).read_to_end(body)?;
        ensure!(read == length, "execd closed the connection within a body");
        Ok(())
    }
}

/// Processes whose parent is `pid`. The kernel's own list (/proc/PID/task/TID/children) is not always there.
pub(crate) fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
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

pub(crate) fn resident_kb(pid: u32) -> anyhow::Result<u64> {
    field(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// Shared pages count by their share (proc_pid_smaps(5)).
pub(crate) fn proportional_kb(pid: u32) -> anyhow::Result<u64> {
    field(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

pub(crate) fn field(path: &str, name: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    Ok(value.with_context(|| format!("{path} has no {name}"))?.parse()?)
}

pub(crate) fn timed<T>(action: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Duration)> {
    let began = Instant::now();
    let outcome = action()?;
    Ok((outcome, began.elapsed()))
}

pub(crate) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

pub(crate) fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

pub(crate) fn mb(kb: u64) -> String {
    format!("{:.2} MB", kb as f64 / 1e3)
}

pub(crate) fn row(what: &str, value: String, target: &str) {
    let target = if target.is_empty() { String::new() } else { format!("   (target {target})") };
    println!("{what:<44}{value:>10}{target}");
}
