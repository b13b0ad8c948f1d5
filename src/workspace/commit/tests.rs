//! Commits of real overlays, compared with what their sessions saw.

use super::*;
use crate::workspace::layer::Marks;
use crate::workspace::trial::{GO_ON, Overlay, run, set_attribute};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, SystemTime};

const EVERYTHING: Options =
    Options { only: Vec::new(), on_conflict: OnConflict::Overwrite, keep_privileges: false };

/// The lower of most tests.
pub(in crate::workspace) const LOWER: &str = r#"
    mkdir -p keep/deep gone/sub/sub again/old-sub dir-to-file file-in shrink/a attrs only/x only/y
    echo old | tee keep/file keep/deep/file gone/a gone/sub/b gone/sub/sub/c again/same again/old again/old-sub/x \
        dir-to-file/x file-to-dir to-link to-fifo modes linked-a linked-b only/x/1 only/y/2 removed shrink/a/b >file-in/f
    ln linked-a linked-c; ln -s keep link; chmod 2775 shrink; mkfifo pipe
    touch -d '2001-02-03 04:05:06.123456789' $(find . -type f)
    touch -d '2002-02-03 04:05:06.123456789' $(find . -type d)
"#;

/// All kinds of changes.
pub(in crate::workspace) const CHANGES: &str = r#"
    echo new >keep/file; echo new >keep/deep/new; mkdir -p keep/fresh/er/est; echo x >keep/fresh/er/est/f; rm removed
    rm -r gone; rm -r again; mkdir again; echo newer >again/same; mkdir again/new-sub; echo y >again/new-sub/y
    rm -r dir-to-file; echo file >dir-to-file; rm file-to-dir; mkdir -p file-to-dir/in; echo z >file-to-dir/in/z
    rm to-link; ln -s /etc/passwd to-link; rm to-fifo; mkfifo -m 621 to-fifo; ln -sfn elsewhere link; rm pipe
    chmod 700 attrs; chown 12:34 attrs; chmod 641 modes; chown 7:8 modes; ln -s "$(printf '%0500d' 7)" long-link
    chown -h 3:4 long-link; mkdir locked; echo in >locked/in; chmod 0 locked
    echo all >one; ln one two; ln one keep/three; ln one keep/fresh/four; echo one >linked-a
    rm linked-c; ln linked-b linked-c
    truncate -s 2M sparse; echo middle | dd of=sparse seek=2000 conv=notrunc status=none; truncate -s 1M hole
    echo name >"$(printf 'n%.0s' {1..255})"; echo bytes >$'\xff\xfe \n\\ \x01'; echo dash >-dash
    python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")' || mkfifo socket
    mknod device c 1 3; : >empty; rm -r shrink/a; head -c 300000 /dev/urandom >large
    touch -h -d '2011-02-03 04:05:06.987654321' keep/file one to-link; touch -d '2012-01-01 00:00:00.5' keep/fresh
"#;

struct Fixture {
    overlay: Overlay,
    since: Timestamp,
}

impl Fixture {
    fn new() -> Option<Self> {
        Self::with(LOWER)
    }

    fn with(lower: &str) -> Option<Self> {
        let overlay = Overlay::new(lower)?;
        fs::create_dir(overlay.path("home")).unwrap();
        Some(Self { overlay, since: now() })
    }

