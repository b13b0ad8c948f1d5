//! The routes of isolated sessions, `/v1/isolated/…`.

use super::App;
use super::dto::{CapabilitiesResponse, CreateRequest, CreateResponse, ListResponse, StateResponse};
use super::error::ApiError;
use super::json::Json;
use crate::session::session::{Session, SessionId};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use std::sync::Arc;
use uuid::Uuid;

/// All of them.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/isolated/capabilities", get(capabilities))
        .route("/v1/isolated/sessions", get(list))
        .route("/v1/isolated/session", post(create))
        .route("/v1/isolated/session/{id}", get(show).delete(delete))
}

async fn capabilities(State(app): State<App>) -> impl IntoResponse {
    let foundation = app.registry.foundation();
    let has_filter = !foundation.filter.program.is_empty();
    axum::Json(CapabilitiesResponse::new(app.registry.report(), has_filter, foundation.ladder()))
}

async fn create(
    State(app): State<App>,
    Json(request): Json<CreateRequest>,
) -> Result<impl IntoResponse, ApiError> {
    let options = request.options(&app.registry.foundation().config.session)?;
    let session = app.registry.create(options).await?;
    Ok((StatusCode::CREATED, axum::Json(CreateResponse::from(&*session))))
}

async fn list(State(app): State<App>) -> impl IntoResponse {
    let sessions = app.registry.list();
    axum::Json(ListResponse { sessions: sessions.iter().map(|session| (&**session).into()).collect() })
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<impl IntoResponse, ApiError> {
    Ok(axum::Json(StateResponse::from(&*find(&app, &id)?)))
}

async fn delete(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = session_id(&id)?;
    app.registry.delete(id).await.map_err(|error| ApiError::Delete(id, error))?;
    Ok(StatusCode::OK)
}

/// The name of a session, as it is in a path.
pub(super) fn session_id(id: &str) -> Result<SessionId, ApiError> {
    Uuid::parse_str(id).map(SessionId).map_err(|_| ApiError::NoSession(id.to_owned()))
}

/// The session of that name.
pub(super) fn find(app: &App, id: &str) -> Result<Arc<Session>, ApiError> {
    app.registry.get(session_id(id)?).ok_or_else(|| ApiError::NoSession(id.to_owned()))
}
