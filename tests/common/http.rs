//! A client that hides nothing: one request a connection, over a plain socket, so that tests see the exact
//! status line, headers and bytes.

use super::HANG;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

/// The first lines of an answer.
pub(crate) struct Head {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn read(reader: &mut impl BufRead) -> Self {
        let status_line = line(reader);
        let status = status_line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let mut headers = Vec::new();
        loop {
            let line = line(reader);
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Self { status: status.unwrap_or_else(|| panic!("no status: {status_line:?}")), headers }
    }
}

fn line(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap_or_else(|error| panic!("the answer broke off: {error}"));
    line.trim_end_matches("\r\n").to_owned()
}

/// An answer whose body is read piece by piece.
pub(crate) struct Streaming {
    pub(crate) head: Head,
    reader: BufReader<TcpStream>,
    left: Option<usize>,
}

impl Streaming {
    /// The next piece of the body, as the server sent it; `None` at its end.
    pub(crate) fn chunk(&mut self) -> Option<Vec<u8>> {
        let length = match &mut self.left {
            Some(left) => std::mem::take(left),
            None => {
                let size = line(&mut self.reader);
                usize::from_str_radix(&size, 16).unwrap_or_else(|_| panic!("no chunk size: {size:?}"))
            }
        };
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes).unwrap();
        if self.left.is_none() {
            assert_eq!(line(&mut self.reader), "");
        }
        (length > 0).then_some(bytes)
    }
}

/// Sends a request and reads the head of the answer.
pub(crate) fn send(
    address: SocketAddr,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: &[u8],
) -> Streaming {
    send_with(address, token, method, path, &[], body)
}

/// The same, with further headers.
pub(crate) fn send_with(
    address: SocketAddr,
    token: Option<&str>,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Streaming {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream.set_write_timeout(Some(HANG)).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: execd\r\nContent-Length: {}\r\n", body.len());
    if let Some(token) = token {
        head.push_str(&format!("X-EXECD-ACCESS-TOKEN: {token}\r\n"));
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    // A server may refuse a body after its first bytes; what it says then counts, not this.
    let _ = stream.write_all(body);
    let mut reader = BufReader::new(stream);
    let head = Head::read(&mut reader);
    let left = match head.header("transfer-encoding") {
        Some(_) => None,
        None => Some(head.header("content-length").map_or(0, |length| length.parse().unwrap())),
    };
    Streaming { head, reader, left }
}

impl Streaming {
    /// Reads it to its end.
    pub(crate) fn whole(mut self) -> Answer {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk() {
            bytes.extend(chunk);
        }
        Answer { status: self.head.status, head: self.head, body: bytes }
    }
}

/// A whole answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// Status, code and message of a failure, which must have just these.
    pub(crate) fn failure(&self) -> (u16, String, String) {
        let body = self.json();
        let text = |key: &str| body[key].as_str().unwrap_or_else(|| panic!("no {key}: {body}")).to_owned();
        assert_eq!(body.as_object().map(serde_json::Map::len), Some(2), "{body}");
        (self.status, text("code"), text("message"))
    }
}

/// Sends a request and reads the whole answer.
pub(crate) fn request(
    address: SocketAddr,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: &[u8],
) -> Answer {
    send(address, token, method, path, body).whole()
}
