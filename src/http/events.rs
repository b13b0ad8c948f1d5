//! The stream of a run, framed as the clients read it: one JSON object a frame, then two newlines, and nothing
//! else ever (no `data:`, no comments; SDK 1.1.1 would lose events). `init` comes first, exactly one of
//! `execution_complete` and `error` last, and `ping` while nothing else does.
//!
//! `text` is one line with its own newline, so that blank lines and a missing last newline survive. Frames that
//! are ready together share one chunk of the body.

use crate::session::run::{End, Report, RunEvent, RunId};
use crate::session::shell_io::Stream;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use execd_init_shim::messages::ExitStatus;
use serde::Serialize;
use std::convert::Infallible;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// The longest `text`; bytes. Longer lines become several events. Escaping can make a byte six, and a frame has
/// to stay below the Go SDK's 4 MiB by far more than that is likely to.
const LINE_BYTES_MAX: usize = 512 * 1024;
/// How much is rendered before it is passed on; bytes.
const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// The run's id, for clients that do not read the stream.
const RUN_ID_HEADER: &str = "execd-run-id";

/// How long the head of an answer waits for the first event: most runs are short, and then the whole answer is
/// one write and wakes its client once.
const FIRST_EVENT_WAIT: Duration = Duration::from_millis(1);

/// The answer to a foreground run.
pub async fn respond(
    id: RunId,
    mut events: mpsc::Receiver<RunEvent>,
    partial_output: bool,
    ping_interval: Duration,
) -> Response {
    let mut renderer = Renderer::new(partial_output);
    renderer.init(id);
    if let Ok(Some(event)) = tokio::time::timeout(FIRST_EVENT_WAIT, events.recv()).await {
        renderer.event(event);
    }
    let stream = futures_util::stream::unfold(Some((events, renderer)), move |state| async move {
        let (mut events, mut renderer) = state?;
        if renderer.is_empty() && !renderer.ended {
            match tokio::time::timeout(ping_interval, events.recv()).await {
                Err(_) => renderer.ping(),
                Ok(Some(event)) => renderer.event(event),
                Ok(None) => renderer.broken_off(),
            }
        }
        while !renderer.ended && renderer.len() < CHUNK_BYTES_MAX {
            match events.try_recv() {
                Ok(event) => renderer.event(event),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => renderer.broken_off(),
            }
        }
        let chunk = renderer.take();
        let next = (!renderer.ended).then_some((events, renderer));
        Some((Ok::<_, Infallible>(chunk), next))
    });
    (headers(Some(id)), Body::from_stream(stream)).into_response()
}

/// The answer to a run on a session that has just died: a stream that says so.
pub fn respond_dead(reason: &str) -> Response {
    let mut renderer = Renderer::new(false);
    renderer.error("RuntimeError", reason, reason, None);
    (headers(None), Body::from(renderer.take())).into_response()
}

