//! What an upper means for its lower.

use rustix::fs::Statx;

/// What one entry of an upper means for the lower.
#[derive(Debug, Clone)]
pub struct Change {
    /// The path, below the roots of both trees.
    pub below: Vec<u8>,
    /// What it does.
    pub effect: Effect,
    /// Of the upper's entry; of the lower's, where that is deleted.
    pub stat: Statx,
}

/// What one entry of an upper does to the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The lower's entry goes, with everything in it.
    Deleted,
    /// The lower has nothing there.
    Added,
    /// It takes the place of the lower's entry. A directory that does is opaque: nothing of the lower's shows in it.
    Replaced {
        /// Whether what it replaces is a directory.
        directory: bool,
    },
    /// A directory on both sides, whose entries are merged.
    Merged {
        /// Whether its own mode, owner or attributes differ from the lower's.
        differs: bool,
    },
}
