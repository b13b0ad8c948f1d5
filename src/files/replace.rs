//! Replacing text in files, piece by piece: a file may be larger than memory.

use super::error::{Call, FileError};
use super::stage::{Attributes, Staged};
use super::stream::{Sparse, Wanted};
use super::tree::Worker;
use memchr::memmem::Finder;
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{self, Read, Write};

/// What is read at once; bytes.
const PIECE_BYTES: usize = 256 * 1024;

impl Worker<'_> {
    /// Replaces every occurrence of `old`, from the left; how many there were. A file without any is left alone. Mode
    /// and owner stay.
    ///
    /// # Errors
    /// For an empty `old`, for what is no file, and when the file could not be written.
    pub fn replace(&self, text: &str, old: &str, new: &str) -> Result<u64, FileError> {
        let path = self.path(text)?;
        if old.is_empty() {
            return Err(FileError::invalid(&path, "old must not be empty"));
        }
        let source = self.regular(&path)?.open(OFlags::RDONLY, &path)?;
        let mut staged = self.stage(&path)?;
        let count = self.replaced(source, &mut staged, old.as_bytes(), new.as_bytes())?;
        if count > 0 {
            self.land(staged, &Attributes::default(), false)?;
        }
        Ok(count)
    }

    /// Whether [`Worker::replace`] makes sense, without doing anything.
    ///
    /// # Errors
    /// As there.
    pub fn check_replace(&self, text: &str, old: &str) -> Result<(), FileError> {
        let path = self.path(text)?;
        if old.is_empty() {
            return Err(FileError::invalid(&path, "old must not be empty"));
        }
        self.regular(&path).map(drop)
    }

    fn replaced(&self, source: File, staged: &mut Staged, old: &[u8], new: &[u8]) -> Result<u64, FileError> {
        let path = staged.path().clone();
        let mut sparse = Sparse::new(staged.file());
        let mut to = Wanted { worker: self, inner: &mut sparse };
        let failed = |error: io::Error| match self.go_on() {
            Err(cancelled) => cancelled,
            Ok(()) => Err::<(), _>(error).call("write", &path).err().unwrap_or(FileError::Cancelled),
        };
        let mut pieces = Replacing { finder: Finder::new(old), new, kept: Vec::new(), count: 0 };
        let mut source = source;
        // What may be the beginning of an occurrence is looked at again with the next piece.
        let mut piece = vec![0; PIECE_BYTES.max(old.len())];
        loop {
            self.go_on()?;
            let length = match source.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).call("read", &path),
            };
            pieces.take(piece.get(..length).unwrap_or_default(), &mut to).map_err(failed)?;
        }
        let Replacing { kept, count, .. } = pieces;
        to.write_all(&kept).map_err(failed)?;
        sparse.finish().call("write", &path)?;
        Ok(count)
    }
}

/// Finds across the seams between pieces.
struct Replacing<'a> {
    finder: Finder<'a>,
    new: &'a [u8],
    /// Bytes that may be the beginning of an occurrence.
    kept: Vec<u8>,
    count: u64,
}

impl Replacing<'_> {
    fn take(&mut self, piece: &[u8], to: &mut impl Write) -> io::Result<()> {
        self.kept.extend_from_slice(piece);
        let mut done = 0;
        let mut rest = self.kept.as_slice();
        while let Some(at) = self.finder.find(rest) {
            let (before, from) = rest.split_at(at);
            to.write_all(before)?;
            to.write_all(self.new)?;
            rest = from.get(self.finder.needle().len()..).unwrap_or_default();
            done = self.kept.len() - rest.len();
            self.count += 1;
        }
        // The last bytes could go on in the next piece.
        let safe = rest.len().saturating_sub(self.finder.needle().len() - 1);
        to.write_all(rest.get(..safe).unwrap_or_default())?;
        self.kept.drain(..done + safe);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(pieces: &[&str], old: &str, new: &str) -> (String, u64) {
        let mut replacing = Replacing {
            finder: Finder::new(old.as_bytes()),
            new: new.as_bytes(),
            kept: Vec::new(),
            count: 0,
        };
        let mut out = Vec::new();
        for piece in pieces {
            replacing.take(piece.as_bytes(), &mut out).unwrap();
        }
        out.extend(&replacing.kept);
        (String::from_utf8(out).unwrap(), replacing.count)
    }

    #[test]
    fn seams_make_no_difference() {
        let text = "aabaabab--aab--ab";
        for old in ["a", "ab", "aab", "aabaab", "--", "x"] {
            let whole = text.replace(old, "<>");
            let count = text.matches(old).count() as u64;
            for at in 0..text.len() {
                let (left, right) = text.split_at(at);
                assert_eq!(replaced(&[left, right], old, "<>"), (whole.clone(), count), "{old} {at}");
            }
            let bytes: Vec<String> = text.chars().map(String::from).collect();
            let bytes: Vec<&str> = bytes.iter().map(String::as_str).collect();
            assert_eq!(replaced(&bytes, old, "<>"), (whole, count));
        }
    }
}
