//! Work in a session's files, from outside of it: how it gets to threads of the session, and how it ends.

use super::inside::{Inside, Visit};
use super::session::Session;
use crate::files::download::Pieces;
use crate::files::{FileError, Worker};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{
    OwnedRwLockReadGuard, OwnedRwLockWriteGuard, OwnedSemaphorePermit, RwLock, Semaphore, mpsc, watch,
};

/// Threads that work in the files of one session at once. A file system that hangs takes no more than these.
const WORKERS_MAX: usize = 16;
/// Long works of one session at once, which keep a thread for as long as their client takes.
const LONG_WORKERS_MAX: usize = 4;
/// How long a client may leave such a thread waiting.
const CLIENT_WAIT_MAX: Duration = Duration::from_secs(60);
/// Pieces that are ready before their client has taken the one before.
const PIECES_AHEAD: usize = 2;

/// Why nothing was done, or not all.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FilesError {
    /// The session is dead or ends; the text says of what.
    #[error("isolated session is not active: {0}")]
    Dead(String),
    /// As many long works go on as may.
    #[error("{LONG_WORKERS_MAX} archives of this session are on their way already")]
    TooMany,
    /// Somebody else is at it.
    #[error("{0}")]
    Busy(String),
    /// This session, or this machine, does not offer it.
    #[error("{0}")]
    NotSupported(String),
    /// The files.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What a session has for work in its files.
#[derive(Debug)]
pub(super) struct Workers {
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
    /// Held for reading by whoever changes files from outside, and for writing by whoever needs them to stay as they are.
    changes: Arc<RwLock<()>>,
    /// Visits that keep the session from being idle.
    uses: AtomicUsize,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            short: Arc::new(Semaphore::new(WORKERS_MAX)),
            long: Arc::new(Semaphore::new(LONG_WORKERS_MAX)),
            changes: Arc::default(),
            uses: AtomicUsize::new(0),
        }
    }
}

impl Workers {
    pub(super) fn are_used(&self) -> bool {
        self.uses.load(Ordering::Acquire) > 0
    }
}

/// What somebody has come for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To read; the session is in use meanwhile.
    Use,
    /// To change something; the session is in use meanwhile, and nobody takes its files for something that stays.
    Change,
    /// It is only looked at, and may be deleted for being idle.
    Watch,
}

/// A visit to a session's files. It lasts until dropped, and the session's end waits for that: whoever keeps one has
/// to leave when [`FilesVisit::asked_to_leave`] resolves.
#[derive(Debug)]
pub struct FilesVisit {
    session: Arc<Session>,
    inside: Visit,
    shut: watch::Receiver<bool>,
    purpose: Purpose,
    /// Those who change files.
    _change: Option<OwnedRwLockReadGuard<()>>,
}

impl Drop for FilesVisit {
    fn drop(&mut self) {
        if self.purpose != Purpose::Watch {
            self.session.used();
            self.session.workers.uses.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Session {
    /// Goes to the files.
    ///
    /// # Errors
    /// [`FilesError::Dead`].
    pub async fn visit_files(self: &Arc<Self>, purpose: Purpose) -> Result<Arc<FilesVisit>, FilesError> {
        let shut = self.door.watch();
        let Some(inside) = self.door.enter().await else { return Err(FilesError::Dead(self.reason())) };
        if purpose != Purpose::Watch {
            self.workers.uses.fetch_add(1, Ordering::AcqRel);
        }
        let mut visit = FilesVisit { session: Arc::clone(self), inside, shut, purpose, _change: None };
        if purpose == Purpose::Change {
            let change = Arc::clone(&self.workers.changes).read_owned();
            visit._change = Some(tokio::select! {
                change = change => change,
                () = visit.asked_to_leave() => return Err(visit.dead()),
            });
        }
        Ok(Arc::new(visit))
    }

    /// Keeps the files as they are, as far as outsiders go, for as long as what is returned is held. Waits for those who
    /// are at it.
    pub(super) async fn hold_changes(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.workers.changes).write_owned().await
    }

    /// The same without waiting.
    pub(super) fn try_hold_changes(&self) -> Option<OwnedRwLockWriteGuard<()>> {
        Arc::clone(&self.workers.changes).try_write_owned().ok()
    }

    /// Changes files for as long as what is returned is held.
    pub(super) async fn share_changes(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.workers.changes).read_owned().await
    }
}

impl FilesVisit {
    /// Resolves when the session ends.
    pub async fn asked_to_leave(&self) {
        // An error means that the session is gone, which is the same.
        let _ = self.shut.clone().wait_for(|shut| *shut).await;
    }

