//! `GET files/download`: a file, or a range of its bytes or lines (RFC 9110, section 14).

use super::App;
use super::error::ApiError;
use super::files::{Pairs, required, value, visit};
use crate::files::download::{LineWindow, Pieces, Source};
use crate::session::files::{FilesVisit, Piece, Purpose};
use crate::session::options::OptionError;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Up to this size the answer is read at once and is one write; bytes.
const SMALL_BYTES_MAX: u64 = 64 * 1024;

/// The handler.
pub(super) async fn download(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let visit = visit(&app, &id, Purpose::Use).await?;
    let path = required(&query, "path")?;
    let (offset, limit) = (line_number(&query, "offset")?, line_number(&query, "limit")?);
    let wants_lines = offset.is_some() || limit.is_some();
    let range = headers.get(header::RANGE).map(|value| value.to_str().unwrap_or_default());
    if wants_lines && range.is_some() {
        return Err(OptionError::new("offset", "lines cannot be asked for together with Range").into());
    }
    let source = visit.perform(move |worker| worker.download(&path)).await?;
    let mut answer = HeaderMap::new();
    answer.insert(header::CONTENT_DISPOSITION, disposition(&source.name()));
    if wants_lines {
        answer.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        let window = LineWindow::new(offset.unwrap_or(1), limit.unwrap_or(u64::MAX));
        return Ok((answer, stream(visit.send(source.lines(window)))).into_response());
    }
    answer.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    answer.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    insert(&mut answer, header::LAST_MODIFIED, &httpdate::fmt_http_date(source.modified_at));
    match condition(&headers, source.modified_at) {
        Condition::NotModified => Ok((StatusCode::NOT_MODIFIED, answer).into_response()),
        Condition::Failed => Ok((StatusCode::PRECONDITION_FAILED, answer).into_response()),
        Condition::Met { range: honours_range } => {
            let range = range.filter(|_| honours_range).map_or(Ok(None), |text| wanted(text, source.size))?;
            respond(visit, source, range, answer).await
        }
    }
}

async fn respond(
    visit: Arc<FilesVisit>,
    source: Source,
    range: Option<Range<u64>>,
    mut headers: HeaderMap,
) -> Result<Response, ApiError> {
    let size = source.size;
    let status = match &range {
        None => StatusCode::OK,
        Some(Range { start, end }) => {
            let range = format!("bytes {start}-{}/{size}", end.saturating_sub(1));
            insert(&mut headers, header::CONTENT_RANGE, &range);
            StatusCode::PARTIAL_CONTENT
        }
    };
    let range = range.unwrap_or(0..size);
    let length = range.end - range.start;
    insert(&mut headers, header::CONTENT_LENGTH, &length.to_string());
    let mut pieces = source.bytes(range);
    if length > SMALL_BYTES_MAX {
        return Ok((status, headers, stream(visit.send(pieces))).into_response());
    }
    let whole = visit.perform(move |worker| {
        let mut whole = Vec::new();
        while let Some(piece) = pieces.next(worker)? {
            whole.extend(piece);
        }
        Ok(whole)
    });
    Ok((status, headers, whole.await?).into_response())
}

/// A body of pieces. One that breaks off ends the connection, so that no client takes it for complete.
pub(super) fn stream(pieces: mpsc::Receiver<Piece>) -> Body {
    let pieces = futures_util::stream::unfold(Some(pieces), |pieces| async move {
        let mut pieces = pieces?;
        let broken = |why: String| Some((Err(io::Error::other(why)), None));
        match pieces.recv().await {
            Some(Piece::Some(piece)) => Some((Ok(Bytes::from(piece)), Some(pieces))),
            Some(Piece::End) => None,
            Some(Piece::Failed(error)) => {
                tracing::warn!(%error, "an answer breaks off");
                broken(error.to_string())
            }
            None => broken("the session has ended".into()),
        }
    });
    Body::from_stream(pieces)
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn line_number(query: &Pairs, name: &'static str) -> Result<Option<u64>, OptionError> {
    let Some(text) = value(query, name) else { return Ok(None) };
    let number = text.parse().ok().filter(|number| *number >= 1);
    number.map(Some).ok_or_else(|| OptionError::new(name, format!("{text:?} is no number from 1 on")))
}

/// RFC 6266: the name in ASCII, and where that is not all of it, whole as well (RFC 8187).
pub(super) fn disposition(name: &str) -> HeaderValue {
    let plain = |c: char| (c.is_ascii_graphic() || c == ' ') && !matches!(c, '"' | '\\');
    let ascii: String = name.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let mut text = format!("attachment; filename=\"{ascii}\"");
    if ascii != name {
        text.push_str("; filename*=UTF-8''");
        for byte in name.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(byte.into()),
                other => text.push_str(&format!("%{other:02X}")),
            }
        }
    }
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("attachment"))
}

