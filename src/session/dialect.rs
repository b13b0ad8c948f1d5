//! What is said to the shell. Pure text; see `super::shell` for the protocol.

use super::control::ControlDir;
use execd_init_shim::messages::Command;
use std::ffi::CString;

/// File names in the control directory.
pub(super) mod name {
    /// The code of the run.
    pub(in super::super) const CODE: &str = "c";
    /// The input of the run.
    pub(in super::super) const INPUT: &str = "i";
    /// Standard output of the run.
    pub(in super::super) const OUT: &str = "o";
    /// Standard error of the run.
    pub(in super::super) const ERR: &str = "e";
    /// Status reports.
    pub(in super::super) const STATUS: &str = "s";
    /// What a shell that exits leaves to its successor.
    pub(in super::super) const STATE: &str = "t";
    /// What a new shell reads first.
    pub(in super::super) const BOOT: &str = "b";
}

/// The last line of a complete state; a shell killed halfway through leaves it out.
const STATE_END: &str = "EXECD-STATE-END";

/// The signal that interrupts a run inside bash (SIGRTMAX).
pub(super) const INTERRUPT_SIGNAL: i32 = 64;

/// A family of shells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// bash, with everything the protocol can do.
    Bash,
    /// dash, busybox ash: they read ahead, so a lost shell is not noticed by its prompt, and they have no
    /// trap that could interrupt a run from inside.
    Posix,
}

/// Where shells are looked for, in order.
const SHELLS: [(&str, Dialect); 6] = [
    ("/bin/bash", Dialect::Bash),
    ("/usr/bin/bash", Dialect::Bash),
    ("/usr/local/bin/bash", Dialect::Bash),
    ("/bin/sh", Dialect::Posix),
    ("/usr/bin/sh", Dialect::Posix),
    ("/bin/busybox", Dialect::Posix),
];

/// The commands to try.
pub(super) fn commands() -> Vec<Command> {
    let words = |path: &str| match path.rsplit('/').next() {
        Some("bash") => vec!["bash", "--noprofile", "--norc"],
        Some("busybox") => vec!["busybox", "sh"],
        _ => vec!["sh"],
    };
    let text = |word: &str| CString::new(word).unwrap_or_default();
    let command =
        |path: &str| Command { path: text(path), argv: words(path).into_iter().map(text).collect() };
    SHELLS.iter().map(|(path, _)| command(path)).collect()
}

/// The dialect of the command with this index.
pub(super) fn of_command(index: usize) -> Dialect {
    SHELLS.get(index).map_or(Dialect::Posix, |(_, dialect)| *dialect)
}

/// What a shell leaves to its successor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Carried {
    cwd: String,
    exports: String,
}

impl Carried {
    /// Reads what the exit trap wrote; `None` unless it is complete.
    pub(super) fn parse(state: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(state).ok()?;
        let text = text.trim_end_matches('\n').strip_suffix(STATE_END)?;
        let (cwd, exports) = text.split_once('\n')?;
        cwd.starts_with('/').then(|| Self { cwd: cwd.into(), exports: exports.into() })
    }
}