fn headers(id: Option<RunId>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    if let Some(value) = id.and_then(|id| HeaderValue::from_str(&id.0.to_string()).ok()) {
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
}

#[derive(Serialize)]
struct ErrorFrame<'a> {
    ename: &'a str,
    evalue: &'a str,
    traceback: [&'a str; 0],
}

/// Turns events into frames.
struct Renderer {
    frames: Vec<u8>,
    stdout: Lines,
    stderr: Lines,
    partial_output: bool,
    ended: bool,
}

impl Renderer {
    fn new(partial_output: bool) -> Self {
        Self {
            frames: Vec::new(),
            stdout: Lines::default(),
            stderr: Lines::default(),
            partial_output,
            ended: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    fn len(&self) -> usize {
        self.frames.len()
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.frames).into()
    }

    fn init(&mut self, id: RunId) {
        self.plain("init", &id.0.to_string());
    }

    fn ping(&mut self) {
        self.plain("ping", "pong");
    }

    fn event(&mut self, event: RunEvent) {
        match event {
            RunEvent::Output(stream, bytes) => self.output(stream, &bytes),
            RunEvent::End(report) => self.end(report),
        }
    }

    fn output(&mut self, stream: Stream, bytes: &[u8]) {
        let partial = self.partial_output;
        let timestamp = now_ms();
        let (lines, kind) = match stream {
            Stream::Stdout => (&mut self.stdout, "stdout"),
            Stream::Stderr => (&mut self.stderr, "stderr"),
        };
        let frames = &mut self.frames;
        lines.push(bytes, |text| write_frame(frames, kind, &text_of(text), timestamp));
        if partial {
            lines.flush_partial(|text| write_frame(frames, kind, &text_of(text), timestamp));
        }
    }

    fn end(&mut self, report: Report) {
        self.flush();
        let took = Some(report.took.as_millis() as u64);
        let exit = |code: i32| (code.to_string(), format!("command exited with code {code}"));
        match report.end {
            End::Status(0) | End::ShellEnded(ExitStatus::Code(0)) => self.complete(took),
            End::Status(code) | End::ShellEnded(ExitStatus::Code(code)) => {
                let (value, text) = exit(code);
                self.error("ExitError", &value, &text, took);
            }
            End::ShellEnded(status @ ExitStatus::Signal(signal)) => {
                let text = format!("the shell was killed by signal {signal}; a new one takes over");
                self.error("ExitError", &status.shell_code().to_string(), &text, took);
            }
            End::ShellLost => {
                let text = "the code took over the shell's own input; a new shell takes over";
                self.error("ExitError", "1", text, took);
            }
            End::TimedOut(limit) => {
                self.error("Timeout", "124", &format!("timed out after {} s", limit.as_secs()), took);
            }
            End::Cancelled => self.error("RuntimeError", "cancelled", "the run was cancelled", took),
            End::SessionEnded => {
                self.error("RuntimeError", "session terminated", "the session ended during the run", took);
            }
            End::Failed => {
                self.error("RuntimeError", "internal error", "the run could not be carried out", took)
            }
        }
    }

    /// The session is gone and has not said how the run ended.
    fn broken_off(&mut self) {
        self.flush();
        self.error("RuntimeError", "session terminated", "the session ended before the run did", None);
    }

    fn flush(&mut self) {
        let timestamp = now_ms();
        let frames = &mut self.frames;
        self.stdout.flush(|text| write_frame(frames, "stdout", &text_of(text), timestamp));
        self.stderr.flush(|text| write_frame(frames, "stderr", &text_of(text), timestamp));
    }

    fn plain(&mut self, kind: &str, text: &str) {
        write_frame(&mut self.frames, kind, text, now_ms());
    }

    fn complete(&mut self, execution_time: Option<u64>) {
        let frame =
            Frame { kind: "execution_complete", text: "", execution_time, timestamp: now_ms(), error: None };
        self.last(&frame);
    }

    fn error(&mut self, ename: &str, evalue: &str, text: &str, execution_time: Option<u64>) {
        let error = Some(ErrorFrame { ename, evalue, traceback: [] });
        self.last(&Frame { kind: "error", text, execution_time, timestamp: now_ms(), error });
    }

    fn last(&mut self, frame: &Frame<'_>) {
        write(&mut self.frames, frame);
        self.ended = true;
    }
}

fn write_frame(frames: &mut Vec<u8>, kind: &str, text: &str, timestamp: u64) {
    write(frames, &Frame { kind, text, execution_time: None, timestamp, error: None });
}

fn write(frames: &mut Vec<u8>, frame: &Frame<'_>) {
    // Writing plain data to memory does not fail.
    let _ = serde_json::to_writer(&mut *frames, frame);
    frames.extend_from_slice(b"\n\n");
}

fn text_of(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Cuts bytes into lines, keeping what is not a whole one yet.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.rest.is_empty() && piece.ends_with(b"\n") && piece.len() <= LINE_BYTES_MAX {
                emit(piece);
                continue;
            }
            self.rest.extend_from_slice(piece);
            if self.rest.ends_with(b"\n") && self.rest.len() <= LINE_BYTES_MAX {
                emit(&self.rest);
                self.rest.clear();
            }
            while self.rest.len() > LINE_BYTES_MAX {
                let (now, later) = self.rest.split_at(whole_characters(&self.rest, LINE_BYTES_MAX));
                emit(now);
                self.rest = later.to_vec();
            }
        }
    }

    /// What there is of a line, but for the first bytes of a character.
    fn flush_partial(&mut self, mut emit: impl FnMut(&[u8])) {
        let (now, later) = self.rest.split_at(whole_characters(&self.rest, self.rest.len()));
        if !now.is_empty() {
            emit(now);
            self.rest = later.to_vec();
        }
    }

    fn flush(&mut self, mut emit: impl FnMut(&[u8])) {
        if !self.rest.is_empty() {
            emit(&self.rest);
            self.rest.clear();
        }
    }
}

