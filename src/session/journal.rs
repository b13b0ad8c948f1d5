//! The events of a run, in order and numbered, in a buffer of bounded size. Whoever reads them, live or later, reads
//! them here.
//!
//! ```text
//! session task ──push──► [ 2 3 4 | 5 | 6 7 ] ──next──► readers, each at a place of its own
//!                          oldest      newest
//! ```
//!
//! As long as there are readers, nothing is dropped that one of them has not read; then the writer has to wait for room,
//! and with it the run, whose pipe fills up. Without a reader, and in the journal of a background run, the oldest events
//! make room for new ones, and a reader is told how many it has missed.
//!
//! Number 1 is the `init` event, which is not kept, since it says nothing but the run's id.

use super::lines::{self, Lines};
use super::run::Report;
use super::shell_io::Stream;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::{Notify, watch};

/// The number of the `init` event.
pub const INIT_SEQ: u64 = 1;

/// Some events with numbers in a row.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The number of the first.
    pub seq: u64,
    /// How many there are.
    pub count: u64,
    /// When they came.
    pub at: SystemTime,
    /// What happened.
    pub event: Event,
}

/// What happens in a run.
#[derive(Debug, Clone)]
pub enum Event {
    /// Output: each line is an event, and an end without newline another.
    Output(Stream, Bytes),
    /// It is over; the last event.
    End(Report),
}

/// The events of one run.
#[derive(Debug)]
pub struct Journal {
    inner: Mutex<Inner>,
    /// Changed whenever something is written.
    news: watch::Sender<()>,
    /// Rung when a reader has made room or is gone.
    room: Notify,
    bytes_max: u64,
    partial_output: bool,
    waits_for_readers: bool,
}

#[derive(Debug, Default)]
struct Inner {
    entries: VecDeque<Kept>,
    /// The size of all entries that were ever written; bytes.
    written: u64,
    next_seq: u64,
    stdout: Lines,
    stderr: Lines,
    ended: bool,
    /// The next number that each reader wants.
    readers: Vec<(u64, u64)>,
    next_reader: u64,
}

/// An entry, and the size of all entries up to and with it; bytes.
#[derive(Debug)]
struct Kept {
    entry: Entry,
    size: u64,
    end: u64,
}

/// What an entry takes besides its output, so that very many tiny ones are limited too; bytes.
const OVERHEAD_BYTES: u64 = 128;

