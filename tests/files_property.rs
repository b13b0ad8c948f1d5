//! Random operations, done over HTTP in one session and with coreutils in the shell of another, end in the same tree.
//! Whether each of them succeeds is the same, too.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test stops at the first surprise"
)]

mod common;

use common::files::Part;
use common::{OTHER_ID, Session, Setup};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const STEPS: usize = 120;
/// More of them, and a look after each step, for who wants to know: EXECD_TEST_SEEDS, EXECD_TEST_EACH_STEP.
const SEEDS: u64 = 3;
/// Times of files may differ by so much; seconds.
const TOLERANCE: i64 = 30;

/// A small generator (xorshift), so that a seed tells the whole story.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % end
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    /// A path of few names, so that operations meet. Only those in l are ever links, so that there are no loops.
    fn path(&mut self) -> String {
        let depth = 1 + self.below(3);
        let mut names: Vec<&str> = (1..depth).map(|_| self.pick(&["d0", "d1", "l0"])).collect();
        names.push(self.pick(&["f0", "f1", "d0", "d1", "l0", "l1"]));
        names.join("/")
    }

    fn mode(&mut self) -> u32 {
        [0o600, 0o644, 0o755, 0o777, 0o4711, 0o444][self.below(6)]
    }
}

/// One operation in both languages.
struct Step {
    request: Box<dyn Fn(&Session<'_>) -> u16>,
    /// Exits with 0 if it succeeds.
    script: String,
    told: String,
}

fn octal_digits(mode: u32) -> u32 {
    format!("{mode:o}").parse().unwrap()
}

/// What the shell needs before it can make something at a path.
fn parents(path: &str) -> String {
    format!("mkdir -p \"$(dirname {path})\" && ")
}

fn step(random: &mut Random) -> Step {
    let (path, other) = (random.path(), random.path());
    let mode = random.mode();
    let digits = octal_digits(mode);
    let told = |what: &str| format!("{what} {path} {other} {mode:o}");
    match random.below(12) {
        0..=2 => {
            let content = format!("{}\n", ["aa bb", "ab ab ab", "", "zz"][random.below(4)]);
            let with_mode = random.below(2) == 0;
            let metadata =
                if with_mode { json!({"path": path, "mode": digits}) } else { json!({"path": path}) };
            let chmod = if with_mode { format!("chmod {mode:o} .t &&") } else { String::new() };
            // As a careful program does it: what there is keeps its owner and its mode.
            let script = format!(
                "p=$(readlink -m {path}); [ ! -L $p ] || exit 1; [ ! -e $p ] || [ -f $p ] || exit 1; {} mkdir -p $(dirname $p) && \
                 echo '{}' > .t && {{ [ ! -e $p ] || {{ chown --reference=$p .t; chmod --reference=$p .t; }}; }} && {chmod} mv -T .t $p || {{ rm -f .t; exit 1; }}",
                parents(&path),
                content.trim_end(),
            );
            let request = move |session: &Session<'_>| {
                let metadata = metadata.to_string();
                session.upload_form(&[Part::metadata(&metadata), Part::file(content.as_bytes())]).status
            };
            Step { request: Box::new(request), script, told: told("upload") }
        }
        3 => Step {
            script: format!("rm {path}"),
            told: told("delete"),
            request: Box::new(move |session| session.ask("DELETE", "/files", &[("path", &path)]).status),
        },
        4 | 5 if path != other => Step {
            script: format!(
                "real() {{ echo $(readlink -f $(dirname $1))/$(basename $1); }}; \
                 [ -e {path} ] || [ -L {path} ] || exit 1; {} {{ [ $(real {path}) = $(real {other}) ] || {{ \
                 [ {path} -ef {other} ] && [ ! -d {other} ] && rm {other}; mv -T {path} {other}; }}; }}",
                parents(&other),
            ),
            told: told("move"),
            request: Box::new(move |session| {
                session.tell("/files/mv", &json!([{"src": path, "dest": other}])).status
            }),
        },
        6 => {
            let (owner, name) =
                [(0, json!(0)), (1, json!("daemon")), (OTHER_ID, json!(OTHER_ID))][random.below(3)].clone();
            let body = json!({path.clone(): {"mode": digits, "owner": name}});
            Step {
                script: format!("[ -e {path} ] && chown {owner} {path} && chmod 00{mode:o} {path}"),
                told: told("permissions"),
                request: Box::new(move |session| session.tell("/files/permissions", &body).status),
            }
        }
        7 => {
            let (old, new) = [("a", "ccc"), ("ab", ""), ("b a", "b-a")][random.below(3)];
            let body: Value = json!({path.clone(): {"old": old, "new": new}});
            Step {
                script: format!(
                    "[ -f {path} ] && {{ ! grep -q '{old}' {path} || {{ m=$(stat -Lc %a {path}); sed -i --follow-symlinks 's/{old}/{new}/g' {path} && chmod 00$m {path}; }}; }}"
                ),
                told: told("replace"),
                request: Box::new(move |session| session.tell("/files/replace", &body).status),
            }
        }
        8 => {
            let body = json!({path.clone(): {"mode": digits | 700}});
            let mode = mode | 0o700;
            let body = if digits / 100 % 10 == 4 || digits > 1000 { json!({path.clone(): {}}) } else { body };
            let mode = if body[&path]["mode"].is_null() { 0o755 } else { mode };
            let body = if body[&path]["mode"].is_null() {
                body
            } else {
                json!({path.clone(): {"mode": octal_digits(mode)}})
            };
            Step {
                script: format!("[ -d {path} ] || {{ mkdir -p {path} && chmod {mode:o} {path}; }}"),
                told: told("mkdir"),
                request: Box::new(move |session| session.tell("/directories", &body).status),
            }
        }
        9 => Step {
            script: format!(
                "[ -L {path} ] && exit 1; [ -e {path} ] && [ ! -d {path} ] && exit 1; rm -rf {path}"
            ),
            told: told("rmdir"),
            request: Box::new(move |session| {
                session.ask("DELETE", "/directories", &[("path", &path)]).status
            }),
        },
        // What only a shell can do is done by both.
        number => {
            let script = match number {
                10 => format!(
                    "{} ln -sfT {} {}",
                    parents("l0"),
                    random.pick(&["d0", "d1", "f0", "f1", "none"]),
                    random.pick(&["l0", "l1", "d0/l0"])
                ),
                _ => format!(
                    "[ ! -f {path} ] || ln -P {path} {other} 2>/dev/null; [ ! -d d1 ] || mkfifo d1/l9 2>/dev/null; touch -h -d @1000000000 {path} 2>/dev/null; [ ! -f d0/f0 ] || truncate -s 200000 d0/f0; true"
                ),
            };
            let same = script.clone();
            let request = move |session: &Session<'_>| {
                if session.run(&format!("({same})")).exit_code() == Some(0) { 200 } else { 400 }
            };
            Step { request: Box::new(request), script, told: told("shell") }
        }
    }
}

