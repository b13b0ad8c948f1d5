//! What every black-box test needs: a real daemon of its own, a client that sees every byte, and a look at the
//! machine from outside.
//!
//! A test gets its daemon from [`Setup`], or `None` where this machine cannot isolate. That is printed and
//! counted, and fails the test where `CI` is `true`: there a skipped test would rot unseen.

#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

pub(crate) mod files;
pub(crate) mod http;
pub(crate) mod machine;
pub(crate) mod run;
pub(crate) mod trees;

use http::Answer;
use run::{Run, Stream};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

/// The program under test.
pub(crate) const EXECD: &str = env!("CARGO_BIN_EXE_execd");
/// No step of a test takes this long, unless something hangs.
pub(crate) const HANG: Duration = Duration::from_secs(30);
/// The nobody of most systems; tests use it as a number without assuming an account.
pub(crate) const OTHER_ID: u32 = 54_321;

const POLL: Duration = Duration::from_millis(10);

/// Waits for something that must come about.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + HANG;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(POLL);
    }
}

/// What `look` finds once that changes no more: connections and processes are closed a moment after they are over.
pub(crate) fn settled<T: PartialEq>(mut look: impl FnMut() -> T) -> T {
    let mut looks = [look(), look(), look()];
    eventually("it settles", || {
        std::thread::sleep(10 * POLL);
        looks.rotate_left(1);
        looks[2] = look();
        looks[0] == looks[1] && looks[1] == looks[2]
    });
    let [found, ..] = looks;
    found
}

/// Whether the present test has to be left out, and says so.
pub(crate) fn skipped() -> bool {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    match REASON.get_or_init(cannot_isolate) {
        Some(reason) => {
            skip(reason);
            true
        }
        None => false,
    }
}

/// Says that the present test, or a part of it, is left out. Not with `eprintln`, which the test harness
/// would swallow.
pub(crate) fn skip(reason: &str) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("?");
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    // One write, so that lines of parallel tests stay whole.
    let line = format!("SKIP {test}: {reason} (skipped in this binary so far: {count})\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIP {test}: {reason}; not allowed with CI=true");
}

fn cannot_isolate() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".into());
    }
    let dir = temporary_folder();
    let config = dir.path().join("config.toml");
    fs::write(&config, format!("upper_root = {:?}\n", dir.path().join("uppers"))).unwrap();
    let output = Command::new(EXECD).args(["probe", "--json", "--isolation-config"]).arg(&config).output();
    let output = output.unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let can = |key: &str| report.get(key).and_then(Value::as_bool) == Some(true);
    (!can("setpriv_available"))
        .then(|| format!("no isolation here: {report} {}", String::from_utf8_lossy(&output.stderr)))
}

/// Not below /tmp, which a strict session does not see; open to every uid.
pub(crate) fn temporary_folder() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("execd-test-").tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A daemon to be started.
#[derive(Default)]
pub(crate) struct Setup {
    settings: Vec<String>,
    env: Vec<(String, String)>,
    wrapper: Vec<String>,
    args: Vec<String>,
}

impl Setup {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// One line of the configuration, with a dotted key.
    pub(crate) fn setting(mut self, line: &str) -> Self {
        self.settings.push(line.into());
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Further arguments for `execd serve`.
    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// A program that changes something about itself and then executes the daemon.
    pub(crate) fn wrapper(mut self, words: &[&str]) -> Self {
        self.wrapper = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Starts it; `None` where the test is to be skipped.
    pub(crate) fn start(self) -> Option<Daemon> {
        (!skipped()).then(|| self.start_anyway())
    }

    fn start_anyway(self) -> Daemon {
        let dir = temporary_folder();
        let config = dir.path().join("config.toml");
        fs::create_dir(dir.path().join("work")).unwrap();
        let mut text = format!("upper_root = {:?}\n", dir.path().join("uppers"));
        if !self.settings.iter().any(|line| line.starts_with("allowed_writable")) {
            text.push_str(&format!("allowed_writable = [{:?}]\n", dir.path().join("work")));
        }
        text.push_str(&self.settings.join("\n"));
        fs::write(&config, text).unwrap();
        let mut words = self.wrapper.iter().map(String::as_str).chain([EXECD]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(["serve", "--port", "0", "--listen", "127.0.0.1", "--log-format", "json"]);
        command.arg("--isolation-config").arg(&config).args(&self.args);
        command.env_remove("EXECD_ACCESS_TOKEN").envs(self.env);
        Daemon::spawn(command, dir)
    }
}

/// A running daemon. Dropping it ends it and removes everything it had.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<String>>,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) token: Option<String>,
}

impl Daemon {
    /// Starts a prepared command line and waits until it listens.
    pub(crate) fn spawn(mut command: Command, dir: tempfile::TempDir) -> Self {
        let stderr = fs::File::create(dir.path().join("stderr")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Mutex::new(String::new()));
        let (sender, port) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let keep = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(port) = listening_port(&line) {
                    let _ = sender.send(port);
                }
                keep.lock().unwrap().push_str(&format!("{line}\n"));
            }
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut daemon = Self { child, address, log, dir, token: None };
        let port = port.recv_timeout(HANG);
        daemon.address.set_port(port.unwrap_or_else(|error| panic!("{error}: {}", daemon.said())));
        daemon
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Its log and what it wrote to standard error.
    pub(crate) fn said(&self) -> String {
        let stderr = fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default();
        format!("{}{stderr}", self.log.lock().unwrap())
    }

    pub(crate) fn upper_root(&self) -> PathBuf {
        self.dir.path().join("uppers")
    }

    /// A path below the folder that the allow-list names; nothing is made.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("work").join(name)
    }

    /// A new folder there.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        machine::signal(self.pid(), signal);
    }

