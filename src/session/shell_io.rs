//! The descriptors of a session's shell, behind one that tokio can wait for.
//!
//! The FIFOs outlive single runs and see writers come and go, and a hang-up that tokio has seen once sticks to
//! a registration for ever. So they live in an epoll instance of their own, edge-triggered, and tokio watches
//! that instance.

use super::control::ControlDir;
use super::dialect::name;
use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// Bytes taken from a pipe at once: what one holds.
const CHUNK_BYTES: usize = 64 * 1024;
/// The most that a shell may leave to its successor; bytes.
const STATE_BYTES_MAX: usize = 4 << 20;
/// The longest status report that can be one of ours; bytes.
const STATUS_LINE_BYTES_MAX: usize = 256;
/// How many pipes of earlier runs are kept for background processes that still write to them.
const RETIRED_MAX: usize = 64;

const OUT: u64 = 0;
const ERR: u64 = 1;
const STATUS: u64 = 2;
const STATE: u64 = 3;
const SCRIPT: u64 = 4;
const SANDBOX: u64 = 5;
const FIRST_RETIRED: u64 = 6;

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

#[derive(Debug)]
struct Output {
    fd: OwnedFd,
    readable: bool,
}

/// All descriptors of one session's shell.
#[derive(Debug)]
pub(super) struct ShellIo {
    control: Arc<ControlDir>,
    out: Output,
    err: Output,
    status: OwnedFd,
    state: OwnedFd,
    /// Writers of our own on those two, so that they never hang up and can be watched by level: a session that
    /// floods them is read a chunk at a time.
    _writers: [OwnedFd; 2],
    /// The script pipe of the present shell.
    script: Option<OwnedFd>,
    /// What did not fit into the script pipe yet.
    unsent: Vec<u8>,
    status_bytes: Vec<u8>,
    state_bytes: Vec<u8>,
    retired: Vec<(u64, OwnedFd)>,
    next_tag: u64,
    /// Whether it is noticed that the shell reads on.
    watching_prompt: bool,
    /// Set when the shell has read everything up to its prompt.
    pub(super) at_prompt: bool,
    /// Set when init has said something.
    pub(super) sandbox_spoke: bool,
    epoll: Epoll,
}

/// Registered with tokio only once the session's task runs; a new shell is first waited for on a thread.
#[derive(Debug)]
enum Epoll {
    Plain(OwnedFd),
    Async(AsyncFd<OwnedFd>),
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Plain(fd) => fd.as_fd(),
            Self::Async(fd) => fd.as_fd(),
        }
    }
}

impl ShellIo {
    pub(super) fn new(control: ControlDir, sandbox: BorrowedFd<'_>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let out = control.fifo(name::OUT)?;
        let err = control.fifo(name::ERR)?;
        let status = control.fifo(name::STATUS)?;
        let state = control.fifo(name::STATE)?;
        let writers = [control.writer(name::STATUS)?, control.writer(name::STATE)?];
        for (fd, tag) in [(&status, STATUS), (&state, STATE)] {
            epoll::add(&epoll, fd, EventData::new_u64(tag), EventFlags::IN)?;
        }
        for (fd, tag) in [(out.as_fd(), OUT), (err.as_fd(), ERR), (sandbox, SANDBOX)] {
            add(epoll.as_fd(), fd, tag, EventFlags::IN)?;
        }
        control.put(name::INPUT, b"")?;
        Ok(Self {
            control: Arc::new(control),
            out: Output { fd: out, readable: false },
            err: Output { fd: err, readable: false },
            status,
            state,
            _writers: writers,
            script: None,
            unsent: Vec::new(),
            status_bytes: Vec::new(),
            state_bytes: Vec::new(),
            retired: Vec::new(),
            next_tag: FIRST_RETIRED,
            watching_prompt: false,
            at_prompt: false,
            sandbox_spoke: false,
            epoll: Epoll::Plain(epoll),
        })
    }

    /// Hands the descriptors to tokio; call inside its runtime.
    pub(super) fn register(mut self) -> io::Result<Self> {
        if let Epoll::Plain(fd) = self.epoll {
            self.epoll = Epoll::Async(execd_sys::watch_readable(fd)?);
        }
        Ok(self)
    }

    /// Files of the control directory.
    pub(super) fn control(&self) -> &Arc<ControlDir> {
        &self.control
    }

    /// Takes the script pipe of a new shell and forgets all about the one before.
    pub(super) fn attach(&mut self, script: OwnedFd) -> io::Result<()> {
        self.detach();
        add(self.epoll.as_fd(), script.as_fd(), SCRIPT, EventFlags::empty())?;
        self.script = Some(script);
        self.watching_prompt = false;
        self.drain_status();
        self.status_bytes.clear();
        self.drain_state();
        self.state_bytes.clear();
        self.at_prompt = false;
        Ok(())
    }

