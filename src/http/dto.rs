//! Bodies of the isolated API, and what they mean. `null` anywhere means absent.

use crate::config;
use crate::http::json::Object;
use crate::sandbox::environment::Passthrough;
use crate::sandbox::profile::Profile;
use crate::session::options::{
    Bind, Mount, MountMode, OptionError, SessionOptions, UidMode, UpperOptions, absolute_path, mount_path,
};
use crate::session::probe::{Check, Feature, Report};
use crate::session::session::Session;
use crate::workspace::home::{Keeper, Limit, Tier, Usage};
use crate::workspace::record::RecordedOverlay;
use crate::workspace::retained::Retained;
use crate::workspace::uppers::Rung;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Longer than this is for ever; seconds (ten years).
pub(super) const SECONDS_MAX: u64 = 10 * 365 * 24 * 3600;

/// The smallest limits of uppers that make sense; bytes, and inodes.
const UPPER_BYTES_MIN: u64 = 8 << 20;
const UPPER_INODES_MIN: u64 = 1 << 10;

/// `POST /session`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct CreateRequest {
    profile: Option<String>,
    workspace: Option<Object<WorkspaceDto>>,
    overlays: Option<Vec<Object<OverlayDto>>>,
    extra_writable: Option<Vec<String>>,
    binds: Option<Vec<Object<BindDto>>>,
    share_net: Option<bool>,
    env_passthrough: Option<Object<PassthroughDto>>,
    uid: Option<u32>,
    gid: Option<u32>,
    uid_mode: Option<String>,
    idle_timeout_seconds: Option<i64>,
}

/// `workspace`
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct WorkspaceDto {
    path: Option<String>,
    mode: Option<String>,
    /// Beyond the contract.
    #[serde(skip_serializing)]
    persist: Option<PersistDto>,
}

/// An entry of `overlays`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct OverlayDto {
    path: Option<String>,
    mode: Option<String>,
    persist: Option<PersistDto>,
}

/// `persist`: whether, and beyond the contract, how.
#[derive(Debug)]
pub enum PersistDto {
    /// As in the contract.
    Whether(bool),
    /// It does, in this way.
    How(PersistHow),
}

impl<'de> Deserialize<'de> for PersistDto {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Persist;
        impl<'de> Visitor<'de> for Persist {
            type Value = PersistDto;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean, or an object with retain_seconds, max_bytes, max_inodes")
            }

            fn visit_bool<E>(self, persist: bool) -> Result<PersistDto, E> {
                Ok(PersistDto::Whether(persist))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PersistDto, A::Error> {
                PersistHow::deserialize(MapAccessDeserializer::new(map)).map(PersistDto::How)
            }
        }
        deserializer.deserialize_any(Persist)
    }
}

/// What `persist` may say about the uppers of the session. A field that is not known is refused, since a misspelt
/// `retain_seconds` would lose the changes.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PersistHow {
    retain_seconds: Option<u64>,
    max_bytes: Option<u64>,
    max_inodes: Option<u64>,
}

/// An overlay as it is shown.
#[derive(Debug, Serialize)]
struct ShownOverlay {
    path: String,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    persist: Option<bool>,
}

/// An entry of `binds`.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct BindDto {
    source: Option<String>,
    dest: Option<String>,
    readonly: Option<bool>,
}

/// `env_passthrough`
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct PassthroughDto {
    mode: Option<String>,
    keys: Option<Vec<String>>,
}

