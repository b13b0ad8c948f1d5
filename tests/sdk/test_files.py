"""What users of the published SDK see of a session's files, in each mode a folder can be mounted in."""

import asyncio
import hashlib
import io
from datetime import datetime, timedelta, timezone

import pytest
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.filesystem import ContentReplaceEntry, DirectoryListEntry, MoveEntry, SearchEntry
from opensandbox.models.filesystem import SetPermissionEntry, WriteEntry
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
    content = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {path: (path.lstat().st_mode, content) for path, content in content.items()}


class Place:
    """A session on a folder."""

    def __init__(self, mode, folder, session):
        self.mode, self.folder, self.session = mode, folder, session
        self.files = session.files
        self.before = tree(folder)

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def inside(self, code: str) -> str:
        """What a run in the folder prints, without its last newline."""
        execution = self.session.run(code)
        assert execution.exit_code == 0, execution
        return execution.text

    def listed(self, name: str = ".", **options) -> list[str]:
        """The paths in a directory, from the folder on."""
        entries = self.files.list_directory(DirectoryListEntry(path=self.path(name), **options))
        return [entry.path.removeprefix(self.path("")) for entry in entries]

    def found(self, pattern: str, name: str = ".") -> list[str]:
        """The same for the files whose names match."""
        entries = self.files.search(SearchEntry(path=self.path(name), pattern=pattern))
        return [entry.path.removeprefix(self.path("")) for entry in entries]

    def mode_of(self, name: str) -> int:
        """The permission bits, which the session has to see as well."""
        mode = self.files.get_file_info([self.path(name)])[self.path(name)].mode
        assert self.inside(f"stat -c %a '{name}'") == str(mode)
        return mode

    def check(self, name: str, content: bytes | None) -> None:
        """The file has that content, or with None is missing, for the SDK and in the session. On the host it is
        the same where writes go through; where they do not, nothing has changed there."""
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
def place(isolation, request_for, uid_mode, tmp_path, request):
    """A session in the mode that the test is parametrised with."""
    folder, mode = tmp_path / "workspace", request.param
    for name, content in ORIGINAL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o640)
    (folder / "link").symlink_to("note.txt")
    if mode == "ephemeral":
        overlays = [IsolatedOverlaySpec(path=str(folder), mode="overlay", persist=False)]
        wanted = CreateIsolatedSessionRequest(overlays=overlays, uid_mode=uid_mode)
    else:
        wanted = request_for(folder, mode)
    with isolation.session(wanted) as session:
        yield Place(mode, folder, session)


every_mode = pytest.mark.parametrize("place", [*WRITABLE, "ro"], indirect=True)
writable_modes = pytest.mark.parametrize("place", WRITABLE, indirect=True)


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
        assert status(read, "note.txt", range_header="bytes=9-") == 416
        assert status(read, "note.txt", range_header="lines=1-2") == 416
        assert status(read, "note.txt", range_header="bytes=0-3", offset=1) == 400
        assert status(read, "note.txt", offset=0) == status(read, "note.txt", limit=0) == 400


@every_mode
def test_reading_a_part(place):
    for name, options, text in [
        ("note.txt", {"range_header": "bytes=0-3"}, "orig"),
        ("note.txt", {"range_header": "bytes=4-999"}, "inal\n"),
        ("note.txt", {"range_header": "bytes=-2"}, "l\n"),
        ("note.txt", {"offset": 1}, "original"),
        ("lines.txt", {"offset": 1, "limit": 2}, "one\ntwo"),
        ("lines.txt", {"offset": 3}, "\nfour ü"),
        ("lines.txt", {"offset": 5, "limit": 1}, ""),
    ]:
        assert place.files.read_file(place.path(name), **options) == text
        assert place.files.read_bytes(place.path(name), **options) == text.encode()
        assert b"".join(place.files.read_bytes_stream(place.path(name), **options)) == text.encode()


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
    assert place.listed("sub") == ["sub/deep.txt", "sub/more"]
    assert place.listed(depth=0) == place.found("nothing*") == []
    assert place.found("*.py") == place.found("**/*.py") == ["sub/more/code.py"]
    assert place.found("*.txt") == ["lines.txt", "note.txt", "sub/deep.txt"]
    assert place.found("*.txt", "sub") == ["sub/deep.txt"]
    assert set(place.found("**")) >= set(ORIGINAL) and "sub" not in place.found("**")
    assert status(place.listed, "missing") == status(place.found, "**", "missing") == 404


