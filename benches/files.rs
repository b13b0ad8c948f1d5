//! What work in a session's files costs: how long a question about one takes, how fast content goes in and out and
//! what memory that takes, how fast a large tree is searched. It prints and asserts nothing, since timings depend on
//! the machine and on what else it does.

#[path = "support.rs"]
mod support;

use anyhow::{Context, ensure};
use serde_json::json;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use support::{Client, Daemon, Machine, field, mb, median, ms, resident_kb, row, timed};

const QUESTIONS: usize = 2000;
const CONTENT_BYTES: usize = 64 << 20;
const TRANSFERS: usize = 9;
/// The tree that is searched: this many directories with this many files, one in ten of which matches.
const DIRECTORIES: usize = 1000;
const FILES_EACH: usize = 100;
const SEARCHES: usize = 15;
const BOUNDARY: &str = "execd-bench-boundary";

fn main() -> anyhow::Result<()> {
    // Test runners start benches too, without this argument.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.describe();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let daemon = Daemon::start(&machine, scratch.path(), "")?;
    let mut client = Client::connect(daemon.port)?;
    let workspace = scratch.path().join("w");
    let request = json!({"workspace": {"path": workspace, "mode": "rw"}});
    let session = client.create(&request)?;
    let route = format!("/v1/isolated/session/{session}");
    info(&mut client, &route, &workspace)?;
    transfers(&daemon, &mut client, &route, &workspace)?;
    search(&daemon, &route, &workspace)
}

fn info(client: &mut Client, route: &str, workspace: &Path) -> anyhow::Result<()> {
    fs::write(workspace.join("one"), "content")?;
    let path = format!("{route}/files/info?path=one");
    let mut times = Vec::new();
    for _ in 0..QUESTIONS {
        let (answer, took) = timed(|| client.call("GET", &path, None))?;
        ensure!(answer.status == 200, "info answered {}", answer.status);
        times.push(took);
    }
    row("info on one file, median", ms(median(times)), "≤ 0.3 ms");
    Ok(())
}

/// Content that no file system and no sender can shorten.
fn content() -> anyhow::Result<Vec<u8>> {
    let mut content = vec![0; CONTENT_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut content)?;
    Ok(content)
}

fn transfers(daemon: &Daemon, client: &mut Client, route: &str, workspace: &Path) -> anyhow::Result<()> {
    let content = content()?;
    let pid = daemon.process.id();
    let mut form = Vec::with_capacity(CONTENT_BYTES + 1024);
    let part = |name: &str, kind: &str| {
        format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\n\
             Content-Type: {kind}\r\n\r\n"
        )
    };
    form.extend(part("metadata", "application/json").bytes());
    form.extend(b"{\"path\":\"large\"}\r\n");
    form.extend(part("file", "application/octet-stream").bytes());
    form.extend(&content);
    form.extend(format!("\r\n--{BOUNDARY}--\r\n").bytes());
    let head = format!(
        "POST {route}/files/upload HTTP/1.1\r\nHost: execd\r\nContent-Length: {}\r\n\
         Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n",
        form.len()
    );
    let rested = resident_kb(pid)?;
    reset_peak(pid)?;
    let mut times = Vec::new();
    for _ in 0..TRANSFERS {
        let (answer, took) = timed(|| client.send(head.as_bytes(), &form))?;
        ensure!(answer.status == 200, "upload answered {}", answer.status);
        times.push(took);
    }
    ensure!(fs::read(workspace.join("large"))? == content, "what was uploaded is not what is there");
    row("64 MiB uploaded, median", speed(median(times)), "≥ 400 MB/s");
    row("   memory of the daemon at most grew by", growth(pid, rested)?, "≤ 4 MB");
    let rested = resident_kb(pid)?;
    reset_peak(pid)?;
    let path = format!("{route}/files/download?path=large");
    let mut into = Vec::with_capacity(CONTENT_BYTES);
    let mut times = Vec::new();
    for _ in 0..TRANSFERS {
        into.clear();
        let (status, took) = timed(|| client.call_into("GET", &path, &mut into))?;
        ensure!(status == 200 && into.len() == CONTENT_BYTES, "download answered {status}");
        times.push(took);
    }
    ensure!(into == content, "what was downloaded is not what is there");
    row("64 MiB downloaded, median", speed(median(times)), "≥ 400 MB/s");
    row("   memory of the daemon at most grew by", growth(pid, rested)?, "≤ 4 MB");
    row("   the same copied by cp, median", speed(copied(workspace)?), "");
    Ok(())
}

