//! The isolation configuration: a TOML file whose every key has a default. `configs/isolation.example.toml`
//! lists them all, with the defaults; a test keeps the two equal.

use crate::workspace::home::Tier;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What an image can be made for.
const UPPER_BYTES: std::ops::RangeInclusive<u64> = 8 << 20..=4 << 40;
const UPPER_INODES: std::ops::RangeInclusive<u64> = 1 << 10..=1 << 27;

/// Everything that can be configured about isolation.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Parent of the writable layers of persistent overlays.
    pub upper_root: PathBuf,
    /// The kinds of places that uppers may have. Of those that can be had, the first of image, directory, memory is used.
    pub upper_tiers: Vec<Tier>,
    /// What all persistent uppers together may hold; bytes, 0 for no limit. Measured every few seconds; at the limit no
    /// session with a persistent overlay is created, and the largest cannot write any more.
    pub upper_max_bytes: u64,
    /// How long uppers may be kept after the end of their session; seconds.
    pub retain_max_seconds: u64,
    /// The largest diff; bytes, before it is packed; 0 for no limit.
    pub diff_max_bytes: u64,
    /// Host paths that `extra_writable` and `binds` may name, with what is beneath them.
    pub allowed_writable: Vec<PathBuf>,
    /// The system call filter.
    pub seccomp: Seccomp,
    /// Sessions and their runs.
    pub session: Session,
    /// Sizes of a sandbox's private places.
    pub sizes: Sizes,
    /// The HTTP server.
    pub http: Http,
}

/// The system call filter.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
#[serde(default)]
pub struct Seccomp {
    /// Replaces the built-in deny list; an empty list means no filter.
    pub deny: Option<Vec<String>>,
}

/// Sessions and their runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Session {
    /// How many sessions may exist at once.
    pub sessions_max: usize,
    /// Idle time after which a session is deleted when its creator named none; seconds, 0 for never.
    pub idle_timeout_seconds: u64,
    /// Runs that may wait for one session's shell.
    pub waiting_runs_max: usize,
    /// How long an interrupted run may take to end by itself before it is killed; milliseconds.
    pub interrupt_grace_ms: u64,
    /// How long a new shell may take to answer; milliseconds.
    pub shell_start_max_ms: u64,
    /// What is kept of the output of a run for clients that come back, and how far a run may be ahead of its readers;
    /// bytes.
    pub run_buffer_max_bytes: usize,
    /// Sandboxes kept ready for the next sessions, once there has been one; 0 for none.
    pub spares: usize,
}

/// Sizes of the private tmpfs mounts of a sandbox; bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Sizes {
    /// /tmp (of the strict profile), /run and /dev/shm together.
    pub private_max_bytes: u64,
    /// What a session's overlays with `persist: true` may hold together, unless its request asks for less; 0 for no limit
    /// but that of all together.
    pub persistent_upper_max_bytes: u64,
    /// The same in files, directories and all else.
    pub persistent_upper_max_inodes: u64,
    /// What a session's overlays with `persist: false` may hold together.
    pub ephemeral_upper_max_bytes: u64,
}

/// The HTTP server.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Http {
    /// The largest JSON body; bytes.
    pub body_max_bytes: usize,
    /// Connections at once.
    pub connections_max: usize,
    /// How long a client may take to send a request's head; seconds.
    pub header_read_max_seconds: u64,
    /// Silence after which a stream carries a `ping` event; seconds.
    pub ping_interval_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            upper_root: "/var/lib/execd/isolation".into(),
            upper_tiers: vec![Tier::Image, Tier::Directory, Tier::Memory],
            upper_max_bytes: 8 << 30,
            retain_max_seconds: 7 * 24 * 3600,
            diff_max_bytes: 4 << 30,
            allowed_writable: ["/workspace", "/mnt", "/media", "/data"].map(PathBuf::from).to_vec(),
            seccomp: Seccomp::default(),
            session: Session::default(),
            sizes: Sizes::default(),
            http: Http::default(),
        }
    }
}

