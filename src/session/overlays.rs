//! Work on a session's overlays from outside of it: taking out what has changed, and putting it into the lowers. The
//! same for the uppers of sessions that have ended and are kept.
//!
//! Whoever only reads comes as a visitor, and the session goes on meanwhile. A commit has the files for itself: runs wait
//! for it, changes from outside wait for it, and processes that earlier runs have left are held up. It goes on when its
//! client goes away, and the session's end waits for it.

use super::files::{FilesError, FilesVisit, GiveUp, Purpose};
use super::inside::Inside;
use super::session::Session;
use super::task::{Order, Rest};
use crate::files::walk::GoOn;
use crate::files::{Class, FileError};
use crate::sandbox::cgroup::Frozen;
use crate::sandbox::launch::{LaunchError, ReplaceError};
use crate::workspace::commit::{self, OnConflict};
use crate::workspace::journal::Journal;
use crate::workspace::layer::Layer;
use crate::workspace::resolve::is_clean;
use crate::workspace::retained::{Retained, RetainedLayers};
use crate::workspace::session_uppers::SessionUppers;
use crate::workspace::timestamp::Timestamp;
use execd_init_shim::messages::MountStep;
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedRwLockWriteGuard, oneshot, watch};

/// How long those who write may take to be gone once they are killed.
const SEAL_WAIT_MAX: Duration = Duration::from_secs(2);
/// Between two tries meanwhile.
const SEAL_INTERVAL: Duration = Duration::from_millis(20);

/// The overlays of a session, held in place.
#[derive(Debug)]
pub struct OverlaysVisit {
    hold: Hold,
    since: Timestamp,
    notes: OwnedFd,
    shut: watch::Receiver<bool>,
}

#[derive(Debug)]
enum Hold {
    Live { visit: Arc<FilesVisit>, uppers: Arc<SessionUppers>, layers: Vec<Layer> },
    Kept { retained: Arc<Retained>, layers: Arc<RetainedLayers>, _never: watch::Sender<bool> },
}

/// What a commit is to do.
#[derive(Debug, Clone)]
pub struct CommitOptions {
    /// Only what is at or below these; everything, when there are none.
    pub paths: Vec<String>,
    /// What becomes of lowers that somebody else has changed.
    pub conflicts: OnConflict,
    /// Whether set-id bits and file capabilities are carried over.
    pub keep_privileges: bool,
    /// Whether runs that go on are waited for.
    pub wait: bool,
    /// Whether the overlays begin anew afterwards, with empty uppers.
    pub reset: bool,
}

/// What a commit has done.
#[derive(Debug, Default, serde::Serialize)]
pub struct CommitReport {
    /// Entries of the lowers that were written or removed.
    pub applied: u64,
    /// Content that was copied; bytes.
    pub bytes: u64,
    /// Paths that were left alone because of a conflict, the first of them.
    pub skipped: Vec<String>,
    /// How many that were.
    pub skipped_count: u64,
    /// What of the time went into fsync(2); microseconds.
    pub fsync_us: u64,
}

/// As long as this is held, nothing in the session changes.
#[derive(Debug)]
pub(super) struct Alone {
    frozen: Option<Frozen>,
    rest: Rest,
    _changes: OwnedRwLockWriteGuard<()>,
}

impl Alone {
    /// Whether the shell is the only process there is.
    fn is_shell_alone(&self, inside: &Inside) -> bool {
        // Without cgroups this one is found out before.
        let all = inside.cgroup.as_ref().map(|cgroup| cgroup.processes_below()).unwrap_or_default();
        all.iter().all(|pid| *pid == self.rest.shell)
    }

    /// Ends it with another shell, which goes on where the old one was.
    fn renew_shell(self) {
        let Self { frozen, rest, _changes } = self;
        drop(frozen);
        rest.renew_shell();
    }
}

