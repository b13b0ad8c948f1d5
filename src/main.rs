//! The `execd` program: picks the role and reports errors.
#![forbid(unsafe_code)]

use clap::Parser;
use execd::cli::{Cli, Subcommands, normalize};
use execd::sandbox::launcher;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(launcher::ROLE) {
        return report(execd_init_shim::launcher::serve().map(|()| 0).map_err(Into::into));
    }
    report(match Cli::parse_from(normalize(std::env::args())).command {
        Subcommands::Run(args) => execd::run_once::run(&args),
        Subcommands::Serve(args) => execd::daemon::serve(&args),
        Subcommands::Probe(args) => execd::daemon::print_probe(&args),
    })
}

fn report(outcome: anyhow::Result<i32>) -> ExitCode {
    match outcome {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("execd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
