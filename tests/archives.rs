//! Whole subtrees in one request, out of one session and into another, and archives that mean harm.

mod common;

use common::files::{append, tar_of};
use common::{Setup, machine};
use std::io::Read;
use tar::{EntryType, Header};

#[test]
fn an_archive_carries_a_tree_from_one_session_to_another() {
    let Some(daemon) = Setup::new().start() else { return };
    let (from, to) = (daemon.session("from"), daemon.session("to"));
    let deep = "d/".repeat(60);
    from.output(&format!(
        "mkdir -p tree/sub/empty tree/{deep}; cd tree; echo a > a; ln a sub/hard; ln -s ../a sub/soft; ln -s /nowhere sub/dangling; \
         mkfifo fifo; truncate -s 8M sparse; printf end >> sparse; chmod 640 a; chmod 711 sub; \
         echo deep > {deep}f; touch -h -d @1000000000 a sub/soft sub; cd .."
    ));
    let archive = from.ask("GET", "/directories/archive", &[("path", "tree")]);
    assert_eq!((archive.status, archive.head.header("content-type")), (200, Some("application/gzip")));
    assert_eq!(archive.head.header("content-disposition"), Some("attachment; filename=\"tree.tar.gz\""));
    let sent = to.send("POST", "/directories/archive?path=new/place", &[], &archive.body).whole();
    assert_eq!((sent.status, sent.text().as_str()), (200, ""));
    let look = "(cd DIR; find . -mindepth 1 -printf '%p %y %m %s %l ' \\( -type f -printf '%n' \\) -o -printf '\\n'; find . -mindepth 1 \\( -type d -o -name 'd*' -o -name soft -o -name a \\) -printf '%p %Ts\\n' | grep -v dangling; sha256sum a sparse sub/hard; du -m sparse) | sort";
    assert_eq!(to.output(&look.replace("DIR", "new/place")), from.output(&look.replace("DIR", "tree")));
    // As plain tar, too, and over what is there.
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(archive.body.as_slice()).read_to_end(&mut plain).unwrap();
    to.output("rm new/place/a; ln -s /etc new/place/a; echo other > new/place/sub/hard");
    assert_eq!(to.send("POST", "/directories/archive?path=new/place", &[], &plain).whole().status, 200);
    assert_eq!(to.output(&look.replace("DIR", "new/place")), from.output(&look.replace("DIR", "tree")));
}

#[test]
fn hostile_archives_write_nothing_outside() {
    let Some(daemon) = Setup::new().start() else { return };
    let session = daemon.session("w");
    session.output("mkdir target outside; echo untouched > outside/f; ln -s ../outside target/link");
    let entry = |kind, path: &str, link: &str| {
        let mut builder = tar::Builder::new(Vec::new());
        append(&mut builder, EntryType::Regular, "good", "", b"good");
        append(&mut builder, kind, path, link, b"");
        builder.into_inner().unwrap()
    };
    let through_own_link = {
        let mut builder = tar::Builder::new(Vec::new());
        append(&mut builder, EntryType::Symlink, "l", "../outside", b"");
        append(&mut builder, EntryType::Regular, "l/f", "", b"written");
        builder.into_inner().unwrap()
    };
    let talkative = {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(48 << 20);
        header.set_cksum();
        let mut builder =
            tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        builder.append(&header, std::io::repeat(b'a').take(48 << 20)).unwrap();
        builder.into_inner().unwrap().finish().unwrap()
    };
    let mut cut_off = tar_of(&[("big", &[b'x'; 100_000])]);
    cut_off.truncate(50_000);
    let before = machine::resident_kb(daemon.pid());
    for (archive, what) in [
        (entry(EntryType::Regular, "../outside/f", ""), "dots"),
        (entry(EntryType::Regular, "/tmp/execd-absolute", ""), "absolute"),
        (entry(EntryType::Regular, "link/f", ""), "a link that was there"),
        (entry(EntryType::Directory, "link/d", ""), "a folder behind a link"),
        (through_own_link, "a link it brings along"),
        (entry(EntryType::Link, "hard", "../outside/f"), "a hard link with dots"),
        (entry(EntryType::Link, "hard", "link/f"), "a hard link behind a link"),
        (entry(EntryType::Link, "hard", "/etc/passwd"), "an absolute hard link"),
        (entry(EntryType::Char, "device", ""), "a device"),
        (entry(EntryType::Block, "device", ""), "a device"),
        (talkative, "a name without end"),
        (cut_off, "cut off"),
        (b"no archive at all".repeat(100), "none"),
        (vec![0x1f, 0x8b, 1, 2, 3], "no gzip"),
    ] {
        let answer = session.send("POST", "/directories/archive?path=target", &[], &archive).whole();
        assert_eq!(answer.failure().0, 400, "{what}: {}", answer.text());
    }
    assert!(machine::resident_kb(daemon.pid()) < before + 20_000, "an archive was kept in memory");
    assert_eq!(
        session.output("cat outside/f; ls outside; ls -A /tmp | grep execd-absolute; readlink target/link"),
        "untouched\nf\n../outside\n"
    );
    // What it brings is the session user's, and no set-uid program.
    assert_eq!(session.output("stat -c '%a %u' target/good"), "755 0\n");
    assert_eq!(
        session.send("POST", "/directories/archive?path=target/good", &[], &tar_of(&[])).whole().failure().0,
        400
    );
    assert_eq!(session.send("POST", "/directories/archive", &[], b"").whole().failure().1, "MISSING_QUERY");
}