impl Session {
    /// Goes to the overlays.
    ///
    /// # Errors
    /// [`FilesError::Dead`], [`FilesError::NotSupported`] for a session without overlays that can be reached.
    pub async fn visit_overlays(self: &Arc<Self>) -> Result<Arc<OverlaysVisit>, FilesError> {
        let visit = self.visit_files(Purpose::Use).await?;
        let uppers = visit.inside().uppers.clone();
        let uppers = uppers.ok_or_else(no_overlays)?;
        blocking(move || {
            let layers = uppers.layers().map_err(|error| own("open the layers", &error))?;
            if layers.is_empty() {
                let reason = "the uppers of this session lie in its own user namespace, out of reach";
                return Err(FilesError::NotSupported(reason.into()));
            }
            let notes = uppers.notes().map_err(|error| own("open the session's folder", &error))?;
            let (since, shut) = (uppers.since(), visit.shut());
            Ok(Arc::new(OverlaysVisit { hold: Hold::Live { visit, uppers, layers }, since, notes, shut }))
        })
        .await
    }

    /// Waits until the session's files are nobody else's business, and keeps them so.
    pub(super) async fn be_alone(
        &self,
        visit: &FilesVisit,
        wait: bool,
        renews: bool,
    ) -> Result<Alone, FilesError> {
        let busy = |what: &str| FilesError::Busy(format!("{what}; nothing was done"));
        let mut shut = visit.shut();
        let leave = async { drop(shut.wait_for(|shut| *shut).await) };
        let get = async {
            if !wait && self.is_running() {
                return Err(busy("a run is going on"));
            }
            let (answer, answered) = oneshot::channel();
            self.queue.send(Order::Rest { answer, renews }).await.map_err(|_| visit.dead())?;
            let rest = answered.await.map_err(|_| visit.dead())?;
            // Last, since nobody can change files while this is waited for.
            let changes = if wait {
                self.hold_changes().await
            } else {
                self.try_hold_changes().ok_or_else(|| busy("files are being changed"))?
            };
            Ok((changes, rest))
        };
        let (changes, rest) = tokio::select! {
            biased;
            () = leave => return Err(visit.dead()),
            got = get => got?,
        };
        let inside = visit.inside();
        let frozen = match inside.cgroup.clone() {
            Some(cgroup) => {
                let frozen = blocking(move || Ok(cgroup.freeze_leaves())).await?;
                Some(frozen.map_err(|_| busy("processes that earlier runs have left do not come to rest"))?)
            }
            None if rest.has_stragglers || self.runs.background_running() > 0 => {
                return Err(busy("processes that earlier runs have left cannot be held up on this machine"));
            }
            None => None,
        };
        Ok(Alone { frozen, rest, _changes: changes })
    }

    /// Lets nothing be written to the overlays any more. Who has a file open for writing is killed.
    pub(super) async fn seal(self: &Arc<Self>, why: String) {
        if self.is_sealed() {
            return;
        }
        let Ok(visit) = self.visit_files(Purpose::Watch).await else { return };
        let session = Arc::clone(self);
        let sealed = blocking(move || Ok(seal(visit.inside(), &|| session.note_writers_killed()))).await;
        match sealed {
            Ok(Ok(())) => {
                tracing::warn!(session = %self.id, why, "the overlays of a session are read-only from now on");
                self.note_sealed(Some(why));
            }
            Ok(Err(error)) => {
                tracing::warn!(session = %self.id, why, %error, "a session cannot be kept from writing; tried again");
            }
            // It ends.
            Err(_) => {}
        }
    }
}

fn seal(inside: &Inside, note_killed: &dyn Fn()) -> Result<(), LaunchError> {
    let dests = inside.uppers.as_ref().map(|uppers| uppers.dests()).unwrap_or_default();
    let cgroup = inside.cgroup.as_deref();
    // If it cannot be held up it has to be faster than the look at its files.
    let frozen = cgroup.and_then(|cgroup| cgroup.freeze_leaves().ok());
    let mut sealed = inside.sandbox.seal(&dests);
    if sealed.is_err() {
        // Files that are open for writing keep a mount writable.
        note_killed();
        match cgroup {
            Some(cgroup) => cgroup.kill_leaves(),
            // Who has them open cannot be told from others.
            None => inside.sandbox.kill(),
        }
        drop(frozen);
        let deadline = Instant::now() + SEAL_WAIT_MAX;
        while sealed.is_err() && Instant::now() < deadline {
            std::thread::sleep(SEAL_INTERVAL);
            sealed = inside.sandbox.seal(&dests);
        }
    }
    sealed
}

