//! The seccomp deny list, compiled to a filter.
//!
//! The filter is a binary search over system call numbers rather than the usual chain of comparisons: at
//! installation the kernel runs it once for every number to fill its cache of always-allowed calls
//! (kernel/seccomp.c), so a chain costs its length times some 450 at every program start.
//!
//! Calls that runtimes probe for answer `ENOSYS`, so that they fall back; calls that need a privilege answer
//! `EPERM`, as they would without it.

use execd_init_shim::messages::Instruction;
use std::collections::BTreeMap;
use std::str::FromStr;
use syscalls::Sysno;

/// What a denied call answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Errno {
    /// Not permitted.
    Perm,
    /// Not implemented: the caller should try something older.
    NoSys,
}

/// One entry of the built-in list.
#[derive(Debug)]
pub struct Denied {
    /// System calls, by name.
    pub names: &'static [&'static str],
    /// What they answer.
    pub errno: Errno,
    /// Why.
    pub reason: &'static str,
}

/// The built-in deny list.
pub const DENY: &[Denied] = &[
    Denied {
        names: &["mount", "umount2", "pivot_root", "chroot"],
        errno: Errno::Perm,
        reason: "the view of the file system is the sandbox",
    },
    Denied {
        names: &[
            "open_tree",
            "open_tree_attr",
            "move_mount",
            "fsopen",
            "fsconfig",
            "fsmount",
            "fspick",
            "mount_setattr",
        ],
        errno: Errno::NoSys,
        reason: "the same by the new mount API: mount_setattr can clear a read-only flag",
    },
    Denied {
        names: &["unshare", "setns"],
        errno: Errno::Perm,
        reason: "namespaces; clone is checked by its flags",
    },
    Denied {
        names: &["clone3"],
        errno: Errno::NoSys,
        reason: "its flags are behind a pointer; libraries fall back to clone",
    },
    Denied {
        names: &["ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"],
        errno: Errno::Perm,
        reason: "reading and steering other processes",
    },
    Denied {
        names: &["init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"],
        errno: Errno::Perm,
        reason: "the kernel itself",
    },
    Denied {
        names: &[
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
        ],
        errno: Errno::NoSys,
        reason: "large kernel surface with a record of escapes; io_uring also goes around this filter",
    },
    Denied {
        names: &["add_key", "request_key", "keyctl"],
        errno: Errno::NoSys,
        reason: "keyrings are not namespaced",
    },
    Denied {
        names: &["name_to_handle_at", "open_by_handle_at"],
        errno: Errno::Perm,
        reason: "file handles reach past the mount namespace",
    },
    Denied {
        names: &[
            "iopl",
            "ioperm",
            "syslog",
            "swapon",
            "swapoff",
            "acct",
            "quotactl",
            "quotactl_fd",
            "settimeofday",
        ],
        errno: Errno::Perm,
        reason: "machine-wide administration",
    },
    Denied {
        names: &["seccomp", "personality"],
        errno: Errno::Perm,
        reason: "personality switches address space randomisation off; filters of the session's own are listeners' way in",
    },
];

/// What a process of a sandbox still calls once it could have its filter (init-shim's `program`).
const STARTUP_CALLS: &[&str] = &[
    "read",
    "write",
    "close",
    "brk",
    "mmap",
    "munmap",
    "access",
    "faccessat",
    "chdir",
    "setgroups",
    "setresgid",
    "setresuid",
    "capget",
    "capset",
    "execve",
    "exit_group",
];

/// Calls that the `syscalls` crate may not know yet; the number is the same on every architecture.
const RECENT: [(&str, u32); 1] = [("open_tree_attr", 467)];

/// `CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET` (clone(2)).
const NAMESPACE_FLAGS: u32 = 0x7E02_0000;
/// ioctl(2) requests that type into a terminal; the kernel looks at the low 32 bits, and so does the filter.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541C;

/// Sockets to the hypervisor and between its guests' processes, which no network namespace separates (vsock(7)).
const AF_VSOCK: u32 = 40;
const EAFNOSUPPORT: u32 = 97;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    Deny(Errno),
    CheckCloneFlags,
    CheckIoctlRequest,
    CheckSocketFamily,
}

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// The program; empty when nothing is denied.
    pub program: Vec<Instruction>,
    /// Whether it denies nothing that a new process does on its way to execve(2).
    pub lets_programs_start: bool,
    /// Names in the list that this architecture or this build does not know.
    pub unknown: Vec<String>,
}

/// The built-in list, compiled.
pub fn builtin() -> Filter {
    let entries = DENY.iter().flat_map(|denied| denied.names.iter().map(|name| (*name, denied.errno)));
    compile(entries)
}

/// A list of names from the configuration, compiled. The answer to each is the built-in list's, `EPERM` for
/// names it lacks. An empty list means no filter.
pub fn from_names(names: &[String]) -> Filter {
    if names.is_empty() {
        return Filter::default();
    }
    compile(names.iter().map(|name| {
        let known = DENY.iter().find(|denied| denied.names.contains(&name.as_str()));
        (name.as_str(), known.map_or(Errno::Perm, |denied| denied.errno))
    }))
}

