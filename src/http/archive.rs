//! `GET` and `POST directories/archive`: a whole subtree in one request, as tar.gz.

use super::App;
use super::download::{disposition, stream};
use super::error::ApiError;
use super::files::{Pairs, required, visit};
use super::upload::heard;
use crate::session::files::{Piece, Purpose, wait_for_client};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use bytes::Bytes;
use futures_util::StreamExt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// How much is packed before it is passed on; bytes.
const PIECE_BYTES: usize = 128 * 1024;
/// Pieces on their way between the client and the thread that packs or unpacks.
pub(super) const PIECES_AHEAD: usize = 4;

/// `GET`: what is in a directory.
pub(super) async fn pack(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
) -> Result<impl IntoResponse, ApiError> {
    let visit = visit(&app, &id, Purpose::Use).await?;
    let path = required(&query, "path")?;
    // Whatever can be known before the head of the answer is sent should be in it.
    let place = visit.long_place()?;
    let checked = path.clone();
    let name = visit.perform(move |worker| worker.check_pack(&checked)).await?;
    let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
    tokio::spawn(async move {
        let (out, to) = (Arc::clone(&visit), sender.clone());
        let packed = visit.perform_long(place, move |worker| {
            let mut writer = PieceWriter::new(out.shut(), to);
            worker.pack(&path, &mut writer)?;
            // An error has been noticed by whoever would read it.
            let _ = writer.pass_on();
            Ok(())
        });
        let last = packed.await.map_or_else(Piece::Failed, |()| Piece::End);
        let _ = sender.send_timeout(last, super::upload::SILENCE_MAX).await;
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/gzip")),
        (header::CONTENT_DISPOSITION, disposition(&format!("{name}.tar.gz"))),
    ];
    Ok((headers, stream(pieces)))
}

/// `POST`: unpacks the body, tar or tar.gz, into a directory.
pub(super) async fn unpack(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Pairs,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let visit = visit(&app, &id, Purpose::Change).await?;
    let path = required(&query, "path")?;
    let place = visit.long_place()?;
    let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
    let from = Arc::clone(&visit);
    let unpacked = visit.perform_long(place, move |worker| {
        worker.unpack(&path, &mut PieceReader { shut: from.shut(), pieces, piece: Bytes::new() })
    });
    let mut body = request.into_body().into_data_stream();
    let sent = async {
        loop {
            let heard = heard(&visit, body.next()).await;
            let piece = match &heard {
                Ok(None) => break,
                Ok(Some(Ok(piece))) => Ok(piece.clone()),
                // An archive that breaks off is not one that is complete.
                Ok(Some(Err(_))) | Err(_) => Err(io::ErrorKind::ConnectionAborted.into()),
            };
            let broke_off = piece.is_err();
            if sender.send(piece).await.is_err() {
                // The archive is complete without it, or has been refused.
                break;
            }
            if broke_off {
                return heard.map(drop);
            }
        }
        drop(sender);
        Ok(())
    };
    let (unpacked, sent) = tokio::join!(unpacked, sent);
    sent?;
    unpacked?;
    Ok(StatusCode::OK)
}

/// Passes on what a thread writes.
pub(super) struct PieceWriter {
    shut: watch::Receiver<bool>,
    sender: mpsc::Sender<Piece>,
    piece: Vec<u8>,
}

impl PieceWriter {
    /// `shut` says when the session ends.
    pub(super) fn new(shut: watch::Receiver<bool>, sender: mpsc::Sender<Piece>) -> Self {
        Self { shut, sender, piece: Vec::with_capacity(PIECE_BYTES) }
    }

    /// Passes on what has not been.
    pub(super) fn pass_on(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        let sent = wait_for_client(&self.shut, self.sender.send(Piece::Some(piece)))?;
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES {
            self.pass_on()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives a thread what arrives.
struct PieceReader {
    shut: watch::Receiver<bool>,
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match wait_for_client(&self.shut, self.pieces.recv())? {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let piece = self.piece.split_to(self.piece.len().min(buffer.len()));
        buffer.get_mut(..piece.len()).unwrap_or_default().copy_from_slice(&piece);
        Ok(piece.len())
    }
}
