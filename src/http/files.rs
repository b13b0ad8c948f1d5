//! The routes of a session's files and directories whose answers are JSON, and their bodies.
//!
//! A request about several files is checked as a whole before anything is changed.

use super::App;
use super::dto::rfc3339;
use super::error::ApiError;
use super::isolated::find;
use super::json::{Json, JsonList, Object};
use crate::files::info::{FileInfo, Kind, octal_digits};
use crate::files::stage::Attributes;
use crate::files::{Class, FileError, Worker};
use crate::session::files::{FilesError, FilesVisit, Purpose};
use crate::session::options::OptionError;
use axum::Router;
use axum::extract::{FromRequest, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The largest answer that is made of a search or a list; bytes.
const LIST_BYTES_MAX: usize = 64 << 20;
/// The most files of one request.
const BATCH_MAX: usize = 10_000;

/// All of them.
pub(super) fn routes() -> Router<App> {
    const SESSION: &str = "/v1/isolated/session/{id}";
    let route = |rest: &str| format!("{SESSION}/{rest}");
    Router::new()
        .route(&route("files"), delete(remove_files))
        .route(&route("files/info"), get(info))
        .route(&route("files/search"), get(search))
        .route(&route("files/mv"), post(relocate))
        .route(&route("files/permissions"), post(permit))
        .route(&route("files/replace"), post(replace))
        .route(&route("files/download"), get(super::download::download))
        .route(&route("files/upload"), post(super::upload::upload))
        .route(&route("files/watch"), get(super::watch::watch))
        .route(&route("directories"), post(make_directories).delete(remove_directories))
        .route(&route("directories/list"), get(list))
        .route(&route("directories/archive"), get(super::archive::pack).post(super::archive::unpack))
}

/// The query of a request, in which a name may come several times.
pub(super) type Pairs = Query<Vec<(String, String)>>;

/// The last value of that name.
pub(super) fn value<'a>(query: &'a Pairs, name: &str) -> Option<&'a str> {
    query.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// The same, for a parameter that must be there.
pub(super) fn required(query: &Pairs, name: &'static str) -> Result<String, ApiError> {
    let value = value(query, name).filter(|value| !value.is_empty());
    value.map(str::to_owned).ok_or(ApiError::MissingQuery(name))
}

/// Every value of that name.
pub(super) fn values(query: Pairs, name: &str) -> Result<Vec<String>, ApiError> {
    let values: Vec<_> = query.0.into_iter().filter(|(key, _)| key == name).map(|(_, value)| value).collect();
    check_batch(values.len())?;
    Ok(values)
}

fn check_batch(files: usize) -> Result<(), ApiError> {
    if files > BATCH_MAX {
        return Err(ApiError::Body(format!("one request may name up to {BATCH_MAX} files, not {files}")));
    }
    Ok(())
}

/// Goes to the files of a session.
pub(super) async fn visit(app: &App, id: &str, purpose: Purpose) -> Result<Arc<FilesVisit>, ApiError> {
    Ok(find(app, id)?.visit_files(purpose).await?)
}