    fn all_kinds() -> Option<Self> {
        let fixture = Self::new()?;
        fixture.overlay.change(CHANGES);
        let merged = fixture.overlay.merged();
        set_attribute(&merged.join("keep/file"), c"user.note", b"value");
        set_attribute(&merged.join("keep/deep"), c"user.on-dir", b"value");
        set_attribute(&merged.join("keep/file"), c"trusted.note", b"\0bytes");
        set_attribute(&merged.join("to-link"), c"trusted.on-link", b"value");
        // u::rw- u:5:r-- g::r-- m::rw- o::---, as it is kept (linux/posix_acl_xattr.h).
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, rights, id) in
            [(1_u16, 6_u16, u32::MAX), (2, 4, 5), (4, 4, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
        {
            acl.extend_from_slice(&tag.to_le_bytes());
            acl.extend_from_slice(&rights.to_le_bytes());
            acl.extend_from_slice(&id.to_le_bytes());
        }
        set_attribute(&merged.join("one"), c"system.posix_acl_access", &acl);
        set_attribute(&merged.join("keep/fresh/er"), c"system.posix_acl_default", &acl);
        fixture.overlay.change("touch -d '2012-01-01 00:00:00.5' keep/deep");
        Some(fixture)
    }

    fn journal(&self) -> Journal {
        let home: OwnedFd = File::open(self.overlay.path("home")).unwrap().into();
        Journal::open(home.as_fd(), "journal").unwrap()
    }

    fn try_commit(&self, options: &Options) -> Result<Outcome, FileError> {
        apply(&self.overlay.layer(), options, self.since, &mut self.journal(), GO_ON)
    }

    fn commit(&self) -> Outcome {
        self.try_commit(&EVERYTHING).unwrap()
    }

    /// What the session sees, copied.
    fn snapshot(&self) -> Facts {
        let copy = self.overlay.path("snapshot");
        let _ = fs::remove_dir_all(&copy);
        let merged = self.overlay.merged();
        run(
            &self.overlay.path(""),
            &format!("mkdir snapshot; cp -a --preserve=all {}/. snapshot", merged.display()),
        );
        let facts = facts(&copy);
        fs::remove_dir_all(&copy).unwrap();
        facts
    }

    fn lower(&self) -> Facts {
        facts(&self.overlay.lower())
    }
}

use rustix::fd::AsFd;

/// A moment that the times of files from before and from after can be told from: they advance in steps.
fn now() -> Timestamp {
    std::thread::sleep(Duration::from_millis(12));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    std::thread::sleep(Duration::from_millis(12));
    Timestamp { sec: now.as_secs().try_into().unwrap(), nsec: now.subsec_nanos() }
}

pub(in crate::workspace) type Facts = BTreeMap<String, String>;

/// All that there is to know of a tree.
pub(in crate::workspace) fn facts(root: &Path) -> Facts {
    let mut facts = Facts::new();
    let mut first = HashMap::new();
    let mut paths = vec![root.to_path_buf()];
    while let Some(path) = paths.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let name = format!("{:?}", path.strip_prefix(root).unwrap());
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            let mut inner: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
            inner.sort();
            paths.extend(inner.into_iter().rev());
            String::new()
        } else if kind.is_file() {
            let bytes = fs::read(&path).unwrap();
            let mut sum = std::hash::DefaultHasher::new();
            std::hash::Hasher::write(&mut sum, &bytes);
            format!("{} bytes, {:x}", bytes.len(), std::hash::Hasher::finish(&sum))
        } else if kind.is_symlink() {
            format!("{:?}", fs::read_link(&path).unwrap())
        } else {
            format!("device {:x}", metadata.rdev())
        };
        let links = if kind.is_dir() {
            name.clone()
        } else {
            first.entry(metadata.ino()).or_insert_with(|| name.clone()).clone()
        };
        let held = rustix::fs::open(
            &path,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        let mut attributes: Vec<_> = xattr::names(&held)
            .unwrap()
            .into_iter()
            .filter(|name| crate::workspace::layer::is_portable(name))
            .map(|name| (name.clone(), xattr::value(&held, &name).unwrap()))
            .collect();
        attributes.sort();
        facts.insert(
            name,
            format!(
                "{:o} {}:{} {}.{:09} {content} {attributes:?} = {links}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.mtime(),
                metadata.mtime_nsec(),
            ),
        );
    }
    facts
}

/// Says where two trees differ, in as few lines as there are differences.
pub(in crate::workspace) fn assert_same(left: &Facts, right: &Facts, what: &str) {
    let names: std::collections::BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let differing: Vec<_> = names
        .into_iter()
        .filter(|name| left.get(*name) != right.get(*name))
        .map(|name| format!("{name}:\n  {:?}\n  {:?}", left.get(name), right.get(name)))
        .collect();
    assert!(differing.is_empty(), "{what}\n{}", differing.join("\n"));
}

fn inodes(root: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let output = std::process::Command::new("find").arg(root).output().unwrap();
    let paths = output.stdout.split(|byte| *byte == b'\n').map(OsStr::from_bytes);
    let stats = paths.filter_map(|path| Some((format!("{path:?}"), fs::symlink_metadata(path).ok()?)));
    stats.map(|(path, stat)| (path, (stat.ino(), stat.ctime(), stat.ctime_nsec()))).collect()
}

