//! Failures as HTTP answers; the only file that knows status codes of failures.

use crate::files::{Class, FileError};
use crate::sandbox::launch::LaunchError;
use crate::session::files::FilesError;
use crate::session::options::OptionError;
use crate::session::prepare::PrepareError;
use crate::session::registry::{CreateError, DeleteError};
use crate::session::session::{RunRefused, SessionId};
use crate::session::{BackgroundError, ShellError};
use crate::workspace::uppers::RemoveError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::io::ErrorKind;

/// Everything a handler can fail with.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// No token, or a wrong one.
    #[error("Unauthorized: invalid or missing header X-EXECD-ACCESS-TOKEN")]
    Unauthorized,
    /// The body is not the JSON that was expected.
    #[error("{0}")]
    Body(String),
    /// The body did not come in time.
    #[error("the body did not come in time")]
    BodyTimedOut,
    /// The body is larger than allowed; bytes.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// A field makes no sense.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// There is no such session.
    #[error("isolated session {0} not found")]
    NoSession(String),
    /// Nothing is kept of such a session.
    #[error("no uppers of a session {0} that has ended are kept")]
    NoUppers(String),
    /// There is no such run.
    #[error("run {0} not found")]
    NoRun(String),
    /// The run has no log.
    #[error("a foreground run has no log; its events are at …/events")]
    NoLog,
    /// A session could not be created.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A session could not be deleted.
    #[error("isolated session {0}: {1}")]
    Delete(SessionId, #[source] DeleteError),
    /// A run was not taken.
    #[error(transparent)]
    Run(#[from] RunRefused),
    /// A background run was not started.
    #[error(transparent)]
    Background(#[from] BackgroundError),
    /// A parameter of the query is missing or empty.
    #[error("missing query parameter {0:?}")]
    MissingQuery(&'static str),
    /// A multipart form is not what it should be; with the code that says in which respect.
    #[error("{1}")]
    File(&'static str, String),
    /// The Range header cannot be understood. Go leaves an empty message out, and clients want one (api 1.2).
    #[error("")]
    RangeSyntax,
    /// There is nothing in that range; with the size of the file in bytes.
    #[error("the range lies beyond the {0} bytes there are")]
    RangeBeyond(u64),
    /// Work in a session's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Uppers that were kept could not be removed.
    #[error(transparent)]
    Remove(#[from] RemoveError),
}

const INVALID: (StatusCode, &str) = (StatusCode::BAD_REQUEST, "INVALID_REQUEST_BODY");
const UNAVAILABLE: (StatusCode, &str) = (StatusCode::SERVICE_UNAVAILABLE, "SERVICE_UNAVAILABLE");
const FAILED: (StatusCode, &str) = (StatusCode::INTERNAL_SERVER_ERROR, "RUNTIME_ERROR");

/// Status and code of a failure in files.
fn of_file(error: &FileError) -> (StatusCode, &'static str) {
    match error.class() {
        Class::Invalid => INVALID,
        Class::NotFound => (StatusCode::NOT_FOUND, "FILE_NOT_FOUND"),
        Class::Forbidden => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
        Class::Conflict => (StatusCode::CONFLICT, "CONFLICT"),
        Class::NoSpace => (StatusCode::INSUFFICIENT_STORAGE, "RUNTIME_ERROR"),
        Class::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "INVALID_REQUEST_BODY"),
        Class::Busy | Class::Cancelled => UNAVAILABLE,
        Class::Failed => FAILED,
    }
}

impl ApiError {
    /// Status and code (api 1.2).
    fn class(&self) -> (StatusCode, &'static str) {
        const NOT_FOUND: (StatusCode, &str) = (StatusCode::NOT_FOUND, "SESSION_NOT_FOUND");
        const NOT_SUPPORTED: (StatusCode, &str) = (StatusCode::SERVICE_UNAVAILABLE, "NOT_SUPPORTED");
        const TOO_MANY: (StatusCode, &str) = (StatusCode::TOO_MANY_REQUESTS, "TOO_MANY_REQUESTS");
        match self {
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
            Self::Body(_) => INVALID,
            Self::BodyTimedOut => (StatusCode::REQUEST_TIMEOUT, "INVALID_REQUEST_BODY"),
            Self::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "INVALID_REQUEST_BODY"),
            // As the original, which finds these while it builds the session.
            Self::Option(error) if error.field == "profile" => (StatusCode::BAD_REQUEST, "RUNTIME_ERROR"),
            Self::Option(_) => INVALID,
            Self::NoSession(_) | Self::NoUppers(_) | Self::NoRun(_) => NOT_FOUND,
            Self::NoLog => INVALID,
            Self::Create(error) => match error {
                CreateError::Unavailable(_) => UNAVAILABLE,
                CreateError::NotSupported(_) => NOT_SUPPORTED,
                CreateError::TooMany(_) => TOO_MANY,
                CreateError::Prepare(PrepareError::Invalid(_)) => INVALID,
                CreateError::Prepare(PrepareError::Path { .. }) => (StatusCode::BAD_REQUEST, "RUNTIME_ERROR"),
                CreateError::Prepare(PrepareError::UppersFull { .. }) => {
                    (StatusCode::INSUFFICIENT_STORAGE, "RUNTIME_ERROR")
                }
                CreateError::Prepare(PrepareError::NotSupported(_)) => NOT_SUPPORTED,
                CreateError::Prepare(PrepareError::Upper(error))
                    if error.kind() == ErrorKind::StorageFull =>
                {
                    (StatusCode::INSUFFICIENT_STORAGE, "RUNTIME_ERROR")
                }
                CreateError::Prepare(PrepareError::Upper(_)) | CreateError::Io(_) => FAILED,
                CreateError::Copy(error) => of_file(error),
                CreateError::Shell(error) => match error {
                    // Another launcher is on its way.
                    ShellError::Launch(LaunchError::LauncherLost) => UNAVAILABLE,
                    ShellError::Launch(
                        LaunchError::Step(_)
                        | LaunchError::NotReplaced(_)
                        | LaunchError::InitLost
                        | LaunchError::TimedOut
                        | LaunchError::Io(_),
                    )
                    | ShellError::Io(_)
                    | ShellError::Folder(_)
                    | ShellError::Silent { .. }
                    | ShellError::Ended { .. } => FAILED,
                },
            },
            Self::Delete(_, DeleteError::Unknown) => NOT_FOUND,
            Self::Delete(_, DeleteError::Stuck) => FAILED,
            Self::Run(RunRefused::TooMany(_)) => TOO_MANY,
            Self::Run(RunRefused::Dead(_)) => NOT_FOUND,
            Self::Background(BackgroundError::TooMany(_)) => TOO_MANY,
            Self::Background(BackgroundError::Dead(_)) => NOT_FOUND,
            Self::Background(BackgroundError::Io(error)) if error.kind() == ErrorKind::StorageFull => {
                (StatusCode::INSUFFICIENT_STORAGE, "RUNTIME_ERROR")
            }
            Self::Background(BackgroundError::Launch(_) | BackgroundError::Io(_)) => FAILED,
            Self::MissingQuery(_) => (StatusCode::BAD_REQUEST, "MISSING_QUERY"),
            Self::File(code, _) => (StatusCode::BAD_REQUEST, code),
            Self::RangeSyntax | Self::RangeBeyond(_) => (StatusCode::RANGE_NOT_SATISFIABLE, "UNKNOWN"),
            Self::Files(FilesError::Dead(_)) => NOT_FOUND,
            Self::Files(FilesError::TooMany) => TOO_MANY,
            Self::Files(FilesError::Busy(_)) => (StatusCode::CONFLICT, "CONFLICT"),
            Self::Files(FilesError::NotSupported(_)) => NOT_SUPPORTED,
            Self::Files(FilesError::File(error)) => of_file(error),
            Self::Remove(RemoveError::InUse) => (StatusCode::CONFLICT, "CONFLICT"),
            Self::Remove(RemoveError::Io(_)) => FAILED,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, code) = self.class();
        let message = with_causes(&self);
        if status.is_server_error() {
            tracing::error!(code, message, "request failed");
        }
        let body = match &self {
            // The original has this one key, and clients look for it.
            Self::Unauthorized => json!({"error": message, "code": code, "message": message}),
            _ => json!({"code": code, "message": message}),
        };
        let mut response = (status, Json(body)).into_response();
        if let Self::RangeBeyond(size) = self
            && let Ok(range) = HeaderValue::from_str(&format!("bytes */{size}"))
        {
            response.headers_mut().insert(header::CONTENT_RANGE, range);
        }
        response
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