    /// Waits for it to end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the daemon ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Kills it, and starts another one in its place, with everything that it has left.
    pub(crate) fn killed_and_started_again(mut self) -> Self {
        self.signal(rustix::process::Signal::KILL);
        self.wait();
        let dir = std::mem::replace(&mut self.dir, temporary_folder());
        let mut command = Command::new(EXECD);
        command.args(["serve", "--port", "0", "--listen", "127.0.0.1", "--log-format", "json"]);
        command.arg("--isolation-config").arg(dir.path().join("config.toml"));
        command.env_remove("EXECD_ACCESS_TOKEN");
        Self::spawn(command, dir)
    }

    pub(crate) fn request(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        http::request(self.address, self.token.as_deref(), method, path, body)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.request("GET", path, b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, body.to_string().as_bytes())
    }

    pub(crate) fn post_session(&self, body: &Value) -> Answer {
        self.post("/v1/isolated/session", body)
    }

    /// The ids of all sessions.
    pub(crate) fn sessions(&self) -> Vec<String> {
        let list = self.get("/v1/isolated/sessions").json();
        let ids = list["sessions"].as_array().unwrap().iter();
        ids.map(|session| session["session_id"].as_str().unwrap().to_owned()).collect()
    }

    /// Creates a session, which must succeed.
    pub(crate) fn create(&self, body: &Value) -> Session<'_> {
        let answer = self.post_session(body);
        assert_eq!(answer.status, 201, "{body}: {} {}", answer.text(), self.said());
        Session { daemon: self, id: answer.json()["session_id"].as_str().unwrap().to_owned() }
    }

    /// A session with a read-write workspace in a new folder.
    pub(crate) fn session(&self, folder: &str) -> Session<'_> {
        self.create(&workspace(&self.folder(folder), "rw"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        // The polite way first: it also removes what the daemon has in the cgroup tree.
        self.signal(rustix::process::Signal::TERM);
        let deadline = Instant::now() + HANG;
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.said());
        }
    }
}

fn listening_port(line: &str) -> Option<u16> {
    let record: Value = serde_json::from_str(line).ok()?;
    let fields = record.get("fields").unwrap_or(&record);
    (fields.get("message")? == "listening")
        .then(|| fields.get("port")?.as_u64())?
        .and_then(|p| p.try_into().ok())
}

/// The body of a request for a session with one workspace.
pub(crate) fn workspace(path: &Path, mode: &str) -> Value {
    json!({"workspace": {"path": path, "mode": mode}})
}

/// A session. The daemon's end is its own.
pub(crate) struct Session<'a> {
    pub(crate) daemon: &'a Daemon,
    pub(crate) id: String,
}

impl Session<'_> {
    pub(crate) fn route(&self, rest: &str) -> String {
        format!("/v1/isolated/session/{}{rest}", self.id)
    }

    /// Runs code to its end.
    pub(crate) fn run(&self, code: &str) -> Run {
        self.run_with(&json!({"code": code}))
    }

    pub(crate) fn run_with(&self, body: &Value) -> Run {
        self.open(body).finish()
    }

    /// Runs code that must succeed; its standard output.
    pub(crate) fn output(&self, code: &str) -> String {
        let run = self.run(code);
        assert_eq!((run.exit_code(), run.stderr().as_str()), (Some(0), ""), "{code}: {}", run.raw());
        run.stdout()
    }

    /// Starts a run and leaves its stream to the caller.
    pub(crate) fn open(&self, body: &Value) -> Stream {
        let token = self.daemon.token.as_deref();
        Stream::open(self.daemon.address, token, &self.route("/run"), body)
    }

    /// Starts code and waits until it has written `ready`.
    pub(crate) fn open_until(&self, body: &Value, ready: &str) -> Stream {
        let mut stream = self.open(body);
        while let Some(event) = stream.next_event() {
            if event["text"].as_str().is_some_and(|text| text.contains(ready)) {
                return stream;
            }
        }
        panic!("{ready:?} was not said: {}", String::from_utf8_lossy(&stream.raw))
    }

    pub(crate) fn state(&self) -> Value {
        let answer = self.daemon.get(&self.route(""));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    pub(crate) fn delete(&self) {
        let answer = self.daemon.request("DELETE", &self.route(""), b"");
        assert_eq!((answer.status, answer.text().as_str()), (200, ""));
    }
}