/// Goes to overlays that are kept.
///
/// # Errors
/// What goes wrong, above all a lower that is gone.
pub async fn visit_kept(retained: Arc<Retained>) -> Result<Arc<OverlaysVisit>, FilesError> {
    blocking(move || {
        let reading = retained.read().ok_or_else(in_use)?;
        let layers = retained.layers().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                FileError::refused(error.to_string(), Class::NotFound, "make the folder again first").into()
            }
            _ => own("open the layers", &error),
        })?;
        let notes = layers.folder.try_clone().map_err(|error| own("open the session's folder", &error))?;
        let since = retained.record().since;
        let (never, shut) = watch::channel(false);
        drop(reading);
        let hold = Hold::Kept { retained, layers, _never: never };
        Ok(Arc::new(OverlaysVisit { hold, since, notes, shut }))
    })
    .await
}

impl OverlaysVisit {
    /// The overlays, in the order in which they were asked for.
    pub fn layers(&self) -> &[Layer] {
        match &self.hold {
            Hold::Live { layers, .. } => layers,
            Hold::Kept { layers, .. } => &layers.layers,
        }
    }

    /// Says when the session ends.
    pub fn shut(&self) -> watch::Receiver<bool> {
        self.shut.clone()
    }

    /// Which overlays these paths are about, and what of each; all of everything, when there are none.
    ///
    /// # Errors
    /// For a path that lies in none of them.
    pub fn parts(&self, paths: &[String]) -> Result<Vec<Part<'_>>, FileError> {
        parts(self.layers(), paths)
    }

    /// Has a thread do something for as long as somebody waits for it and the session lives.
    ///
    /// # Errors
    /// What `work` fails with.
    pub async fn perform<T, F>(self: &Arc<Self>, work: F) -> Result<T, FilesError>
    where
        T: Send + 'static,
        F: FnOnce(&Self, &GoOn<'_>) -> Result<T, FileError> + Send + 'static,
    {
        let given_up = Arc::new(AtomicBool::new(false));
        let _give_up = GiveUp(Arc::clone(&given_up));
        let visit = Arc::clone(self);
        blocking(move || {
            // Nobody removes what is kept meanwhile.
            let _reading = match &visit.hold {
                Hold::Kept { retained, .. } => Some(retained.read().ok_or_else(in_use)?),
                Hold::Live { .. } => None,
            };
            let go_on = || {
                let is_over = given_up.load(Ordering::Relaxed) || *visit.shut.borrow();
                if is_over { Err(FileError::Cancelled) } else { Ok(()) }
            };
            Ok(work(&visit, &go_on)?)
        })
        .await
    }

    /// Makes the lowers what the session sees. Once begun it goes on to its end even if nobody waits for it.
    ///
    /// # Errors
    /// [`FilesError::Busy`], [`crate::files::Class::Conflict`], and what goes wrong; the same commit can be tried again then.
    pub async fn commit(self: Arc<Self>, options: CommitOptions) -> Result<CommitReport, FilesError> {
        let alone = match &self.hold {
            Hold::Live { visit, .. } => {
                check_reset(visit.inside(), &options)?;
                Some(visit.session().be_alone(visit, options.wait, options.reset).await?)
            }
            Hold::Kept { .. } if options.reset => {
                let reason = "the session has ended, and nothing of it can begin anew";
                return Err(FileError::invalid("reset_upper_after", reason).into());
            }
            Hold::Kept { .. } => None,
        };
        // From here on nothing cancels it.
        blocking(move || match (&self.hold, alone) {
            (Hold::Live { visit, uppers, .. }, Some(alone)) if options.reset => {
                if !alone.is_shell_alone(visit.inside()) {
                    let reason = "processes of background runs, or left by others, live in the overlays; nothing was done";
                    return Err(FilesError::Busy(reason.into()));
                }
                let report = self.commit_now(&options)?;
                reset(visit, uppers)?;
                alone.renew_shell();
                Ok(report)
            }
            (_, alone) => {
                let done = self.commit_now(&options);
                drop(alone);
                done
            }
        })
        .await
    }

    fn commit_now(&self, options: &CommitOptions) -> Result<CommitReport, FilesError> {
        let _alone = match &self.hold {
            Hold::Kept { retained, .. } => Some(retained.write().ok_or_else(in_use)?),
            Hold::Live { .. } => None,
        };
        let parts = self.parts(&options.paths)?;
        self.apply(&parts, options)
    }

    fn note(&self, is_going_on: bool) -> Result<(), FilesError> {
        match &self.hold {
            Hold::Live { uppers, .. } => {
                uppers.note_commit(is_going_on).map_err(|error| own("note the commit", &error))
            }
            Hold::Kept { retained, .. } => {
                retained.note_commit(is_going_on).map_err(|error| own("note the commit", &error))
            }
        }
    }

    fn apply(&self, parts: &[Part<'_>], options: &CommitOptions) -> Result<CommitReport, FilesError> {
        // Whoever waits for the session's end waits for this, too: half a commit would be worse.
        let go_on = || Ok(());
        let mut journals = Vec::new();
        for part in parts {
            let journal = Journal::open(self.notes.as_fd(), &format!("commit-{}", part.index))?;
            let options = part.options(options);
            if options.on_conflict == OnConflict::Fail {
                commit::refuse(&commit::conflicts(part.layer, &options, self.since, &journal, &go_on)?)?;
            }
            journals.push((journal, options));
        }
        self.note(true)?;
        let mut report = CommitReport::default();
        for (part, (mut journal, options)) in parts.iter().zip(journals) {
            let outcome = commit::apply(part.layer, &options, self.since, &mut journal, &go_on)?;
            report.applied += outcome.applied;
            report.bytes += outcome.bytes;
            report.fsync_us += outcome.fsync_us;
            report.skipped_count += outcome.skipped.count;
            report.skipped.extend(outcome.skipped.first);
        }
        self.note(false)?;
        Ok(report)
    }
}

/// Whether the overlays of a session can begin anew at all.
fn check_reset(inside: &Inside, options: &CommitOptions) -> Result<(), FilesError> {
    if !options.reset {
        return Ok(());
    }
    if !options.paths.is_empty() || options.conflicts == OnConflict::Skip {
        let reason = "commits everything, so it goes with neither paths nor skip";
        return Err(FileError::invalid("reset_upper_after", reason).into());
    }
    let overlays = inside.uppers.as_ref().map_or(0, |uppers| uppers.count());
    let replaceable = inside.late_mounts.iter().filter(|step| is_overlay(step)).count();
    if overlays != replaceable {
        let reason = "overlays of the root, of /tmp and in user namespaces cannot begin anew";
        return Err(FilesError::NotSupported(reason.into()));
    }
    Ok(())
}

fn is_overlay(step: &MountStep) -> bool {
    matches!(step, MountStep::Overlay { .. })
}

/// Has the overlays begin anew. The session's shell is still in the old ones.
fn reset(visit: &FilesVisit, uppers: &SessionUppers) -> Result<(), FilesError> {
    let inside = visit.inside();
    let renewal = uppers.renew().map_err(|error| own("make new uppers", &error))?;
    let renewed = |step: &MountStep| match step {
        MountStep::Overlay { lower, dest, .. } => {
            let upper = uppers.index_of(dest).and_then(|index| renewal.upper(index));
            let upper = upper.ok_or_else(|| own("make new uppers", &io::ErrorKind::NotFound.into()))?;
            Ok(MountStep::Overlay { lower: lower.clone(), upper, dest: dest.clone() })
        }
        other => Ok(other.clone()),
    };
    let mounts = inside.late_mounts.iter().map(renewed).collect::<Result<Vec<_>, FilesError>>()?;
    match inside.sandbox.replace(&mounts) {
        Ok(()) => {
            uppers.adopt(renewal)?;
            visit.session().note_sealed(None);
            Ok(())
        }
        Err(ReplaceError::Unchanged(error)) => Err(FilesError::Busy(format!(
            "everything is committed, but the overlays stay as they are: {error}"
        ))),
        Err(ReplaceError::Broken(error)) => {
            // Without its mounts it would see what is not for it.
            inside.sandbox.kill();
            Err(FileError::Own(format!("everything is committed, but the session is lost: {error}")).into())
        }
    }
}

/// What of one overlay is meant.
#[derive(Debug)]
pub struct Part<'a> {
    /// The overlay.
    pub layer: &'a Layer,
    /// Which of them it is.
    pub index: usize,
    /// Paths below its root; none for all of it.
    pub only: Vec<Vec<u8>>,
}

