//! Bodies that nobody has read to their end. A client that is still sending does not look for an answer, and when the
//! connection is closed on it, it finds none; so what is left of a body that was refused is read and thrown away, up to
//! a limit.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// What is thrown away of one body; bytes.
const BYTES_MAX: usize = 256 << 20;
/// A client that has been silent for so long is not busy sending.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Has what is left of a request's body read when its handler has not.
pub(super) async fn drain(request: Request, next: Next) -> Response {
    // Such a client waits to be told before it sends anything (RFC 9110, section 10.1.1), and a refusal is just that.
    let waits = request.headers().contains_key(header::EXPECT);
    let request = request.map(|body| Body::new(Draining { body: Some(body), waits }));
    next.run(request).await
}

struct Draining {
    body: Option<Body>,
    waits: bool,
}

impl hyper::body::Body for Draining {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.waits = false;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !self.waits && !body.is_end_stream()) else { return };
        // Outside of the runtime there is no connection any more, either.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(throw_away(body));
        }
    }
}

async fn throw_away(mut body: Body) {
    let mut left = BYTES_MAX;
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(SILENCE_MAX, body.frame()).await {
        match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
            Some(rest) => left = rest,
            None => break,
        }
    }
}
