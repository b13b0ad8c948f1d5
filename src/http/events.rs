//! The stream of a run, framed as the clients read it: one JSON object a frame, then two newlines, and nothing
//! else ever (no `data:`, no comments; SDK 1.1.1 would lose events). `init` comes first, exactly one of
//! `execution_complete` and `error` last, and `ping` while nothing else does.
//!
//! `text` is one line with its own newline, so that blank lines and a missing last newline survive. Frames that
//! are ready together share one chunk of the body.

use crate::session::journal::{Event, INIT_SEQ, Read};
use crate::session::run::{Attachment, End, Report, RunId, signal_name};
use crate::session::shell_io::Stream;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use execd_init_shim::messages::ExitStatus;
use serde::Serialize;
use std::convert::Infallible;
use std::time::{Duration, SystemTime};

/// How much is rendered before it is passed on; bytes.
const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// The run's id, for clients that do not read the stream.
const RUN_ID_HEADER: &str = "execd-run-id";

/// How long the head of an answer waits for the first event: most runs are short, and then the whole answer is
/// one write and wakes its client once.
const FIRST_EVENT_WAIT: Duration = Duration::from_millis(1);

/// The events of a run behind number `after`, to its end.
pub async fn respond(mut attachment: Attachment, after: u64, ping_interval: Duration) -> Response {
    let id = attachment.run().id;
    let mut renderer = Renderer::default();
    if after < INIT_SEQ {
        renderer.init(attachment.run().started_at, id);
    }
    if let Ok(Some(read)) = tokio::time::timeout(FIRST_EVENT_WAIT, attachment.reader.next()).await {
        renderer.read(read);
    }
    let stream = futures_util::stream::unfold(Some((attachment, renderer)), move |state| async move {
        let (mut attachment, mut renderer) = state?;
        renderer.render_output();
        if renderer.is_empty() && !renderer.ended {
            match tokio::time::timeout(ping_interval, attachment.reader.next()).await {
                Err(_) => renderer.ping(),
                Ok(Some(read)) => renderer.read(read),
                Ok(None) => return None,
            }
        }
        while renderer.wants_more() {
            let Some(read) = attachment.reader.try_next() else { break };
            renderer.read(read);
        }
        let chunk = renderer.take();
        let next = (!renderer.ended).then_some((attachment, renderer));
        Some((Ok::<_, Infallible>(chunk), next))
    });
    (headers(Some(id)), Body::from_stream(stream)).into_response()
}

/// The answer to a run on a session that has just died: a stream that says so.
pub fn respond_dead(reason: &str) -> Response {
    let mut renderer = Renderer::default();
    renderer.frame(&Frame {
        text: reason,
        error: Some(ErrorFrame { ename: "RuntimeError", evalue: reason, traceback: [] }),
        ..Frame::new("error", SystemTime::now())
    });
    (headers(None), Body::from(renderer.take())).into_response()
}

pub(super) fn headers(id: Option<RunId>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    if let Some(value) = id.and_then(|id| HeaderValue::from_str(&id.to_string()).ok()) {
        headers.insert(RUN_ID_HEADER, value);
    }
    headers
}

#[derive(Serialize)]
struct Frame<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    execution_time: Option<u64>,
    timestamp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorFrame<'a>>,
    /// What a client that comes back asks to go on behind; pings and notes of execd's own have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<ReportFrame>,
}

impl<'a> Frame<'a> {
    fn new(kind: &'a str, at: SystemTime) -> Self {
        let timestamp = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        Self { kind, text: "", execution_time: None, timestamp, error: None, seq: None, report: None }
    }
}

#[derive(Serialize)]
struct ErrorFrame<'a> {
    ename: &'a str,
    evalue: &'a str,
    traceback: [&'a str; 0],
}

/// How a run went, in numbers; times in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ReportFrame {
    wall_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_cpu_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_cpu_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i32>,
}

impl From<Report> for ReportFrame {
    fn from(report: Report) -> Self {
        let micros = |time: Duration| time.as_micros() as u64;
        Self {
            wall_us: micros(report.took),
            user_cpu_us: report.cpu.map(|cpu| micros(cpu.user)),
            system_cpu_us: report.cpu.map(|cpu| micros(cpu.system)),
            exit_code: report.end.exit_code(),
            signal: report.end.signal(),
        }
    }
}

/// How a run failed, as an `error` event says it; `None` for success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    ename: &'static str,
    evalue: String,
    /// A sentence.
    pub text: String,
}