impl Journal {
    /// An empty one that keeps about `bytes_max` bytes of output. `partial_output` makes events of pieces of lines as
    /// they come. The writer of one that `waits_for_readers` has to wait for [`Journal::room`].
    pub(super) fn new(bytes_max: usize, partial_output: bool, waits_for_readers: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner { next_seq: INIT_SEQ + 1, ..Inner::default() }),
            news: watch::Sender::new(()),
            room: Notify::new(),
            bytes_max: bytes_max as u64,
            partial_output,
            waits_for_readers,
        })
    }

    /// Writes a piece of output, cut anywhere. There should be room.
    pub(super) fn output(&self, stream: Stream, chunk: Bytes) {
        let mut inner = self.inner();
        let Inner { stdout, stderr, .. } = &mut *inner;
        let lines = if stream == Stream::Stdout { stdout } else { stderr };
        let mut pieces = Vec::new();
        lines.push(chunk, |piece| pieces.push(piece));
        if self.partial_output {
            pieces.extend(lines.take_partial());
        }
        if pieces.is_empty() {
            return;
        }
        for piece in pieces {
            inner.push(Event::Output(stream, piece));
        }
        self.make_room(&mut inner);
        drop(inner);
        self.news.send_replace(());
    }

    /// Writes the last event.
    pub(super) fn end(&self, report: Report) {
        let mut inner = self.inner();
        for (stream, rest) in
            [(Stream::Stdout, inner.stdout.take_rest()), (Stream::Stderr, inner.stderr.take_rest())]
        {
            if let Some(rest) = rest {
                inner.push(Event::Output(stream, rest));
            }
        }
        inner.push(Event::End(report));
        inner.ended = true;
        self.make_room(&mut inner);
        drop(inner);
        self.news.send_replace(());
    }

    /// Waits until output may be written. Cancel safe; for one writer.
    pub(super) async fn room(&self) {
        while !self.has_room() {
            self.room.notified().await;
        }
    }

    fn has_room(&self) -> bool {
        self.inner().unread() < self.bytes_max
    }

    /// Bytes of output that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.inner().kept()
    }

    /// Whether anybody reads it.
    pub(super) fn has_readers(&self) -> bool {
        !self.inner().readers.is_empty()
    }

    /// A reader that begins behind event number `after`.
    pub fn read(self: &Arc<Self>, after: u64) -> Reader {
        let mut inner = self.inner();
        let id = inner.next_reader;
        inner.next_reader += 1;
        // A stream always ends in the last event, even if that has been seen.
        let newest = if inner.ended { inner.next_seq - 1 } else { inner.next_seq };
        let next_seq = after.saturating_add(1).min(newest).max(INIT_SEQ + 1);
        inner.readers.push((id, next_seq));
        Reader { journal: Arc::clone(self), id, next_seq, news: self.news.subscribe(), ended: false }
    }

    /// Drops the oldest entries, as long as more than enough is left.
    fn make_room(&self, inner: &mut Inner) {
        let wanted = if self.waits_for_readers { inner.wanted() } else { u64::MAX };
        while let Some(Kept { entry, end, .. }) = inner.entries.front() {
            if inner.written - end < self.bytes_max || entry.seq + entry.count > wanted {
                return;
            }
            inner.entries.pop_front();
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn push(&mut self, event: Event) {
        let (count, size) = match &event {
            Event::Output(_, bytes) => (lines::count(bytes), bytes.len() as u64 + OVERHEAD_BYTES),
            Event::End(_) => (1, OVERHEAD_BYTES),
        };
        self.written += size;
        let entry = Entry { seq: self.next_seq, count, at: SystemTime::now(), event };
        self.entries.push_back(Kept { entry, size, end: self.written });
        self.next_seq += count;
    }

    fn kept(&self) -> u64 {
        self.entries.front().map_or(0, |oldest| self.written + oldest.size - oldest.end)
    }

    /// What the slowest reader has not read; bytes.
    fn unread(&self) -> u64 {
        self.find(self.wanted()).map_or(0, |oldest| self.written + oldest.size - oldest.end)
    }

    /// The lowest number that a reader has not read.
    fn wanted(&self) -> u64 {
        self.readers.iter().map(|(_, next)| *next).min().unwrap_or(u64::MAX)
    }

    /// What holds event number `seq`, or the first after it.
    fn find(&self, seq: u64) -> Option<&Kept> {
        let place =
            self.entries.partition_point(|kept| kept.entry.seq.saturating_add(kept.entry.count) <= seq);
        self.entries.get(place)
    }
}

/// Reads a journal from one place on.
#[derive(Debug)]
pub struct Reader {
    journal: Arc<Journal>,
    id: u64,
    next_seq: u64,
    news: watch::Receiver<()>,
    ended: bool,
}

/// What a reader reads.
#[derive(Debug)]
pub struct Read {
    /// The entry.
    pub entry: Entry,
    /// How many of its events were read before.
    pub skip: u64,
    /// How many events before it are no longer kept.
    pub missed: u64,
}

impl Reader {
    /// The next events, if there are any yet; `None` too after the last.
    pub fn try_next(&mut self) -> Option<Read> {
        if self.ended {
            return None;
        }
        let mut inner = self.journal.inner();
        let entry = inner.find(self.next_seq)?.entry.clone();
        let read = Read {
            skip: self.next_seq.saturating_sub(entry.seq),
            missed: entry.seq.saturating_sub(self.next_seq),
            entry,
        };
        self.ended = matches!(read.entry.event, Event::End(_));
        self.next_seq = read.entry.seq + read.entry.count;
        if let Some(place) = inner.readers.iter_mut().find(|(id, _)| *id == self.id) {
            place.1 = self.next_seq;
        }
        drop(inner);
        self.journal.room.notify_one();
        Some(read)
    }

    /// Waits for the next events; `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Option<Read> {
        loop {
            self.news.mark_unchanged();
            if let Some(read) = self.try_next() {
                return Some(read);
            }
            // The sender lives in the journal, which this reader holds.
            if self.ended || self.news.changed().await.is_err() {
                return None;
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.journal.inner().readers.retain(|(id, _)| *id != self.id);
        self.journal.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::super::run::End;
    use super::*;
    use std::time::Duration;

    fn report() -> Report {
        Report { end: End::Status(0), took: Duration::ZERO, cpu: None }
    }

    fn numbers(reader: &mut Reader) -> Vec<(u64, u64, u64)> {
        std::iter::from_fn(|| reader.try_next())
            .map(|read| (read.entry.seq, read.entry.count, read.skip))
            .collect()
    }

    #[test]
    fn events_are_numbered_and_can_be_read_from_anywhere() {
        let journal = Journal::new(1000, false, true);
        journal.output(Stream::Stdout, Bytes::from("a\nb\nc"));
        journal.output(Stream::Stderr, Bytes::from("x\n"));
        journal.output(Stream::Stdout, Bytes::from("d\n"));
        journal.end(report());
        assert_eq!(numbers(&mut journal.read(0)), [(2, 2, 0), (4, 1, 0), (5, 1, 0), (6, 1, 0)]);
        assert_eq!(numbers(&mut journal.read(2)), [(2, 2, 1), (4, 1, 0), (5, 1, 0), (6, 1, 0)]);
        assert_eq!(numbers(&mut journal.read(5)), [(6, 1, 0)]);
        assert_eq!(numbers(&mut journal.read(6)), [(6, 1, 0)]);
        assert_eq!(numbers(&mut journal.read(u64::MAX)), [(6, 1, 0)]);
    }

    #[test]
    fn readers_hold_up_the_writer_and_nobody_else_does() {
        let journal = Journal::new(1000, false, true);
        let chunk = || Bytes::from(vec![b'x'; 600]);
        let mut reader = journal.read(0);
        journal.output(Stream::Stdout, chunk());
        assert!(journal.has_room());
        journal.output(Stream::Stdout, Bytes::from_static(b"\n"));
        journal.output(Stream::Stdout, chunk());
        journal.output(Stream::Stdout, Bytes::from_static(b"\n"));
        assert!(!journal.has_room());
        assert_eq!(numbers(&mut reader), [(2, 1, 0), (3, 1, 0)]);
        assert!(journal.has_room());
        drop(reader);
        for number in 0..20 {
            journal.output(Stream::Stdout, Bytes::from(format!("{number}{}\n", "x".repeat(400))));
            assert!(journal.has_room() && journal.bytes() < 3000);
        }
        let mut late = journal.read(0);
        let read = late.try_next().unwrap();
        assert!(read.missed > 10 && read.entry.seq == 2 + read.missed, "{read:?}");
        let background = Journal::new(1000, false, false);
        let mut slow = background.read(0);
        for _ in 0..20 {
            background.output(Stream::Stdout, Bytes::from(format!("{}\n", "x".repeat(400))));
            assert!(background.bytes() < 3000);
        }
        assert!(slow.try_next().unwrap().missed > 10);
        // The newest stays, however small the limit.
        let tiny = Journal::new(1, false, true);
        tiny.output(Stream::Stdout, Bytes::from_static(b"lost\n"));
        tiny.output(Stream::Stdout, Bytes::from_static(b"kept\n"));
        tiny.end(report());
        assert!(matches!(tiny.read(0).try_next().unwrap().entry.event, Event::Output(..) | Event::End(_)));
    }
}