#[test]
fn the_lower_becomes_what_the_session_saw_and_the_upper_stays_as_it_was() {
    let Some(fixture) = Fixture::all_kinds() else { return };
    let (seen, upper) = (fixture.snapshot(), facts(&fixture.overlay.upper()));
    std::thread::sleep(Duration::from_millis(100));
    let outcome = fixture.commit();
    assert_same(&seen, &fixture.lower(), "after the first commit");
    assert_same(&upper, &facts(&fixture.overlay.upper()), "the upper");
    assert!(outcome.applied > 40 && outcome.bytes > 300_000 && outcome.fsync_us > 0, "{outcome:?}");
    assert_eq!(outcome.skipped, Paths::default());
    let sparse = fs::metadata(fixture.overlay.lower().join("sparse")).unwrap();
    assert!(sparse.len() == 2 << 20 && sparse.blocks() < 100);

    let before = inodes(&fixture.overlay.lower());
    let again = fixture.commit();
    assert_same(&seen, &fixture.lower(), "after the second commit");
    assert_eq!((again.applied, again.bytes), (0, 0));
    assert_eq!(before, inodes(&fixture.overlay.lower()));

    // Without the journal everything is copied again, to the same effect.
    fs::remove_file(fixture.overlay.path("home/journal")).unwrap();
    assert!(fixture.commit().applied > 20);
    assert_same(&seen, &fixture.lower(), "after a commit by another journal");
}

#[test]
fn a_session_goes_on_and_commits_again() {
    let Some(fixture) = Fixture::all_kinds() else { return };
    std::thread::sleep(Duration::from_millis(100));
    fixture.commit();
    for script in [
        "echo more >>keep/file; rm two; rm -r keep/fresh; mkdir keep/fresh; echo other >keep/fresh/er",
        "rm -rf ./*; mkdir again; echo last >again/last; chmod 750 .; chown 5:6 .",
    ] {
        fixture.overlay.change(script);
        let seen = fixture.snapshot();
        let options = Options { on_conflict: OnConflict::Fail, ..EVERYTHING };
        fixture.try_commit(&options).unwrap();
        assert_same(&seen, &fixture.lower(), script);
    }
}

#[test]
fn only_some_of_it() {
    let Some(fixture) = Fixture::new() else { return };
    fixture
        .overlay
        .change("echo new | tee only/x/1 only/y/2 only/x/new; rm removed; chmod 700 only; mkdir -p a/b a/c");
    let before = fixture.lower();
    let only = vec![b"only/x".to_vec(), b"a/b".to_vec()];
    let outcome = fixture.try_commit(&Options { only, ..EVERYTHING }).unwrap();
    let after = fixture.lower();
    assert_eq!(fs::read(fixture.overlay.lower().join("only/x/1")).unwrap(), b"new\n");
    for same in ["only", "only/y/2", "removed"].map(|name| format!("{name:?}")) {
        assert_eq!(before.get(&same), after.get(&same));
    }
    let is_there = |name| fixture.overlay.lower().join(name).exists();
    assert!(is_there("a/b") && !is_there("a/c"));
    assert_eq!(outcome.applied, 4);
}

#[test]
fn privileges_are_kept_when_asked_for() {
    let Some(fixture) = Fixture::with("mkdir shared; chmod 2775 shared") else { return };
    fixture
        .overlay
        .change("cp /bin/true tool; chmod 6755 tool; echo x >shared/x; mkdir shared/sub; mkfifo -m 600 p; chmod g+s p");
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    set_attribute(&fixture.overlay.merged().join("tool"), c"security.capability", capability);
    let mode = |name: &str| fs::metadata(fixture.overlay.lower().join(name)).unwrap().mode() & 0o7777;
    let has_capability = || {
        let tool = File::open(fixture.overlay.lower().join("tool")).unwrap();
        xattr::value(&tool, c"security.capability").unwrap().is_some()
    };
    fixture.commit();
    assert_eq!((mode("tool"), mode("p"), has_capability()), (0o755, 0o600, false));
    assert_eq!((mode("shared"), mode("shared/sub")), (0o2775, 0o2755));
    let seen = fixture.snapshot();
    fixture.try_commit(&Options { keep_privileges: true, ..EVERYTHING }).unwrap();
    assert_eq!((mode("tool"), mode("p"), has_capability()), (0o6755, 0o2600, true));
    assert_same(&seen, &fixture.lower(), "with privileges");
    fixture.commit();
    assert_eq!((mode("tool"), has_capability()), (0o755, false));
}