@writable_modes
def test_writing(place):
    place.files.write_file(place.path("text.txt"), "grüße\n", mode=644)
    place.check("text.txt", "grüße\n".encode())
    place.files.write_file("latin", "grüße", encoding="latin-1")
    place.check("latin", "grüße".encode("latin-1"))
    assert place.mode_of("text.txt") == 644 and place.mode_of("latin") == 755
    for name, data in [("bytes", BINARY), ("stream", io.BytesIO(BINARY))]:
        place.files.write_file(place.path(f"new/folder/{name}"), data, mode=600)
        place.check(f"new/folder/{name}", BINARY)
        assert b"".join(place.files.read_bytes_stream(f"new/folder/{name}")) == BINARY
    assert place.mode_of("new/folder") == 755 and place.mode_of("new/folder/stream") == 600

    place.files.write_file(place.path("note.txt"), "", mode=644)
    place.check("note.txt", b"")
    assert place.mode_of("note.txt") == 644
    assert place.inside("echo more >> note.txt; cat note.txt") == "more"
    place.check("note.txt", b"more\n")

    odd = "ö & b+\"c\" %41;?#.txt"
    owner = place.files.get_file_info(["note.txt"])["note.txt"]
    one = WriteEntry(path=place.path("one"), data="1", mode=640, owner=owner.owner, group=owner.group)
    place.files.write_files([one, WriteEntry(path=place.path(odd), data=b"2")])
    place.check("one", b"1")
    place.check(odd, b"2")
    place.files.write_files([])


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
    # What was in it before does not come back.
    place.files.create_directories([WriteEntry(path=place.path("sub"))])
    assert place.listed("sub") == [] and place.inside("ls -A sub") == ""


@writable_modes
def test_deleting_files(place):
    place.files.write_file(place.path("new"), "new")
    assert status(place.files.delete_files, [place.path("new"), place.path("missing")]) == 404
    assert status(place.files.delete_files, [place.path("sub")]) == 400
    place.check("new", b"new")
    place.files.delete_files([place.path("new"), place.path("link"), place.path("sub/deep.txt")])
    place.check("new", None)
    place.check("sub/deep.txt", None)
    # The link is gone, not what it led to.
    place.check("note.txt", b"original\n")
    place.files.delete_files([place.path("note.txt")])
    place.inside("rm lines.txt")
    for name in ("note.txt", "lines.txt"):
        place.check(name, None)
        place.files.write_file(place.path(name), "back")
        place.check(name, b"back")


@writable_modes
def test_moving(place):
    place.files.write_file(place.path("new"), "new", mode=600)
    moves = [("new", "far/away/newer"), ("note.txt", "lines.txt"), ("sub", "far/sub")]
    place.files.move_files([MoveEntry(src=place.path(src), dest=place.path(dest)) for src, dest in moves])
    place.check("far/away/newer", b"new")
    place.check("lines.txt", b"original\n")
    place.check("far/sub/more/code.py", b"print()\n")
    for name in ("new", "note.txt", "sub/deep.txt"):
        place.check(name, None)
    place.inside("mv far/sub back")
    place.check("far/sub/deep.txt", None)
    place.check("back/deep.txt", b"deep\n")
    assert place.mode_of("far/away/newer") == 600 and place.mode_of("lines.txt") == 640
    assert status(place.files.move_files, [MoveEntry(src=place.path("missing"), dest=place.path("x"))]) == 404


@writable_modes
def test_permissions(place):
    def entry(name, mode, **owners):
        return SetPermissionEntry(path=place.path(name), mode=mode, **owners)

    place.files.write_file(place.path("new"), "new", mode=644)
    modes = {"new": 755, "note.txt": 755, "sub": 711, "sub/deep.txt": 400}
    place.files.set_permissions([entry(name, mode) for name, mode in modes.items()])
    info = place.files.get_file_info(["new"])["new"]
    place.files.set_permissions([entry("new", 0, owner=info.owner, group=info.group)])
    assert status(place.files.set_permissions, [entry("missing", 755)]) == 404
    assert status(place.files.set_permissions, [entry("new", 789)]) == 400
    assert status(place.files.set_permissions, [entry("new", 600, owner="no-such-user")]) == 400
    for name, mode in modes.items():
        assert place.mode_of(name) == mode
    assert (place.folder / "note.txt").stat().st_mode & 0o777 == (0o755 if place.mode == "rw" else 0o640)
    place.check("note.txt", b"original\n")


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
    counts = {result.path: result.replaced_count for result in place.files.replace_contents_detailed(entries)}
    assert counts == {place.path("new"): 3, place.path("lines.txt"): 3, place.path("sub/deep.txt"): 0}
    place.check("new", b"->->")
    place.check("sub/deep.txt", b"deep\n")
    for replace in (place.files.replace_contents, place.files.replace_contents_detailed):
        assert status(replace, [entry("missing", "a", "b")]) == 404
        assert status(replace, [entry("new", "", "b")]) == 400


