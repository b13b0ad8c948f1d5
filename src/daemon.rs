//! `execd serve` and `execd probe`: what both set up, and the daemon's life from start to shutdown.

use crate::cli::{ProbeArgs, ServeArgs};
use crate::config::{Config, Sizes};
use crate::http::dto::CapabilitiesResponse;
use crate::http::{self, App};
use crate::sandbox::cgroup::CgroupTree;
use crate::sandbox::launcher::Launcher;
use crate::sandbox::seccomp;
use crate::session::launchpad::Launchpad;
use crate::session::prepare::Foundation;
use crate::session::probe::{Report, probe};
use crate::session::registry::Registry;
use crate::telemetry;
use crate::workspace::home::{EPHEMERAL_INODES_MAX, Limit};
use crate::workspace::uppers::{Limits, Uppers, UppersError};
use anyhow::Context;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How long sessions may take to end at shutdown.
const SHUTDOWN_MAX: Duration = Duration::from_secs(5);
/// Worker threads are half the cores, up to this many. Handlers do little and what blocks runs elsewhere; more
/// workers only add wake-ups between cores, which cost more than the work, and the sessions need cores too.
const WORKERS_MAX: usize = 4;

struct Machine {
    foundation: Arc<Foundation>,
    launcher: Arc<Launcher>,
    cgroups: Option<CgroupTree>,
    report: Report,
}

/// Everything sessions are made from, and what the machine can do with it.
fn set_up(config_path: &str) -> anyhow::Result<Machine> {
    // Modes of what execd makes are exactly those it names.
    rustix::process::umask(rustix::fs::Mode::empty());
    raise_descriptor_limit();
    let (config, unknown) = Config::load(Path::new(config_path))?;
    for key in unknown {
        tracing::warn!(key, "the isolation configuration has an unknown key");
    }
    let filter = config.seccomp.deny.as_deref().map_or_else(seccomp::builtin, seccomp::from_names);
    for name in &filter.unknown {
        tracing::warn!(name, "the deny list names an unknown system call");
    }
    let uppers = match Uppers::open(&config.upper_root, limits(&config.sizes), &config.upper_tiers) {
        Ok(uppers) => Some(uppers),
        Err(error @ UppersError::InUse(_)) => return Err(error.into()),
        Err(error) => {
            let error = anyhow::Error::from(error);
            tracing::warn!(error = format!("{error:#}"), "overlays will use memory");
            None
        }
    };
    let cgroups = CgroupTree::create();
    if let Err(reason) = &cgroups {
        tracing::warn!(reason, "no cgroup v2 tree; processes of a run are found by their parents");
    }
    let launcher = Launcher::start().context("start the launcher")?;
    let foundation = Arc::new(Foundation { config, filter, uppers, has_cgroups: cgroups.is_ok() });
    let report = probe(&launcher, &foundation, cgroups.as_ref().map(|_| ()).map_err(Clone::clone));
    Ok(Machine { foundation, launcher, cgroups: cgroups.ok(), report })
}

fn limits(sizes: &Sizes) -> Limits {
    Limits {
        persistent: Limit {
            bytes: sizes.persistent_upper_max_bytes,
            inodes: sizes.persistent_upper_max_inodes,
        },
        ephemeral: Limit { bytes: sizes.ephemeral_upper_max_bytes, inodes: EPHEMERAL_INODES_MAX },
    }
}

/// Every session holds some twenty descriptors.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Serves until told to stop.
///
/// # Errors
/// When it cannot start: a broken configuration, an address in use, an `upper_root` in use.
pub fn serve(args: &ServeArgs) -> anyhow::Result<i32> {
    telemetry::start(args.log_level, args.log_format, &args.log_file)?;
    let machine = set_up(&args.isolation_config)?;
    for check in &machine.report.checks {
        match &check.reason {
            None => tracing::info!(check = check.name.title(), "available"),
            Some(reason) => tracing::warn!(check = check.name.title(), reason, "not available"),
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = (cores / 2).clamp(1, WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(run(args, machine))?;
    // A thread stuck in the kernel must not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(0)
}

async fn run(args: &ServeArgs, machine: Machine) -> anyhow::Result<()> {
    let Machine { foundation, launcher, cgroups, report } = machine;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = http::server::listen(args.listen, args.port)?;
    let address = listener.local_addr()?;
    let answer_max = Duration::from_millis(foundation.config.session.shell_start_max_ms);
    let launchpad = Launchpad { launcher, cgroups, answer_max };
    let registry = Registry::new(Arc::clone(&foundation), launchpad, report).context("start the registry")?;
    tokio::spawn(Registry::watch_memory(Arc::downgrade(&registry)));
    tokio::spawn(Registry::watch_uppers(Arc::downgrade(&registry)));
    let app = App { registry: Arc::clone(&registry), access_token: args.access_token.as_str().into() };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        port = address.port(),
        %address,
        token = !args.access_token.is_empty(),
        "listening"
    );
    if args.access_token.is_empty() && !address.ip().is_loopback() {
        tracing::warn!(
            "whoever reaches this port can run code: set EXECD_ACCESS_TOKEN, or --listen 127.0.0.1"
        );
    }
    let (stop, stopped) = watch::channel(false);
    let drain_max = args.graceful_shutdown_timeout.min(SHUTDOWN_MAX);
    let router = http::router(app);
    let config = foundation.config.http.clone();
    let server =
        tokio::spawn(async move { http::server::serve(listener, router, &config, stopped, drain_max).await });
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    stop.send_replace(true);
    registry.shut_down(SHUTDOWN_MAX).await;
    server.await.context("the server failed")
}

/// Prints what this machine can isolate. The status is 1 when it cannot isolate at all.
///
/// # Errors
/// As [`serve`].
pub fn print_probe(args: &ProbeArgs) -> anyhow::Result<i32> {
    let machine = set_up(&args.isolation_config)?;
    if args.json {
        let has_filter = !machine.foundation.filter.program.is_empty();
        let ladder = machine.foundation.ladder();
        let response = CapabilitiesResponse::new(&machine.report, has_filter, ladder);
        println!("{}", serde_json::to_string_pretty(&response)?);
    } else {
        for check in &machine.report.checks {
            let mark = if check.available { "yes" } else { "no " };
            println!("{mark}  {}", check.name.title());
            if let Some(reason) = &check.reason {
                println!("     {reason}");
            }
        }
    }
    Ok(i32::from(!machine.report.available()))
}
