//! What a session has changed: `GET diff`, `POST commit`, `POST fork`; and the uppers of sessions that have ended,
//! `/v1/isolated/uppers`, which can be diffed and committed as well.
//!
//! `diff` and `commit` by a session's own route also find its uppers once it has ended, so whoever asked for them to be
//! kept need not know when that was.

use super::App;
use super::archive::{PIECES_AHEAD, PieceWriter};
use super::download::{disposition, stream};
use super::dto::{CreateResponse, UpperResponse, UppersResponse};
use super::error::ApiError;
use super::files::{List, Pairs, value, values};
use super::isolated::{find, session_id};
use super::json::OptionalJson;
use crate::files::{Class, FileError};
use crate::session::files::{FilesError, Piece};
use crate::session::options::OptionError;
use crate::session::overlays::{CommitOptions, CommitReport, OverlaysVisit, visit_kept};
use crate::session::registry::ForkError;
use crate::workspace::changes::Changes;
use crate::workspace::commit::OnConflict;
use crate::workspace::diff;
use crate::workspace::retained::Retained;
use axum::Router;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tokio::sync::mpsc;

/// The most paths of one request.
const PATHS_MAX: usize = 1000;

/// All of them.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/isolated/session/{id}/diff", get(diff))
        .route("/v1/isolated/session/{id}/commit", post(commit))
        .route("/v1/isolated/session/{id}/fork", post(fork))
        .route("/v1/isolated/uppers", get(list))
        .route("/v1/isolated/uppers/{id}", get(show).delete(remove))
        .route("/v1/isolated/uppers/{id}/diff", get(diff))
        .route("/v1/isolated/uppers/{id}/commit", post(commit))
}

/// The overlays of a session, or what is left of one.
async fn visit(app: &App, id: &str) -> Result<Arc<OverlaysVisit>, ApiError> {
    if let Some(session) = app.registry.get(session_id(id)?) {
        match session.visit_overlays().await {
            Err(FilesError::Dead(_)) if retained(app, id).is_ok() => {}
            visited => return Ok(visited?),
        }
    }
    let retained = retained(app, id).map_err(|_| ApiError::NoSession(id.to_owned()))?;
    Ok(visit_kept(retained).await?)
}

fn retained(app: &App, id: &str) -> Result<Arc<Retained>, ApiError> {
    let session = session_id(id)?;
    let uppers = app.registry.foundation().uppers.as_ref();
    uppers.and_then(|uppers| uppers.retained_of(session.0)).ok_or_else(|| ApiError::NoUppers(id.to_owned()))
}

/// The changes, as a layer or as a list.
async fn diff(State(app): State<App>, Path(id): Path<String>, query: Pairs) -> Result<Response, ApiError> {
    #[derive(Clone, Copy)]
    enum Format {
        Tar,
        Json,
    }
    let format = match value(&query, "format") {
        None | Some("" | "tar" | "tar.gz") => Format::Tar,
        Some("json") => Format::Json,
        Some(other) => {
            return Err(OptionError::new("format", format!("{other:?} is none of tar, json")).into());
        }
    };
    let visit = visit(&app, &id).await?;
    let paths = paths(values(query, "path")?)?;
    match format {
        Format::Tar => layer(&app, &id, visit, paths).await,
        Format::Json => Ok(changes(&visit, paths).await?.into_response()),
    }
}

fn paths(paths: Vec<String>) -> Result<Vec<String>, ApiError> {
    if paths.len() > PATHS_MAX {
        return Err(OptionError::new("path", format!("at most {PATHS_MAX} of them")).into());
    }
    Ok(paths)
}

async fn changes(visit: &Arc<OverlaysVisit>, paths: Vec<String>) -> Result<List, ApiError> {
    let listed = visit.perform(move |visit, go_on| {
        let mut list = List::new();
        for part in visit.parts(&paths)? {
            let mut changes = Changes::new(part.layer, &part.only)?;
            while let Some(change) = changes.next(go_on) {
                if let Some(listed) = change?.listed(part.layer) {
                    list.push(&listed.path, &listed)?;
                }
            }
        }
        Ok(list)
    });
    Ok(listed.await?)
}