impl Failure {
    /// What there is to say of an end.
    pub fn of(end: End) -> Option<Self> {
        let exit = |code: i32, text: String| Self { ename: "ExitError", evalue: code.to_string(), text };
        let runtime = |evalue: &str, text: &str| Self {
            ename: "RuntimeError",
            evalue: evalue.into(),
            text: text.into(),
        };
        Some(match end {
            End::Status(0) | End::ShellEnded(ExitStatus::Code(0)) | End::Exited(ExitStatus::Code(0)) => {
                return None;
            }
            End::Status(code)
            | End::ShellEnded(ExitStatus::Code(code))
            | End::Exited(ExitStatus::Code(code)) => {
                let signal = signal_name(code - 128);
                let signal = signal.map(|name| format!(", as after {name}")).unwrap_or_default();
                exit(code, format!("command exited with code {code}{signal}"))
            }
            End::ShellEnded(status @ ExitStatus::Signal(signal)) => {
                let text = format!("the shell was killed by {}; a new one takes over", signal_text(signal));
                exit(status.shell_code(), text)
            }
            End::Exited(status @ ExitStatus::Signal(signal)) => {
                exit(status.shell_code(), format!("killed by {}", signal_text(signal)))
            }
            End::OutOfMemory(code) => Self {
                ename: "OutOfMemory",
                evalue: code.to_string(),
                text: format!("killed by {}: the kernel ran out of memory", signal_text(code - 128)),
            },
            End::QuotaExceeded(code) => Self {
                ename: "QuotaExceeded",
                evalue: code.to_string(),
                text: format!(
                    "killed by {}: the session holds more than it may, and can write no more to its overlays",
                    signal_text(code - 128)
                ),
            },
            End::ShellLost => {
                exit(1, "the code took over the shell's own input; a new shell takes over".into())
            }
            End::TimedOut(limit) => Self {
                ename: "Timeout",
                evalue: "124".into(),
                text: format!("timed out after {} s", limit.as_secs()),
            },
            End::Cancelled => runtime("cancelled", "the run was cancelled"),
            End::SessionEnded => runtime("session terminated", "the session ended before the run did"),
            End::Failed => runtime("internal error", "the run could not be carried out"),
        })
    }
}

fn signal_text(signal: i32) -> String {
    match signal_name(signal) {
        Some(name) => format!("signal {signal} ({name})"),
        None => format!("signal {signal}"),
    }
}

/// Turns events into frames. Short lines grow many times over, so output is rendered a chunk of the body at a time.
#[derive(Default)]
struct Renderer {
    frames: Vec<u8>,
    output: Option<Output>,
    ended: bool,
}

/// Output that is being rendered.
struct Output {
    stream: Stream,
    at: SystemTime,
    /// The number of the first event in what is left.
    seq: u64,
    left: Bytes,
}