impl Part<'_> {
    fn options(&self, options: &CommitOptions) -> commit::Options {
        commit::Options {
            only: self.only.clone(),
            on_conflict: options.conflicts,
            keep_privileges: options.keep_privileges,
        }
    }
}

fn parts<'a>(layers: &'a [Layer], paths: &[String]) -> Result<Vec<Part<'a>>, FileError> {
    let mut all: Vec<Part<'a>> =
        layers.iter().enumerate().map(|(index, layer)| Part { layer, index, only: Vec::new() }).collect();
    if paths.is_empty() {
        return Ok(all);
    }
    let mut is_whole = vec![false; all.len()];
    for text in paths {
        let path = absolute(layers, text)?;
        // The deepest overlay hides those above it.
        let holds = all.iter_mut().filter(|part| path.starts_with(&part.layer.dest));
        let part = holds.max_by_key(|part| part.layer.dest.components().count());
        let part = part.ok_or_else(|| FileError::invalid(&path, "lies in no overlay of the session"))?;
        let below = path.strip_prefix(&part.layer.dest).unwrap_or(Path::new("")).as_os_str().as_bytes();
        match is_whole.get_mut(part.index) {
            Some(is_whole) if below.is_empty() => *is_whole = true,
            _ => part.only.push(below.to_vec()),
        }
    }
    all.retain(|part| !part.only.is_empty() || is_whole.get(part.index) == Some(&true));
    for part in &mut all {
        if is_whole.get(part.index) == Some(&true) {
            part.only.clear();
        }
    }
    Ok(all)
}