impl Dialect {
    fn run_builtin(self) -> &'static str {
        match self {
            Self::Bash => "\\builtin",
            Self::Posix => "\\command",
        }
    }

    /// The script a new shell reads first.
    pub(super) fn boot_script(self, carried: Option<&Carried>) -> String {
        let builtin = self.run_builtin();
        let mut script = String::new();
        if self == Self::Bash {
            // Inside a function or sourced file `return` would only leave that, so the shell exits and its
            // state is carried over. Never raise the signal again from here: bash 5.2 crashes.
            script.push_str(&format!(
                "trap '((${{#BASH_SOURCE[@]}}>1))&&{builtin} exit 130;{builtin} return 130' {INTERRUPT_SIGNAL}\n"
            ));
        }
        let state = ControlDir::path(name::STATE);
        script.push_str(&format!("trap '{}>{state}' EXIT\n", self.state_group()));
        if let Some(carried) = carried {
            script.push_str(&carried.exports);
            script.push_str(&format!("{builtin} cd {}\n", quote(&carried.cwd)));
        }
        script
    }

    /// What a shell that was started before its session was known reads before its first run, so that it is as if it
    /// had been started for that session.
    pub(super) fn settle_script(self, cwd: &str) -> String {
        let builtin = self.run_builtin();
        let reset = match self {
            Self::Bash => ";SECONDS=0",
            Self::Posix => "",
        };
        format!(
            "{builtin} cd -P -- {}&&{{ {builtin} unset OLDPWD;{builtin} export OLDPWD{reset};}}\n",
            quote(cwd)
        )
    }

    /// The line that makes a shell read its boot script and answer with what came of that.
    pub(super) fn boot_line(self, token: &str) -> String {
        let builtin = self.run_builtin();
        let (boot, status) = (ControlDir::path(name::BOOT), ControlDir::path(name::STATUS));
        format!("{builtin} . {boot};{builtin} echo {token} \"$?\" >{status}\n\n")
    }

    /// A line that tells where the shell is, as it would tell its successor, and reports. Fails in nothing that could
    /// end a shell under `set -e`.
    pub(super) fn ask_line(self, token: &str) -> String {
        let builtin = self.run_builtin();
        let (state, status) = (ControlDir::path(name::STATE), ControlDir::path(name::STATUS));
        format!("{}>{state}||{builtin} :;{builtin} echo {token} 0 >{status}\n\n", self.state_group())
    }

    /// What prints the state of a shell.
    fn state_group(self) -> String {
        let builtin = self.run_builtin();
        format!("{{ {builtin} pwd -P;{builtin} export -p;{builtin} echo {STATE_END};}} ")
    }

    /// What the shell of a background run reads: it becomes like the session's shell, and then runs the code.
    pub(super) fn background_script(
        self,
        state: Option<&Carried>,
        envs: &[(String, String)],
        code: &str,
    ) -> String {
        let builtin = self.run_builtin();
        let mut script = String::new();
        if let Some(state) = state {
            script.push_str(&state.exports);
            script.push_str(&format!("{builtin} cd {}\n", quote(&state.cwd)));
        }
        for (name, value) in envs {
            script.push_str(&format!("{builtin} export {name}={}\n", quote(value)));
        }
        script.push_str(&format!("{builtin} . {}\n", ControlDir::path(code)));
        script
    }

    /// The commands to try for a shell of this family that reads `script` and ends.
    pub(super) fn background_commands(self, script: &str) -> Vec<Command> {
        let line = format!("{} . {}", self.run_builtin(), ControlDir::path(script));
        let of_family = SHELLS.iter().zip(commands()).filter(|((_, dialect), _)| *dialect == self);
        let with_line = of_family.map(|(_, mut command)| {
            command.argv.extend([c"-c".into(), CString::new(line.as_str()).unwrap_or_default()]);
            command
        });
        with_line.collect()
    }

    /// A line that does nothing but report.
    pub(super) fn idle_line(self, token: &str) -> String {
        let builtin = self.run_builtin();
        format!("{builtin} :;{builtin} echo {token} 0 >{}\n\n", ControlDir::path(name::STATUS))
    }

    /// The line that runs the code in the control directory. Variables in front of `.` vanish with it, and so
    /// do the redirections, whatever `exec` does inside. The empty line is for `super::shell` to see whether
    /// the shell came back.
    pub(super) fn run_line(self, token: &str, envs: &[(String, String)]) -> String {
        let builtin = self.run_builtin();
        let mut line = String::new();
        // bash 5.2 drops variables set in front of `builtin .` with the first builtin that the code runs, so
        // `command` stands in between. It alone would let a function of that name swallow every later run.
        let source = match self {
            Self::Bash => "\\builtin command .",
            Self::Posix => "\\command .",
        };
        for (name, value) in envs {
            line.push_str(&format!("{name}={} ", quote(value)));
        }
        let [code, input, out, err, status] =
            [name::CODE, name::INPUT, name::OUT, name::ERR, name::STATUS].map(ControlDir::path);
        line.push_str(&format!(
            "{source} {code} <{input} >{out} 2>{err};{builtin} echo {token} \"$?\" >{status}\n\n"
        ));
        line
    }
}

