//! Cuts what a run writes into events: one for each line, however it is cut into chunks on its way here.

use bytes::Bytes;

/// The longest event; bytes. Longer lines become several events. Escaping can make a byte six, and a frame has to stay
/// below the Go SDK's 4 MiB by far more than that is likely to.
pub(super) const LINE_BYTES_MAX: usize = 512 * 1024;

/// Cuts one stream into lines, keeping what is not a whole one yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Takes a chunk. What is emitted consists of whole events: each line is one, and an end without newline is another.
    pub(super) fn push(&mut self, mut chunk: Bytes, mut emit: impl FnMut(Bytes)) {
        if !self.rest.is_empty() {
            let first = memchr::memchr(b'\n', &chunk).map_or(chunk.len(), |newline| newline + 1);
            self.rest.extend_from_slice(&chunk.split_to(first));
            self.cut_long(&mut emit);
            if self.rest.ends_with(b"\n") {
                emit(std::mem::take(&mut self.rest).into());
            }
        }
        let whole = memchr::memrchr(b'\n', &chunk).map_or(0, |newline| newline + 1);
        let lines = chunk.split_to(whole);
        if !lines.is_empty() {
            emit(lines);
        }
        self.rest.extend_from_slice(&chunk);
        self.cut_long(&mut emit);
    }

    fn cut_long(&mut self, emit: &mut impl FnMut(Bytes)) {
        while self.rest.len() > LINE_BYTES_MAX {
            let later = self.rest.split_off(whole_characters(&self.rest, LINE_BYTES_MAX));
            emit(std::mem::replace(&mut self.rest, later).into());
        }
    }

    /// What there is of a line, but for the first bytes of a character.
    pub(super) fn take_partial(&mut self) -> Option<Bytes> {
        let later = self.rest.split_off(whole_characters(&self.rest, self.rest.len()));
        let now = std::mem::replace(&mut self.rest, later);
        (!now.is_empty()).then(|| now.into())
    }

    /// All there is of a line.
    pub(super) fn take_rest(&mut self) -> Option<Bytes> {
        let rest = std::mem::take(&mut self.rest);
        (!rest.is_empty()).then(|| rest.into())
    }
}

/// How many events a piece of output is.
pub(super) fn count(output: &[u8]) -> u64 {
    let newlines = memchr::memchr_iter(b'\n', output).count() as u64;
    newlines + u64::from(!output.ends_with(b"\n"))
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

    fn events(chunks: &[&[u8]], partial: bool) -> Vec<String> {
        let mut lines = Lines::default();
        let mut pieces = Vec::new();
        for chunk in chunks {
            lines.push(Bytes::copy_from_slice(chunk), |piece| pieces.push(piece));
            if partial {
                pieces.extend(lines.take_partial());
            }
        }
        pieces.extend(lines.take_rest());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut events = Vec::new();
        for piece in &pieces {
            let of_piece: Vec<_> = piece.split_inclusive(|byte| *byte == b'\n').map(text).collect();
            assert_eq!(count(piece), of_piece.len() as u64);
            events.extend(of_piece);
        }
        events
    }

    #[test]
    fn lines_keep_their_newlines_wherever_chunks_are_cut() {
        assert_eq!(events(&[b"a\n\nb", b"c\nd"], false), ["a\n", "\n", "bc\n", "d"]);
        assert_eq!(events(&[b"a", b"b", b"\n", b"\n"], false), ["ab\n", "\n"]);
        assert_eq!(events(&[b"", b"\n"], false), ["\n"]);
        assert_eq!(events(&[b"a", b"b\n"], true), ["a", "b\n"]);
    }

    #[test]
    fn characters_are_not_cut_and_long_lines_are() {
        let euro = "€".as_bytes();
        assert_eq!(events(&[&euro[..1], &euro[1..]], true), ["€"]);
        assert_eq!(events(&[b"\xff\xfe\n"], false), ["\u{fffd}\u{fffd}\n"]);
        let long = "€".repeat(LINE_BYTES_MAX);
        for cut in [long.len(), 100_000, 65_536] {
            let chunks: Vec<&[u8]> = long.as_bytes().chunks(cut).collect();
            let pieces = events(&chunks, false);
            assert!(pieces.len() > 2 && pieces.iter().all(|piece| piece.len() <= LINE_BYTES_MAX));
            assert_eq!(pieces.concat(), long);
        }
    }
}