/// From here on the peak counts anew (proc_pid_clear_refs(5)).
fn reset_peak(pid: u32) -> anyhow::Result<()> {
    Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

fn growth(pid: u32, rested_kb: u64) -> anyhow::Result<String> {
    let peak = field(&format!("/proc/{pid}/status"), "VmHWM:")?;
    Ok(mb(peak.saturating_sub(rested_kb)))
}

fn speed(took: Duration) -> String {
    format!("{:.0} MB/s", CONTENT_BYTES as f64 / 1e6 / took.as_secs_f64())
}

fn copied(workspace: &Path) -> anyhow::Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..TRANSFERS {
        let mut cp = Machine::command(Path::new("/bin/cp"));
        cp.args(["--reflink=never", "large", "copy"]).current_dir(workspace);
        let (status, took) = timed(|| Ok(cp.status()?))?;
        ensure!(status.success(), "cp failed");
        fs::remove_file(workspace.join("copy"))?;
        times.push(took);
    }
    Ok(median(times))
}

fn search(daemon: &Daemon, route: &str, workspace: &Path) -> anyhow::Result<()> {
    let tree = workspace.join("tree");
    for directory in 0..DIRECTORIES {
        let directory = tree.join(format!("{}/{}", directory / 30, directory));
        fs::create_dir_all(&directory)?;
        for file in 0..FILES_EACH {
            let ending = if file % 10 == 0 { "rs" } else { "txt" };
            File::create(directory.join(format!("file-{file}.{ending}")))?;
        }
    }
    // Making the tree may take longer than a connection may be idle.
    let mut client = Client::connect(daemon.port)?;
    let matches = DIRECTORIES * FILES_EACH / 10;
    let path = format!("{route}/files/search?path=tree&pattern=**/*.rs");
    let fd = std::env::var_os("FD").filter(|fd| !fd.is_empty()).map(PathBuf::from);
    let (mut ours, mut find, mut fds) = (Vec::new(), Vec::new(), Vec::new());
    let mut into = Vec::new();
    for round in 0..=SEARCHES {
        into.clear();
        let (status, took) = timed(|| client.call_into("GET", &path, &mut into))?;
        let found = into.windows(7).filter(|window| window == b"\"path\":").count();
        ensure!(status == 200 && found == matches, "search answered {status} with {found} files");
        let finder = Path::new("/usr/bin/find");
        let found_by_find = program(finder, &["tree", "-type", "f", "-name", "*.rs"], workspace, matches)?;
        let found_by_fd = fd
            .as_ref()
            .map(|fd| program(fd, &["-u", "-t", "f", "--glob", "*.rs", "tree"], workspace, matches))
            .transpose()?;
        // The first round is for the caches.
        if round > 0 {
            ours.push(took);
            find.push(found_by_find);
            fds.extend(found_by_fd);
        }
    }
    let (ours, find) = (median(ours), median(find));
    let mut fastest = find;
    row("100,000 files searched, median", ms(ours), "");
    row("   find", ms(find), "");
    if fds.is_empty() {
        row("   fd", "not there".into(), "");
    } else {
        let fd = median(fds);
        row("   fd", ms(fd), "");
        fastest = fastest.min(fd);
    }
    let ratio = ours.as_secs_f64() / fastest.as_secs_f64();
    row("   ours / the faster of these", format!("{ratio:.2}"), "≤ 1.5");
    Ok(())
}

/// Runs a program that prints a line for each match, into a pipe that is read.
fn program(program: &Path, args: &[&str], dir: &Path, matches: usize) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut child = Machine::command(program)
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| program.display().to_string())?;
    let mut printed = Vec::new();
    child.stdout.take().context("no output")?.read_to_end(&mut printed)?;
    child.wait()?;
    let took = began.elapsed();
    let lines = printed.iter().filter(|byte| **byte == b'\n').count();
    ensure!(lines == matches, "{} found {lines} files", program.display());
    std::io::stdout().flush()?;
    Ok(took)
}