#[derive(Debug, PartialEq, Eq)]
enum Condition {
    Met { range: bool },
    NotModified,
    Failed,
}

/// What the request wants to hold of the time of the last change (RFC 9110, section 13); there are no entity tags.
fn condition(headers: &HeaderMap, modified_at: SystemTime) -> Condition {
    let date = |name: HeaderName| {
        let text = headers.get(name)?.to_str().ok()?;
        httpdate::parse_http_date(text).ok()
    };
    // Dates of HTTP know no parts of seconds.
    let since_epoch = modified_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let modified_at = SystemTime::UNIX_EPOCH + Duration::from_secs(since_epoch);
    if date(header::IF_UNMODIFIED_SINCE).is_some_and(|date| modified_at > date) {
        return Condition::Failed;
    }
    if date(header::IF_MODIFIED_SINCE).is_some_and(|date| modified_at <= date) {
        return Condition::NotModified;
    }
    Condition::Met {
        range: !headers.contains_key(header::IF_RANGE) || date(header::IF_RANGE) == Some(modified_at),
    }
}

/// The first of the ranges asked for that the file has; `None` for all of it.
fn wanted(text: &str, size: u64) -> Result<Option<Range<u64>>, ApiError> {
    let ranges = text.strip_prefix("bytes=").ok_or(ApiError::RangeSyntax)?;
    let mut satisfiable = None;
    let mut count = 0;
    for part in ranges.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        count += 1;
        let range = one_range(part, size)?;
        satisfiable = satisfiable.or(range);
    }
    match satisfiable {
        Some(range) => Ok(Some(range)),
        None if count == 0 => Err(ApiError::RangeSyntax),
        // Clients that always send a range get the nothing there is.
        None if size == 0 => Ok(None),
        None => Err(ApiError::RangeBeyond(size)),
    }
}

fn one_range(part: &str, size: u64) -> Result<Option<Range<u64>>, ApiError> {
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // What is too large to be counted is larger than any file.
        if is_number { Ok(text.parse::<u64>().unwrap_or(u64::MAX)) } else { Err(ApiError::RangeSyntax) }
    };
    let (first, last) = part.split_once('-').ok_or(ApiError::RangeSyntax)?;
    let range = match (first.trim(), last.trim()) {
        ("", last) => size.saturating_sub(number(last)?)..size,
        (first, "") => number(first)?..size,
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(ApiError::RangeSyntax);
            }
            first..last.saturating_add(1).min(size)
        }
    };
    Ok((range.start < range.end).then_some(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_has_them() {
        let wanted = |text: &str| wanted(text, 10).map_err(|error| error.to_string());
        for (text, range) in [
            ("bytes=0-0", 0..1),
            ("bytes=2-", 2..10),
            ("bytes=-3", 7..10),
            ("bytes=-99", 0..10),
            ("bytes=5-99999999999999999999999", 5..10),
            ("bytes=20-30, 1-2,3-4", 1..3),
            ("bytes= 4 - 5 ", 4..6),
        ] {
            assert_eq!(wanted(text), Ok(Some(range)), "{text}");
        }
        for text in
            ["bytes=", "bytes=a-b", "bytes=3-2", "bytes=--1", "bytes=-", "lines=1-2", "bytes=+1-2", ""]
        {
            assert_eq!(wanted(text), Err(ApiError::RangeSyntax.to_string()), "{text}");
        }
        for text in ["bytes=10-", "bytes=-0", "bytes=11-12"] {
            assert_eq!(wanted(text), Err(ApiError::RangeBeyond(10).to_string()), "{text}");
        }
        assert_eq!(super::wanted("bytes=0-", 0).unwrap(), None);
    }

    #[test]
    fn names_survive_in_headers() {
        assert_eq!(disposition("a b.txt"), "attachment; filename=\"a b.txt\"");
        assert_eq!(disposition("ä\"\n"), "attachment; filename=\"___\"; filename*=UTF-8''%C3%A4%22%0A");
    }

    #[test]
    fn conditions_are_about_whole_seconds() {
        let modified_at = SystemTime::UNIX_EPOCH + Duration::from_millis(100_500);
        let with = |name: HeaderName, seconds: u64| {
            let date = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
            condition(&HeaderMap::from_iter([(name, HeaderValue::from_str(&date).unwrap())]), modified_at)
        };
        assert_eq!(with(header::IF_MODIFIED_SINCE, 100), Condition::NotModified);
        assert_eq!(with(header::IF_MODIFIED_SINCE, 99), Condition::Met { range: true });
        assert_eq!(with(header::IF_UNMODIFIED_SINCE, 99), Condition::Failed);
        assert_eq!(with(header::IF_RANGE, 100), Condition::Met { range: true });
        assert_eq!(with(header::IF_RANGE, 101), Condition::Met { range: false });
    }
}
