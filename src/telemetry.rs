//! The log.

use crate::cli::LogFormat;
use anyhow::Context;
use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Starts logging to `file`, or to standard output when it is empty. `level` counts as the original's does.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(level: u8, format: LogFormat, file: &str) -> anyhow::Result<()> {
    let filter = match level {
        0..=2 => LevelFilter::OFF,
        3 => LevelFilter::ERROR,
        4 => LevelFilter::WARN,
        5 | 6 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let writer = if file.is_empty() {
        BoxMakeWriter::new(std::io::stdout)
    } else {
        let path = Path::new(file);
        let file = OpenOptions::new().create(true).append(true).open(path);
        BoxMakeWriter::new(Mutex::new(file.with_context(|| format!("open {}", path.display()))?))
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_target(false)
        .with_ansi(false)
        .with_writer(writer);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
