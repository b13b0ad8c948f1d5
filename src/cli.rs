//! The command line. `serve` is also what execd does when no subcommand is named, and then it reads its
//! arguments as the Go original did: one dash or two before a name, flags ended by the first other word,
//! further words ignored.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;

/// Disposable, isolated bash sessions over HTTP.
#[derive(Debug, Parser)]
#[command(name = "execd", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do; `serve` when left out.
    #[command(subcommand)]
    pub command: Subcommands,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Subcommands {
    /// Serve the HTTP API (the default).
    Serve(ServeArgs),
    /// Run one command in a throw-away session on the current folder.
    Run(RunArgs),
    /// Find out what this machine can isolate, and say why where it cannot.
    Probe(ProbeArgs),
}

/// Options of `execd serve`. A flag beats its environment variable.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// TCP port; 0 takes a free one, which the log names.
    #[arg(long, default_value_t = 44772)]
    pub port: u16,
    /// Address to listen on; the default is every address, IPv4 and IPv6.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<IpAddr>,
    /// Shared secret that requests carry in X-EXECD-ACCESS-TOKEN; empty for none.
    #[arg(long, env = "EXECD_ACCESS_TOKEN", hide_env_values = true, default_value = "")]
    pub access_token: String,
    /// Isolation settings; see configs/isolation.example.toml.
    #[arg(long, env = "EXECD_ISOLATION_CONFIG", default_value = "", value_name = "FILE")]
    pub isolation_config: String,
    /// 0 to 2 nothing, 3 errors, 4 warnings, 5 and 6 what happens, 7 details.
    #[arg(long, default_value_t = 6)]
    pub log_level: u8,
    /// One line a record, for people or for machines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Where the log goes; standard output by default.
    #[arg(long, env = "EXECD_LOG_FILE", default_value = "", value_name = "FILE")]
    pub log_file: String,
    /// How long streams may take to end when execd is told to stop, such as 200ms or 2s; at most 5s.
    #[arg(long, env = "EXECD_API_GRACE_SHUTDOWN", default_value = "200ms", value_parser = duration)]
    pub graceful_shutdown_timeout: std::time::Duration,
    /// Accepted for command lines written for the original.
    #[arg(long, env = "JUPYTER_HOST", hide = true, default_value = "")]
    pub jupyter_host: String,
    /// Accepted for command lines written for the original.
    #[arg(long, env = "JUPYTER_TOKEN", hide = true, hide_env_values = true, default_value = "")]
    pub jupyter_token: String,
    /// Accepted for command lines written for the original.
    #[arg(long, env = "EXECD_JUPYTER_IDLE_POLL_INTERVAL", hide = true, default_value = "")]
    pub jupyter_idle_poll_interval: String,
}

/// How log records look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Options of `execd run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The folder to work in, seen at the same path inside; the current one by default.
    #[arg(long, value_name = "FOLDER")]
    pub workspace: Option<PathBuf>,
    /// overlay: changes are thrown away; rw: they are real; ro: there are none.
    #[arg(long, value_enum, default_value_t = RunMode::Overlay)]
    pub mode: RunMode,
    /// strict: a private /tmp; balanced: the real one.
    #[arg(long, value_enum, default_value_t = RunProfile::Strict)]
    pub profile: RunProfile,
    /// Another path to show, as SOURCE, SOURCE:DEST or SOURCE:DEST:ro.
    #[arg(long = "bind", value_name = "SPEC")]
    pub binds: Vec<String>,
    /// Loopback only.
    #[arg(long)]
    pub no_net: bool,
    /// Run as this uid.
    #[arg(long)]
    pub uid: Option<u32>,
    /// Run as this gid.
    #[arg(long)]
    pub gid: Option<u32>,
    /// Use a user namespace, which needs no privilege; the default when execd is not started by root.
    #[arg(long)]
    pub userns: bool,
    /// Isolation settings; see configs/isolation.example.toml.
    #[arg(long, env = "EXECD_ISOLATION_CONFIG", default_value = "", value_name = "FILE")]
    pub isolation_config: String,
    /// Print to standard error how long clone, mounts and exec took.
    #[arg(long)]
    pub timings: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
}

