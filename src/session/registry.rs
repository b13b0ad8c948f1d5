//! All sessions of this execd.

use super::background::Background;
use super::files::{FilesError, Purpose, Workers};
use super::inside::Door;
use super::launchpad::{Launched, Launchpad};
use super::oom::{self, OomWatch};
use super::options::SessionOptions;
use super::prepare::{Foundation, PrepareError, Prepared, prepare};
use super::probe::Report;
use super::run::Runs;
use super::session::{Life, Session, SessionId};
use super::shell::ShellError;
use super::spares::Spares;
use super::state::State;
use super::task::Task;
use crate::files::FileError;
use crate::sandbox::spec::SandboxSpec;
use crate::session::options::UidMode;
use crate::session::probe::Feature;
use crate::workspace::session_uppers::SessionUppers;
use execd_init_shim::messages::MountStep;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;

/// How long a delete waits for the session's task.
const DELETE_WAIT_MAX: Duration = Duration::from_secs(15);

/// Between two looks for sessions that hold more than they may.
const EXCESS_INTERVAL: Duration = Duration::from_millis(500);

/// All sessions, and what they are made from.
#[derive(Debug)]
pub struct Registry {
    foundation: Arc<Foundation>,
    launchpad: Arc<Launchpad>,
    spares: Arc<Spares>,
    report: Report,
    sessions: Mutex<HashMap<SessionId, Entry>>,
    /// Sessions that exist or are being created.
    taken: AtomicUsize,
    oom: OomWatch,
}

#[derive(Debug, Clone)]
struct Entry {
    session: Arc<Session>,
    /// Closed when the session's task has ended.
    gone: watch::Receiver<()>,
}