/// Everything about each file, and which are the same file.
type Look = BTreeMap<String, (String, i64, String)>;

fn look(session: &Session<'_>) -> Look {
    let code = "find . -mindepth 1 -printf '%p|%y %m %U %G %l|%Ts|%D:%i|%n\\n'; echo; \
                find . -type f -size +0 -exec sha256sum {} + 2>/dev/null; true";
    let run = session.run(code);
    let text = run.stdout();
    let (tree, sums) = text.split_once("\n\n").unwrap_or((&text, ""));
    let sums: BTreeMap<&str, &str> =
        sums.lines().filter_map(|line| line.split_once("  ")).map(|(sum, path)| (path, sum)).collect();
    let mut first_names: BTreeMap<String, String> = BTreeMap::new();
    let mut lines: Vec<&str> = tree.lines().filter(|line| !line.is_empty()).collect();
    lines.sort_unstable();
    let mut look = Look::new();
    for line in lines {
        let fields: Vec<&str> = line.split('|').collect();
        let [path, what, time, inode, links] = fields[..] else { panic!("{line}") };
        // Overlays count the links of directories in their own way.
        let is_dir = what.starts_with('d');
        let first = first_names.entry(inode.to_owned()).or_insert_with(|| path.to_owned());
        let same_as = if is_dir { String::new() } else { format!("{links} {first}") };
        let sum = sums.get(path).copied().unwrap_or("empty");
        look.insert(path.to_owned(), (format!("{what} {sum}"), time.parse().unwrap(), same_as));
    }
    look
}