    /// Closes the script pipe.
    pub(super) fn detach(&mut self) {
        if let Some(script) = self.script.take() {
            let _ = epoll::delete(self.epoll.as_fd(), &script);
        }
        self.unsent.clear();
    }

    /// Takes what the last shell left to its successor.
    pub(super) fn take_state(&mut self) -> Vec<u8> {
        self.drain_state();
        std::mem::take(&mut self.state_bytes)
    }

    /// Sends a line to the shell; what does not fit is sent as the shell reads on.
    pub(super) fn send(&mut self, line: &str) {
        self.at_prompt = false;
        self.status_bytes.clear();
        self.unsent.extend_from_slice(line.as_bytes());
        self.send_more();
        self.watch_prompt(!self.unsent.is_empty());
    }

    /// Turns on or off that the shell's reading on is noticed. Off for short runs: it reads on after each of
    /// them, and noticing costs a wake-up.
    pub(super) fn watch_prompt(&mut self, on: bool) {
        if std::mem::replace(&mut self.watching_prompt, on) == on {
            return;
        }
        let Some(script) = &self.script else { return };
        let interest = if on { EventFlags::OUT } else { EventFlags::empty() };
        let changed =
            epoll::modify(self.epoll.as_fd(), script, EventData::new_u64(SCRIPT), interest | EventFlags::ET);
        if let Err(error) = changed {
            tracing::error!(%error, "a script pipe cannot be watched");
        }
    }

    /// Whether [`ShellIo::watch_prompt`] is on.
    pub(super) fn watches_prompt(&self) -> bool {
        self.watching_prompt
    }

    fn send_more(&mut self) {
        let Some(script) = &self.script else { return };
        while !self.unsent.is_empty() {
            match rustix::io::write(script, &self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(Errno::INTR) => {}
                // Full, or the shell is gone, which its exit will tell.
                Err(_) => return,
            }
        }
    }