/// Has one thread of a session do something in its files.
async fn perform<T, F>(app: &App, id: &str, purpose: Purpose, work: F) -> Result<T, ApiError>
where
    T: Send + 'static,
    F: FnOnce(&Worker<'_>) -> Result<T, FileError> + Send + 'static,
{
    Ok(visit(app, id, purpose).await?.perform(work).await?)
}

async fn info(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<impl IntoResponse, ApiError> {
    let paths = values(query, "path")?;
    let infos = perform(&app, &id, Purpose::Use, move |worker| {
        let described = |path: String| worker.info(&path).map(|info| (path, FileInfoResponse::from(info)));
        paths.into_iter().map(described).collect::<Result<BTreeMap<_, _>, _>>()
    });
    Ok(axum::Json(infos.await?))
}

async fn search(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<impl IntoResponse, ApiError> {
    let path = required(&query, "path")?;
    let pattern = value(&query, "pattern").filter(|pattern| !pattern.is_empty()).unwrap_or("**").to_owned();
    let found = perform(&app, &id, Purpose::Use, move |worker| {
        let mut list = List::new();
        worker.search(&path, &pattern, &mut |info| list.push_info(info))?;
        Ok(list)
    });
    found.await
}

async fn list(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<impl IntoResponse, ApiError> {
    let path = required(&query, "path")?;
    let depth = match value(&query, "depth") {
        None => 1,
        Some(text) => {
            text.parse().map_err(|_| OptionError::new("depth", format!("{text:?} is no number from 0 on")))?
        }
    };
    let found = perform(&app, &id, Purpose::Use, move |worker| {
        let mut list = List::new();
        worker.list(&path, depth, &mut |info| list.push_info(info))?;
        Ok(list)
    });
    found.await
}

async fn remove_files(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<StatusCode, ApiError> {
    let paths = values(query, "path")?;
    let removed = perform(&app, &id, Purpose::Change, move |worker| {
        paths.iter().try_for_each(|path| worker.check_remove_file(path))?;
        paths.iter().try_for_each(|path| worker.remove_file(path))
    });
    removed.await.map(|()| StatusCode::OK)
}

async fn remove_directories(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<StatusCode, ApiError> {
    let paths = values(query, "path")?;
    let removed = perform(&app, &id, Purpose::Change, move |worker| {
        paths.iter().try_for_each(|path| worker.remove_directory(path))
    });
    removed.await.map(|()| StatusCode::OK)
}

async fn relocate(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    find(&app, &id)?;
    let JsonList(moves) = JsonList::<MoveRequest>::from_request(request, &app).await?;
    check_batch(moves.len())?;
    let moved = perform(&app, &id, Purpose::Change, move |worker| {
        moves.iter().try_for_each(|Object(MoveRequest { src, dest })| worker.check_relocate(src, dest))?;
        moves.iter().try_for_each(|Object(MoveRequest { src, dest })| worker.relocate(src, dest))
    });
    moved.await.map(|()| StatusCode::OK)
}

async fn permit(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let wanted = attributes_by_path(&app, &id, request).await?;
    let permitted = perform(&app, &id, Purpose::Change, move |worker| {
        wanted.iter().try_for_each(|(path, wanted)| worker.check_permit(path, wanted))?;
        wanted.iter().try_for_each(|(path, wanted)| worker.permit(path, wanted))
    });
    permitted.await.map(|()| StatusCode::OK)
}

async fn make_directories(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let wanted = attributes_by_path(&app, &id, request).await?;
    let made = perform(&app, &id, Purpose::Change, move |worker| {
        wanted.iter().try_for_each(|(path, wanted)| worker.make_directory(path, wanted))
    });
    made.await.map(|()| StatusCode::OK)
}

async fn attributes_by_path(
    app: &App,
    id: &str,
    request: Request,
) -> Result<Vec<(String, Attributes)>, ApiError> {
    find(app, id)?;
    let Json(wanted) =
        Json::<BTreeMap<String, Option<Object<AttributesRequest>>>>::from_request(request, app).await?;
    check_batch(wanted.len())?;
    wanted.into_iter().map(|(path, wanted)| Ok((path, wanted.unwrap_or_default().0.attributes()?))).collect()
}

/// Always with the counts: a client that did not ask for them ignores the body (api 2.9).
async fn replace(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<impl IntoResponse, ApiError> {
    find(&app, &id)?;
    let Json(wanted) = Json::<BTreeMap<String, Object<ReplaceRequest>>>::from_request(request, &app).await?;
    check_batch(wanted.len())?;
    let replaced = perform(&app, &id, Purpose::Change, move |worker| {
        wanted.iter().try_for_each(|(path, Object(wanted))| worker.check_replace(path, &wanted.old))?;
        let replaced = wanted.into_iter().map(|(path, Object(ReplaceRequest { old, new }))| {
            let replaced_count = worker.replace(&path, &old, &new)?;
            Ok((path, ReplaceResponse { replaced_count }))
        });
        replaced.collect::<Result<BTreeMap<_, _>, FileError>>()
    });
    Ok(axum::Json(replaced.await?))
}

#[derive(Debug, Deserialize)]
struct MoveRequest {
    src: String,
    dest: String,
}

#[derive(Debug, Deserialize)]
struct ReplaceRequest {
    old: String,
    new: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ReplaceResponse {
    replaced_count: u64,
}

/// Mode and owners, as clients send them.
#[derive(Debug, Default, Deserialize)]
pub(super) struct AttributesRequest {
    /// Octal digits, read as a decimal number; 0 for "as it comes".
    mode: Option<u32>,
    #[serde(default, deserialize_with = "name_or_number")]
    owner: Option<String>,
    #[serde(default, deserialize_with = "name_or_number")]
    group: Option<String>,
}

impl AttributesRequest {
    pub(super) fn attributes(self) -> Result<Attributes, OptionError> {
        let mode = match self.mode {
            None | Some(0) => None,
            Some(digits) => Some(octal(digits)?),
        };
        Ok(Attributes { mode, owner: self.owner, group: self.group })
    }
}

fn octal(digits: u32) -> Result<u32, OptionError> {
    let mode = u32::from_str_radix(&digits.to_string(), 8).ok().filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| OptionError::new("mode", format!("{digits} is not up to four octal digits")))
}

fn name_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a name or a number")]
    enum NameOrNumber {
        Name(String),
        Number(u32),
    }
    Ok(Option::deserialize(deserializer)?.map(|owner| match owner {
        NameOrNumber::Name(name) => name,
        NameOrNumber::Number(number) => number.to_string(),
    }))
}

#[derive(Debug, Serialize)]
struct FileInfoResponse {
    path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    size: u64,
    modified_at: String,
    created_at: String,
    owner: String,
    group: String,
    mode: u32,
}

impl From<FileInfo> for FileInfoResponse {
    fn from(info: FileInfo) -> Self {
        Self {
            path: info.path,
            kind: match info.kind {
                Kind::File => "file",
                Kind::Directory => "directory",
                Kind::Symlink => "symlink",
                Kind::Other => "other",
            },
            size: info.size,
            modified_at: rfc3339(info.modified_at),
            created_at: rfc3339(info.created_at),
            owner: info.owner,
            group: info.group,
            mode: octal_digits(info.mode),
        }
    }
}

/// A JSON array, rendered as it grows, which takes the least memory.
pub(super) struct List(Vec<u8>);

impl List {
    pub(super) fn new() -> Self {
        Self(vec![b'['])
    }

    /// Adds one more; `path` is what it is about.
    pub(super) fn push(&mut self, path: &str, item: &impl Serialize) -> Result<(), FileError> {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        serde_json::to_writer(&mut self.0, item).map_err(|error| FileError::Own(error.to_string()))?;
        if self.0.len() > LIST_BYTES_MAX {
            let reason = format!("the answer would be larger than {LIST_BYTES_MAX} bytes; ask for less");
            return Err(FileError::refused(path, Class::TooLarge, reason));
        }
        Ok(())
    }

    fn push_info(&mut self, info: FileInfo) -> Result<(), FileError> {
        let info = FileInfoResponse::from(info);
        self.push(&info.path, &info)
    }
}

impl IntoResponse for List {
    fn into_response(mut self) -> Response {
        self.0.push(b']');
        ([(header::CONTENT_TYPE, "application/json")], self.0).into_response()
    }
}

impl From<FileError> for ApiError {
    fn from(error: FileError) -> Self {
        Self::Files(FilesError::File(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_digits_in_octal_digits() {
        assert_eq!((octal(755).unwrap(), octal(4755).unwrap(), octal(7).unwrap()), (0o755, 0o4755, 7));
        assert_eq!((octal_digits(0o644), octal_digits(0o1777), octal_digits(0)), (644, 1777, 0));
        assert!(
            octal(8).is_err() && octal(799).is_err() && octal(10_000).is_err() && octal(u32::MAX).is_err()
        );
    }

    #[test]
    fn owners_are_names_or_numbers() {
        let owner = |text: &str| serde_json::from_str::<AttributesRequest>(text).map(|request| request.owner);
        assert_eq!(owner(r#"{"owner":7}"#).unwrap().as_deref(), Some("7"));
        assert_eq!(owner(r#"{"owner":"ann"}"#).unwrap().as_deref(), Some("ann"));
        assert_eq!(owner(r#"{"owner":null}"#).unwrap(), None);
        assert!(owner(r#"{"owner":[]}"#).is_err() && owner(r#"{"owner":-1}"#).is_err());
    }
}