impl Renderer {
    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether there is room in the chunk and nothing else to fill it with.
    fn wants_more(&mut self) -> bool {
        self.render_output();
        !self.ended && self.output.is_none()
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.frames).into()
    }

    fn init(&mut self, at: SystemTime, id: RunId) {
        self.frame(&Frame { text: &id.to_string(), seq: Some(INIT_SEQ), ..Frame::new("init", at) });
    }

    fn ping(&mut self) {
        self.frame(&Frame { text: "pong", ..Frame::new("ping", SystemTime::now()) });
    }

    fn read(&mut self, read: Read) {
        if read.missed > 0 {
            let text = format!("{} earlier events are no longer kept", read.missed);
            self.frame(&Frame { text: &text, ..Frame::new("status", SystemTime::now()) });
        }
        match read.entry.event {
            Event::Output(stream, left) => {
                self.output = Some(Output { stream, at: read.entry.at, seq: read.entry.seq, left });
                self.skip(read.skip);
                self.render_output();
            }
            Event::End(report) => self.end(report, read.entry.at, read.entry.seq),
        }
    }

    fn skip(&mut self, events: u64) {
        for _ in 0..events {
            let _ = self.next_line();
        }
    }

    /// The next line of the output, with its number.
    fn next_line(&mut self) -> Option<(u64, Bytes)> {
        let output = self.output.as_mut()?;
        let end = memchr::memchr(b'\n', &output.left).map_or(output.left.len(), |newline| newline + 1);
        let line = output.left.split_to(end);
        let seq = output.seq;
        output.seq += 1;
        (!line.is_empty()).then_some((seq, line))
    }

    /// Renders output until the chunk is full.
    fn render_output(&mut self) {
        let Some(Output { stream, at, .. }) = self.output else { return };
        let kind = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        while self.frames.len() < CHUNK_BYTES_MAX {
            let Some((seq, line)) = self.next_line() else {
                self.output = None;
                return;
            };
            self.frame(&Frame {
                text: &String::from_utf8_lossy(&line),
                seq: Some(seq),
                ..Frame::new(kind, at)
            });
        }
    }

    fn end(&mut self, report: Report, at: SystemTime, seq: u64) {
        let failure = Failure::of(report.end);
        let frame = Frame {
            execution_time: Some(report.took.as_millis() as u64),
            seq: Some(seq),
            report: Some(report.into()),
            ..Frame::new("execution_complete", at)
        };
        match &failure {
            None => self.frame(&frame),
            Some(Failure { ename, evalue, text }) => {
                let error = Some(ErrorFrame { ename, evalue, traceback: [] });
                self.frame(&Frame { kind: "error", text, error, ..frame });
            }
        }
        self.ended = true;
    }

    fn frame(&mut self, frame: &Frame<'_>) {
        // Writing plain data to memory does not fail.
        let _ = serde_json::to_writer(&mut self.frames, frame);
        self.frames.extend_from_slice(b"\n\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::journal::Entry;

    fn frame(event: Event, seq: u64, skip: u64) -> Vec<serde_json::Value> {
        let mut renderer = Renderer::default();
        let entry = Entry { seq, count: 1, at: SystemTime::now(), event };
        renderer.read(Read { entry, skip, missed: 0 });
        let all = String::from_utf8(renderer.take().to_vec()).unwrap();
        all.trim_end().split("\n\n").map(|frame| serde_json::from_str(frame).unwrap()).collect()
    }

    #[test]
    fn each_line_is_a_numbered_frame() {
        let output = Event::Output(Stream::Stderr, Bytes::from_static(b"a\n\n\xff"));
        let frames = frame(output.clone(), 7, 0);
        let texts: Vec<_> = frames.iter().map(|frame| (&frame["text"], &frame["seq"])).collect();
        assert_eq!(
            texts,
            [(&"a\n".into(), &7.into()), (&"\n".into(), &8.into()), (&"\u{fffd}".into(), &9.into())]
        );
        assert!(frames.iter().all(|frame| frame["type"] == "stderr"));
        assert_eq!(frame(output, 7, 2)[0]["seq"], 9);
    }

    #[test]
    fn many_short_lines_are_rendered_a_chunk_at_a_time() {
        let mut renderer = Renderer::default();
        let bytes = Bytes::from("y\n".repeat(30_000));
        let event = Event::Output(Stream::Stdout, bytes);
        let entry = Entry { seq: 2, count: 30_000, at: SystemTime::now(), event };
        renderer.read(Read { entry, skip: 0, missed: 0 });
        let (mut frames, mut chunks) = (0, 0);
        while !renderer.is_empty() {
            assert!(!renderer.wants_more() || renderer.output.is_none());
            let chunk = renderer.take();
            assert!(chunk.len() < CHUNK_BYTES_MAX + 1000);
            frames += String::from_utf8(chunk.to_vec()).unwrap().matches("\n\n").count();
            chunks += 1;
            renderer.render_output();
        }
        assert!(frames == 30_000 && chunks > 4, "{frames} {chunks}");
    }

    #[test]
    fn every_end_is_one_terminal_event() {
        let ends = [
            (End::Status(3), "ExitError", "3", "command exited with code 3"),
            (End::Status(139), "ExitError", "139", "command exited with code 139, as after SIGSEGV"),
            (
                End::ShellEnded(ExitStatus::Signal(9)),
                "ExitError",
                "137",
                "the shell was killed by signal 9 (SIGKILL); a new one takes over",
            ),
            (End::Exited(ExitStatus::Signal(64)), "ExitError", "192", "killed by signal 64"),
            (
                End::OutOfMemory(137),
                "OutOfMemory",
                "137",
                "killed by signal 9 (SIGKILL): the kernel ran out of memory",
            ),
            (End::TimedOut(Duration::from_secs(1)), "Timeout", "124", "timed out after 1 s"),
            (End::SessionEnded, "RuntimeError", "session terminated", "the session ended before the run did"),
        ];
        for (end, name, value, text) in ends {
            let report = Report { end, took: Duration::from_millis(5), cpu: None };
            let frames = frame(Event::End(report), 2, 0);
            let [frame] = frames.as_slice() else { panic!("{frames:?}") };
            assert_eq!((&frame["type"], &frame["error"]["ename"]), (&"error".into(), &name.into()));
            assert_eq!((&frame["error"]["evalue"], &frame["execution_time"]), (&value.into(), &5.into()));
            assert_eq!((&frame["text"], &frame["report"]["wall_us"]), (&text.into(), &5000.into()));
            assert!(frame["error"]["traceback"].is_array());
        }
        let report = Report { end: End::Status(0), took: Duration::ZERO, cpu: None };
        let done = frame(Event::End(report), 2, 0);
        assert_eq!(
            (&done[0]["type"], &done[0]["report"]["exit_code"]),
            (&"execution_complete".into(), &0.into())
        );
    }
}
