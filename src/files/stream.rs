//! Readers and writers on the way of content: with holes, and with an end when nobody wants it any more.

use super::tree::Worker;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// Runs of zeros this long become holes, as they mostly were before; bytes.
const HOLE_BYTES: usize = 4096;

/// Writes long runs of zeros as holes.
pub(crate) struct Sparse<'a> {
    file: &'a mut File,
    /// Zeros that have been left out since the last byte; bytes.
    hole: u64,
}

impl<'a> Sparse<'a> {
    pub(crate) fn new(file: &'a mut File) -> Self {
        Self { file, hole: 0 }
    }

    /// Gives the file its length, if it ends in a hole.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if self.hole > 0 {
            let end = self.file.stream_position()? + self.hole;
            self.file.set_len(end)?;
        }
        Ok(())
    }
}

impl Write for Sparse<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for block in bytes.chunks(HOLE_BYTES) {
            if block.len() == HOLE_BYTES && block.iter().all(|byte| *byte == 0) {
                self.hole += block.len() as u64;
                continue;
            }
            if self.hole > 0 {
                self.file.seek(SeekFrom::Current(i64::try_from(self.hole).map_err(io::Error::other)?))?;
                self.hole = 0;
            }
            self.file.write_all(block)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Breaks off (`ConnectionAborted`) when nobody wants it any more.
pub(crate) struct Wanted<'a, 'w, T> {
    pub(crate) worker: &'a Worker<'w>,
    pub(crate) inner: T,
}

impl<T> Wanted<'_, '_, T> {
    fn go_on(&self) -> io::Result<()> {
        self.worker.go_on().map_err(|_| io::ErrorKind::ConnectionAborted.into())
    }
}

impl<R: Read> Read for Wanted<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.go_on()?;
        self.inner.read(buffer)
    }
}

impl<W: Write> Write for Wanted<'_, '_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.go_on()?;
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
