//! What taking out and putting back what a session has changed costs: diff beside `tar cz`, commit beside `cp -a`, the
//! list of many changes, the deletion of such a session, and forks. It prints and asserts nothing, since timings depend on
//! the machine and on what else it does.

#[path = "support.rs"]
mod support;

use anyhow::{Context, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{Client, Daemon, Machine, median, ms, row, timed};

/// The upper that is diffed and committed.
const FILES: usize = 1000;
const FILE_BYTES: usize = 1 << 20;
/// The upper that is listed.
const ENTRIES: usize = 100_000;
const ROUNDS: usize = 3;
const COMMITS: usize = 7;
const FORKS: usize = 15;

fn main() -> anyhow::Result<()> {
    // Test runners start benches too, without this argument.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.describe();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    for tier in ["image", "directory"] {
        let folder = scratch.path().join(tier);
        fs::create_dir(&folder)?;
        let daemon = Daemon::start(&machine, &folder, &format!("upper_tiers = [\"{tier}\"]"))?;
        let mut client = Client::connect(daemon.port)?;
        println!("uppers in {tier}:");
        // What packing costs does not depend on where the files lie.
        let contents: &[Content] =
            if tier == "image" { &[Content::Random, Content::Text] } else { &[Content::Text] };
        for content in contents {
            gigabyte(&mut client, &folder, *content)?;
        }
        many(&mut client, &folder)?;
        forks(&mut client, &folder)?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Content {
    Random,
    Text,
}

impl Content {
    fn name(self) -> &'static str {
        match self {
            Self::Random => "random bytes",
            Self::Text => "text",
        }
    }

    /// Code that makes the files in the present folder.
    fn make(self) -> String {
        let source = match self {
            Self::Random => "cat /dev/urandom",
            // Numbers that differ from file to file.
            Self::Text => "seq ${i}00000 999999999",
        };
        format!("for i in $(seq {FILES}); do {source} | head -c {FILE_BYTES} >f$i; done")
    }
}

fn run(client: &mut Client, session: &str, code: &str) -> anyhow::Result<()> {
    let body = json!({"code": code}).to_string();
    let answer = client.call("POST", &format!("/v1/isolated/session/{session}/run"), Some(&body))?;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    ensure!(text.contains("execution_complete"), "{code}: {text}");
    Ok(())
}

/// A folder in memory. On a disk, what the last round wrote is still being written in the next, and one round takes
/// several times as long as another.
struct InMemory(PathBuf);

impl InMemory {
    fn new(path: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir(&path)?;
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).context("mount a tmpfs")?;
        Ok(Self(path))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

fn gigabyte(client: &mut Client, folder: &Path, content: Content) -> anyhow::Result<()> {
    let memory = InMemory::new(folder.join("memory"))?;
    let (lower, other) = (memory.0.join("lower"), memory.0.join("copy"));
    fs::create_dir(&lower)?;
    let session = client.create(&json!({"workspace": {"path": lower, "mode": "overlay"}}))?;
    run(client, &session, &content.make())?;
    let route = format!("/v1/isolated/session/{session}");
    // What the others work on: the same files, as warm as the upper.
    let same = folder.join("same");
    commit(client, &route)?;
    copy(&lower, &same)?;
    let (mut commits, mut syncs, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..COMMITS {
        empty(&lower)?;
        let (whole, synced) = commit(client, &route)?;
        commits.push(whole.saturating_sub(synced));
        syncs.push(synced);
        let (_, took) = timed(|| copy(&same, &other))?;
        copies.push(took);
        fs::remove_dir_all(&other)?;
    }
    let (committed, copied) = (median(commits), median(copies));
    let name = content.name();
    row(&format!("commit of 1 GB of {name}, ratio of speed to cp -a"), ratio(copied, committed), "≥ 0.8");
    row(
        "   commit, its fsync, cp -a",
        format!("{}, {}, {}", ms(committed), ms(median(syncs)), ms(copied)),
        "",
    );
    let (mut diffs, mut tars) = (Vec::new(), Vec::new());
    let mut into = Vec::with_capacity(FILES * FILE_BYTES * 11 / 10);
    for _ in 0..ROUNDS {
        into.clear();
        let (status, took) = timed(|| client.call_into("GET", &format!("{route}/diff"), &mut into))?;
        ensure!(status == 200 && into.len() > 1000, "diff answered {status}");
        diffs.push(took);
        tars.push(tar(&same)?);
    }
    let (diffed, packed) = (median(diffs), median(tars));
    row(&format!("diff of 1 GB of {name}, ratio of speed to tar cz"), ratio(packed, diffed), "≥ 1.5");
    row("   diff, tar cz", format!("{}, {}", ms(diffed), ms(packed)), "");
    client.delete(&session)?;
    fs::remove_dir_all(&same)?;
    Ok(())
}

fn ratio(theirs: Duration, ours: Duration) -> String {
    format!("{:.2}", theirs.as_secs_f64() / ours.as_secs_f64())
}

/// How long a commit takes, and what of that goes into fsync.
fn commit(client: &mut Client, route: &str) -> anyhow::Result<(Duration, Duration)> {
    let (answer, took) = timed(|| client.call("POST", &format!("{route}/commit"), Some("{}")))?;
    ensure!(answer.status == 200, "commit answered {}", answer.status);
    let report = answer.json()?;
    let fsync = report.get("fsync_us").and_then(Value::as_u64).context("no fsync_us")?;
    Ok((took, Duration::from_micros(fsync)))
}

fn empty(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    ensure!(Command::new("cp").arg("-a").arg(from).arg(to).status()?.success(), "cp failed");
    Ok(())
}

/// How long tar and gzip take to read and pack a folder.
fn tar(folder: &Path) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut tar =
        Command::new("tar").args(["cz", "-C"]).arg(folder).arg(".").stdout(Stdio::piped()).spawn()?;
    let mut packed = Vec::new();
    tar.stdout.take().context("no output")?.read_to_end(&mut packed)?;
    ensure!(tar.wait()?.success(), "tar failed");
    Ok(began.elapsed())
}

fn many(client: &mut Client, folder: &Path) -> anyhow::Result<()> {
    let lower = folder.join("many");
    fs::create_dir(&lower)?;
    let mut lists = Vec::new();
    let mut deletes = Vec::new();
    for _ in 0..ROUNDS {
        let session = client.create(&json!({"workspace": {"path": lower, "mode": "overlay"}}))?;
        let code = format!(
            "for d in $(seq 100); do mkdir d$d; (cd d$d; seq {} | split -l 1 -a 3 -d -); done",
            ENTRIES / 100
        );
        run(client, &session, &code)?;
        let mut into = Vec::new();
        let route = format!("/v1/isolated/session/{session}/diff?format=json");
        let (status, took) = timed(|| client.call_into("GET", &route, &mut into))?;
        let listed: Vec<Value> = serde_json::from_slice(&into)?;
        ensure!(status == 200 && listed.len() >= ENTRIES, "{status}: {} are listed", listed.len());
        lists.push(took);
        let (_, took) = timed(|| client.delete(&session))?;
        deletes.push(took);
    }
    row("list of 100,000 changes, median", ms(median(lists)), "≤ 1000 ms");
    row("delete of that session, median", ms(median(deletes)), "≤ 50 ms");
    Ok(())
}

fn forks(client: &mut Client, folder: &Path) -> anyhow::Result<()> {
    let lower = folder.join("forked");
    fs::create_dir(&lower)?;
    File::create(lower.join("file"))?.write_all(b"content")?;
    let source = client.create(&json!({"workspace": {"path": lower, "mode": "overlay"}}))?;
    run(client, &source, "for i in $(seq 100); do head -c 10000 /dev/urandom >$i; done")?;
    let mut times = Vec::new();
    for _ in 0..FORKS {
        let (answer, took) =
            timed(|| client.call("POST", &format!("/v1/isolated/session/{source}/fork"), None))?;
        ensure!(answer.status == 201, "fork answered {}", answer.status);
        times.push(took);
        let id = answer.json()?.get("session_id").and_then(Value::as_str).context("no id")?.to_owned();
        client.delete(&id)?;
    }
    row("fork of a session with 1 MB in 100 files, median", ms(median(times)), "");
    Ok(())
}