impl CreateRequest {
    /// What is asked for, with defaults filled in.
    ///
    /// # Errors
    /// Names the field.
    pub fn options(self, config: &config::Session) -> Result<SessionOptions, OptionError> {
        let idle = match self.idle_timeout_seconds {
            Some(seconds) => u64::try_from(seconds)
                .map_err(|_| OptionError::new("idle_timeout_seconds", "must not be negative"))?,
            None => config.idle_timeout_seconds,
        };
        let overlays = self.overlays.unwrap_or_default();
        let mut uppers = UpperOptions::default();
        if let Some(Object(WorkspaceDto { persist: Some(PersistDto::How(how)), .. })) = &self.workspace {
            put_together(&mut uppers, "workspace", how)?;
        }
        for (index, Object(overlay)) in overlays.iter().enumerate() {
            if let Some(PersistDto::How(how)) = &overlay.persist {
                put_together(&mut uppers, &format!("overlays[{index}]"), how)?;
            }
        }
        let options = SessionOptions {
            profile: profile(self.profile.as_deref())?,
            mounts: mounts(self.workspace, overlays)?,
            extra_writable: self
                .extra_writable
                .unwrap_or_default()
                .iter()
                .map(|path| absolute_path("extra_writable", path))
                .collect::<Result<_, _>>()?,
            binds: self.binds.unwrap_or_default().into_iter().map(bind).collect::<Result<_, _>>()?,
            share_net: self.share_net.unwrap_or(true),
            environment: passthrough(self.env_passthrough.unwrap_or_default())?,
            uid: self.uid,
            gid: self.gid,
            uid_mode: uid_mode(self.uid_mode.as_deref())?,
            idle_timeout: (idle > 0).then(|| Duration::from_secs(idle.min(SECONDS_MAX))),
            uppers,
        };
        for (field, id) in [("uid", options.uid), ("gid", options.gid)] {
            // (uid_t)-1 means "leave as it is" to every call that takes one.
            if id == Some(u32::MAX) {
                return Err(OptionError::new(field, "is no valid id"));
            }
        }
        options.check()?;
        Ok(options)
    }
}

/// An absent or empty string, as Go clients send unset ones.
fn set(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

fn one_of<T: Copy>(
    field: &str,
    given: Option<&str>,
    default: T,
    known: &[(&str, T)],
) -> Result<T, OptionError> {
    let Some(given) = set(given) else { return Ok(default) };
    known.iter().find(|(name, _)| *name == given).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        OptionError::new(field, format!("{given:?} is none of {}", names.join(", ")))
    })
}

fn profile(given: Option<&str>) -> Result<Profile, OptionError> {
    one_of("profile", given, Profile::Strict, &[("strict", Profile::Strict), ("balanced", Profile::Balanced)])
}

fn uid_mode(given: Option<&str>) -> Result<UidMode, OptionError> {
    one_of("uid_mode", given, UidMode::Setpriv, &[("setpriv", UidMode::Setpriv), ("userns", UidMode::Userns)])
}

const OVERLAY: MountMode = MountMode::Overlay { persist: true };

fn mount_mode(field: &str, given: Option<&str>) -> Result<MountMode, OptionError> {
    let known = [("rw", MountMode::ReadWrite), ("overlay", OVERLAY), ("ro", MountMode::ReadOnly)];
    one_of(field, given, OVERLAY, &known)
}

fn persistence(field: &str, mode: MountMode, persist: Option<&PersistDto>) -> Result<MountMode, OptionError> {
    match (mode, persist) {
        (MountMode::Overlay { .. }, persist) => {
            Ok(MountMode::Overlay { persist: !matches!(persist, Some(PersistDto::Whether(false))) })
        }
        (mode, None) => Ok(mode),
        (_, Some(_)) => Err(OptionError::new(field, "only goes with mode overlay")),
    }
}

fn mounts(
    workspace: Option<Object<WorkspaceDto>>,
    overlays: Vec<Object<OverlayDto>>,
) -> Result<Vec<Mount>, OptionError> {
    let mut mounts = Vec::new();
    if let Some(Object(WorkspaceDto { path, mode, persist })) = workspace {
        let mode = mount_mode("workspace.mode", mode.as_deref())?;
        let mode = persistence("workspace.persist", mode, persist.as_ref())?;
        match set(path.as_deref()) {
            Some(path) => mounts.push(Mount { path: mount_path("workspace.path", path)?, mode }),
            // The Go SDK always sends the object.
            None if !overlays.is_empty() => {}
            None => return Err(OptionError::new("workspace.path", "must not be empty")),
        }
    }
    for (index, Object(overlay)) in overlays.into_iter().enumerate() {
        let field = |name: &str| format!("overlays[{index}].{name}");
        let path = mount_path(&field("path"), overlay.path.as_deref().unwrap_or_default())?;
        let mode = mount_mode(&field("mode"), overlay.mode.as_deref())?;
        let mode = persistence(&field("persist"), mode, overlay.persist.as_ref())?;
        mounts.push(Mount { path, mode });
    }
    Ok(mounts)
}

