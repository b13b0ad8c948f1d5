//! execd: disposable, isolated bash sessions over HTTP.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod files;
pub mod http;
pub mod run_once;
pub mod sandbox;
pub mod session;
pub mod telemetry;
pub mod workspace;
