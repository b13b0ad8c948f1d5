//! Random scripts of file operations, run on a plain copy of a folder and in a session that has it as its overlay: after a
//! commit the two are the same, and so is another copy that the diff has been applied to.
//!
//! `EXECD_TEST_SEEDS` makes it try more scripts.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use common::trees::{apply_layer, assert_same, attribute_functions, copy, script, tree};
use common::{Session, Setup};
use serde_json::{Value, json};
use std::path::Path;

/// Operations of one script.
const OPERATIONS: usize = 60;

/// A reproducible sequence (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(sides).unwrap()).unwrap()
    }

    fn name(&mut self) -> &'static str {
        ["f0", "f1", "d0", "d1", "l0", "x y", "ünï"][self.roll(7)]
    }

    fn path(&mut self) -> String {
        let names: Vec<&str> = (0..=self.roll(3)).map(|_| self.name()).collect();
        format!("'./{}'", names.join("/"))
    }

    /// One operation; most fail now and then, on both sides alike. None opens a FIFO, which would wait for another side.
    fn operation(&mut self, owners: bool) -> String {
        let (a, b) = (self.path(), self.path());
        let number = self.roll(1000);
        match self.roll(22) {
            0 | 1 => format!("[ -p {a} ] || echo new{number} >{a}"),
            2 => format!("[ -p {a} ] || echo more{number} >>{a}"),
            3 => format!("[ -p {a} ] || head -c {} /dev/zero | tr '\\0' z >{a}", number * 100),
            4 | 5 => format!("mkdir {a}"),
            6 => format!("mkdir -p {a}"),
            7 => format!("rm -f {a}"),
            8 => format!("rm -rf {a}"),
            9 => format!("rm -rf {a}; mkdir {a}; echo again >{a}/f0"),
            10 => format!("mv -T {a} {b}"),
            11 => format!("[ ! -f {a} ] || cp --remove-destination {a} {b}"),
            12 => format!("ln -s {b} {a}"),
            // Links between files of the lower break when they are written to, as overlayfs says.
            13 => format!("echo one >{a}.n && ln {a}.n {b}.h"),
            14 => format!("chmod {} {a}", ["600", "644", "755", "1777", "700"][self.roll(5)]),
            15 if !owners => format!("touch {a}"),
            15 => format!("chown {} {a}", ["1:1", "54321:54322", "0:7"][self.roll(3)]),
            16 => format!("[ -p {a} ] || mkfifo {a}"),
            17 => format!("setattr user.a{} v{number} {a}", self.roll(3)),
            18 => format!("truncate -s {} {a}", number * 1000),
            19 => format!("rm -rf {a}; echo file >{a}"),
            20 => format!("touch {a}"),
            _ => format!("delattr user.a{} {a}", self.roll(3)),
        }
    }

    fn script(&mut self, owners: bool) -> String {
        (0..OPERATIONS).map(|_| self.operation(owners)).collect::<Vec<_>>().join("\n")
    }
}

/// What both begin with.
const BEGINNING: &str = "mkdir -p d0/d0/d1 d1/d1 'd0/x y'
    echo lower >f0; echo lower >d0/f0; echo lower >d0/d0/f1; echo ü >'d0/x y/ünï'; ln -s f0 l0; ln -s d0 d1/l0
    chmod 750 d1; chmod 2755 d0; chown 3:4 d0/f0; mkfifo d1/f1; setattr user.a0 lower d0/d0
    setattr user.a1 lower f0; truncate -s 1M d1/d0; touch -d @1000000000 f0 d0/d0/f1 d1 d0 .";

fn seeds() -> u64 {
    std::env::var("EXECD_TEST_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(12)
}

/// The session's own view of its folder.
const LOOK: &str =
    "find . -printf '%P|%y|%m|%U:%G|%T@|%l|' \\( -type f -printf '%s' -o -true \\) -printf '\\n' | sort";

fn listing(folder: &Path) -> String {
    let output = std::process::Command::new("bash").args(["-c", LOOK]).current_dir(folder).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn diff(session: &Session<'_>) -> Vec<u8> {
    let answer = session.daemon.get(&session.route("/diff"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.body
}

fn commit(session: &Session<'_>, body: &Value) -> Value {
    let answer = session.daemon.post(&session.route("/commit"), body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// `owners` says whether the session can give files away.
fn scripts_end_the_same(setup: Setup, owners: bool, body: impl Fn(&Path) -> Value) {
    let Some(daemon) = setup.start() else { return };
    for seed in 0..seeds() {
        let folders = ["work", "plain", "layer"].map(|name| daemon.path(&format!("{seed}-{name}")));
        let [work, plain, layer] = &folders;
        std::fs::create_dir(work).unwrap();
        script(work, &format!("{}{BEGINNING}", attribute_functions()));
        if !owners {
            script(work, "chown 0:0 d0/f0");
        }
        copy(work, plain);
        copy(work, layer);
        let code = format!("{}{}", attribute_functions(), Dice(seed).script(owners));
        script(plain, &code);
        let session = daemon.create(&body(work));
        session.run(&code);
        let story = format!("seed {seed}\n{code}");
        let seen = session.output(LOOK);
        let before = diff(&session);
        let report = commit(&session, &json!({"on_conflict": "fail", "allow_privileged": true}));
        assert_eq!(report["skipped_count"], 0);
        let committed = tree(work);
        assert_same(&committed, &tree(plain), false, &story);
        if owners {
            assert_eq!(listing(work), seen, "{story}");
        }
        assert_eq!(session.output(LOOK), seen, "{story}");
        apply_layer(&before, layer);
        assert_same(&tree(layer), &committed, true, &story);
        // Once more changes nothing, and what is left of the diff changes nothing, either.
        commit(&session, &json!({}));
        assert_same(&tree(work), &committed, true, &story);
        apply_layer(&diff(&session), layer);
        assert_same(&tree(layer), &committed, true, &story);
        // Nor does what comes after a commit get lost.
        session.output("echo late >late; rm -rf d0");
        commit(&session, &json!({}));
        assert!(work.join("late").exists() && !work.join("d0").exists());
        session.delete();
    }
}

#[test]
fn of_an_overlay() {
    scripts_end_the_same(Setup::new(), true, |work| json!({"overlays": [{"path": work}]}));
}

#[test]
fn of_an_overlay_in_memory() {
    let body = |work: &Path| json!({"overlays": [{"path": work, "persist": false}]});
    scripts_end_the_same(Setup::new(), true, body);
}

#[test]
fn of_an_overlay_in_a_directory() {
    let setup = Setup::new().setting("sizes.persistent_upper_max_bytes = 0");
    scripts_end_the_same(setup, true, |work| json!({"overlays": [{"path": work}]}));
}

#[test]
fn of_an_overlay_in_a_user_namespace() {
    let body = |work: &Path| json!({"overlays": [{"path": work}], "uid_mode": "userns"});
    scripts_end_the_same(Setup::new(), false, body);
}