    /// Waits until something has happened and takes note of it. Cancel safe.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        let events = loop {
            let Epoll::Async(epoll) = &self.epoll else {
                return Err(io::Error::other("the shell's descriptors are not registered"));
            };
            let mut guard = epoll.readable().await?;
            let events = ready(guard.get_inner().as_fd())?;
            if !events.is_empty() {
                break events;
            }
            guard.clear_ready();
        };
        self.note(&events);
        Ok(())
    }

    /// Like [`ShellIo::wait`] on a thread that may block; gives up after `timeout`.
    pub(super) fn wait_blocking(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&timeout))?;
        let events = ready(self.epoll.as_fd())?;
        self.note(&events);
        Ok(())
    }

    fn note(&mut self, tags: &[u64]) {
        for tag in tags {
            match *tag {
                OUT => self.out.readable = true,
                ERR => self.err.readable = true,
                STATUS => self.drain_status(),
                STATE => self.drain_state(),
                SCRIPT => self.note_script(),
                SANDBOX => self.sandbox_spoke = true,
                retired => self.discard(retired),
            }
        }
    }

    /// The pipe holds one page, so that it can be written to means that the shell has read all of it: the line
    /// and the empty one behind it.
    fn note_script(&mut self) {
        self.send_more();
        let Some(script) = self.script.as_ref().filter(|_| self.unsent.is_empty()) else { return };
        let mut fds = [PollFd::new(script, PollFlags::OUT)];
        let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let [fd] = fds;
        self.at_prompt = polled.is_ok() && fd.revents() == PollFlags::OUT;
        // A report that was written before the prompt came back counts.
        self.drain_status();
    }

    /// Takes all that waits, which is at most what a pipe holds. Somebody else inside may write here too, so what
    /// is kept covers two such takes: a report of ours that is in either of them is still whole.
    fn drain_status(&mut self) {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        if rustix::io::read(&self.status, spare_capacity(&mut chunk)).is_err() {
            return;
        }
        self.status_bytes.append(&mut chunk);
        let kept_max = 2 * CHUNK_BYTES + STATUS_LINE_BYTES_MAX;
        if let Some(excess @ 1..) = self.status_bytes.len().checked_sub(kept_max) {
            self.status_bytes.drain(..excess);
        }
    }

    fn drain_state(&mut self) {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        if rustix::io::read(&self.state, spare_capacity(&mut chunk)).is_ok() {
            if self.state_bytes.len() + chunk.len() > STATE_BYTES_MAX {
                self.state_bytes.clear();
            }
            self.state_bytes.append(&mut chunk);
        }
    }

    /// Reads reports whose arrival has not been noticed yet.
    pub(super) fn refresh_status(&mut self) {
        self.drain_status();
    }

    /// The exit status that the report with `token` tells, if it has come. What others wrote in front of it does
    /// not matter: the report is one atomic write (pipe(7), PIPE_BUF).
    pub(super) fn reported(&self, token: &str) -> Option<i32> {
        if token.is_empty() {
            return None;
        }
        // Looked for after every event, and a session may flood this pipe.
        let place = memchr::memmem::find(&self.status_bytes, token.as_bytes())?;
        let report = self.status_bytes.get(place + token.len()..)?;
        let status = report.get(..memchr::memchr(b'\n', report)?)?;
        std::str::from_utf8(status).ok()?.trim_start().parse().ok()
    }

    /// Whether a stream has something to read.
    pub(super) fn has_output(&self) -> bool {
        self.out.readable || self.err.readable
    }

    /// The next chunk of output; `None` when there is none now.
    pub(super) fn read_output(&mut self) -> Option<(Stream, Bytes)> {
        if let Some(chunk) = self.out.read(CHUNK_BYTES) {
            return Some((Stream::Stdout, chunk));
        }
        self.err.read(CHUNK_BYTES).map(|chunk| (Stream::Stderr, chunk))
    }

    /// How many bytes wait in both pipes; what a run left there when it ended.
    pub(super) fn pending_bytes(&self) -> u64 {
        let pending = |output: &Output| rustix::io::ioctl_fionread(&output.fd).unwrap_or(0);
        pending(&self.out) + pending(&self.err)
    }

    /// Makes ready to read what is pending, whether or not its arrival has been noticed.
    pub(super) fn mark_readable(&mut self) {
        self.out.readable = true;
        self.err.readable = true;
    }

    /// After a run: a pipe that somebody still holds stays with that run, and a new one takes its place, so
    /// that late output never shows up in the next run.
    pub(super) fn retire_held_pipes(&mut self) -> io::Result<()> {
        if !self.out.is_at_end() {
            let fresh = self.control.fifo(name::OUT)?;
            add(self.epoll.as_fd(), fresh.as_fd(), OUT, EventFlags::IN)?;
            let old = std::mem::replace(&mut self.out, Output { fd: fresh, readable: false });
            self.retire(old.fd)?;
        }
        if !self.err.is_at_end() {
            let fresh = self.control.fifo(name::ERR)?;
            add(self.epoll.as_fd(), fresh.as_fd(), ERR, EventFlags::IN)?;
            let old = std::mem::replace(&mut self.err, Output { fd: fresh, readable: false });
            self.retire(old.fd)?;
        }
        Ok(())
    }

    /// Keeps the pipe of a run that has ended, so that its background processes neither block nor get SIGPIPE;
    /// what they write is thrown away. Beyond a limit the oldest is closed.
    fn retire(&mut self, fd: OwnedFd) -> io::Result<()> {
        let tag = self.next_tag;
        self.next_tag += 1;
        epoll::modify(self.epoll.as_fd(), &fd, EventData::new_u64(tag), EventFlags::IN | EventFlags::ET)?;
        self.retired.push((tag, fd));
        if self.retired.len() > RETIRED_MAX {
            self.retired.remove(0);
        }
        self.discard(tag);
        Ok(())
    }

    fn discard(&mut self, tag: u64) {
        let Some(place) = self.retired.iter().position(|(of, _)| *of == tag) else { return };
        let Some((_, fd)) = self.retired.get(place) else { return };
        let mut chunk = vec![0; CHUNK_BYTES];
        if rustix::io::read(fd, &mut chunk) == Ok(0) {
            self.retired.remove(place);
        }
    }
}

impl Output {
    fn read(&mut self, bytes_max: usize) -> Option<Bytes> {
        if !self.readable {
            return None;
        }
        let mut chunk = Vec::with_capacity(bytes_max);
        match rustix::io::read(&self.fd, spare_capacity(&mut chunk)) {
            Ok(1..) => Some(kept(chunk)),
            Err(Errno::INTR) => None,
            // No writer, or nothing written: the next write is a new edge.
            Ok(0) | Err(_) => {
                self.readable = false;
                None
            }
        }
    }

    /// Whether no writer is left. Something that is read here came after the end of its run.
    fn is_at_end(&self) -> bool {
        let mut byte = [0];
        rustix::io::read(&self.fd, &mut byte) == Ok(0)
    }
}

/// A chunk that may be kept for long, without the room it does not need.
pub(super) fn kept(chunk: Vec<u8>) -> Bytes {
    if chunk.len() < chunk.capacity() / 2 { Bytes::copy_from_slice(&chunk) } else { Bytes::from(chunk) }
}

fn add(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>, tag: u64, interest: EventFlags) -> io::Result<()> {
    Ok(epoll::add(epoll, fd, EventData::new_u64(tag), interest | EventFlags::ET)?)
}

/// The tags of what is ready now.
fn ready(epoll: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut events = Vec::with_capacity(16);
    let none = Timespec { tv_sec: 0, tv_nsec: 0 };
    match epoll::wait(epoll, spare_capacity(&mut events), Some(&none)) {
        Ok(_) | Err(Errno::INTR) => Ok(events.iter().map(|event| event.data.u64()).collect()),
        Err(errno) => Err(errno.into()),
    }
}