impl Default for Session {
    fn default() -> Self {
        Self {
            sessions_max: 4096,
            idle_timeout_seconds: 1800,
            waiting_runs_max: 16,
            interrupt_grace_ms: 1000,
            shell_start_max_ms: 10_000,
            run_buffer_max_bytes: 256 << 10,
            spares: 2,
        }
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            private_max_bytes: 1 << 30,
            persistent_upper_max_bytes: 2 << 30,
            persistent_upper_max_inodes: 1 << 18,
            ephemeral_upper_max_bytes: 1 << 30,
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self {
            body_max_bytes: 16 << 20,
            connections_max: 4096,
            header_read_max_seconds: 30,
            ping_interval_seconds: 10,
        }
    }
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file exists and cannot be read.
    #[error("read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// It is not TOML, or a value has the wrong type.
    #[error("{}", .0.display())]
    Parse(PathBuf, #[source] toml::de::Error),
    /// A value makes no sense.
    #[error("{key}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        reason: &'static str,
    },
}

impl Config {
    /// Reads the file; one that does not exist gives the defaults. Unknown keys are returned for the log: a
    /// file written for another version should still work, and a typing error should still be seen.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<(Self, Vec<String>), ConfigError> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
            other => other.map_err(|error| ConfigError::Read(path.into(), error))?,
        };
        let mut unknown = Vec::new();
        let config: Self = toml::Deserializer::parse(&text)
            .and_then(|toml| serde_ignored::deserialize(toml, |key| unknown.push(key.to_string())))
            .map_err(|error| ConfigError::Parse(path.into(), error))?;
        config.check()?;
        Ok((config, unknown))
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, reason| Err(ConfigError::Value { key, reason });
        if !self.upper_root.is_absolute() || self.upper_root == Path::new("/") {
            return wrong("upper_root", "must be an absolute path below /");
        }
        if !self.allowed_writable.iter().all(|path| path.is_absolute()) {
            return wrong("allowed_writable", "must list absolute paths");
        }
        if self.session.waiting_runs_max == 0 {
            return wrong("session.waiting_runs_max", "must be at least 1");
        }
        if self.session.run_buffer_max_bytes == 0 {
            return wrong("session.run_buffer_max_bytes", "must be at least 1");
        }
        if self.sizes.ephemeral_upper_max_bytes == 0 {
            return wrong("sizes.ephemeral_upper_max_bytes", "must be at least 1");
        }
        let bytes = self.sizes.persistent_upper_max_bytes;
        if bytes != 0 && !UPPER_BYTES.contains(&bytes) {
            return wrong("sizes.persistent_upper_max_bytes", "must be 0, or between 8 MiB and 4 TiB");
        }
        if !UPPER_INODES.contains(&self.sizes.persistent_upper_max_inodes) {
            return wrong("sizes.persistent_upper_max_inodes", "must be between 1024 and 134217728");
        }
        if self.http.ping_interval_seconds == 0 {
            return wrong("http.ping_interval_seconds", "must be at least 1");
        }
        if self.http.connections_max == 0 {
            return wrong("http.connections_max", "must be at least 1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/isolation.example.toml");

    #[test]
    fn the_example_file_lists_every_key_with_its_default() {
        let (config, unknown) = Config::load(Path::new(EXAMPLE)).unwrap();
        assert_eq!(config, Config { seccomp: config.seccomp.clone(), ..Config::default() });
        assert_eq!(unknown, Vec::<String>::new());
        let built_in: Vec<&str> =
            crate::sandbox::seccomp::DENY.iter().flat_map(|denied| denied.names).copied().collect();
        assert_eq!(config.seccomp.deny.unwrap(), built_in);
        let text = std::fs::read_to_string(EXAMPLE).unwrap();
        let keys = text.lines().filter(|line| line.contains(" = ")).count();
        assert_eq!(keys, 22, "a key was added without a line in the example");
    }

    #[test]
    fn missing_broken_unknown_and_senseless() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        assert_eq!(Config::load(&path).unwrap().0, Config::default());
        std::fs::write(&path, "upper_root = [").unwrap();
        assert!(matches!(Config::load(&path), Err(ConfigError::Parse(..))));
        std::fs::write(&path, "uper_root = '/x'\n[session]\nsessions_max = 3").unwrap();
        let (config, unknown) = Config::load(&path).unwrap();
        assert_eq!((config.session.sessions_max, unknown), (3, vec!["uper_root".to_owned()]));
        std::fs::write(&path, "upper_root = 'relative'").unwrap();
        assert!(matches!(Config::load(&path), Err(ConfigError::Value { key: "upper_root", .. })));
    }
}