/// A path as a caller writes it; relative ones begin in the first overlay.
fn absolute(layers: &[Layer], text: &str) -> Result<PathBuf, FileError> {
    let trimmed = if text.len() > 1 { text.trim_end_matches('/') } else { text };
    let first = layers.first().map_or(Path::new("/"), |layer| &layer.dest);
    let path = first.join(trimmed);
    match path.to_str() {
        Some(clean) if is_clean(clean) && !trimmed.is_empty() => Ok(path),
        _ => Err(FileError::invalid(text, "must be a path without '.', '..' and doubled '/'")),
    }
}

pub(super) fn no_overlays() -> FilesError {
    FileError::invalid("/", "the session has no overlays, so nothing is kept apart").into()
}

fn in_use() -> FilesError {
    FilesError::Busy("the uppers are in use by somebody else, or being removed; nothing was done".into())
}

fn own(what: &str, error: &io::Error) -> FilesError {
    FileError::Own(format!("{what}: {error}")).into()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FilesError> + Send + 'static,
) -> Result<T, FilesError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| FileError::Own(format!("work in overlays broke down: {error}")))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::layer::Marks;

    fn layer(dest: &str) -> Layer {
        let dir = || std::fs::File::open("/").unwrap().into();
        Layer { dest: dest.into(), upper: dir(), lower: dir(), marks: Marks::Trusted }
    }

    #[test]
    fn paths_choose_overlays_and_what_of_them() {
        let layers = [layer("/w"), layer("/w/inner"), layer("/o")];
        let chosen = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            let parts = parts(&layers, &paths).map_err(|error| error.to_string())?;
            let text = |below: &Vec<u8>| String::from_utf8_lossy(below).into_owned();
            Ok::<_, String>(
                parts
                    .iter()
                    .map(|part| (part.index, part.only.iter().map(text).collect::<Vec<_>>().join(",")))
                    .collect::<Vec<_>>(),
            )
        };
        let is = |index, only: &str| (index, only.to_owned());
        assert_eq!(chosen(&[]).unwrap(), [is(0, ""), is(1, ""), is(2, "")]);
        assert_eq!(chosen(&["/w/a", "b/c", "/o/"]).unwrap(), [is(0, "a,b/c"), is(2, "")]);
        assert_eq!(chosen(&["/w/inner/x"]).unwrap(), [is(1, "x")]);
        assert_eq!(chosen(&["/w/a", "/w"]).unwrap(), [is(0, "")]);
        for wrong in ["/else", "/w/../etc", "../x", "", "/w//a"] {
            assert!(chosen(&[wrong]).is_err(), "{wrong}");
        }
    }
}
