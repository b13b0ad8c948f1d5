"""What users of the published SDK see of a session's files, in each mode a folder can be mounted in."""

import asyncio
import hashlib
import io
from datetime import datetime, timedelta, timezone

import pytest
from conftest import Execd
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.filesystem import (
    ContentReplaceEntry,
    DirectoryListEntry,
    MoveEntry,
    SearchEntry,
    SetPermissionEntry,
    WriteEntry,
)
from opensandbox.models.isolated import CreateIsolatedSessionRequest, IsolatedOverlaySpec

# What is in the folder on the host.
ORIGINAL = {
    "note.txt": b"original\n",
    "lines.txt": b"one\ntwo\r\n\nfour \xc3\xbc",
    "sub/deep.txt": b"deep\n",
    "sub/more/code.py": b"print()\n",
}
BINARY = bytes(range(256)) * 20_000
WRITABLE = ["rw", "overlay", "ephemeral"]


def status(call, *args, **kwargs) -> int:
    """The HTTP status of the error that the call has to raise."""
    with pytest.raises(SandboxApiException) as caught:
        call(*args, **kwargs)
    return caught.value.status_code


def tree(folder) -> dict:
    """Modes and contents of everything in a folder."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


class Place:
    """A session on a folder."""

    def __init__(self, mode, folder, session):
        self.mode, self.folder, self.session = mode, folder, session
        self.files = session.files
        self.before = tree(folder)

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def inside(self, code: str) -> str:
        """What a run in the folder prints; its last newline is not in it."""
        execution = self.session.run(code)
        assert execution.exit_code == 0, execution
        return execution.text

    def listed(self, name: str = ".", **options) -> list[str]:
        """The paths in a directory, from the folder on."""
        entries = self.files.list_directory(DirectoryListEntry(path=self.path(name), **options))
        return [entry.path.removeprefix(f"{self.folder}/") for entry in entries]

    def found(self, pattern: str, name: str = ".") -> list[str]:
        entries = self.files.search(SearchEntry(path=self.path(name), pattern=pattern))
        return [entry.path.removeprefix(f"{self.folder}/") for entry in entries]

    def mode_of(self, name: str) -> int:
        """The permission bits, which the session has to see as well."""
        mode = self.files.get_file_info([self.path(name)])[self.path(name)].mode
        assert self.inside(f"stat -c %a '{name}'") == str(mode)
        return mode

    def check(self, name: str, content: bytes | None) -> None:
        """The file has that content for the SDK and in the session; None: there is none. On the host it is the same
        where writes go through, and nothing has changed where they do not."""
        if content is None:
            assert status(self.files.read_bytes, self.path(name)) == 404
            assert status(self.files.get_file_info, [self.path(name)]) == 404
            assert name not in self.listed(depth=9) + self.found("**")
            self.inside(f"! test -e '{name}'")
        else:
            assert self.files.read_bytes(self.path(name)) == content
            assert name in self.listed(depth=9) and name in self.found("**")
            assert self.inside(f"sha256sum < '{name}'").split()[0] == hashlib.sha256(content).hexdigest()
        if self.mode == "rw":
            on_host = self.folder / name
            assert (on_host.read_bytes() if on_host.exists() else None) == content
        else:
            assert tree(self.folder) == self.before


@pytest.fixture
def prepare(request_for, uid_mode, tmp_path):
    """Makes the folder, and the request for a session on it."""

    def build(mode):
        folder = tmp_path / "workspace"
        for name, content in ORIGINAL.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o640)
        (folder / "link").symlink_to("note.txt")
        if mode == "ephemeral":
            overlays = [IsolatedOverlaySpec(path=str(folder), mode="overlay", persist=False)]
            return folder, CreateIsolatedSessionRequest(overlays=overlays, uid_mode=uid_mode)
        return folder, request_for(folder, mode)

    return build


@pytest.fixture
def place(isolation, prepare, request):
    """A session in the mode that the test is parametrised with."""
    folder, wanted = prepare(request.param)
    with isolation.session(wanted) as session:
        yield Place(request.param, folder, session)


every_mode = pytest.mark.parametrize("place", [*WRITABLE, "ro"], indirect=True)
writable_modes = pytest.mark.parametrize("place", WRITABLE, indirect=True)
read_only = pytest.mark.parametrize("place", ["ro"], indirect=True)


@every_mode
def test_reading(place):
    files = place.files
    for name, content in ORIGINAL.items():
        place.check(name, content)
        assert files.read_file(place.path(name)) == content.decode()
        assert b"".join(files.read_bytes_stream(place.path(name), chunk_size=3)) == content
    assert files.read_file("note.txt") == files.read_file(place.path("link")) == "original\n"
    assert files.read_file("lines.txt", encoding="latin-1").endswith("four Ã¼")
    for read in (files.read_file, files.read_bytes, files.read_bytes_stream):
        assert status(read, place.path("missing")) == 404


@every_mode
def test_reading_a_range(place):
    ranges = {"bytes=0-3": b"orig", "bytes=4-": b"inal\n", "bytes=-2": b"l\n", "bytes=5-999": b"nal\n"}
    for header, content in ranges.items():
        assert place.files.read_bytes("note.txt", range_header=header) == content
        assert place.files.read_file("note.txt", range_header=header) == content.decode()
        assert b"".join(place.files.read_bytes_stream("note.txt", range_header=header)) == content
    for read in (place.files.read_bytes, place.files.read_bytes_stream):
        assert status(read, "note.txt", range_header="bytes=9-") == 416
        assert status(read, "note.txt", range_header="lines=1-2") == 416
        assert status(read, "note.txt", range_header="bytes=0-3", offset=1) == 400


@every_mode
def test_reading_lines(place):
    for offset, limit, text in [
        (1, 2, "one\ntwo"),
        (None, 1, "one"),
        (3, None, "\nfour ü"),
        (4, 9, "four ü"),
        (5, 1, ""),
    ]:
        assert place.files.read_file("lines.txt", offset=offset, limit=limit) == text
        assert place.files.read_bytes("lines.txt", offset=offset, limit=limit) == text.encode()
        stream = place.files.read_bytes_stream("lines.txt", offset=offset, limit=limit)
        assert b"".join(stream) == text.encode()
    assert place.files.read_file("note.txt", offset=1) == "original"
    assert status(place.files.read_file, "lines.txt", offset=0) == 400
    assert status(place.files.read_file, "lines.txt", limit=0) == 400


@every_mode
def test_info(place):
    names = [place.path("note.txt"), place.path("sub"), "link"]
    found = place.files.get_file_info(names)
    assert {name: info.path for name, info in found.items()} == {name: name for name in names}
    assert [found[name].entry_type for name in names] == ["file", "directory", "symlink"]
    note = found[names[0]]
    assert (note.size, note.mode) == (9, 640)
    assert place.inside("stat -c '%U %G' note.txt") == f"{note.owner} {note.group}"
    for time in (note.modified_at, note.created_at):
        assert abs(datetime.now(timezone.utc) - time) < timedelta(minutes=5)
    assert place.files.get_file_info([]) == {}
    assert status(place.files.get_file_info, [*names, place.path("missing")]) == 404


@every_mode
def test_listing_and_searching(place):
    top = ["lines.txt", "link", "note.txt", "sub"]
    assert place.listed() == place.listed(depth=1) == top
    assert place.listed(depth=2) == [*top, "sub/deep.txt", "sub/more"]
    assert place.listed(depth=9)[-1] == "sub/more/code.py"
    assert place.listed("sub") == ["sub/deep.txt", "sub/more"]
    assert place.listed(depth=0) == []
    assert place.found("*.py") == place.found("**/*.py") == ["sub/more/code.py"]
    assert place.found("*.txt") == ["lines.txt", "note.txt", "sub/deep.txt"]
    assert place.found("*.txt", "sub") == ["sub/deep.txt"]
    assert set(place.found("**")) >= set(ORIGINAL) and "sub" not in place.found("**")
    assert place.found("nothing*") == []
    assert status(place.listed, "missing") == status(place.found, "**", "missing") == 404


@writable_modes
def test_writing(place, tmp_path):
    (tmp_path / "upload").write_bytes(BINARY)
    place.files.write_file(place.path("text.txt"), "grüße\n", mode=644)
    place.check("text.txt", "grüße\n".encode())
    assert place.mode_of("text.txt") == 644
    place.files.write_file("latin", "grüße", encoding="latin-1")
    place.check("latin", "grüße".encode("latin-1"))
    assert place.mode_of("latin") == 755
    for name, data in [("bytes", BINARY), ("stream", io.BytesIO(BINARY)), ("empty", b"")]:
        place.files.write_file(place.path(f"new/folder/{name}"), data, mode=600)
        place.check(f"new/folder/{name}", BINARY if name != "empty" else b"")
    with (tmp_path / "upload").open("rb") as upload:
        place.files.write_file(place.path("file"), upload)
    place.check("file", BINARY)
    assert b"".join(place.files.read_bytes_stream(place.path("file"))) == BINARY
    assert place.mode_of("new/folder") == 755 and place.mode_of("new/folder/bytes") == 600

    place.files.write_file(place.path("note.txt"), "changed", mode=644)
    place.check("note.txt", b"changed")
    assert place.mode_of("note.txt") == 644
    assert place.inside("echo more >> note.txt; cat note.txt") == "changedmore"
    place.check("note.txt", b"changedmore\n")


@writable_modes
def test_writing_several_files(place):
    owner = place.files.get_file_info(["note.txt"])["note.txt"]
    odd = "ö & 'b'+\"c\" %41;?#.txt"
    place.files.write_files(
        [
            WriteEntry(path=place.path("one"), data="1", mode=640, owner=owner.owner, group=owner.group),
            WriteEntry(path=place.path(odd), data=b"2"),
            WriteEntry(path="sub/three", data=io.BytesIO(b"3")),
        ]
    )
    assert place.inside("cat one ö* sub/three") == "123"
    assert place.files.read_file(place.path(odd)) == "2" and odd in place.listed() and odd in place.found("ö*")
    assert place.files.get_file_info([place.path(odd)])[place.path(odd)].size == 1
    place.check("one", b"1")
    place.files.write_files([])
    assert status(place.files.write_file, place.path("bad"), "x", mode=888) == 400
    assert status(place.files.write_file, place.path("bad"), "x", owner="no-such-user") == 400
    place.check("bad", None)


@writable_modes
def test_both_sides_see_changes_at_once(place):
    place.check("passing", None)
    place.inside("echo 1 > passing; echo 2 > note.txt; rm lines.txt; mv sub moved")
    place.check("passing", b"1\n")
    place.check("note.txt", b"2\n")
    place.check("lines.txt", None)
    place.check("sub/deep.txt", None)
    place.check("moved/more/code.py", b"print()\n")
    place.files.delete_files([place.path("passing")])
    place.check("passing", None)
    place.files.write_file(place.path("lines.txt"), "again")
    place.check("lines.txt", b"again")


@writable_modes
def test_directories(place):
    wanted = [WriteEntry(path=place.path("made/below")), WriteEntry(path=place.path("private"), mode=700)]
    place.files.create_directories(wanted)
    place.files.create_directories(wanted)
    infos = place.files.get_file_info([place.path("made"), place.path("made/below"), place.path("private")])
    assert [info.entry_type for info in infos.values()] == ["directory"] * 3
    assert place.mode_of("made") == place.mode_of("made/below") == 755 and place.mode_of("private") == 700
    assert (place.folder / "made/below").is_dir() == (place.mode == "rw")
    assert status(place.files.create_directories, [WriteEntry(path=place.path("note.txt/x"))]) == 400

    place.files.write_file(place.path("made/below/x"), "x")
    place.files.delete_directories([place.path("made"), place.path("sub"), place.path("missing")])
    for name in ("made/below/x", "sub/deep.txt", "sub/more/code.py"):
        place.check(name, None)
    assert place.listed() == ["lines.txt", "link", "note.txt", "private"]
    # What was there before does not come back.
    place.files.create_directories([WriteEntry(path=place.path("sub"))])
    assert place.listed("sub") == [] and place.inside("ls -A sub") == ""


@writable_modes
def test_deleting_files(place):
    place.files.write_file(place.path("new"), "new")
    assert status(place.files.delete_files, [place.path("new"), place.path("missing")]) == 404
    assert status(place.files.delete_files, [place.path("sub")]) == 400
    place.check("new", b"new")
    place.files.delete_files([place.path("new"), place.path("note.txt"), place.path("sub/deep.txt")])
    for name in ("new", "note.txt", "sub/deep.txt"):
        place.check(name, None)
    # A link is deleted, not what it leads to, which by now is nothing.
    place.files.delete_files([place.path("link"), place.path("lines.txt")])
    assert place.inside("ls -A") == "sub"
    place.files.write_file(place.path("note.txt"), "back")
    place.check("note.txt", b"back")
    place.files.delete_files([])


@writable_modes
def test_moving(place):
    place.files.write_file(place.path("new"), "new", mode=600)
    moves = [("new", "far/away/newer"), ("note.txt", "lines.txt"), ("sub", "far/sub")]
    place.files.move_files([MoveEntry(src=place.path(src), dest=place.path(dest)) for src, dest in moves])
    place.check("far/away/newer", b"new")
    place.check("lines.txt", b"original\n")
    place.check("far/sub/more/code.py", b"print()\n")
    for name in ("new", "note.txt", "sub/deep.txt", "sub/more/code.py"):
        place.check(name, None)
    assert place.mode_of("far/away/newer") == 600 and place.mode_of("lines.txt") == 640
    assert place.files.get_file_info([place.path("far/sub")])[place.path("far/sub")].entry_type == "directory"
    assert status(place.files.move_files, [MoveEntry(src=place.path("missing"), dest=place.path("x"))]) == 404


@writable_modes
def test_permissions(place):
    place.files.write_file(place.path("new"), "new", mode=644)
    entries = [("new", 755), ("note.txt", 755), ("sub", 711), ("sub/deep.txt", 400)]
    place.files.set_permissions([SetPermissionEntry(path=place.path(name), mode=mode) for name, mode in entries])
    for name, mode in entries:
        assert place.mode_of(name) == mode
    place.check("note.txt", b"original\n")
    if place.mode == "rw":
        assert (place.folder / "note.txt").stat().st_mode & 0o777 == 0o755
    info = place.files.get_file_info(["new"])["new"]
    keep = SetPermissionEntry(path=place.path("new"), mode=0, owner=info.owner, group=info.group)
    place.files.set_permissions([keep])
    assert place.mode_of("new") == 755
    for name, mode, owner, expected in [
        ("missing", 755, None, 404),
        ("new", 789, None, 400),
        ("new", 600, "no-such-user", 400),
    ]:
        entry = SetPermissionEntry(path=place.path(name), mode=mode, owner=owner)
        assert status(place.files.set_permissions, [entry]) == expected
    assert place.mode_of("new") == 755


@writable_modes
def test_replacing(place):
    def entry(name, old, new):
        return ContentReplaceEntry(path=place.path(name), old_content=old, new_content=new)

    place.files.write_file(place.path("new"), "a.a.a", mode=600)
    place.files.replace_contents([entry("new", ".", "->"), entry("note.txt", "original", "grüße\n")])
    place.check("new", b"a->a->a")
    place.check("note.txt", "grüße\n\n".encode())
    assert place.mode_of("new") == 600 and place.mode_of("note.txt") == 640
    entries = [entry("new", "a", ""), entry("lines.txt", "\n", "\n\n"), entry("sub/deep.txt", "none", "x")]
    results = place.files.replace_contents_detailed(entries)
    counts = {result.path: result.replaced_count for result in results}
    assert counts == {place.path("new"): 3, place.path("lines.txt"): 3, place.path("sub/deep.txt"): 0}
    place.check("new", b"->->")
    place.check("lines.txt", ORIGINAL["lines.txt"].replace(b"\n", b"\n\n"))
    place.check("sub/deep.txt", b"deep\n")
    for replace in (place.files.replace_contents, place.files.replace_contents_detailed):
        assert status(replace, [entry("missing", "a", "b")]) == 404
        assert status(replace, [entry("new", "", "b")]) == 400


@read_only
@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("write_files", WriteEntry(path="new", data="new")),
        ("write_files", WriteEntry(path="note.txt", data=b"changed")),
        ("write_files", WriteEntry(path="no/such/folder/new", data=BINARY)),
        ("create_directories", WriteEntry(path="new/folder")),
        ("delete_files", "note.txt"),
        ("delete_directories", "sub"),
        ("move_files", MoveEntry(src="note.txt", dest="moved.txt")),
        ("move_files", MoveEntry(src="sub", dest="new/sub")),
        ("move_files", MoveEntry(src="note.txt", dest="/tmp/note.txt")),
        ("set_permissions", SetPermissionEntry(path="note.txt", mode=777)),
        ("replace_contents", ContentReplaceEntry(path="note.txt", old_content="o", new_content="0")),
        ("replace_contents_detailed", ContentReplaceEntry(path="lines.txt", old_content="e", new_content="")),
    ],
)
def test_read_only_refuses(place, method, argument):
    assert status(getattr(place.files, method), [argument]) == 403
    for name, content in ORIGINAL.items():
        place.check(name, content)


@every_mode
def test_outside_of_the_folder(place):
    place.files.write_file("/tmp/private", "private", mode=644)
    assert place.inside("cat /tmp/private") == "private"
    assert status(place.files.write_file, "/etc/new", "new") == 403
    assert status(place.files.create_directories, [WriteEntry(path="/etc/new")]) == 403
    assert status(place.files.read_file, "../secret") == 400
    place.check("note.txt", ORIGINAL["note.txt"])


def test_files_belong_to_the_session_user(isolation, request_for, workspace, uid_mode):
    (workspace / "note.txt").chmod(0o600)
    with isolation.session(request_for(workspace, uid=61234, gid=61235)) as session:
        session.files.write_file("/tmp/mine/file", "mine", mode=600)
        info = session.files.get_file_info(["/tmp/mine/file"])["/tmp/mine/file"]
        assert (info.owner, info.group, info.mode) == ("61234", "61235", 600)
        assert session.run("stat -c '%u %g' /tmp/mine; cat /tmp/mine/file").text == "61234 61235\nmine"
        if uid_mode == "setpriv":
            assert status(session.files.read_file, "note.txt") == 403
            assert status(session.files.write_file, "new", "new") == 403


def test_a_session_that_is_gone_and_a_wrong_token(isolation, request_for, workspace, tmp_path):
    session = isolation.create(request_for(workspace))
    session.delete()
    assert status(session.files.read_file, "note.txt") == 404
    assert status(session.files.write_file, "new", "new") == 404
    assert status(session.files.get_file_info, ["note.txt"]) == 404
    daemon = Execd(tmp_path, token="correct horse")
    try:
        with daemon.client(token="correct horse") as client, daemon.client() as stranger:
            with client.session(request_for(workspace)) as session:
                session.files.write_file("new", "new")
                # The SDK's handle of the same session, without the token.
                foreign = type(session)(session.info, stranger)
                assert status(foreign.files.read_file, "new") == 401
                assert status(foreign.files.delete_files, ["new"]) == 401
                assert session.files.read_file("new") == "new"
    finally:
        assert daemon.stop() == 0


@pytest.mark.parametrize("mode", WRITABLE)
def test_the_asynchronous_service(execd, prepare, mode):
    folder, request = prepare(mode)
    before = tree(folder)

    async def use(files):
        names = [f"{folder}/many/{number}" for number in range(20)]
        await asyncio.gather(*(files.write_file(name, name, mode=644) for name in names))
        assert await asyncio.gather(*(files.read_file(name) for name in names)) == names
        assert {info.mode for info in (await files.get_file_info(names)).values()} == {644}
        await files.write_file("big", io.BytesIO(BINARY))
        stream = await files.read_bytes_stream("big", chunk_size=10_000)
        assert b"".join([chunk async for chunk in stream]) == BINARY
        assert await files.read_bytes("big", range_header="bytes=256-258") == b"\0\1\2"
        assert await files.read_file("lines.txt", offset=2, limit=1) == "two"

        await files.create_directories([WriteEntry(path="made", mode=700)])
        await files.move_files([MoveEntry(src="sub", dest="made/sub")])
        await files.set_permissions([SetPermissionEntry(path="note.txt", mode=600)])
        swap = ContentReplaceEntry(path="note.txt", old_content="i", new_content="1")
        await files.replace_contents([swap])
        assert (await files.replace_contents_detailed([swap]))[0].replaced_count == 0
        await files.delete_files(["big", "lines.txt", "link"])
        await files.delete_directories(["many"])
        listed = await files.list_directory(DirectoryListEntry(path=str(folder), depth=2))
        left = [f"{folder}/{name}" for name in ("made", "made/sub", "note.txt")]
        assert [entry.path for entry in listed] == left
        assert [entry.entry_type for entry in listed] == ["directory", "directory", "file"]
        found = await files.search(SearchEntry(path=str(folder), pattern="*.py"))
        assert [entry.path for entry in found] == [f"{folder}/made/sub/more/code.py"]

        for read in (files.read_file, files.read_bytes_stream):
            with pytest.raises(SandboxApiException) as caught:
                await read("big")
            assert caught.value.status_code == 404

    async def use_in_a_session():
        async with execd.async_client() as client, client.session(request) as session:
            await use(session.files)
            execution = await session.run("cat note.txt made/sub/deep.txt; stat -c %a note.txt made")
            assert execution.text == "or1g1nal\ndeep\n600\n700"

    asyncio.run(use_in_a_session())
    if mode == "rw":
        assert (folder / "note.txt").read_text() == "or1g1nal\n"
        assert sorted(path.name for path in folder.iterdir()) == ["made", "note.txt"]
    else:
        assert tree(folder) == before