/// A word in single quotes.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Why a name cannot be an environment variable of a run, if it cannot: bash refuses to assign some, and
/// others are no names.
pub fn refuse_env_name(name: &str) -> Option<&'static str> {
    const READ_ONLY: [&str; 6] = ["UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO"];
    let mut bytes = name.bytes();
    let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !starts_well || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Some("is no variable name");
    }
    READ_ONLY.contains(&name).then_some("is read-only in bash")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_line_is_one_line_and_quotes_values() {
        let envs = vec![("A".to_owned(), "it's $x `y` \"z\"".to_owned())];
        let line = Dialect::Bash.run_line("tok", &envs);
        assert_eq!(
            line,
            "A='it'\\''s $x `y` \"z\"' \\builtin command . /run/execd/c </run/execd/i >/run/execd/o \
             2>/run/execd/e;\\builtin echo tok \"$?\" >/run/execd/s\n\n"
        );
        assert!(Dialect::Posix.run_line("t", &[]).starts_with("\\command . "));
    }

    #[test]
    fn a_background_shell_becomes_like_the_sessions() {
        let state = Carried { cwd: "/a b".into(), exports: "declare -x A=\"1\"\n".into() };
        let envs = vec![("B".to_owned(), "it's".to_owned())];
        let script = Dialect::Bash.background_script(Some(&state), &envs, "c-1");
        assert_eq!(
            script,
            "declare -x A=\"1\"\n\\builtin cd '/a b'\n\\builtin export B='it'\\''s'\n\\builtin . /run/execd/c-1\n"
        );
        let commands = Dialect::Posix.background_commands("p-1");
        assert_eq!(commands[0].argv, [c"sh", c"-c", c"\\command . /run/execd/p-1"].map(CString::from));
        assert_eq!(commands.len(), 3);
    }

    #[test]
    fn a_shell_settles_in_any_folder() {
        let script = Dialect::Bash.settle_script("/it's; here");
        assert_eq!(
            script,
            "\\builtin cd -P -- '/it'\\''s; here'&&{ \\builtin unset OLDPWD;\\builtin export OLDPWD;SECONDS=0;}\n"
        );
        assert!(!Dialect::Posix.settle_script("/x").contains("SECONDS"));
    }

    #[test]
    fn state_is_only_taken_when_complete() {
        let state = b"/work dir\ndeclare -x A=\"1\"\nEXECD-STATE-END\n";
        let carried = Carried::parse(state).unwrap();
        assert_eq!((carried.cwd.as_str(), carried.exports.as_str()), ("/work dir", "declare -x A=\"1\"\n"));
        let script = Dialect::Bash.boot_script(Some(&carried));
        assert!(script.ends_with("declare -x A=\"1\"\n\\builtin cd '/work dir'\n"), "{script}");
        for bad in [&state[..20], b"", b"relative\nEXECD-STATE-END", b"\xff\nEXECD-STATE-END"] {
            assert_eq!(Carried::parse(bad), None);
        }
    }

    #[test]
    fn variable_names() {
        for good in ["A", "_a1", "PATH"] {
            assert_eq!(refuse_env_name(good), None);
        }
        for bad in ["", "1A", "A-B", "A=1", "A;rm", "é", "UID", "SHELLOPTS"] {
            assert!(refuse_env_name(bad).is_some(), "{bad}");
        }
    }
}