/// The longest beginning of at most `max` bytes that does not cut a UTF-8 character in two; everything, where
/// the bytes are no UTF-8 anyway.
fn whole_characters(bytes: &[u8], max: usize) -> usize {
    let end = max.min(bytes.len());
    // A character has at most four bytes, so its first one is among the last three.
    let tail = bytes.get(end.saturating_sub(3)..end).unwrap_or_default();
    let Some(back) = tail.iter().rev().position(|byte| byte & 0b1100_0000 != 0b1000_0000) else { return end };
    let lead = end - back - 1;
    let length = match bytes.get(lead) {
        Some(0xC0..=0xDF) => 2,
        Some(0xE0..=0xEF) => 3,
        Some(0xF0..=0xF7) => 4,
        _ => 1,
    };
    if lead + length > end { lead } else { end }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn texts(chunks: &[&[u8]], partial: bool) -> Vec<String> {
        let mut renderer = Renderer::new(partial);
        for chunk in chunks {
            renderer.output(Stream::Stdout, chunk);
        }
        renderer.end(Report { end: End::Status(0), took: Duration::ZERO });
        let all = String::from_utf8(renderer.take().to_vec()).unwrap();
        assert!(all.ends_with("}\n\n"));
        let frames: Vec<serde_json::Value> =
            all.trim_end().split("\n\n").map(|frame| serde_json::from_str(frame).unwrap()).collect();
        let (last, output) = frames.split_last().unwrap();
        assert_eq!(last["type"], "execution_complete");
        output.iter().map(|frame| frame["text"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn lines_keep_their_newlines_wherever_chunks_are_cut() {
        assert_eq!(texts(&[b"a\n\nb", b"c\nd"], false), ["a\n", "\n", "bc\n", "d"]);
        assert_eq!(texts(&[b"", b"\n"], false), ["\n"]);
        assert_eq!(texts(&[b"a", b"b\n"], true), ["a", "b\n"]);
    }

    #[test]
    fn characters_are_not_cut_and_invalid_bytes_are_replaced() {
        let euro = "€".as_bytes();
        assert_eq!(texts(&[&euro[..1], &euro[1..]], true), ["€"]);
        assert_eq!(texts(&[b"\xff\xfe\n"], false), ["\u{fffd}\u{fffd}\n"]);
        let long = "€".repeat(LINE_BYTES_MAX);
        let pieces = texts(&[long.as_bytes()], false);
        assert!(pieces.len() > 2 && pieces.iter().all(|piece| piece.len() <= LINE_BYTES_MAX));
        assert_eq!(pieces.concat(), long);
    }

    #[test]
    fn every_end_is_one_terminal_event() {
        let ends = [
            (End::Status(3), "ExitError", "3"),
            (End::ShellEnded(ExitStatus::Signal(9)), "ExitError", "137"),
            (End::TimedOut(Duration::from_secs(1)), "Timeout", "124"),
            (End::SessionEnded, "RuntimeError", "session terminated"),
        ];
        for (end, name, value) in ends {
            let mut renderer = Renderer::new(false);
            renderer.end(Report { end, took: Duration::from_millis(5) });
            let frame: serde_json::Value = serde_json::from_slice(&renderer.take()).unwrap();
            assert_eq!((&frame["type"], &frame["error"]["ename"]), (&"error".into(), &name.into()));
            assert_eq!((&frame["error"]["evalue"], &frame["execution_time"]), (&value.into(), &5.into()));
            assert!(frame["error"]["traceback"].is_array() && renderer.ended);
        }
    }
}