    /// Has a thread of the session do something. When what is returned is dropped before, the thread is told to give
    /// up.
    ///
    /// # Errors
    /// What `work` fails with; [`FilesError::Dead`] when the session ends meanwhile.
    pub async fn perform<T, F>(self: &Arc<Self>, work: F) -> Result<T, FilesError>
    where
        T: Send + 'static,
        F: FnOnce(&Worker<'_>) -> Result<T, FileError> + Send + 'static,
    {
        let place = Arc::clone(&self.session.workers.short).acquire_owned();
        let place = tokio::select! {
            place = place => place.ok(),
            () = self.asked_to_leave() => None,
        };
        self.employ(place.ok_or_else(|| self.dead())?, work).await
    }

    /// The same for what waits for its client time and again.
    ///
    /// # Errors
    /// As [`FilesVisit::perform`].
    pub async fn perform_long<T, F>(self: &Arc<Self>, place: LongPlace, work: F) -> Result<T, FilesError>
    where
        T: Send + 'static,
        F: FnOnce(&Worker<'_>) -> Result<T, FileError> + Send + 'static,
    {
        self.employ(place.0, work).await
    }

    /// The right to work for long, without waiting for it.
    ///
    /// # Errors
    /// [`FilesError::TooMany`].
    pub fn long_place(&self) -> Result<LongPlace, FilesError> {
        let place = Arc::clone(&self.session.workers.long).try_acquire_owned();
        place.map(LongPlace).map_err(|_| FilesError::TooMany)
    }

    async fn employ<T, F>(self: &Arc<Self>, place: OwnedSemaphorePermit, work: F) -> Result<T, FilesError>
    where
        T: Send + 'static,
        F: FnOnce(&Worker<'_>) -> Result<T, FileError> + Send + 'static,
    {
        let given_up = Arc::new(AtomicBool::new(false));
        let _give_up = GiveUp(Arc::clone(&given_up));
        let visit = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            let is_cancelled = || given_up.load(Ordering::Relaxed) || *visit.shut.borrow();
            let worker = visit.inside.files.worker(&is_cancelled)?;
            let done = work(&worker);
            drop(worker);
            drop(place);
            done
        });
        match done.await {
            Ok(Err(FileError::Cancelled)) if *self.shut.borrow() => Err(self.dead()),
            Ok(done) => Ok(done?),
            Err(error) => Err(FileError::Own(format!("a file operation broke down: {error}")).into()),
        }
    }

    /// Has pieces made ahead of whoever takes them, until the last, or until nobody takes them any more, or the
    /// session ends. The visit lasts as long, and not as long as a client that does not read.
    pub fn send(self: Arc<Self>, pieces: impl Pieces) -> mpsc::Receiver<Piece> {
        let (sender, receiver) = mpsc::channel(PIECES_AHEAD);
        tokio::spawn(async move {
            let mut left = Some(pieces);
            while let Some(mut pieces) = left.take() {
                let made = self.perform(move |worker| {
                    let piece = pieces.next(worker)?;
                    Ok((pieces, piece))
                });
                let piece = match made.await {
                    Ok((pieces, Some(piece))) => {
                        left = Some(pieces);
                        Piece::Some(piece)
                    }
                    Ok((_, None)) => Piece::End,
                    Err(error) => Piece::Failed(error),
                };
                let taken = tokio::select! {
                    biased;
                    taken = sender.send(piece) => taken.is_ok(),
                    () = self.asked_to_leave() => false,
                };
                if !taken {
                    break;
                }
            }
        });
        receiver
    }

    pub(super) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// What of the session is needed to work in it.
    pub(super) fn inside(&self) -> &Inside {
        &self.inside
    }

    /// Says when the session ends.
    pub fn shut(&self) -> watch::Receiver<bool> {
        self.shut.clone()
    }

    /// What to say when the session ends meanwhile.
    pub fn dead(&self) -> FilesError {
        FilesError::Dead(self.session.reason())
    }
}

/// The right to work for long.
#[derive(Debug)]
pub struct LongPlace(OwnedSemaphorePermit);

/// What comes out of [`FilesVisit::send`]. When it breaks off before an end, something is missing.
#[derive(Debug)]
pub enum Piece {
    /// There may be more.
    Some(Vec<u8>),
    /// That was all.
    End,
    /// There will be no more.
    Failed(FilesError),
}

/// Tells a thread that nobody waits for it any more.
pub(super) struct GiveUp(pub(super) Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits on a thread that may block for something a client has to do, for as long as a client may take and the session
/// lives.
///
/// # Errors
/// `ConnectionAborted` when the session ends, `TimedOut`.
pub fn wait_for_client<T>(
    shut: &watch::Receiver<bool>,
    client: impl Future<Output = T>,
) -> std::io::Result<T> {
    let mut shut = shut.clone();
    Handle::current().block_on(async {
        tokio::select! {
            biased;
            _ = shut.wait_for(|shut| *shut) => Err(std::io::ErrorKind::ConnectionAborted.into()),
            done = client => Ok(done),
            () = tokio::time::sleep(CLIENT_WAIT_MAX) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    })
}