@pytest.mark.parametrize("place", ["ro"], indirect=True)
@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("write_files", WriteEntry(path="new", data="new")),
        ("write_files", WriteEntry(path="no/such/folder/new", data=BINARY)),
        ("create_directories", WriteEntry(path="new/folder")),
        ("delete_files", "note.txt"),
        ("delete_directories", "sub"),
        ("move_files", MoveEntry(src="note.txt", dest="moved.txt")),
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
    assert status(place.files.read_file, "../secret") == 400


def test_mounts_stay_where_they_are(isolation, uid_mode, tmp_path):
    inner = tmp_path / "outer" / "inner"
    overlays = [IsolatedOverlaySpec(path=str(inner.parent), mode="rw"), IsolatedOverlaySpec(path=str(inner))]
    request = CreateIsolatedSessionRequest(overlays=overlays, uid_mode=uid_mode)
    with isolation.session(request) as session:
        # To rmdir and mv in the session, the place of a mount is busy.
        assert session.run("rmdir inner || mv inner elsewhere").exit_code == 1
        status(session.files.delete_directories, ["inner"])
        status(session.files.move_files, [MoveEntry(src="inner", dest="elsewhere")])
        session.files.write_file("inner/new", "new")
        assert session.run("cat inner/new").text == "new"
    assert list(inner.iterdir()) == []


def test_files_belong_to_the_session_user(isolation, request_for, workspace):
    with isolation.session(request_for(workspace, uid=61234, gid=61235)) as session:
        session.files.write_file("/tmp/mine/file", "mine", mode=600)
        info = session.files.get_file_info(["/tmp/mine/file"])["/tmp/mine/file"]
        assert (info.owner, info.group, info.mode) == ("61234", "61235", 600)
        assert session.run("stat -c '%u %g' /tmp/mine; cat /tmp/mine/file").text == "61234 61235\nmine"
    assert status(session.files.read_file, "/tmp/mine/file") == 404
    assert status(session.files.write_file, "/tmp/mine/file", "x") == 404


def in_a_session(execd, request, use):
    """Lets `use` have a session of the asynchronous service."""

    async def run():
        async with execd.async_client() as client, client.session(request) as session:
            await use(session, session.files)

    asyncio.run(run())


def test_the_asynchronous_service(execd, request_for, workspace):
    async def use(session, files):
        names = [f"{workspace}/many/{number}" for number in range(20)]
        await asyncio.gather(*(files.write_file(name, name, mode=644) for name in names))
        assert await asyncio.gather(*(files.read_file(name) for name in names)) == names
        assert {info.mode for info in (await files.get_file_info(names)).values()} == {644}
        await files.write_file("big", io.BytesIO(BINARY))
        stream = await files.read_bytes_stream("big", chunk_size=10_000)
        assert b"".join([chunk async for chunk in stream]) == BINARY
        assert await files.read_bytes("big", range_header="bytes=256-258") == b"\0\1\2"
        await files.move_files([MoveEntry(src="big", dest="made/big")])
        swap = ContentReplaceEntry(path="note.txt", old_content="i", new_content="1")
        assert (await files.replace_contents_detailed([swap]))[0].replaced_count == 2
        found = await files.search(SearchEntry(path="made", pattern="b*"))
        assert [entry.path for entry in found] == [f"{workspace}/made/big"]
        await files.delete_files(["made/big"])
        await files.delete_directories(["many"])
        listed = await files.list_directory(DirectoryListEntry(path=".", depth=2))
        assert [entry.path for entry in listed] == [f"{workspace}/made", f"{workspace}/note.txt"]
        assert (await session.run("cat note.txt")).text == "or1g1nal"
        with pytest.raises(SandboxApiException) as caught:
            await files.read_file("big")
        assert caught.value.status_code == 404

    in_a_session(execd, request_for(workspace), use)
    assert [path.read_text() for path in workspace.iterdir()] == ["original\n"]


def test_a_refusal_reaches_who_is_still_sending(execd, request_for, workspace):
    async def use(session, files):
        with pytest.raises(SandboxApiException) as caught:
            await files.write_file("new", BINARY)
        assert caught.value.status_code == 403

    in_a_session(execd, request_for(workspace, "ro"), use)