/// The uppers of a session have one place, so what its overlays say about them is put together: the longest and largest
/// counts.
fn put_together(options: &mut UpperOptions, of: &str, how: &PersistHow) -> Result<(), OptionError> {
    for (name, value, least) in
        [("max_bytes", how.max_bytes, UPPER_BYTES_MIN), ("max_inodes", how.max_inodes, UPPER_INODES_MIN)]
    {
        if value.is_some_and(|value| value < least) {
            return Err(OptionError::new(
                format!("{of}.persist.{name}"),
                format!("must be at least {least}"),
            ));
        }
    }
    let retain = Duration::from_secs(how.retain_seconds.unwrap_or(0).min(SECONDS_MAX));
    options.retain = options.retain.max(retain);
    options.bytes_max = options.bytes_max.max(how.max_bytes);
    options.inodes_max = options.inodes_max.max(how.max_inodes);
    Ok(())
}

fn bind(Object(bind): Object<BindDto>) -> Result<Bind, OptionError> {
    let source = absolute_path("binds.source", bind.source.as_deref().unwrap_or_default())?;
    let dest = match set(bind.dest.as_deref()) {
        Some(dest) => absolute_path("binds.dest", dest)?,
        None => source.clone(),
    };
    Ok(Bind { source, dest, read_only: bind.readonly.unwrap_or(false) })
}

fn passthrough(Object(given): Object<PassthroughDto>) -> Result<Passthrough, OptionError> {
    #[derive(Clone, Copy)]
    enum Mode {
        Default,
        Deny,
        Allow,
    }
    let known = [("deny", Mode::Deny), ("allow", Mode::Allow)];
    let mode = one_of("env_passthrough.mode", given.mode.as_deref(), Mode::Default, &known)?;
    let keys = given.keys.unwrap_or_default();
    Ok(match mode {
        Mode::Default => Passthrough::NotSecret,
        Mode::Deny => Passthrough::Deny(keys),
        Mode::Allow => Passthrough::Allow(keys),
    })
}

/// Answer of `POST /session`.
#[derive(Debug, Serialize)]
pub struct CreateResponse {
    session_id: String,
    created_at: String,
}

impl From<&Session> for CreateResponse {
    fn from(session: &Session) -> Self {
        Self { session_id: session.id.to_string(), created_at: rfc3339(session.created_at) }
    }
}

/// Answer of `GET /sessions`.
#[derive(Debug, Serialize)]
pub struct ListResponse {
    /// All sessions.
    pub sessions: Vec<Summary>,
}

/// An entry of it.
#[derive(Debug, Serialize)]
pub struct Summary {
    session_id: String,
    #[serde(flatten)]
    life: LifeDto,
}

#[derive(Debug, Serialize)]
struct LifeDto {
    status: &'static str,
    created_at: String,
    last_run_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_remaining_seconds: Option<u64>,
}

impl From<&Session> for Summary {
    fn from(session: &Session) -> Self {
        Self { session_id: session.id.to_string(), life: life(session) }
    }
}

fn life(session: &Session) -> LifeDto {
    LifeDto {
        status: session.state().name(),
        created_at: rfc3339(session.created_at),
        last_run_at: rfc3339(session.last_run_at()),
        idle_remaining_seconds: session.idle_remaining_seconds(),
    }
}

/// Answer of `GET /session/{id}`: its state and what it was created with.
#[derive(Debug, Serialize)]
pub struct StateResponse {
    session_id: String,
    #[serde(flatten)]
    life: LifeDto,
    profile: Profile,
    #[serde(skip_serializing_if = "Option::is_none")]
    workspace: Option<WorkspaceDto>,
    overlays: Vec<ShownOverlay>,
    extra_writable: Vec<String>,
    binds: Vec<BindDto>,
    share_net: bool,
    env_passthrough: PassthroughDto,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    uid_mode: UidMode,
    idle_timeout_seconds: u64,
    /// Beyond the contract: where the changes lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    uppers: Option<SessionUppersDto>,
}

/// Where the changes of a session's persistent overlays lie.
#[derive(Debug, Serialize)]
struct SessionUppersDto {
    tier: Tier,
    /// Whether the kernel keeps to the limit, or execd.
    limited_by: Keeper,
    max: Limit,
    /// Some seconds ago.
    used: Usage,
    retain_seconds: u64,
    /// Why nothing can be written any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    sealed: Option<String>,
}