/// Why a session is not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// This machine cannot isolate at all.
    #[error("isolation unavailable: {0}")]
    Unavailable(String),
    /// It cannot do what was asked.
    #[error("{0}")]
    NotSupported(String),
    /// As many exist as may.
    #[error("{0} sessions exist already")]
    TooMany(usize),
    /// The request.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The sandbox or its shell.
    #[error(transparent)]
    Shell(#[from] ShellError),
    /// The copy of another session's changes.
    #[error("copy the changes")]
    Copy(#[source] FileError),
    /// The daemon's own side.
    #[error("create the session")]
    Io(#[from] std::io::Error),
}

/// Why a session is not forked.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The session that is to be copied.
    #[error(transparent)]
    Source(#[from] FilesError),
    /// The copy.
    #[error(transparent)]
    Create(#[from] CreateError),
}

/// Why a session is not deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    /// There is none of that name.
    #[error("no such session")]
    Unknown,
    /// Its processes do not end; it stays listed.
    #[error("the session did not end in time; it stays listed")]
    Stuck,
}

/// Gives a place back when a creation fails or a session ends.
struct Place(Arc<Registry>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Registry {
    /// An empty registry.
    ///
    /// # Errors
    /// `EAGAIN` when no thread can be started.
    pub fn new(
        foundation: Arc<Foundation>,
        launchpad: Launchpad,
        report: Report,
    ) -> std::io::Result<Arc<Self>> {
        let launchpad = Arc::new(launchpad);
        let spares = Spares::new(Arc::clone(&launchpad), foundation.config.session.spares)?;
        Ok(Arc::new(Self {
            foundation,
            launchpad,
            spares,
            report,
            sessions: Mutex::default(),
            taken: AtomicUsize::new(0),
            oom: OomWatch::new(),
        }))
    }

    /// Looks now and then whether the kernel kills for lack of memory; ends with the registry.
    pub async fn watch_memory(registry: Weak<Self>) {
        while let Some(registry) = registry.upgrade() {
            registry.oom.look();
            drop(registry);
            tokio::time::sleep(oom::LOOK_INTERVAL).await;
        }
    }

    /// Keeps sessions from writing that hold more than they may, where the kernel does not; ends with the registry.
    pub async fn watch_uppers(registry: Weak<Self>) {
        while let Some(registry) = registry.upgrade() {
            let uppers = registry.foundation.uppers.clone();
            let total_max = registry.foundation.config.upper_max_bytes;
            let excesses = uppers.map(|uppers| uppers.excesses(total_max)).unwrap_or_default();
            for (id, excess) in excesses {
                if let Some(session) = registry.get(SessionId(id)) {
                    session.seal(excess.to_string()).await;
                }
            }
            drop(registry);
            tokio::time::sleep(EXCESS_INTERVAL).await;
        }
    }

    pub(super) fn oom_struck_since(&self, then: std::time::Instant) -> bool {
        self.oom.struck_since(then)
    }

    /// What this machine can do.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What sessions are made from.
    pub fn foundation(&self) -> &Foundation {
        &self.foundation
    }

    /// Creates a session and waits until its shell answers.
    ///
    /// # Errors
    /// See [`CreateError`]; nothing is left behind.
    pub async fn create(self: &Arc<Self>, options: SessionOptions) -> Result<Arc<Session>, CreateError> {
        self.create_from(options, None).await
    }

    /// Creates a session like another one, whose overlays begin as that one has left them.
    ///
    /// # Errors
    /// See [`ForkError`]; nothing is left behind.
    pub async fn fork(
        self: &Arc<Self>,
        source: &Arc<Session>,
        wait: bool,
    ) -> Result<Arc<Session>, ForkError> {
        let visit = source.visit_files(Purpose::Use).await?;
        let uppers = visit.inside().uppers.clone();
        let uppers = uppers.ok_or_else(super::overlays::no_overlays)?;
        if !uppers.are_reachable() {
            let reason = "the uppers of this session lie in its own user namespace, out of reach";
            return Err(FilesError::NotSupported(reason.into()).into());
        }
        // It stays as it is until the copy is complete.
        let alone = source.be_alone(&visit, wait, false).await?;
        let created = self.create_from(source.options.clone(), Some(uppers)).await;
        drop(alone);
        Ok(created?)
    }

    async fn create_from(
        self: &Arc<Self>,
        options: SessionOptions,
        source: Option<Arc<SessionUppers>>,
    ) -> Result<Arc<Session>, CreateError> {
        self.check_supported(&options)?;
        let place = self.take_place()?;
        let id = SessionId(Uuid::new_v4());
        let registry = Arc::clone(self);
        let built = tokio::task::spawn_blocking(move || {
            let built = registry.build(id, &options, source.as_deref());
            registry.spares.refill();
            registry.foundation.uppers.iter().for_each(|uppers| uppers.refill());
            built
        });
        let built = built.await;
        let built = built.map_err(std::io::Error::other)??;
        self.admit(id, built, place)
    }

    /// The session of that name.
    pub fn get(&self, id: SessionId) -> Option<Arc<Session>> {
        self.sessions().get(&id).map(|entry| Arc::clone(&entry.session))
    }

    /// All sessions, oldest first.
    pub fn list(&self) -> Vec<Arc<Session>> {
        let mut all: Vec<_> = self.sessions().values().map(|entry| Arc::clone(&entry.session)).collect();
        all.sort_by_key(|session| (session.created_at, session.id));
        all
    }

    /// Ends a session and waits until nothing of it is left.
    ///
    /// # Errors
    /// See [`DeleteError`].
    pub async fn delete(&self, id: SessionId) -> Result<(), DeleteError> {
        let entry = self.sessions().get(&id).cloned().ok_or(DeleteError::Unknown)?;
        entry.session.stop();
        wait_gone(entry.gone, DELETE_WAIT_MAX).await
    }

    /// Ends all sessions, for at most `timeout`.
    pub async fn shut_down(&self, timeout: Duration) {
        let entries: Vec<Entry> = self.sessions().values().cloned().collect();
        for entry in &entries {
            entry.session.stop();
        }
        let spares = Arc::clone(&self.spares);
        let spares_gone = tokio::task::spawn_blocking(move || spares.stop());
        let deadline = Instant::now() + timeout;
        for entry in entries {
            let left = deadline.saturating_duration_since(Instant::now());
            let _ = wait_gone(entry.gone, left).await;
        }
        let _ = tokio::time::timeout_at(deadline, spares_gone).await;
    }

    pub(super) fn forget(&self, id: SessionId) {
        self.sessions().remove(&id);
    }

    pub(super) fn launcher_is_lost(&self, generation: u64) -> bool {
        self.launchpad.launcher.is_lost(generation)
    }

    fn check_supported(&self, options: &SessionOptions) -> Result<(), CreateError> {
        options.check().map_err(PrepareError::Invalid)?;
        let report = &self.report;
        if !report.available() {
            return Err(CreateError::Unavailable(report.why_not(Feature::Setpriv).into()));
        }
        let need = |feature: Feature, what: &str| {
            if report.can(feature) {
                return Ok(());
            }
            Err(CreateError::NotSupported(format!("{what} is not available: {}", report.why_not(feature))))
        };
        match options.uid_mode {
            UidMode::Userns => need(Feature::Userns, "uid_mode userns")?,
            UidMode::Setpriv => {
                need(Feature::Setpriv, "uid_mode setpriv")?;
                if options.uid.is_some_and(|uid| uid != 0) || options.gid.is_some_and(|gid| gid != 0) {
                    need(Feature::IdentitySwitch, "another uid or gid")?;
                }
            }
        }
        Ok(())
    }

    fn take_place(self: &Arc<Self>) -> Result<Place, CreateError> {
        let max = self.foundation.config.session.sessions_max;
        let taken = self.taken.fetch_add(1, Ordering::AcqRel);
        let place = Place(Arc::clone(self));
        if taken < max { Ok(place) } else { Err(CreateError::TooMany(max)) }
    }

    fn build(
        &self,
        id: SessionId,
        options: &SessionOptions,
        source: Option<&SessionUppers>,
    ) -> Result<Built, CreateError> {
        let name = id.to_string();
        let Prepared { spec, uppers, effective } = prepare(&self.foundation, id.0, options)?;
        if let (Some(uppers), Some(source)) = (&uppers, source) {
            uppers.fill_from(source).map_err(CreateError::Copy)?;
        }
        let workspace = spec.cwd.clone();
        let late_mounts = spec.late_mounts.clone();
        let spare = self.build_from_spare(&spec);
        let from_spare = spare.is_some();
        let mut launched = match spare {
            Some(launched) => launched,
            None => self.launchpad.launch(&name, spec)?,
        };
        launched.resources.uppers = uppers;
        let timings = launched.timings;
        tracing::info!(
            session = %id,
            from_spare,
            clone_us = timings.clone_us,
            assembled_us = timings.assembled_us,
            exec_us = timings.exec_us,
            ready_us = timings.ready_us,
            "session created"
        );
        Ok(Built { launched, effective, workspace, late_mounts })
    }

    /// Makes a session of a spare. One that fails is no reason to fail: the spare may have been hurt while it waited.
    fn build_from_spare(&self, spec: &SandboxSpec) -> Option<Launched> {
        let mut spare = self.spares.take(spec)?;
        let fitted = spare
            .resources
            .sandbox
            .attach(&spec.late_mounts)
            .map_err(ShellError::from)
            .and_then(|()| spare.shell.settle(&spec.cwd, self.launchpad.answer_max));
        match fitted {
            Ok(()) => {
                spare.resources.sandbox.start_in(&spec.cwd);
                Some(spare)
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "a spare sandbox did not fit");
                None
            }
        }
    }

    fn admit(
        self: &Arc<Self>,
        id: SessionId,
        built: Built,
        place: Place,
    ) -> Result<Arc<Session>, CreateError> {
        let Built { launched, effective, workspace, late_mounts } = built;
        let Launched { mut shell, resources, generation, .. } = launched;
        shell.io = shell.io.register()?;
        resources.uppers.iter().for_each(|uppers| uppers.taken_into_use());
        let config = self.foundation.config.session.clone();
        let (queue, queue_receiver) = mpsc::channel(config.waiting_runs_max);
        let (asks, asks_receiver) = mpsc::channel(1);
        let (stop, stop_receiver) = watch::channel(false);
        let (alive, gone) = watch::channel(());
        let now = SystemTime::now();
        let life = Life {
            state: State::Active,
            last_run_at: now,
            idle_since: Instant::now(),
            running: false,
            sealed: None,
            writers_killed: None,
        };
        let session = Arc::new(Session {
            id,
            options: effective.clone(),
            created_at: now,
            registry: Arc::downgrade(self),
            launcher_generation: generation,
            runs: Runs::default(),
            run_buffer_bytes_max: config.run_buffer_max_bytes,
            queue,
            background: Background::new(asks),
            door: Door::new(shell.inside(workspace, resources.uppers.clone(), late_mounts)),
            workers: Workers::default(),
            stop,
            life: Mutex::new(life),
            uppers: resources.uppers.as_ref().map(Arc::downgrade).unwrap_or_default(),
        });
        let task = Task {
            session: Arc::clone(&session),
            config,
            options: effective,
            shell: Some(shell),
            resources: Some(resources),
            queue: queue_receiver,
            asks: asks_receiver,
            stop: stop_receiver,
            ask_at: None,
        };
        self.sessions().insert(id, Entry { session: Arc::clone(&session), gone });
        tokio::spawn(async move {
            task.live().await;
            drop(place);
            drop(alive);
        });
        Ok(session)
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that is built and not yet listed. Dropping it releases everything.
struct Built {
    launched: Launched,
    effective: SessionOptions,
    /// Where relative paths begin.
    workspace: PathBuf,
    /// What was attached last.
    late_mounts: Vec<MountStep>,
}

async fn wait_gone(mut gone: watch::Receiver<()>, timeout: Duration) -> Result<(), DeleteError> {
    // The sender is never used, only dropped.
    match tokio::time::timeout(timeout, gone.changed()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(DeleteError::Stuck),
    }
}
