//! What runs cost: how fast output streams, how many runs there are in a second, how much memory a flood takes, how
//! exact a timeout is. It prints and asserts nothing, since timings depend on the machine and on what else it does.

#[path = "support.rs"]
mod support;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::{Client, Daemon, Machine, mb, median, ms, resident_kb, row};

const LINES: u64 = 1_000_000;
const LONG_LINES: u64 = 300_000;
const PARALLEL_SESSIONS: usize = 8;
const PARALLEL_TIME: Duration = Duration::from_secs(3);
const TIMEOUTS: usize = 10;
const BETWEEN_TIMEOUTS: Duration = Duration::from_millis(100);
const GRACE_MS: u64 = 300;
/// How the slow client of a flood reads.
const SLOW_BYTES_PER_SECOND: usize = 1_000_000;
const SLOW_TIME: Duration = Duration::from_secs(20);

fn main() -> anyhow::Result<()> {
    // Test runners start benches too, without this argument.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.describe();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let setting = format!("session.interrupt_grace_ms = {GRACE_MS}");
    let daemon = Daemon::start(&machine, scratch.path(), &setting)?;
    let mut client = Client::connect(daemon.port)?;
    let request = json!({"workspace": {"path": scratch.path().join("w"), "mode": "overlay"}});
    let session = client.create(&request)?;
    streaming(&daemon, &session)?;
    parallel(&daemon, &mut client, &request)?;
    timeouts(&mut client, &session)?;
    flood(&daemon, &session)
}

/// Output as fast as it comes, beside what the same producer does into a plain pipe.
fn streaming(daemon: &Daemon, session: &str) -> anyhow::Result<()> {
    let code = format!("seq 1 {LINES}");
    let took = drained(daemon, session, &code)?;
    row("1,000,000 short lines", per_second(LINES as f64, took, "lines/s"), "≥ 500,000 lines/s");
    let code = format!("yes \"$(printf %1023s x)\" | head -n {LONG_LINES}");
    let took = drained(daemon, session, &code)?;
    let megabytes = LONG_LINES as f64 * 1024.0 / 1e6;
    row("lines of 1 KiB", per_second(megabytes, took, "MB/s"), "≥ 200 MB/s");
    let bytes = piped(&code)?;
    row("   the same through a plain pipe", per_second(bytes.0 as f64 / 1e6, bytes.1, "MB/s"), "");
    Ok(())
}

fn per_second(amount: f64, took: Duration, unit: &str) -> String {
    format!("{:.0} {unit}", amount / took.as_secs_f64())
}

/// Sends a run and reads its stream to the end, as a client that does nothing with it.
fn drained(daemon: &Daemon, session: &str, code: &str) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut stream = open(daemon, session, &json!({"code": code}))?;
    let mut chunk = vec![0; 1 << 20];
    let mut tail = Vec::new();
    loop {
        let length = stream.read(&mut chunk)?;
        ensure!(length > 0, "the stream broke off");
        tail.extend_from_slice(chunk.get(length.saturating_sub(400)..length).unwrap_or_default());
        tail.drain(..tail.len().saturating_sub(800));
        if tail.ends_with(b"0\r\n\r\n") {
            break;
        }
    }
    ensure!(tail.windows(18).any(|window| window == b"execution_complete"), "the run failed");
    Ok(began.elapsed())
}

fn open(daemon: &Daemon, session: &str, body: &Value) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", daemon.port))?;
    let body = body.to_string();
    let length = body.len();
    write!(
        stream,
        "POST /v1/isolated/session/{session}/run HTTP/1.1\r\nHost: execd\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    Ok(stream)
}

fn piped(code: &str) -> anyhow::Result<(usize, Duration)> {
    let began = Instant::now();
    let mut command = std::process::Command::new("bash");
    let mut child = command.args(["-c", code]).stdout(std::process::Stdio::piped()).spawn()?;
    let mut pipe = child.stdout.take().context("no pipe")?;
    let (mut chunk, mut total) = (vec![0; 64 * 1024], 0);
    loop {
        match pipe.read(&mut chunk)? {
            0 => break,
            length => total += length,
        }
    }
    child.wait()?;
    Ok((total, began.elapsed()))
}

/// Runs of `:` on several sessions at once, each with a client of its own.
fn parallel(daemon: &Daemon, client: &mut Client, request: &Value) -> anyhow::Result<()> {
    let sessions: Vec<String> =
        (0..PARALLEL_SESSIONS).map(|_| client.create(request)).collect::<anyhow::Result<_>>()?;
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let total: anyhow::Result<u64> = std::thread::scope(|scope| {
        let clients: Vec<_> = sessions
            .iter()
            .map(|session| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut client = Client::connect(daemon.port)?;
                    let path = format!("/v1/isolated/session/{session}/run");
                    let mut runs = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let response = client.call("POST", &path, Some(r#"{"code":":"}"#))?;
                        ensure!(response.status == 200, "a run answered {}", response.status);
                        runs += 1;
                    }
                    Ok(runs)
                })
            })
            .collect();
        std::thread::sleep(PARALLEL_TIME);
        stop.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .map(|client| client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
            .sum()
    });
    row(
        "runs of `:`, 8 sessions at once",
        per_second(total? as f64, began.elapsed(), "runs/s"),
        "≥ 4,000 runs/s",
    );
    for session in sessions {
        client.delete(&session)?;
    }
    Ok(())
}

/// How long after its deadline and the grace period a run that ignores all signals is reported.
fn timeouts(client: &mut Client, session: &str) -> anyhow::Result<()> {
    let path = format!("/v1/isolated/session/{session}/run");
    for (what, code, due) in [
        ("late after a timeout, of a sleep", "sleep 60", 1000),
        ("   and its grace, children ignore signals", "(trap '' INT TERM; sleep 60)", 1000 + GRACE_MS),
        (
            "   and its grace, the shell ignores signals",
            "trap '' INT TERM 64; while :; do :; done",
            1000 + GRACE_MS,
        ),
    ] {
        let mut late = Vec::new();
        for _ in 0..TIMEOUTS {
            // The session tidies up behind the run before, once that has been answered.
            std::thread::sleep(BETWEEN_TIMEOUTS);
            let began = Instant::now();
            let body = json!({"code": code, "timeout_seconds": 1}).to_string();
            let response = client.call("POST", &path, Some(&body))?;
            ensure!(response.body.windows(7).any(|window| window == b"Timeout"), "no timeout");
            late.push(began.elapsed().saturating_sub(Duration::from_millis(due)));
        }
        let worst = late.iter().max().copied().unwrap_or_default();
        row(what, format!("{}, worst {}", ms(median(late)), ms(worst)), "≤ 20 ms");
    }
    Ok(())
}

/// A run writes a gigabyte, its client reads slowly for a while and goes away.
fn flood(daemon: &Daemon, session: &str) -> anyhow::Result<()> {
    let pid = daemon.process.id();
    let mut stream =
        open(daemon, session, &json!({"code": "head -c 1G /dev/zero | tr '\\0' x | fold -w 1000"}))?;
    let (began, mut worst_kb) = (Instant::now(), 0);
    let mut chunk = vec![0; SLOW_BYTES_PER_SECOND / 20];
    while began.elapsed() < SLOW_TIME {
        stream.read_exact(&mut chunk)?;
        worst_kb = worst_kb.max(resident_kb(pid)?);
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(stream);
    std::thread::sleep(Duration::from_secs(1));
    worst_kb = worst_kb.max(resident_kb(pid)?);
    row("daemon, 1 GB written and 1 MB/s read, RSS", mb(worst_kb), "≤ 32 MB");
    Ok(())
}
