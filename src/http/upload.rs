//! `POST files/upload`: `metadata` and `file` parts, which belong together by their number (api 3.8).
//!
//! Content goes straight to where it is to be, without a name; all files of a request get theirs once the request is
//! complete. Of a request that breaks off nothing stays.

use super::App;
use super::error::ApiError;
use super::files::{AttributesRequest, Pairs, value, visit};
use super::json::decode;
use crate::files::FileError;
use crate::files::stage::{Attributes, Staged};
use crate::session::files::{FilesVisit, Purpose};
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use bytes::Bytes;
use multer::{Field, Multipart};
use serde::Deserialize;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

/// Pairs of one request; each keeps a descriptor open.
const PAIRS_MAX: usize = 1000;
/// The largest metadata part; bytes.
const METADATA_BYTES_MAX: usize = 64 * 1024;
const MISSING_METADATA: &str =
    "there is no part \"metadata\" with a filename parameter (curl: -F 'metadata={…};filename=metadata')";
/// How much is gathered before it is written; bytes.
const BATCH_BYTES: usize = 512 * 1024;
/// How long a client may send nothing.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The handler.
pub(super) async fn upload(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let visit = visit(&app, &id, Purpose::Change).await?;
    let fsync = value(&query, "fsync") == Some("true");
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let boundary = multer::parse_boundary(content_type.unwrap_or_default()).map_err(broken)?;
    let mut multipart = Multipart::new(request.into_body().into_data_stream(), boundary);
    let (mut metadata, mut contents) = (Vec::new(), Vec::new());
    while let Some(field) = heard(&visit, multipart.next_field()).await?.map_err(broken)? {
        // A part without a file name does not count, whatever it is called.
        match field.name().filter(|_| field.file_name().is_some()) {
            Some("metadata") if metadata.len() < PAIRS_MAX => {
                metadata.push(read_metadata(&visit, field).await?)
            }
            Some("file") if contents.len() < PAIRS_MAX => {
                let place = metadata.get(contents.len()).map(|(path, _): &(String, _)| path.clone());
                contents.push(receive(&visit, field, place).await?);
            }
            Some("metadata" | "file") => {
                return Err(ApiError::File("INVALID_FILE", format!("more than {PAIRS_MAX} files at once")));
            }
            _ => {}
        }
    }
    if metadata.is_empty() {
        return Err(ApiError::File("INVALID_FILE_METADATA", MISSING_METADATA.into()));
    }
    if contents.is_empty() {
        return Err(ApiError::File("INVALID_FILE_CONTENT", "there is no file part with a file name".into()));
    }
    if metadata.len() != contents.len() {
        let counts = format!("{} metadata parts and {} file parts", metadata.len(), contents.len());
        return Err(ApiError::File("INVALID_FILE", counts));
    }
    let landed = visit.perform(move |worker| {
        let pairs = metadata.into_iter().zip(contents);
        let staged = pairs.map(|((path, attributes), content)| match content {
            Content::Staged(staged) => Ok((*staged, attributes)),
            Content::Spooled(spool) => {
                let mut staged = worker.stage(&worker.path(&path)?)?;
                staged.write_from(spool)?;
                Ok((staged, attributes))
            }
        });
        let staged: Vec<(Staged, Attributes)> = staged.collect::<Result<_, FileError>>()?;
        staged.into_iter().try_for_each(|(staged, attributes)| worker.land(staged, &attributes, fsync))
    });
    landed.await?;
    Ok(StatusCode::OK)
}

#[derive(Debug, Deserialize)]
struct Metadata {
    path: String,
    #[serde(flatten)]
    attributes: AttributesRequest,
}

async fn read_metadata(visit: &FilesVisit, mut field: Field<'_>) -> Result<(String, Attributes), ApiError> {
    let invalid = |why: String| ApiError::File("INVALID_FILE_METADATA", why);
    let mut bytes = Vec::new();
    while let Some(chunk) = heard(visit, field.chunk()).await?.map_err(broken)? {
        if bytes.len() + chunk.len() > METADATA_BYTES_MAX {
            return Err(invalid(format!("metadata is larger than {METADATA_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    let metadata: Metadata = decode(&bytes).map_err(|error| invalid(error.to_string()))?;
    if metadata.path.is_empty() {
        return Err(invalid("path: must not be empty".into()));
    }
    let attributes = metadata.attributes.attributes().map_err(|error| invalid(error.to_string()))?;
    Ok((metadata.path, attributes))
}

/// Content that has arrived.
enum Content {
    Staged(Box<Staged>),
    /// Its metadata is still to come.
    Spooled(File),
}

impl Content {
    fn write(&mut self, batch: &[Bytes]) -> Result<(), FileError> {
        match self {
            Self::Staged(staged) => batch.iter().try_for_each(|chunk| staged.write(chunk)),
            Self::Spooled(file) => batch.iter().try_for_each(|chunk| crate::files::stage::spool(file, chunk)),
        }
    }
}

async fn receive(
    visit: &Arc<FilesVisit>,
    mut field: Field<'_>,
    place: Option<String>,
) -> Result<Content, ApiError> {
    let opened = visit.perform(move |worker| match place {
        Some(path) => worker.stage(&worker.path(&path)?).map(Box::new).map(Content::Staged),
        None => worker.spool().map(Content::Spooled),
    });
    let mut content = opened.await?;
    let mut batch = Vec::new();
    let mut bytes = 0;
    loop {
        let chunk = heard(visit, field.chunk()).await?.map_err(broken)?;
        let is_last = chunk.is_none();
        bytes += chunk.as_ref().map_or(0, Bytes::len);
        batch.extend(chunk);
        if bytes >= BATCH_BYTES || (is_last && bytes > 0) {
            let (taken, mut into) = (std::mem::take(&mut batch), content);
            bytes = 0;
            content = visit.perform(move |_| into.write(&taken).map(|()| into)).await?;
        }
        if is_last {
            return Ok(content);
        }
    }
}

/// Waits for the client, as long as it may be silent and the session lives.
pub(super) async fn heard<T>(visit: &FilesVisit, client: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::select! {
        biased;
        () = visit.asked_to_leave() => Err(visit.dead().into()),
        heard = client => Ok(heard),
        () = tokio::time::sleep(SILENCE_MAX) => Err(ApiError::BodyTimedOut),
    }
}

fn broken(error: multer::Error) -> ApiError {
    ApiError::File("INVALID_FILE", format!("the body is no multipart form: {error}"))
}
