//! The HTTP side: extract, validate, call, render. Nothing here that a command line tool would need.
//!
//! [`server`] accepts connections, [`auth`], [`drain`] and [`trace`] wrap every route, [`isolated`] has the routes of
//! isolated sessions, [`runs`] those of their runs, [`dto`] their bodies, [`events`] the stream of a run. [`files`] has the
//! routes of their files; [`download`], [`upload`], [`archive`] and [`watch`] are those of them that stream. [`changes`] is about what they have changed. [`error`] is
//! the only place that knows which failure is which status.

mod archive;
pub mod auth;
mod changes;
mod download;
mod drain;
pub mod dto;
pub mod error;
pub mod events;
mod files;
pub mod isolated;
pub mod json;
pub mod runs;
pub mod server;
pub mod trace;
mod upload;
mod watch;

use crate::session::registry::Registry;
use axum::Router;
use axum::http::StatusCode;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// What every handler can reach.
#[derive(Debug, Clone)]
pub struct App {
    /// All sessions.
    pub registry: Arc<Registry>,
    /// The shared secret; empty for none.
    pub access_token: Arc<str>,
}

/// All routes.
pub fn router(app: App) -> Router {
    Router::new()
        .merge(isolated::routes())
        .merge(runs::routes())
        .merge(files::routes())
        .merge(changes::routes())
        .layer(from_fn_with_state(app.clone(), auth::require_token))
        // Whoever waits for execd to come up has no token yet.
        .route("/ping", get(ping))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(from_fn(drain::drain))
        .layer(from_fn(trace::observe))
        .with_state(app)
}

async fn ping() -> StatusCode {
    StatusCode::OK
}

/// As the original: also for a known path with another method.
async fn unknown() -> impl IntoResponse {
    (StatusCode::NOT_FOUND, "404 page not found")
}
