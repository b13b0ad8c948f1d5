//! The routes of runs, `/v1/isolated/session/{id}/run…`, and their bodies.

use super::App;
use super::dto::{SECONDS_MAX, rfc3339};
use super::error::ApiError;
use super::events::{self, Failure, ReportFrame};
use super::isolated::find;
use super::json::Json;
use crate::session::dialect::refuse_env_name;
use crate::session::log::Part;
use crate::session::options::OptionError;
use crate::session::run::{End, Run, RunId, RunSpec};
use crate::session::session::{RunRefused, Session};
use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequest, Path, Query, Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use execd_init_shim::messages::ExitStatus;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// The most variables of one run.
const ENVS_MAX: usize = 1024;
/// What is read of a log at once; bytes.
const LOG_PIECE_BYTES: u64 = 256 * 1024;
/// The position behind what was read of a log; bytes.
const TAIL_CURSOR: HeaderName = HeaderName::from_static("execd-isolated-tail-cursor");

/// All of them.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/isolated/session/{id}/run", post(start))
        .route("/v1/isolated/session/{id}/runs", get(list))
        .route("/v1/isolated/session/{id}/runs/{run}", get(show).delete(end))
        .route("/v1/isolated/session/{id}/runs/{run}/events", get(replay))
        .route("/v1/isolated/session/{id}/runs/{run}/logs", get(logs))
}

async fn start(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    // Whether there is such a session comes first, whatever the body is like.
    let session = find(&app, &id)?;
    let Json(request) = Json::<RunRequest>::from_request(request, &app).await?;
    if request.background == Some(true) {
        let log_dir = app.registry.foundation().uppers.as_ref().map(|uppers| uppers.root().to_path_buf());
        let run = session.run_in_background(request.spec()?, log_dir).await?;
        return Ok((StatusCode::ACCEPTED, axum::Json(StartedResponse::new(&session, &run))).into_response());
    }
    match session.run(request.spec()?) {
        Ok(attachment) => Ok(events::respond(attachment, 0, ping_interval(&app)).await),
        Err(error @ RunRefused::Dead(_)) => Ok(events::respond_dead(&error.to_string())),
        Err(error @ RunRefused::TooMany(_)) => Err(error.into()),
    }
}

async fn list(State(app): State<App>, Path(id): Path<String>) -> Result<impl IntoResponse, ApiError> {
    let session = find(&app, &id)?;
    let runs = session.runs.list().iter().map(|run| RunResponse::new(&session, run)).collect();
    Ok(axum::Json(RunsResponse { runs }))
}

async fn show(
    State(app): State<App>,
    Path((id, run)): Path<(String, String)>,
) -> Result<impl IntoResponse, ApiError> {
    let (session, run) = find_run(&app, &id, &run)?;
    Ok(axum::Json(RunResponse::new(&session, &run)))
}

