//! Content on its way out, piece by piece: ranges of bytes, or of lines.

use super::error::{Call, FileError};
use super::info::time;
use super::path::RootedPath;
use super::tree::{Worker, stat};
use memchr::memchr;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

/// What is read at once; bytes.
const PIECE_BYTES: usize = 256 * 1024;

/// Something that comes in pieces, each made by a thread of the session.
pub trait Pieces: Send + 'static {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// What is missing then will not come.
    fn next(&mut self, worker: &Worker<'_>) -> Result<Option<Vec<u8>>, FileError>;
}

/// A file that has been opened for reading.
#[derive(Debug)]
pub struct Source {
    file: File,
    path: RootedPath,
    /// As it was opened; bytes.
    pub size: u64,
    /// Of its content.
    pub modified_at: SystemTime,
}

impl Worker<'_> {
    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// [`super::Class::Invalid`] for anything that is no regular file; such is never opened.
    pub fn download(&self, text: &str) -> Result<Source, FileError> {
        let path = self.path(text)?;
        let file = self.regular(&path)?.open(OFlags::RDONLY, &path)?;
        let stat = stat(&file, &path)?;
        Ok(Source { file, path, size: stat.stx_size, modified_at: time(&stat.stx_mtime) })
    }
}

impl Source {
    /// The last part of its path.
    pub fn name(&self) -> String {
        self.path.file_name()
    }

    /// Some of its bytes.
    pub fn bytes(self, range: Range<u64>) -> ByteRange {
        ByteRange { source: self, range }
    }

    /// Some of its lines, without the newline at the very end.
    pub fn lines(self, window: LineWindow) -> Lines {
        Lines { source: self, at: 0, window }
    }

    /// What is there from a place on, at most `max` bytes; empty at the end.
    fn read(&self, at: u64, max: usize) -> Result<Vec<u8>, FileError> {
        let mut piece = vec![0; max];
        loop {
            match self.file.read_at(&mut piece, at) {
                Ok(length) => {
                    piece.truncate(length);
                    return Ok(piece);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).call("pread64", &self.path),
            }
        }
    }
}

/// A range of bytes. A file that has become shorter meanwhile is a failure, since its length has been told.
#[derive(Debug)]
pub struct ByteRange {
    source: Source,
    range: Range<u64>,
}

impl Pieces for ByteRange {
    fn next(&mut self, _: &Worker<'_>) -> Result<Option<Vec<u8>>, FileError> {
        let left = self.range.end.saturating_sub(self.range.start);
        if left == 0 {
            return Ok(None);
        }
        let max = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let piece = self.source.read(self.range.start, max)?;
        if piece.is_empty() {
            return Err(Errno::NODATA).call("pread64", &self.source.path);
        }
        self.range.start += piece.len() as u64;
        Ok(Some(piece))
    }
}

/// A range of lines of a file.
#[derive(Debug)]
pub struct Lines {
    source: Source,
    at: u64,
    window: LineWindow,
}

impl Pieces for Lines {
    fn next(&mut self, worker: &Worker<'_>) -> Result<Option<Vec<u8>>, FileError> {
        while !self.window.is_complete() {
            worker.go_on()?;
            let piece = self.source.read(self.at, PIECE_BYTES)?;
            if piece.is_empty() {
                return Ok(None);
            }
            self.at += piece.len() as u64;
            let out = self.window.take(&piece);
            if !out.is_empty() {
                return Ok(Some(out));
            }
        }
        Ok(None)
    }
}

/// Picks lines out of pieces: from one number on, so many, without the `\r` and `\n` at their ends, joined by `\n`.
#[derive(Debug, Clone)]
pub struct LineWindow {
    skip: u64,
    left: u64,
    /// Carriage returns that belong to the line only if something other than a newline follows.
    returns: usize,
    /// A newline that is written once there is another line.
    joint: bool,
}

impl LineWindow {
    /// `limit` lines from number `offset` on, which counts from 1.
    pub fn new(offset: u64, limit: u64) -> Self {
        Self { skip: offset.saturating_sub(1), left: limit, returns: 0, joint: false }
    }

    fn is_complete(&self) -> bool {
        self.left == 0
    }

    fn take(&mut self, mut piece: &[u8]) -> Vec<u8> {
        while self.skip > 0 {
            let Some(at) = memchr(b'\n', piece) else { return Vec::new() };
            piece = piece.get(at + 1..).unwrap_or_default();
            self.skip -= 1;
        }
        let mut out = Vec::with_capacity(piece.len());
        while !piece.is_empty() && self.left > 0 {
            if std::mem::take(&mut self.joint) {
                out.push(b'\n');
            }
            let (line, rest) = match memchr(b'\n', piece) {
                Some(at) => (piece.get(..at).unwrap_or_default(), piece.get(at + 1..)),
                None => (piece, None),
            };
            self.part_of_line(line, &mut out);
            let Some(rest) = rest else { break };
            piece = rest;
            self.returns = 0;
            self.joint = true;
            self.left -= 1;
        }
        out
    }

    fn part_of_line(&mut self, part: &[u8], out: &mut Vec<u8>) {
        let text = part.iter().rposition(|byte| *byte != b'\r').map_or(0, |at| at + 1);
        if text > 0 {
            out.extend(std::iter::repeat_n(b'\r', self.returns));
            out.extend_from_slice(part.get(..text).unwrap_or_default());
            self.returns = 0;
        }
        self.returns += part.len() - text;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, offset: u64, limit: u64, at: usize) -> String {
        let mut window = LineWindow::new(offset, limit);
        let (left, right) = text.as_bytes().split_at(at);
        let out = [window.take(left), window.take(right)].concat();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_the_same_wherever_pieces_meet() {
        let text = "one\r\n\ntwo\r\rx\r\r\nlast\r";
        for at in 0..=text.len() {
            assert_eq!(lines(text, 1, u64::MAX, at), "one\n\ntwo\r\rx\nlast", "{at}");
            assert_eq!(lines(text, 2, 2, at), "\ntwo\r\rx", "{at}");
            assert_eq!(lines(text, 4, 9, at), "last", "{at}");
            assert_eq!(lines(text, 9, 9, at), "", "{at}");
            assert_eq!(lines(text, 1, 1, at), "one", "{at}");
        }
        assert_eq!(lines("a\nb\n", 1, 9, 2), "a\nb");
    }
}
