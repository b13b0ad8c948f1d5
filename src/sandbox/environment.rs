//! Which of the daemon's environment variables a session sees.
//!
//! Three things always hold, whatever the caller asks: execd's own settings and what would make bash run or
//! read something at start never pass; names that look like secrets pass only when listed by name with
//! `allow`; and there is a usable `PATH`.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStrExt;

/// The caller's choice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Passthrough {
    /// Everything but what looks secret.
    #[default]
    NotSecret,
    /// Everything but what looks secret and these.
    Deny(Vec<String>),
    /// Only these.
    Allow(Vec<String>),
}

/// execd's own settings; never passed, not even when listed.
const OWN: [&str; 8] = [
    "EXECD_ACCESS_TOKEN",
    "EXECD_ISOLATION_CONFIG",
    "EXECD_ENVS",
    "EXECD_LIFECYCLE_CONFIG",
    "EXECD_RUNTIME_INIT",
    "JUPYTER_HOST",
    "JUPYTER_TOKEN",
    "OPENSANDBOX_LIFECYCLE",
];
/// What bash would act on before or beside the session's code (bash(1), INVOCATION and Shell Variables), and
/// what would be wrong inside.
const SHELL: [&str; 8] =
    ["BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "PS4", "PROMPT_COMMAND", "PWD", "OLDPWD"];
/// Name endings and beginnings that mean a secret; compared without case.
const SECRET_ENDINGS: [&str; 4] = ["_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD"];
const SECRET_BEGINNINGS: [&str; 5] = ["AWS_", "ALI_", "ALIYUN_", "K8S_", "KUBE_"];

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Filters `variables`, then lets `overrides` (such as a user's `HOME`) replace what is there. Pure.
pub fn build(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
    passthrough: &Passthrough,
    overrides: &[(&str, String)],
) -> Vec<CString> {
    let mut kept: Vec<CString> = Vec::new();
    let mut has_path = false;
    for (name, value) in variables {
        let Some(name) = name.to_str() else { continue };
        if !passes(name, passthrough) || overrides.iter().any(|(over, _)| *over == name) {
            continue;
        }
        has_path |= name == "PATH";
        kept.extend(variable(name.as_bytes(), value.as_bytes()));
    }
    kept.extend(overrides.iter().filter_map(|(name, value)| variable(name.as_bytes(), value.as_bytes())));
    if !has_path && !overrides.iter().any(|(name, _)| *name == "PATH") {
        kept.extend(variable(b"PATH", DEFAULT_PATH.as_bytes()));
    }
    kept
}

fn variable(name: &[u8], value: &[u8]) -> Option<CString> {
    CString::new([name, b"=", value].concat()).ok()
}

fn passes(name: &str, passthrough: &Passthrough) -> bool {
    if OWN.contains(&name) || SHELL.contains(&name) || name.starts_with("BASH_FUNC_") {
        return false;
    }
    let listed = |keys: &[String]| keys.iter().any(|key| key == name);
    match passthrough {
        Passthrough::NotSecret => !looks_secret(name),
        Passthrough::Deny(keys) => !looks_secret(name) && !listed(keys),
        Passthrough::Allow(keys) => listed(keys),
    }
}

fn looks_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    SECRET_ENDINGS.iter().any(|end| name.ends_with(end))
        || SECRET_BEGINNINGS.iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(passthrough: &Passthrough, variables: &[&str]) -> Vec<String> {
        let variables = variables.iter().map(|name| (OsString::from(name), OsString::from("v")));
        let built = build(variables, passthrough, &[("HOME", "/h".into())]);
        built.iter().map(|v| v.to_str().unwrap().split('=').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn secrets_and_own_settings_stay_out() {
        let all = [
            "PATH",
            "LANG",
            "X_TOKEN",
            "openai_api_key",
            "AWS_REGION",
            "EXECD_ACCESS_TOKEN",
            "BASH_ENV",
            "HOME",
        ];
        assert_eq!(names(&Passthrough::NotSecret, &all), ["PATH", "LANG", "HOME"]);
        // Denying one more name does not switch the patterns off.
        assert_eq!(names(&Passthrough::Deny(vec!["LANG".into()]), &all), ["PATH", "HOME"]);
    }

    #[test]
    fn allow_passes_only_what_is_listed_and_keeps_a_path() {
        let allow = Passthrough::Allow(vec!["X_TOKEN".into(), "EXECD_ACCESS_TOKEN".into()]);
        assert_eq!(names(&allow, &["X_TOKEN", "EXECD_ACCESS_TOKEN", "LANG"]), ["X_TOKEN", "HOME", "PATH"]);
    }
}