/// Ends a run and everything it started. One that has ended is fine.
async fn end(
    State(app): State<App>,
    Path((id, run)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let (_, run) = find_run(&app, &id, &run)?;
    run.cancel();
    Ok(StatusCode::OK)
}

async fn replay(
    State(app): State<App>,
    Path((id, run)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, ApiError> {
    let (_, run) = find_run(&app, &id, &run)?;
    let after = number(&query, "after")?;
    Ok(events::respond(run.attach(after), after, ping_interval(&app)).await)
}

async fn logs(
    State(app): State<App>,
    Path((id, run)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, ApiError> {
    let (_, run) = find_run(&app, &id, &run)?;
    let cursor = number(&query, "cursor")?;
    let range = run.log.as_ref().ok_or(ApiError::NoLog)?.range(cursor);
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8".to_owned()),
        (TAIL_CURSOR, range.end.to_string()),
    ];
    // A piece at a time: a client that does not read holds no more than that.
    let pieces = futures_util::stream::unfold((run, range), |(run, range)| async move {
        if range.is_empty() {
            return None;
        }
        // A disk may be slow.
        let read = tokio::task::spawn_blocking(move || {
            let part = run
                .log
                .as_ref()
                .map(|log| log.read(range.start, LOG_PIECE_BYTES.min(range.end - range.start)));
            (run, range, part)
        });
        let (run, range, part) = read.await.ok()?;
        match part? {
            Ok(Part { bytes, next }) => Some((Ok(Bytes::from(bytes)), (run, next.min(range.end)..range.end))),
            Err(error) => Some((Err(error), (run, range.end..range.end))),
        }
    });
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// A number in the query; 0 when absent.
fn number(query: &HashMap<String, String>, name: &str) -> Result<u64, OptionError> {
    let Some(text) = query.get(name) else { return Ok(0) };
    text.parse().map_err(|_| OptionError::new(name, format!("{text:?} is no number from 0 on")))
}

pub(super) fn ping_interval(app: &App) -> Duration {
    Duration::from_secs(app.registry.foundation().config.http.ping_interval_seconds)
}

fn find_run(app: &App, id: &str, run: &str) -> Result<(Arc<Session>, Arc<Run>), ApiError> {
    let session = find(app, id)?;
    let id = Uuid::parse_str(run).map(RunId);
    let found = id.ok().and_then(|id| session.runs.get(id));
    let run = found.ok_or_else(|| ApiError::NoRun(run.to_owned()))?;
    Ok((session, run))
}

/// `POST /session/{id}/run`
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct RunRequest {
    code: Option<String>,
    envs: Option<BTreeMap<String, Option<String>>>,
    timeout_seconds: Option<i64>,
    stdin: Option<String>,
    /// Run detached from the request.
    pub background: Option<bool>,
    /// Send pieces of lines as they come.
    partial_output: Option<bool>,
    /// Whether the run ends when nobody reads its events any more; true when absent.
    cancel_on_disconnect: Option<bool>,
}

impl RunRequest {
    /// What is asked for.
    ///
    /// # Errors
    /// Names the field.
    pub fn spec(self) -> Result<RunSpec, OptionError> {
        let code = self.code.filter(|code| !code.is_empty());
        let code = code.ok_or_else(|| OptionError::new("code", "must not be empty"))?;
        if code.contains('\0') {
            return Err(OptionError::new("code", "must not contain a NUL byte"));
        }
        let timeout = match self.timeout_seconds {
            None | Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(
                u64::try_from(seconds)
                    .map_err(|_| OptionError::new("timeout_seconds", "must not be negative"))?
                    .min(SECONDS_MAX),
            )),
        };
        Ok(RunSpec {
            code,
            stdin: self.stdin.map(String::into_bytes),
            envs: envs(self.envs.unwrap_or_default())?,
            timeout,
            partial_output: self.partial_output == Some(true),
            cancel_on_disconnect: self.cancel_on_disconnect != Some(false),
        })
    }
}

fn envs(given: BTreeMap<String, Option<String>>) -> Result<Vec<(String, String)>, OptionError> {
    if given.len() > ENVS_MAX {
        return Err(OptionError::new("envs", format!("at most {ENVS_MAX} variables")));
    }
    let mut envs = Vec::new();
    for (name, value) in given {
        let Some(value) = value else { continue };
        if let Some(reason) = refuse_env_name(&name) {
            return Err(OptionError::new(format!("envs.{name}"), reason));
        }
        if value.contains('\0') {
            return Err(OptionError::new(format!("envs.{name}"), "must not contain a NUL byte"));
        }
        envs.push((name, value));
    }
    Ok(envs)
}

/// Answer of `POST /session/{id}/run` to a background run.
#[derive(Debug, Serialize)]
pub struct StartedResponse {
    session_id: String,
    run_id: String,
    started_at: String,
}

impl StartedResponse {
    /// The handle of a run.
    pub fn new(session: &Session, run: &Run) -> Self {
        Self {
            session_id: session.id.to_string(),
            run_id: run.id.to_string(),
            started_at: rfc3339(run.started_at),
        }
    }
}

/// Answer of `GET /session/{id}/runs`.
#[derive(Debug, Serialize)]
pub struct RunsResponse {
    /// All runs that are kept, oldest first.
    pub runs: Vec<RunResponse>,
}

/// Answer of `GET /session/{id}/runs/{run}`.
#[derive(Debug, Serialize)]
pub struct RunResponse {
    session_id: String,
    run_id: String,
    background: bool,
    running: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    started_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<ReportFrame>,
}

impl RunResponse {
    /// What is known of a run.
    pub fn new(session: &Session, run: &Run) -> Self {
        let outcome = run.outcome();
        let failure = |end: End| match end {
            // The exit code says it all.
            End::Status(_) | End::Exited(ExitStatus::Code(_)) | End::ShellEnded(ExitStatus::Code(_)) => None,
            // As the original has it.
            End::SessionEnded => Some("session terminated".into()),
            end => Failure::of(end).map(|failure| failure.text),
        };
        Self {
            session_id: session.id.to_string(),
            run_id: run.id.to_string(),
            background: run.log.is_some(),
            running: outcome.is_none(),
            exit_code: outcome.and_then(|outcome| outcome.report.end.exit_code()),
            error: outcome.and_then(|outcome| failure(outcome.report.end)),
            started_at: rfc3339(run.started_at),
            finished_at: outcome.map(|outcome| rfc3339(outcome.finished_at)),
            report: outcome.map(|outcome| outcome.report.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::json::decode;

    #[test]
    fn runs() {
        let run = |body: &str| {
            let request: RunRequest = decode(body.as_bytes()).map_err(|error| error.to_string())?;
            request.spec().map_err(|error| error.to_string())
        };
        let spec = run(r#"{"code":"a","envs":{"B":"1","A":null},"timeout_seconds":2,"stdin":"x"}"#).unwrap();
        assert_eq!(spec.envs, [("B".to_owned(), "1".to_owned())]);
        assert_eq!((spec.timeout, spec.stdin.as_deref()), (Some(Duration::from_secs(2)), Some(&b"x"[..])));
        assert_eq!(run(r#"{"code":"a","timeout_seconds":0}"#).unwrap().timeout, None);
        for (body, field) in [
            (r#"{}"#, "code"),
            (r#"{"code":""}"#, "code"),
            ("{\"code\":\"\0\"}", "code"),
            (r#"{"code":"a","timeout_seconds":-1}"#, "timeout_seconds"),
            (r#"{"code":"a","timeout_seconds":1.5}"#, "timeout_seconds"),
            (r#"{"code":"a","envs":{"A-B":"1"}}"#, "envs.A-B"),
            (r#"{"code":"a","envs":{"UID":"1"}}"#, "envs.UID"),
            (r#"{"code":"a","envs":{"A":1}}"#, "envs.A"),
        ] {
            let error = run(body).unwrap_err();
            assert!(error.starts_with(&format!("{field}: ")), "{body}: {error}");
        }
    }
}