fn compile<'a>(entries: impl IntoIterator<Item = (&'a str, Errno)>) -> Filter {
    let mut unknown = Vec::new();
    let mut actions: BTreeMap<u32, Action> = BTreeMap::new();
    for (name, errno) in entries {
        match number(name) {
            Some(number) => drop(actions.insert(number, Action::Deny(errno))),
            None => unknown.push(name.to_owned()),
        }
    }
    actions.entry(Sysno::clone as u32).or_insert(Action::CheckCloneFlags);
    actions.entry(Sysno::socket as u32).or_insert(Action::CheckSocketFamily);
    actions.entry(Sysno::ioctl as u32).or_insert(Action::CheckIoctlRequest);
    let denies = |name: &&str| {
        let action = number(name).and_then(|number| actions.get(&number));
        matches!(action, Some(Action::Deny(_)))
    };
    let lets_programs_start = !STARTUP_CALLS.iter().any(denies);
    Filter { program: assemble(&ranges(&actions)), lets_programs_start, unknown }
}

fn number(name: &str) -> Option<u32> {
    let recent = RECENT.iter().find(|(recent, _)| *recent == name).map(|(_, number)| *number);
    recent.or_else(|| Sysno::from_str(name).ok().map(|sysno| sysno as u32))
}

/// Turns single numbers into half-open ranges that cover all numbers: `(first number, action)`.
fn ranges(actions: &BTreeMap<u32, Action>) -> Vec<(u32, Action)> {
    let mut ranges = vec![(0, Action::Allow)];
    for (&number, &action) in actions {
        match ranges.last_mut() {
            Some(last) if last.0 == number => last.1 = action,
            _ => ranges.push((number, action)),
        }
        ranges.push((number + 1, Action::Allow));
    }
    ranges.dedup_by_key(|range| range.1);
    ranges
}

// Classic BPF (linux/bpf_common.h) and the layout of struct seccomp_data (linux/seccomp.h).
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGS: u32 = 16;
const RET_ALLOW: u32 = 0x7FFF_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_KILL_PROCESS: u32 = 0x8000_0000;
#[cfg(target_arch = "x86_64")]
const NATIVE_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const NATIVE_ARCH: u32 = 0xC000_00B7;
/// Set in the numbers of the x32 ABI, which a 64-bit filter sees under the native architecture.
const X32_BIT: u32 = 0x4000_0000;

fn op(code: u16, jt: u8, jf: u8, k: u32) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn errno_return(errno: Errno) -> Instruction {
    let number = match errno {
        Errno::Perm => 1,
        Errno::NoSys => 38,
    };
    op(RETURN, 0, 0, RET_ERRNO | number)
}

fn assemble(ranges: &[(u32, Action)]) -> Vec<Instruction> {
    let mut program = vec![
        op(LOAD, 0, 0, DATA_ARCH),
        op(JUMP_EQUAL, 1, 0, NATIVE_ARCH),
        // A foreign architecture numbers its calls differently; a program of one cannot run here.
        op(RETURN, 0, 0, RET_KILL_PROCESS),
        op(LOAD, 0, 0, DATA_NR),
    ];
    if cfg!(target_arch = "x86_64") {
        program.push(op(JUMP_GREATER_OR_EQUAL, 0, 1, X32_BIT));
        program.push(errno_return(Errno::NoSys));
    }
    program.extend(search(ranges));
    program
}

/// Code that finds the range of the number in the accumulator and acts on it; always returns.
fn search(ranges: &[(u32, Action)]) -> Vec<Instruction> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    match (low, high) {
        ([], [(_, action)]) => act(*action),
        ([], _) | (_, []) => act(Action::Allow),
        (_, [(pivot, _), ..]) => {
            let (low, high) = (search(low), search(high));
            let mut code = match u8::try_from(low.len()) {
                Ok(skip) => vec![op(JUMP_GREATER_OR_EQUAL, skip, 0, *pivot)],
                // Conditional jumps reach 255 instructions.
                Err(_) => vec![op(JUMP_GREATER_OR_EQUAL, 0, 1, *pivot), op(JUMP, 0, 0, low.len() as u32)],
            };
            code.extend(low);
            code.extend(high);
            code
        }
    }
}

