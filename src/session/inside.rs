//! The way into a session's sandbox for everybody but its own task: background runs, and whoever works in its files.
//!
//! Whoever is inside holds the sandbox in place, above all its mounts: without them paths would lead into the
//! host's files. So a session that ends first shuts the door, which those inside are told, and releases nothing before
//! the last of them has left.

use super::control::ControlDir;
use super::dialect::Dialect;
use crate::files::Tree;
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::launch::Sandbox;
use crate::workspace::session_uppers::SessionUppers;
use execd_init_shim::messages::MountStep;
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, RwLock, watch};

/// What of a session is needed to work beside its shell.
#[derive(Debug)]
pub(super) struct Inside {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) control: Arc<ControlDir>,
    pub(super) cgroup: Option<Arc<Cgroup>>,
    pub(super) dialect: Dialect,
    pub(super) files: Tree,
    /// Those of its overlays, if it has any.
    pub(super) uppers: Option<Arc<SessionUppers>>,
    /// Mounts that can be replaced, in order; not those that others depend on.
    pub(super) late_mounts: Vec<MountStep>,
}

/// Holds a session's sandbox in place.
pub(super) type Visit = OwnedRwLockReadGuard<Option<Inside>, Inside>;

/// Open while the session lives.
#[derive(Debug)]
pub(super) struct Door {
    inside: Arc<RwLock<Option<Inside>>>,
    shut: watch::Sender<bool>,
}

impl Door {
    pub(super) fn new(inside: Inside) -> Self {
        Self { inside: Arc::new(RwLock::new(Some(inside))), shut: watch::Sender::new(false) }
    }

    /// Goes inside; `None` once the session ends.
    pub(super) async fn enter(&self) -> Option<Visit> {
        let mut shut = self.watch();
        tokio::select! {
            biased;
            // Somebody may take for ever to leave; those who come meanwhile do not wait for that.
            _ = shut.wait_for(|shut| *shut) => None,
            guard = Arc::clone(&self.inside).read_owned() => {
                OwnedRwLockReadGuard::try_map(guard, Option::as_ref).ok()
            }
        }
    }

    /// Tells those inside when they are to leave.
    pub(super) fn watch(&self) -> watch::Receiver<bool> {
        self.shut.subscribe()
    }

    /// Lets nobody in any more, and waits until all have left.
    pub(super) async fn shut(&self) {
        self.shut.send_replace(true);
        drop(self.inside.write().await.take());
    }
}