/// A layer is that of one overlay, whose root its names begin at.
async fn layer(
    app: &App,
    id: &str,
    visit: Arc<OverlaysVisit>,
    paths: Vec<String>,
) -> Result<Response, ApiError> {
    let bytes_max = app.registry.foundation().config.diff_max_bytes;
    let measured = paths.clone();
    // Whatever can be known before the head of the answer is sent should be in it.
    let measure = visit.perform(move |visit, go_on| {
        let parts = visit.parts(&measured)?;
        let [part] = parts.as_slice() else {
            let all: Vec<String> = parts.iter().map(|part| part.layer.dest.display().to_string()).collect();
            let reason = format!("a layer is that of one overlay; choose one of {} by path", all.join(", "));
            return Err(FileError::invalid("path", reason));
        };
        let measure = diff::measure(part.layer, &part.only, go_on)?;
        if bytes_max > 0 && measure.bytes > bytes_max {
            let reason =
                format!("the changes take {} bytes, and diff_max_bytes is {bytes_max}", measure.bytes);
            return Err(FileError::refused(&part.layer.dest, Class::TooLarge, reason));
        }
        Ok(())
    });
    measure.await?;
    let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
    tokio::spawn(async move {
        let (shut, to) = (visit.shut(), sender.clone());
        let written = visit.perform(move |visit, go_on| {
            let mut writer = PieceWriter::new(shut, to);
            for part in visit.parts(&paths)? {
                diff::write(part.layer, &part.only, &mut writer, go_on)?;
            }
            // An error has been noticed by whoever would read it.
            let _ = writer.pass_on();
            Ok(())
        });
        let last = written.await.map_or_else(Piece::Failed, |()| Piece::End);
        let _ = sender.send_timeout(last, super::upload::SILENCE_MAX).await;
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/gzip")),
        (header::CONTENT_DISPOSITION, disposition(&format!("{id}.tar.gz"))),
    ];
    Ok((headers, stream(pieces)).into_response())
}

/// `POST commit`. A field that is not known is refused, since a misspelt `dry_run` would write.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CommitRequest {
    paths: Option<Vec<String>>,
    dry_run: Option<bool>,
    on_conflict: Option<String>,
    allow_privileged: Option<bool>,
    wait: Option<bool>,
    reset_upper_after: Option<bool>,
}

/// Its answer.
#[derive(Debug, Serialize)]
struct CommitResponse {
    session_id: String,
    #[serde(flatten)]
    report: CommitReport,
}

async fn commit(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let visit = visit(&app, &id).await?;
    let OptionalJson(request) = OptionalJson::from_request(request, &app).await?;
    let CommitRequest { paths: given, dry_run, on_conflict, allow_privileged, wait, reset_upper_after } =
        request;
    let options = CommitOptions {
        paths: paths(given.unwrap_or_default())?,
        conflicts: conflicts(on_conflict.as_deref())?,
        keep_privileges: allow_privileged.unwrap_or(false),
        wait: wait.unwrap_or(true),
        reset: reset_upper_after.unwrap_or(false),
    };
    if dry_run.unwrap_or(false) {
        return Ok(changes(&visit, options.paths).await?.into_response());
    }
    let report = visit.commit(options).await?;
    tracing::info!(session = id, applied = report.applied, bytes = report.bytes, "committed");
    Ok(axum::Json(CommitResponse { session_id: id, report }).into_response())
}

fn conflicts(given: Option<&str>) -> Result<OnConflict, OptionError> {
    match given.filter(|given| !given.is_empty()) {
        None | Some("fail") => Ok(OnConflict::Fail),
        Some("overwrite") => Ok(OnConflict::Overwrite),
        Some("skip") => Ok(OnConflict::Skip),
        Some(other) => {
            Err(OptionError::new("on_conflict", format!("{other:?} is none of overwrite, skip, fail")))
        }
    }
}

/// `POST fork`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ForkRequest {
    wait: Option<bool>,
}

async fn fork(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<impl IntoResponse, ApiError> {
    let source = find(&app, &id)?;
    let OptionalJson(ForkRequest { wait }) = OptionalJson::from_request(request, &app).await?;
    let forked = app.registry.fork(&source, wait.unwrap_or(true)).await;
    let session = forked.map_err(|error| match error {
        ForkError::Source(error) => ApiError::Files(error),
        ForkError::Create(error) => ApiError::Create(error),
    })?;
    Ok((StatusCode::CREATED, axum::Json(CreateResponse::from(&*session))))
}

async fn list(State(app): State<App>) -> impl IntoResponse {
    let uppers = app.registry.foundation().uppers.as_ref();
    let uppers = uppers.map(|uppers| uppers.retained()).unwrap_or_default();
    described(uppers).await.map(|uppers| axum::Json(UppersResponse { uppers }))
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<impl IntoResponse, ApiError> {
    let mut described = described(vec![retained(&app, &id)?]).await?;
    described.pop().map(axum::Json).ok_or(ApiError::NoUppers(id))
}

/// Finding out what they hold is a look at the disk.
async fn described(uppers: Vec<Arc<Retained>>) -> Result<Vec<UpperResponse>, ApiError> {
    let described =
        tokio::task::spawn_blocking(move || uppers.iter().map(|retained| (&**retained).into()).collect());
    Ok(described.await.map_err(|error| FileError::Own(format!("a look at uppers broke down: {error}")))?)
}

async fn remove(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let retained = retained(&app, &id)?;
    let removed = tokio::task::spawn_blocking(move || {
        let uppers = app.registry.foundation().uppers.as_ref();
        uppers.map_or(Ok(()), |uppers| uppers.remove(&retained))
    });
    removed.await.map_err(|error| FileError::Own(format!("removing uppers broke down: {error}")))??;
    Ok(StatusCode::OK)
}