fn act(action: Action) -> Vec<Instruction> {
    let allow = op(RETURN, 0, 0, RET_ALLOW);
    let deny = errno_return(Errno::Perm);
    match action {
        Action::Allow => vec![allow],
        Action::Deny(errno) => vec![errno_return(errno)],
        Action::CheckCloneFlags => {
            vec![op(LOAD, 0, 0, DATA_ARGS), op(JUMP_SET, 0, 1, NAMESPACE_FLAGS), deny, allow]
        }
        Action::CheckSocketFamily => vec![
            op(LOAD, 0, 0, DATA_ARGS),
            op(JUMP_EQUAL, 0, 1, AF_VSOCK),
            op(RETURN, 0, 0, RET_ERRNO | EAFNOSUPPORT),
            allow,
        ],
        Action::CheckIoctlRequest => vec![
            op(LOAD, 0, 0, DATA_ARGS + 8),
            op(JUMP_EQUAL, 1, 0, TIOCSTI),
            op(JUMP_EQUAL, 0, 1, TIOCLINUX),
            deny,
            allow,
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would.
    fn run(program: &[Instruction], arch: u32, nr: u32, args: [u32; 2]) -> u32 {
        let (mut pc, mut accumulator) = (0, 0);
        loop {
            let i = program[pc];
            pc += 1;
            let branch = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                LOAD => {
                    accumulator = match i.k {
                        DATA_NR => nr,
                        DATA_ARCH => arch,
                        16 => args[0],
                        24 => args[1],
                        other => panic!("load {other}"),
                    }
                }
                JUMP => pc += i.k as usize,
                JUMP_EQUAL => pc += branch(accumulator == i.k),
                JUMP_GREATER_OR_EQUAL => pc += branch(accumulator >= i.k),
                JUMP_SET => pc += branch(accumulator & i.k != 0),
                RETURN => return i.k,
                other => panic!("op {other:#x}"),
            }
        }
    }

    fn answer(filter: &Filter, name: &str, args: [u32; 2]) -> u32 {
        run(&filter.program, NATIVE_ARCH, number(name).unwrap(), args)
    }

    const EPERM: u32 = RET_ERRNO | 1;
    const ENOSYS: u32 = RET_ERRNO | 38;

    #[test]
    fn every_listed_call_is_denied_and_every_other_allowed() {
        let filter = builtin();
        let listed: BTreeMap<u32, u32> = DENY
            .iter()
            .flat_map(|d| d.names.iter().map(|n| (n, d.errno)))
            .filter_map(|(n, e)| Some((number(n)?, if e == Errno::Perm { EPERM } else { ENOSYS })))
            .collect();
        for nr in 0..600 {
            let expected = listed.get(&nr).copied().unwrap_or(RET_ALLOW);
            assert_eq!(run(&filter.program, NATIVE_ARCH, nr, [0, 0]), expected, "call {nr}");
        }
        assert!(filter.program.len() < 400, "{} instructions", filter.program.len());
    }

    #[test]
    fn clone_and_ioctl_are_judged_by_their_arguments() {
        let filter = builtin();
        assert_eq!(answer(&filter, "clone", [0x11, 0]), RET_ALLOW);
        for flag in
            [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
        {
            assert_eq!(answer(&filter, "clone", [flag | 0x11, 0]), EPERM, "{flag:#x}");
        }
        assert_eq!(answer(&filter, "ioctl", [0, 0x5401]), RET_ALLOW);
        assert_eq!(answer(&filter, "ioctl", [0, TIOCSTI]), EPERM);
        assert_eq!(answer(&filter, "ioctl", [0, TIOCLINUX]), EPERM);
        assert_eq!(answer(&filter, "socket", [2, 1]), RET_ALLOW);
        assert_eq!(answer(&filter, "socket", [AF_VSOCK, 1]), RET_ERRNO | EAFNOSUPPORT);
    }

    #[test]
    fn foreign_calls_are_refused() {
        let filter = builtin();
        assert_eq!(run(&filter.program, 0x4000_0003, 20, [0, 0]), RET_KILL_PROCESS);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(run(&filter.program, NATIVE_ARCH, X32_BIT | 1, [0, 0]), ENOSYS);
    }

    #[test]
    fn a_configured_list_replaces_the_built_in_one() {
        let filter = from_names(&["chdir".into(), "clone3".into(), "no_such_call".into()]);
        assert_eq!(filter.unknown, ["no_such_call"]);
        assert_eq!(answer(&filter, "chdir", [0, 0]), EPERM);
        assert_eq!(answer(&filter, "clone3", [0, 0]), ENOSYS);
        assert_eq!(answer(&filter, "mount", [0, 0]), RET_ALLOW);
        assert!(from_names(&[]).program.is_empty());
        assert!(!filter.lets_programs_start && builtin().lets_programs_start);
    }

    #[test]
    fn a_list_of_hundreds_still_assembles() {
        let names: Vec<String> = (0..400).filter_map(|nr| Some(Sysno::new(nr)?.name().to_owned())).collect();
        let filter = from_names(&names.iter().step_by(2).cloned().collect::<Vec<_>>());
        assert_eq!(answer(&filter, &names[0], [0, 0]), EPERM);
        assert_eq!(answer(&filter, &names[1], [0, 0]), RET_ALLOW);
        assert_eq!(answer(&filter, &names[300], [0, 0]), EPERM);
    }
}