/// Modes of `execd run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RunMode {
    /// Throw changes away.
    Overlay,
    /// Write through.
    Rw,
    /// Refuse writes.
    Ro,
}

/// Profiles of `execd run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RunProfile {
    /// A private /tmp.
    Strict,
    /// The real /tmp.
    Balanced,
}

/// Options of `execd probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Print the answer of GET /v1/isolated/capabilities instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Isolation settings; see configs/isolation.example.toml.
    #[arg(long, env = "EXECD_ISOLATION_CONFIG", default_value = "", value_name = "FILE")]
    pub isolation_config: String,
}

const SUBCOMMANDS: [&str; 3] = ["serve", "run", "probe"];
const ASKS_FOR_HELP: [&str; 4] = ["--help", "-h", "--version", "-V"];

/// Rewrites a command line in the original's syntax into one clap reads; a line that names a subcommand other
/// than `serve` passes unchanged.
pub fn normalize(args: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut args = args.into_iter().peekable();
    let mut line: Vec<String> = args.next().into_iter().collect();
    match args.peek().map(String::as_str) {
        Some("serve") => drop(args.next()),
        Some(word) if SUBCOMMANDS.contains(&word) || ASKS_FOR_HELP.contains(&word) => {
            line.extend(args);
            return line;
        }
        _ => {}
    }
    line.push("serve".into());
    // Go's flag package (pkg.go.dev/flag, "Command line flag syntax").
    while let Some(word) = args.next() {
        let Some(name) = word.strip_prefix('-').map(|rest| rest.strip_prefix('-').unwrap_or(rest)) else {
            break;
        };
        if name.is_empty() {
            break;
        }
        if ASKS_FOR_HELP.contains(&word.as_str()) || name == "help" {
            line.push("--help".into());
        } else if name.contains('=') {
            line.push(format!("--{name}"));
        } else {
            // Every flag of ours takes a value; joining it keeps values that start with a dash.
            match args.next() {
                Some(value) => line.push(format!("--{name}={value}")),
                None => line.push(format!("--{name}")),
            }
        }
    }
    line
}

/// A duration in Go's notation: a number with ms, s or m.
fn duration(text: &str) -> Result<std::time::Duration, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is no duration such as 200ms"))?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        _ => return Err(format!("{text:?} needs a unit: ms, s or m")),
    };
    std::time::Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(line: &str) -> ServeArgs {
        let args = normalize(line.split(' ').map(String::from));
        match Cli::try_parse_from(&args).unwrap_or_else(|error| panic!("{args:?}: {error}")).command {
            Subcommands::Serve(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_originals_command_lines_work() {
        for line in [
            "execd --port 1 --access-token T",
            "execd -port=1 -access-token=T",
            "execd -port 1 --access-token=T tail -f /dev/null",
            "execd serve --port 1 --access-token T",
            "execd --port=1 -jupyter-host=http://x --access-token T -- --port 2",
        ] {
            let args = serve(line);
            assert_eq!((args.port, args.access_token.as_str()), (1, "T"), "{line}");
        }
        assert_eq!(serve("execd tail -f /dev/null").port, 44772);
        assert_eq!(serve("execd --access-token= --port 2").port, 2);
        assert_eq!(serve("execd -graceful-shutdown-timeout 2s").graceful_shutdown_timeout.as_millis(), 2000);
    }

    #[test]
    fn other_subcommands_and_mistakes() {
        let parse = |line: &str| Cli::try_parse_from(normalize(line.split(' ').map(String::from)));
        assert!(matches!(parse("execd run --no-net -- ls -l").unwrap().command, Subcommands::Run(_)));
        assert!(matches!(parse("execd probe --json").unwrap().command, Subcommands::Probe(_)));
        for bad in ["execd --no-such-flag x", "execd --port x", "execd --port", "execd run"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
