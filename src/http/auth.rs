//! The access token.

use super::App;
use super::error::ApiError;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

/// The header that carries it.
pub const HEADER: &str = "x-execd-access-token";

/// Lets a request pass when it carries the token, or when none is set.
pub async fn require_token(State(app): State<App>, request: Request, next: Next) -> Response {
    let given = request.headers().get(HEADER).map_or(&[][..], |value| value.as_bytes());
    // Constant time in the content; that its length shows is usual for tokens.
    if app.access_token.is_empty() || bool::from(app.access_token.as_bytes().ct_eq(given)) {
        next.run(request).await
    } else {
        ApiError::Unauthorized.into_response()
    }
}