#[test]
fn what_others_have_changed_is_a_conflict() {
    let Some(fixture) = Fixture::all_kinds() else { return };
    let lower = fixture.overlay.lower();
    run(
        &lower,
        "echo theirs | tee keep/file gone/sub/b again/fresh again/old-sub/x unrelated keep/theirs >modes",
    );
    let paths = |paths: &Paths| paths.first.clone();
    let fail = Options { on_conflict: OnConflict::Fail, ..EVERYTHING };
    let expected = ["/inside/again", "/inside/gone", "/inside/keep/file", "/inside/modes"];
    let found = conflicts(&fixture.overlay.layer(), &fail, fixture.since, &fixture.journal(), GO_ON).unwrap();
    assert_eq!(paths(&found), expected);
    let before = inodes(&lower);
    let error = fixture.try_commit(&fail).unwrap_err();
    assert_eq!(error.class(), Class::Conflict);
    assert!(error.to_string().contains("/inside/again") && error.to_string().contains("3 more"), "{error}");
    assert_eq!(before, inodes(&lower));

    let theirs = fixture.lower();
    let outcome = fixture.try_commit(&Options { on_conflict: OnConflict::Skip, ..EVERYTHING }).unwrap();
    assert_eq!((paths(&outcome.skipped), outcome.skipped.count), (expected.map(str::to_owned).to_vec(), 4));
    let after = fixture.lower();
    for (name, fact) in &theirs {
        if ["again", "gone", "modes\"", "keep/file", "unrelated", "keep/theirs"]
            .iter()
            .any(|same| name[1..].starts_with(same))
        {
            assert_eq!(Some(fact), after.get(name), "{name}");
        }
    }
    assert_eq!(fs::read(lower.join("dir-to-file")).unwrap(), b"file\n");
    // Its own work is none, in another process too; what was left alone still is.
    fixture
        .overlay
        .change("echo newest | tee dir-to-file file-to-dir/in/z linked-b; rm -r keep/fresh locked");
    let found = conflicts(&fixture.overlay.layer(), &fail, fixture.since, &fixture.journal(), GO_ON).unwrap();
    assert_eq!(paths(&found), expected);
    // But others may change that.
    run(&lower, "echo theirs >file-to-dir/in/z");
    let found = conflicts(&fixture.overlay.layer(), &fail, fixture.since, &fixture.journal(), GO_ON).unwrap();
    assert_eq!(found.count, 5);
    let outcome = fixture.commit();
    assert_eq!(outcome.skipped.count, 0);
    assert_eq!(fs::read(lower.join("keep/file")).unwrap(), b"new\n");
    assert!(lower.join("unrelated").exists() && !lower.join("gone").exists());
}

#[test]
fn own_directories_may_be_removed_again() {
    let Some(fixture) = Fixture::new() else { return };
    let fail = Options { on_conflict: OnConflict::Fail, ..EVERYTHING };
    fixture.overlay.change("echo new >keep/deep/file; mkdir -p new/sub; echo x >new/sub/x; chmod 700 shrink");
    fixture.try_commit(&fail).unwrap();
    fixture.overlay.change("rm -r keep new shrink");
    let seen = fixture.snapshot();
    run(&fixture.overlay.lower(), "mkdir new/theirs");
    assert_eq!(fixture.try_commit(&fail).unwrap_err().class(), Class::Conflict);
    run(&fixture.overlay.lower(), "rmdir new/theirs; touch -r keep new");
    let outcome = fixture.try_commit(&Options { on_conflict: OnConflict::Overwrite, ..fail }).unwrap();
    assert!(outcome.applied >= 2);
    assert_same(&seen, &fixture.lower(), "after removing");
}

/// Works on copies of the trees, again and again from the beginning, in memory.
struct Repeated {
    dir: tempfile::TempDir,
}

impl Repeated {
    fn new(fixture: &Fixture) -> Self {
        let memory = Path::new("/dev/shm");
        let dir = if memory.exists() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        let repeated = Self { dir };
        repeated.copy(&fixture.overlay.lower(), "old");
        repeated.copy(&fixture.overlay.upper(), "upper");
        repeated
    }

