//! A run's stream. Every run of every test is held to the framing, whatever else the test is about.

use super::http::{self, Head, Streaming};
use serde_json::Value;
use std::net::SocketAddr;

/// A stream that is being read.
pub(crate) struct Stream {
    answer: Streaming,
    /// Everything that has arrived.
    pub(crate) raw: Vec<u8>,
    read: usize,
}

impl Stream {
    /// Starts a run; it must be accepted.
    pub(crate) fn open(address: SocketAddr, token: Option<&str>, path: &str, body: &Value) -> Self {
        let mut answer = http::send(address, token, "POST", path, body.to_string().as_bytes());
        let status = answer.head.status;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer.chunk().unwrap_or_default()));
        Self { answer, raw: Vec::new(), read: 0 }
    }

    /// Reads the events of a run that has been started before.
    pub(crate) fn get(daemon: &super::Daemon, path: &str) -> Self {
        let mut answer = http::send(daemon.address, daemon.token.as_deref(), "GET", path, b"");
        let status = answer.head.status;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer.chunk().unwrap_or_default()));
        Self { answer, raw: Vec::new(), read: 0 }
    }

    /// Status and headers.
    pub(crate) fn head(&self) -> &Head {
        &self.answer.head
    }

    /// The next event; `None` at the end of the stream.
    pub(crate) fn next_event(&mut self) -> Option<Value> {
        loop {
            let rest = &self.raw[self.read..];
            if let Some(end) = rest.windows(2).position(|two| two == b"\n\n") {
                let event = event(&rest[..end]);
                self.read += end + 2;
                return Some(event);
            }
            self.raw.extend(self.answer.chunk()?);
        }
    }

    /// Reads to the end.
    pub(crate) fn finish(mut self) -> Run {
        while let Some(chunk) = self.answer.chunk() {
            self.raw.extend(chunk);
        }
        Run::new(self.answer.head, self.raw)
    }
}

fn event(frame: &[u8]) -> Value {
    let text = std::str::from_utf8(frame).unwrap();
    assert!(text.starts_with('{') && !text.contains('\n'), "not bare JSON on one line: {text:?}");
    let event: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert!(event["type"].is_string() && event["timestamp"].is_u64(), "{event}");
    event
}

/// A run that has ended.
pub(crate) struct Run {
    pub(crate) head: Head,
    raw: Vec<u8>,
    pub(crate) events: Vec<Value>,
}

impl Run {
    fn new(head: Head, raw: Vec<u8>) -> Self {
        assert!(raw.ends_with(b"}\n\n"), "no whole frame at the end: {:?}", String::from_utf8_lossy(&raw));
        let text = std::str::from_utf8(&raw).unwrap();
        let events = text.trim_end_matches("\n\n").split("\n\n").map(|frame| event(frame.as_bytes()));
        let run = Self { head, events: events.collect(), raw: raw.clone() };
        let (last, others) = run.events.split_last().unwrap();
        assert!(is_terminal(last), "the last event ends nothing: {}", run.raw());
        assert!(!others.iter().any(is_terminal), "more than one end: {}", run.raw());
        run
    }

    pub(crate) fn raw(&self) -> String {
        String::from_utf8_lossy(&self.raw).into_owned()
    }

    /// The texts of all events of a type.
    pub(crate) fn texts(&self, kind: &str) -> Vec<&str> {
        let of_kind = self.events.iter().filter(|event| event["type"] == kind);
        of_kind.map(|event| event["text"].as_str().unwrap()).collect()
    }

    pub(crate) fn stdout(&self) -> String {
        self.texts("stdout").concat()
    }

    pub(crate) fn stderr(&self) -> String {
        self.texts("stderr").concat()
    }

    pub(crate) fn terminal(&self) -> &Value {
        self.events.last().unwrap()
    }

    /// As the SDK computes it.
    pub(crate) fn exit_code(&self) -> Option<i32> {
        match self.terminal()["type"].as_str() {
            Some("execution_complete") => Some(0),
            _ => self.terminal()["error"]["evalue"].as_str().and_then(|value| value.parse().ok()),
        }
    }

    /// Name and value of the error that ended it.
    pub(crate) fn error(&self) -> (&str, &str) {
        let error = &self.terminal()["error"];
        (error["ename"].as_str().unwrap_or("none"), error["evalue"].as_str().unwrap_or("none"))
    }

    /// Asserts a success with this standard output and no standard error.
    pub(crate) fn prints(&self, stdout: &str) {
        assert_eq!((self.exit_code(), self.stdout(), self.stderr()), (Some(0), stdout.into(), String::new()));
    }
}

fn is_terminal(event: &Value) -> bool {
    event["type"] == "execution_complete" || event["type"] == "error"
}