fn compare(api: &Look, shell: &Look, story: &str) {
    let paths = |look: &Look| look.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(api), paths(shell), "{story}");
    for (path, (what, time, same_as)) in api {
        let (other_what, other_time, other_same_as) = &shell[path];
        assert_eq!(
            (what, same_as),
            (other_what, other_same_as),
            "{path} (left: over HTTP, right: by coreutils) {story}"
        );
        assert!((time - other_time).abs() <= TOLERANCE, "{path}: {time} {other_time} {story}");
    }
}

/// The same tree for both.
fn plant(folder: &Path, owner: u32) {
    for (path, content) in [
        ("d0/f0", "aa ab\n"),
        ("d0/d1/f1", "ab\n"),
        ("d1/f0", "zz\n"),
        ("f0", "b a\n"),
        ("d0/d0/d0/f0", "deep\n"),
    ] {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    fs::hard_link(folder.join("d0/f0"), folder.join("d1/f1")).unwrap();
    std::os::unix::fs::symlink("d0", folder.join("l0")).unwrap();
    fn give(path: &Path, owner: u32) {
        std::os::unix::fs::lchown(path, Some(owner), Some(owner)).unwrap();
        if path.is_dir() && !path.is_symlink() {
            fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), owner));
        }
    }
    give(folder, owner);
}

fn same_trees(mode: &str, uid: Option<u32>) {
    let Some(daemon) = Setup::new().start() else { return };
    let seeds = std::env::var("EXECD_TEST_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    for seed in 1..=seeds {
        let mut random = Random((seed << 20) + (mode.len() as u64) + u64::from(uid.unwrap_or(0)));
        let session = |name: &str| {
            let folder = daemon.folder(&format!("{name}{seed}"));
            plant(&folder, uid.unwrap_or(0));
            let mut body = common::workspace(&folder, mode);
            if let Some(uid) = uid {
                body["uid"] = json!(uid);
                body["gid"] = json!(uid);
            }
            daemon.create(&body)
        };
        let (api, shell) = (session("api"), session("shell"));
        let mut story = format!("\nseed {seed}, {mode}, uid {uid:?}");
        for _ in 0..STEPS {
            let Step { request, script, told } = step(&mut random);
            story.push_str(&format!("\n  {told}"));
            let status = request(&api);
            let run = shell.run(&format!("({script})"));
            assert_eq!(
                status == 200,
                run.exit_code() == Some(0),
                "HTTP {status}, the shell {:?}: {script} {} {story}",
                run.exit_code(),
                run.stderr()
            );
            assert!(status < 500, "{status} {story}");
            if std::env::var_os("EXECD_TEST_EACH_STEP").is_some() {
                compare(&look(&api), &look(&shell), &story);
            }
        }
        compare(&look(&api), &look(&shell), &story);
        api.delete();
        shell.delete();
    }
}

#[test]
fn rw_workspaces_end_the_same() {
    same_trees("rw", None);
}

#[test]
fn overlays_end_the_same() {
    same_trees("overlay", None);
}

#[test]
fn workspaces_of_another_user_end_the_same() {
    same_trees("rw", Some(OTHER_ID));
}

#[test]
fn overlays_of_another_user_end_the_same() {
    same_trees("overlay", Some(OTHER_ID));
}
