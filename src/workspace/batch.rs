//! What a commit has prepared and not yet put in place.
//!
//! Bringing a file to the disk takes about as long for many as for one, since the first call commits the file system's
//! journal for all. So complete copies wait under passing names until there are enough of them; then all are brought to
//! the disk, and only then does each get its name, in the order of the walk.

use super::site::Place;
use crate::files::copy::Failed;
use crate::files::tree::FileId;
use rustix::fs::{Statx, fsync};
use std::collections::VecDeque;
use std::fs::File;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How many files wait, each with its descriptor.
const FILES_MAX: usize = 64;
/// How much content waits; bytes.
const BYTES_MAX: u64 = 64 << 20;
/// How many steps wait; those that change directories hold a descriptor for a while.
const STEPS_MAX: usize = 128;

/// One step towards the lower as it is to be.
pub(super) enum Step {
    /// A complete copy gets its name.
    Put(Box<Put>),
    /// Another name for a file that was put, or was there, before.
    Link(Link),
    /// A directory gets its own attributes, after what is in it.
    Leave(Directory),
}

pub(super) struct Put {
    pub(super) place: Rc<Place>,
    pub(super) below: Vec<u8>,
    pub(super) passing: String,
    /// A regular file.
    pub(super) file: Option<File>,
    pub(super) bytes: u64,
    pub(super) copy: Statx,
    pub(super) source: Statx,
}

pub(super) struct Link {
    pub(super) place: Rc<Place>,
    pub(super) below: Vec<u8>,
    pub(super) first: First,
}

/// The first name of a file with several, in the lower.
#[derive(Clone)]
pub(super) struct First {
    pub(super) below: Vec<u8>,
    pub(super) id: FileId,
}

/// A directory that the walk is in.
pub(super) struct Directory {
    pub(super) below: Vec<u8>,
    /// Whether it gets the attributes of the upper's.
    pub(super) dressed: bool,
    /// Whether the commit has made it.
    pub(super) made: bool,
    /// Whether entries of it have been changed.
    pub(super) touched: bool,
    /// Whether it has lost rights already.
    pub(super) narrowed: bool,
}

#[derive(Default)]
pub(super) struct Batch {
    pub(super) steps: VecDeque<Step>,
    files: usize,
    bytes: u64,
}

impl Batch {
    pub(super) fn push(&mut self, step: Step) {
        if let Step::Put(put) = &step {
            self.files += usize::from(put.file.is_some());
            self.bytes += put.bytes;
        }
        self.steps.push_back(step);
    }

    pub(super) fn is_full(&self) -> bool {
        self.files >= FILES_MAX || self.bytes >= BYTES_MAX || self.steps.len() >= STEPS_MAX
    }

    /// Begins to count anew; what there is has been dealt with.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The files that are to get their names.
    pub(super) fn puts(&self) -> impl Iterator<Item = &Put> {
        self.steps.iter().filter_map(|step| match step {
            Step::Put(put) => Some(&**put),
            Step::Link(_) | Step::Leave(_) => None,
        })
    }

    /// Brings all content to the disk. Tells which path failed.
    pub(super) fn sync(&self, clock: &mut Clock) -> Result<(), (Vec<u8>, Failed)> {
        for put in self.puts() {
            let Some(file) = &put.file else { continue };
            clock.time(|| fsync(file)).map_err(|errno| (put.below.clone(), ("fsync", errno)))?;
        }
        Ok(())
    }
}

/// Adds up what bringing things to the disk takes.
#[derive(Default)]
pub(super) struct Clock(Duration);

impl Clock {
    pub(super) fn time<T>(&mut self, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = call();
        self.0 += start.elapsed();
        done
    }

    pub(super) fn micros(&self) -> u64 {
        u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX)
    }
}
