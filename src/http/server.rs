//! Connections: HTTP/1.1 over TCP, limited in number, with a time limit for a request's head, keepalive probes
//! so that a client that vanished is noticed, and an end.

use crate::config::Http;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Silence after which the kernel asks whether the peer is still there, and how often it asks.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
/// Pause when the process has no descriptor left for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens. Without an address that means every address, IPv6 and IPv4, or IPv4 alone where there is no IPv6.
///
/// # Errors
/// `EADDRINUSE` and its kin, with the address.
pub fn listen(address: Option<IpAddr>, port: u16) -> io::Result<TcpListener> {
    let bound = match address {
        Some(address) => bind(SocketAddr::new(address, port)),
        None => {
            bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)).or_else(|error| match error.kind() {
                io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
                _ => bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)),
            })
        }
    };
    bound.and_then(TcpListener::from_std)
}

fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket
        .bind(&address.into())
        .map_err(|error| io::Error::new(error.kind(), format!("listen on {address}: {error}")))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves until `stop`, then lets requests in flight end for at most `drain_max`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    config: &Http,
    mut stop: watch::Receiver<bool>,
    drain_max: Duration,
) {
    let places = Arc::new(Semaphore::new(config.connections_max));
    let header_read_max = Duration::from_secs(config.header_read_max_seconds);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = told_to(&mut stop) => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, place)) = accepted else { continue };
        let (router, stop) = (router.clone(), stop.clone());
        connections.spawn(async move {
            connection(stream, router, header_read_max, stop).await;
            drop(place);
        });
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(drain_max, drained).await.is_err() {
        tracing::warn!("connections cut off at shutdown");
    }
}

async fn told_to(stop: &mut watch::Receiver<bool>) {
    // An error means that the daemon's main task is gone, which is the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, place)),
        Err(error) => {
            tracing::warn!(%error, "accept");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    header_read_max: Duration,
    mut stop: watch::Receiver<bool>,
) {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    // Neither is needed for the answer to be right.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_read_max)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told_to(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
