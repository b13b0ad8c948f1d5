//! `GET files/watch`: what happens to files, as a stream of frames like that of a run: one JSON object, then two
//! newlines. `init` comes first, once everything is watched; `ping` while nothing happens; `end` last, if the session or
//! what is watched ends before the client does.

use super::App;
use super::error::ApiError;
use super::events;
use super::files::{Pairs, required, visit};
use super::runs::ping_interval;
use crate::files::watch::{Change, ChangeKind, Watch};
use crate::session::files::{FilesError, FilesVisit, Purpose};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use rustix::fd::{AsFd, OwnedFd};
use serde::Serialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// How long changes are gathered: most come in groups, and the two halves of a move belong together.
const GATHER: Duration = Duration::from_millis(10);
/// Chunks of frames that are ready before the client has taken the one before.
const CHUNKS_AHEAD: usize = 2;

/// The handler.
pub(super) async fn watch(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let visit = visit(&app, &id, Purpose::Watch).await?;
    let path = required(&query, "path")?;
    let watch = visit.perform(move |worker| worker.watch(&path)).await?;
    // A descriptor of its own, since the watch itself moves between threads.
    let ready = watch.as_fd().try_clone_to_owned().and_then(execd_sys::watch_readable);
    let ready = ready.map_err(|error| crate::files::FileError::Own(format!("watch: {error}")))?;
    let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
    tokio::spawn(follow(visit, watch, ready, sender));
    let ping = ping_interval(&app);
    let frames = futures_util::stream::unfold(chunks, move |mut chunks| async move {
        let chunk = match tokio::time::timeout(ping, chunks.recv()).await {
            Ok(chunk) => chunk?,
            Err(_) => frame(&Frame::new("ping")),
        };
        Some((Ok::<_, Infallible>(Bytes::from(chunk)), chunks))
    });
    Ok((events::headers(None), Body::from_stream(frames)).into_response())
}

/// Carries changes to the client until either side, or the session, ends.
async fn follow(
    visit: Arc<FilesVisit>,
    mut watch: Watch,
    ready: AsyncFd<OwnedFd>,
    sender: mpsc::Sender<Vec<u8>>,
) {
    let mut chunk = frame(&Frame::new("init"));
    let reason = loop {
        if !chunk.is_empty() {
            let sent = tokio::select! {
                biased;
                () = visit.asked_to_leave() => break "the session has ended".to_owned(),
                sent = sender.send(std::mem::take(&mut chunk)) => sent,
            };
            if sent.is_err() {
                return;
            }
        }
        if watch.has_ended() {
            break "what was watched is gone".to_owned();
        }
        tokio::select! {
            biased;
            () = visit.asked_to_leave() => break "the session has ended".to_owned(),
            () = sender.closed() => return,
            ready = ready.readable() => match ready {
                // What happens from here on makes it ready again.
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => break format!("inotify: {error}"),
            },
        }
        tokio::time::sleep(GATHER).await;
        match read(&visit, watch).await {
            Ok((rest, changes)) => {
                watch = rest;
                for change in &changes {
                    chunk.extend(frame(&Frame::of(change)));
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    // Who has not taken what came before is not waited for.
    let _ = sender.try_send(frame(&Frame { text: Some(&reason), ..Frame::new("end") }));
}

async fn read(visit: &Arc<FilesVisit>, watch: Watch) -> Result<(Watch, Vec<Change>), FilesError> {
    let read = |mut watch: Watch, decide: bool| {
        visit.perform(move |worker| watch.read(worker, decide).map(|changes| (watch, changes)))
    };
    let (mut watch, mut changes) = read(watch, false).await?;
    if watch.is_undecided() {
        tokio::time::sleep(GATHER).await;
        let (rest, more) = read(watch, true).await?;
        watch = rest;
        changes.extend(more);
    }
    Ok((watch, changes))
}

#[derive(Serialize)]
struct Frame<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    /// Where it was before.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_directory: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    /// Milliseconds since the epoch.
    timestamp: u64,
}

impl<'a> Frame<'a> {
    fn new(kind: &'static str) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            kind,
            path: None,
            from: None,
            is_directory: None,
            text: None,
            timestamp: now.as_millis() as u64,
        }
    }

    fn of(change: &'a Change) -> Self {
        let kind = match change.kind {
            ChangeKind::Created => "created",
            ChangeKind::Modified => "modified",
            ChangeKind::Removed => "removed",
            ChangeKind::Moved => "moved",
            ChangeKind::Overflow => "overflow",
        };
        let (path, from) = (Some(change.path.as_str()), change.from.as_deref());
        Self { path, from, is_directory: Some(change.is_directory), ..Self::new(kind) }
    }
}

fn frame(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(frame).unwrap_or_default();
    bytes.extend_from_slice(b"\n\n");
    bytes
}