impl From<&Session> for StateResponse {
    fn from(session: &Session) -> Self {
        let options = &session.options;
        let overlays: Vec<ShownOverlay> = options.mounts.iter().map(overlay_dto).collect();
        let workspace = match overlays.as_slice() {
            [only] => Some(WorkspaceDto {
                path: Some(only.path.clone()),
                mode: Some(only.mode.into()),
                persist: None,
            }),
            _ => None,
        };
        Self {
            session_id: session.id.to_string(),
            life: life(session),
            profile: options.profile,
            workspace,
            overlays,
            extra_writable: options.extra_writable.iter().map(|path| text(path)).collect(),
            binds: options
                .binds
                .iter()
                .map(|bind| BindDto {
                    source: Some(text(&bind.source)),
                    dest: Some(text(&bind.dest)),
                    readonly: Some(bind.read_only),
                })
                .collect(),
            share_net: options.share_net,
            env_passthrough: passthrough_dto(&options.environment),
            uid: options.uid,
            gid: options.gid,
            uid_mode: options.uid_mode,
            idle_timeout_seconds: options.idle_timeout.map_or(0, |timeout| timeout.as_secs()),
            uppers: session.uppers_info().map(|info| SessionUppersDto {
                tier: info.tier,
                limited_by: info.tier.keeper(),
                max: info.limit,
                used: info.used,
                retain_seconds: options.uppers.retain.as_secs(),
                sealed: info.sealed,
            }),
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn overlay_dto(mount: &Mount) -> ShownOverlay {
    let (mode, persist) = match mount.mode {
        MountMode::ReadWrite => ("rw", None),
        MountMode::ReadOnly => ("ro", None),
        MountMode::Overlay { persist } => ("overlay", Some(persist)),
    };
    ShownOverlay { path: text(&mount.path), mode, persist }
}

/// Answer of `GET /uppers`.
#[derive(Debug, Serialize)]
pub struct UppersResponse {
    /// Those of sessions that have ended.
    pub uppers: Vec<UpperResponse>,
}

/// The uppers of a session that has ended.
#[derive(Debug, Serialize)]
pub struct UpperResponse {
    session_id: String,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    tier: Tier,
    /// What they take; bytes.
    used_bytes: u64,
    /// Whether a commit of it was cut off.
    half_committed: bool,
    overlays: Vec<KeptOverlay>,
}

#[derive(Debug, Serialize)]
struct KeptOverlay {
    path: String,
    /// Where a commit goes, links resolved.
    lower: String,
}

impl From<&Retained> for UpperResponse {
    fn from(retained: &Retained) -> Self {
        let record = retained.record();
        let overlay = |overlay: &RecordedOverlay| KeptOverlay {
            path: text(&overlay.dest),
            lower: text(&overlay.lower),
        };
        Self {
            session_id: record.session.to_string(),
            created_at: rfc3339(record.created.system_time()),
            ended_at: record.ended.map(|ended| rfc3339(ended.system_time())),
            expires_at: record.expires().map(rfc3339),
            tier: record.tier,
            used_bytes: retained.used_bytes(),
            half_committed: record.committing,
            overlays: record.overlays.iter().map(overlay).collect(),
        }
    }
}

fn passthrough_dto(passthrough: &Passthrough) -> PassthroughDto {
    let (mode, keys) = match passthrough {
        Passthrough::NotSecret => ("deny", Vec::new()),
        Passthrough::Deny(keys) => ("deny", keys.clone()),
        Passthrough::Allow(keys) => ("allow", keys.clone()),
    };
    PassthroughDto { mode: Some(mode.into()), keys: Some(keys) }
}

/// Answer of `GET /capabilities`.
#[derive(Debug, Serialize)]
pub struct CapabilitiesResponse {
    available: bool,
    isolator: &'static str,
    version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    setpriv_available: bool,
    userns_available: bool,
    commit_supported: bool,
    diff_supported: bool,
    hardening: Hardening,
    /// Beyond the contract: everything that was tried, with reasons.
    checks: Vec<Check>,
    /// And where uppers can lie, the preferred place first.
    uppers: Vec<Rung>,
}

#[derive(Debug, Serialize)]
struct Hardening {
    init_mode: &'static str,
    signal_shield: bool,
    cap_drop: Layer,
    seccomp: Layer,
    landlock: Layer,
    ebpf: Layer,
}

#[derive(Debug, Serialize)]
struct Layer {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'static str>,
}

impl CapabilitiesResponse {
    /// From what was found out.
    pub fn new(report: &Report, has_filter: bool, uppers: Vec<Rung>) -> Self {
        let has_reachable_uppers = report.available() && uppers.iter().any(|rung| rung.available);
        const ACTIVE: Layer = Layer { state: "active", message: None };
        let off = |state, message| Layer { state, message: Some(message) };
        Self {
            available: report.available(),
            isolator: "execd",
            version: env!("CARGO_PKG_VERSION"),
            message: (!report.available()).then(|| report.why_not(Feature::Setpriv).to_owned()),
            setpriv_available: report.can(Feature::Setpriv),
            userns_available: report.can(Feature::Userns),
            commit_supported: has_reachable_uppers,
            diff_supported: has_reachable_uppers,
            hardening: Hardening {
                init_mode: "none",
                signal_shield: false,
                cap_drop: ACTIVE,
                seccomp: if has_filter {
                    ACTIVE
                } else {
                    off("disabled", "the configured deny list is empty")
                },
                landlock: off("disabled", "not used"),
                ebpf: off("unsupported", "not part of this build"),
            },
            checks: report.checks.clone(),
            uppers,
        }
    }
}

/// RFC 3339 in UTC.
pub(super) fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::json::decode;

    fn create(body: &str) -> Result<SessionOptions, String> {
        let request: CreateRequest = decode(body.as_bytes()).map_err(|error| error.to_string())?;
        request.options(&config::Session::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_and_nulls() {
        let options = create(
            r#"{"workspace":{"path":"/w","mode":null},"uid":null,"binds":null,"env_passthrough":null,"x":1}"#,
        )
        .unwrap();
        assert_eq!(options.mounts, [Mount { path: "/w".into(), mode: OVERLAY }]);
        assert_eq!((options.profile, options.uid_mode), (Profile::Strict, UidMode::Setpriv));
        assert!(options.share_net);
        assert_eq!(options.idle_timeout, Some(Duration::from_secs(1800)));
        assert_eq!(
            create(r#"{"workspace":{"path":"/w"},"idle_timeout_seconds":0}"#).unwrap().idle_timeout,
            None
        );
        assert!(create(r#"{"workspace":{"path":"/w"},"idle_timeout_seconds":9223372036854775807}"#).is_ok());
    }

    #[test]
    fn workspace_is_prepended_and_may_be_empty_beside_overlays() {
        let paths = |body| create(body).map(|o| o.mounts.iter().map(|m| text(&m.path)).collect::<Vec<_>>());
        assert_eq!(paths(r#"{"workspace":{"path":"/w"},"overlays":[{"path":"/o"}]}"#).unwrap(), ["/w", "/o"]);
        assert_eq!(paths(r#"{"workspace":{"path":""},"overlays":[{"path":"/o"}]}"#).unwrap(), ["/o"]);
    }

    #[test]
    fn mistakes_name_their_field() {
        for (body, field) in [
            (r#"{}"#, "workspace"),
            (r#"{"workspace":{}}"#, "workspace.path"),
            (r#"{"workspace":{"path":""}}"#, "workspace.path"),
            (r#"{"workspace":{"path":"w"}}"#, "workspace.path"),
            (r#"{"workspace":{"path":"/a/../b"}}"#, "workspace.path"),
            (r#"{"workspace":{"path":"/w","mode":"x"}}"#, "workspace.mode"),
            (r#"{"workspace":"/w"}"#, "workspace"),
            (r#"{"overlays":[{"path":"/w","mode":"rw","persist":true}]}"#, "overlays[0].persist"),
            (r#"{"overlays":[{"path":"/w"},{"path":"/w"}]}"#, "overlays"),
            (r#"{"workspace":{"path":"/w"},"profile":"loose"}"#, "profile"),
            (r#"{"workspace":{"path":"/w"},"uid_mode":"x"}"#, "uid_mode"),
            (r#"{"workspace":{"path":"/w"},"uid":-1}"#, "uid"),
            (r#"{"workspace":{"path":"/w"},"uid":4294967295}"#, "uid"),
            (r#"{"workspace":{"path":"/w"},"uid":4294967296}"#, "uid"),
            (r#"{"workspace":{"path":"/w"},"idle_timeout_seconds":-1}"#, "idle_timeout_seconds"),
            (r#"{"workspace":{"path":"/w"},"binds":[{"source":"a"}]}"#, "binds.source"),
            (r#"{"workspace":{"path":"/w"},"binds":[{"source":"/a","dest":"/proc/x"}]}"#, "binds.dest"),
            (r#"{"workspace":{"path":"/w"},"extra_writable":["/a/../.."]}"#, "extra_writable"),
            (r#"{"workspace":{"path":"/w"},"env_passthrough":{"mode":"all"}}"#, "env_passthrough.mode"),
        ] {
            let error = create(body).unwrap_err();
            assert!(error.starts_with(&format!("{field}: ")), "{body}: {error}");
        }
    }
}