    fn open(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    fn copy(&self, from: &Path, to: &str) {
        let to = self.dir.path().join(to);
        fs::create_dir(&to).unwrap();
        let (from, to) = (Self::open(from), Self::open(&to));
        crate::workspace::duplicate::duplicate(from.as_fd(), to.as_fd(), GO_ON).unwrap();
    }

    fn begin(&self) -> (Layer, OwnedFd) {
        let path = |name| self.dir.path().join(name);
        for name in ["lower", "home"] {
            let _ = fs::remove_dir_all(path(name));
        }
        fs::create_dir(path("home")).unwrap();
        self.copy(&path("old"), "lower");
        let (upper, lower) = (Self::open(&path("upper")), Self::open(&path("lower")));
        (Layer { dest: "/inside".into(), upper, lower, marks: Marks::Trusted }, Self::open(&path("home")))
    }

    fn lower(&self) -> Facts {
        facts(&self.dir.path().join("lower"))
    }
}

/// The part of a fact that has to be either old or new at every moment.
fn content(facts: &Facts, name: &str) -> Option<String> {
    let fact = facts.get(name)?;
    let kind = u32::from_str_radix(fact.split(' ').next()?, 8).ok()? & 0o170_000;
    Some(if kind == 0o040_000 {
        "directory".into()
    } else {
        fact.split(' ').nth(3)?.to_owned() + &kind.to_string()
    })
}

#[test]
fn cut_off_anywhere_it_ends_the_same() {
    let Some(fixture) = Fixture::all_kinds() else { return };
    std::thread::sleep(Duration::from_millis(100));
    let repeated = Repeated::new(&fixture);
    let (layer, home) = repeated.begin();
    let since = Timestamp { sec: 0, nsec: 0 };
    let old = repeated.lower();
    let steps = Cell::new(0);
    let count = || {
        steps.set(steps.get() + 1);
        Ok(())
    };
    let mut journal = Journal::open(home.as_fd(), "journal").unwrap();
    apply(&layer, &EVERYTHING, since, &mut journal, &count).unwrap();
    let new = repeated.lower();
    assert!(steps.get() > 100, "{}", steps.get());

    for killed in [false, true] {
        for at in 0..steps.get() {
            let what = format!("cut off at {at}, killed: {killed}");
            let (layer, home) = repeated.begin();
            let since = now();
            let mut journal = Journal::open(home.as_fd(), "journal").unwrap();
            let done = Cell::new(0);
            let cut_off = || {
                done.set(done.get() + 1);
                match (done.get() > at, killed) {
                    (false, _) => Ok(()),
                    (true, false) => Err(FileError::Cancelled),
                    // Like being killed: nothing is tidied up.
                    (true, true) => resume_unwind(Box::new(())),
                }
            };
            let result =
                catch_unwind(AssertUnwindSafe(|| apply(&layer, &EVERYTHING, since, &mut journal, &cut_off)));
            match result {
                Ok(done) => assert_eq!(done.unwrap_err().class(), Class::Cancelled, "{what}"),
                Err(_) => assert!(killed, "{what}"),
            }
            drop(journal);
            let between = repeated.lower();
            if !killed {
                assert!(!between.keys().any(|name| name.contains(".execd-commit")), "{what}: {between:?}");
            }
            for name in old.keys().filter(|name| new.contains_key(*name)) {
                let [old, new, now] = [&old, &new, &between].map(|facts| content(facts, name));
                assert!(now == old || now == new, "{what}: {name} {now:?}");
            }
            let mut journal = Journal::open(home.as_fd(), "journal").unwrap();
            // What the commit itself has written is no conflict.
            let options = Options { on_conflict: OnConflict::Fail, ..EVERYTHING };
            apply(&layer, &options, since, &mut journal, GO_ON)
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_same(&new, &repeated.lower(), &what);
        }
    }
}

#[test]
fn what_is_planted_leads_nowhere() {
    let Some(fixture) = Fixture::new() else { return };
    let canary = fixture.overlay.path("canary");
    run(&fixture.overlay.path(""), "mkdir -p canary/deep; echo safe | tee canary/file >canary/deep/file");
    let before = inodes(&canary);
    fixture.overlay.change("echo new | tee keep/file keep/deep/file; rm -r gone; rm only/x/1");
    run(
        &fixture.overlay.lower(),
        "mv keep away; mv only/x only/z; ln -s ../canary keep; ln -s ../../canary only/x; rm -r gone; ln -s ../canary gone",
    );
    for on_conflict in [OnConflict::Fail, OnConflict::Skip, OnConflict::Overwrite] {
        let result = fixture.try_commit(&Options { on_conflict, ..EVERYTHING });
        println!("{on_conflict:?}: {result:?}");
        assert_eq!(before, inodes(&canary));
    }
    // In the middle of a commit, too.
    let Some(fixture) = Fixture::new() else { return };
    run(&fixture.overlay.path(""), "mkdir -p canary/deep; echo safe | tee canary/file >canary/deep/file");
    let canary = fixture.overlay.path("canary");
    let before = inodes(&canary);
    fixture
        .overlay
        .change("echo new | tee keep/file keep/deep/file keep/deep/other; rm -r gone; rm only/x/1");
    for at in 0..40 {
        let done = Cell::new(0);
        let swapped = || {
            done.set(done.get() + 1);
            if done.get() == at {
                run(&fixture.overlay.lower(), "mv keep away; ln -s ../canary keep");
            }
            Ok(())
        };
        let result =
            apply(&fixture.overlay.layer(), &EVERYTHING, fixture.since, &mut fixture.journal(), &swapped);
        if let Err(error) = result {
            assert_eq!(error.class(), Class::Conflict, "{at}: {error}");
        }
        assert_eq!(before, inodes(&canary));
        run(&fixture.overlay.lower(), "if [ -e away ]; then rm -rf keep; mv away keep; fi");
    }
}

#[test]
fn marks_of_overlayfs_stay_in_the_upper() {
    let Some(fixture) = Fixture::new() else { return };
    fixture.overlay.change("mkdir new; echo x >new/file; echo y >keep/file");
    let upper = fixture.overlay.upper();
    for name in [c"trusted.overlay.redirect", c"trusted.overlay.overlay.opaque", c"user.overlay.redirect"] {
        set_attribute(&upper.join("new"), name, b"/canary");
        set_attribute(&upper.join("keep/file"), name, b"/canary");
    }
    fixture.commit();
    for path in ["new", "new/file", "keep", "keep/file", ""] {
        let file = File::open(fixture.overlay.lower().join(path)).unwrap();
        assert!(xattr::names(&file).unwrap().is_empty(), "{path}");
    }
}

#[test]
fn what_is_mounted_in_the_lower_is_not_entered_nor_removed() {
    let Some(fixture) = Fixture::with("mkdir -p a/point b/point; echo x >a/file") else { return };
    fixture.overlay.change("echo new >a/point/new; rm -r b");
    let point = |name: &str| fixture.overlay.lower().join(name);
    for name in ["a/point", "b/point"] {
        run(&fixture.overlay.lower(), &format!("mount -t tmpfs tmpfs {name}; echo safe >{name}/safe"));
    }
    let only = |path: &str| Options { only: vec![path.as_bytes().to_vec()], ..EVERYTHING };
    let results = ["a", "b"].map(|name| fixture.try_commit(&only(name)).map_err(|error| error.class()));
    let safe = ["a/point", "b/point"].map(|name| fs::read_dir(point(name)).unwrap().count());
    run(&fixture.overlay.lower(), "umount a/point b/point");
    assert!(results.iter().all(|result| matches!(result, Err(Class::Conflict))), "{results:?}");
    assert_eq!(safe, [1, 1]);
}

#[test]
fn deep_trees() {
    let Some(fixture) = Fixture::with("mkdir top") else { return };
    fixture.overlay.change("d=$(printf 'd/%.0s' {1..1900}); mkdir -p $d; echo x >${d}f");
    let seen = fixture.snapshot();
    fixture.commit();
    assert_same(&seen, &fixture.lower(), "deep");
    fixture.overlay.change("rm -r d");
    fixture.commit();
    assert!(!fixture.overlay.lower().join("d").exists());
    // Where no path reaches, it says so.
    fixture.overlay.nest(5000, 1);
    assert_eq!(fixture.try_commit(&EVERYTHING).unwrap_err().class(), Class::Invalid);
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let Some(fixture) = Fixture::with("mkdir d; echo old >d/file") else { return };
    let small = fixture.overlay.path("small");
    run(&fixture.overlay.path(""), "mkdir small; mount -t tmpfs -o size=1M tmpfs small; cp -a lower/. small");
    fixture.overlay.change("echo new >d/a; head -c 3000000 /dev/urandom >d/file");
    let layer = Layer { lower: File::open(&small).unwrap().into(), ..fixture.overlay.layer() };
    let result = apply(&layer, &EVERYTHING, fixture.since, &mut fixture.journal(), GO_ON);
    drop(layer);
    let left = facts(&small).into_keys().collect::<Vec<_>>();
    run(&fixture.overlay.path(""), "umount small");
    let error = result.unwrap_err();
    assert_eq!(error.class(), Class::NoSpace);
    assert!(error.to_string().starts_with("/inside/d/file: "), "{error}");
    assert_eq!(left, ["\"\"", "\"d\"", "\"d/file\""]);
}
