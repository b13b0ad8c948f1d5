//! One log line and one id for each request.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use std::time::Instant;

/// The header the SDK reads.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client's own id is taken over up to this length; bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Logs method, path, status and time; query strings and headers stay out, since they may carry secrets.
pub async fn observe(request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|value| value.len() <= REQUEST_ID_BYTES_MAX)
        .cloned()
        .or_else(|| HeaderValue::from_str(&uuid::Uuid::new_v4().simple().to_string()).ok());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    tracing::info!(
        %method,
        path,
        status = response.status().as_u16(),
        ms = began.elapsed().as_secs_f64() * 1e3,
        request = id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or(""),
        "request"
    );
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}
