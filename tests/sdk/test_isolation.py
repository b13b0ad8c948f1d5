"""What users of the published SDK see of isolated sessions."""

import asyncio
import time
import uuid

import pytest
from conftest import Execd, missing
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.execd_sync import ExecutionHandlersSync
from opensandbox.models.isolated import (
    CreateIsolatedSessionRequest,
    IsolatedOverlaySpec,
    IsolatedRunOpts,
    IsolatedWorkspaceSpec,
)


def api_error(call, *args, **kwargs) -> SandboxApiException:
    """The error that the call has to raise."""
    with pytest.raises(SandboxApiException) as caught:
        call(*args, **kwargs)
    return caught.value


def test_capabilities(isolation, uid_mode):
    found = isolation.capabilities()
    assert found.available
    assert found.isolator and found.version
    assert found.setpriv_available or found.userns_available
    states = {"active", "disabled", "degraded", "unsupported"}
    hardening = found.hardening
    layers = [hardening.cap_drop, hardening.seccomp, hardening.landlock, hardening.ebpf]
    assert {layer.state for layer in layers} <= states


def test_output_and_exit_code_of_a_failing_run(session):
    execution = session.run("echo hi; echo err >&2; exit 3")
    assert uuid.UUID(execution.id)
    assert execution.text == "hi"
    assert "".join(message.text for message in execution.logs.stderr).strip() == "err"
    assert execution.error is not None and execution.error.value == "3"
    assert execution.exit_code == 3
    assert execution.complete is None


def test_a_run_that_succeeds(session):
    execution = session.run("echo hi")
    assert (execution.text, execution.exit_code, execution.error) == ("hi", 0, None)
    assert execution.complete is not None
    assert execution.complete.execution_time_in_millis >= 0


def test_a_failing_command_without_exit(session):
    assert session.run("(exit 41)").exit_code == 41
    assert session.run("no-such-command-here").exit_code == 127
    assert session.run("if then").exit_code not in (0, None)
    assert session.run("kill -TERM $BASHPID").exit_code == 128 + 15
    assert session.run("echo still here").text == "still here"


def test_state_lasts_from_run_to_run(session, workspace):
    session.run("greeting=hello; mkdir sub; cd sub; say() { echo \"$greeting from $PWD\"; }")
    assert session.run("say").text == f"hello from {workspace}/sub"


def test_blank_lines_and_a_missing_last_newline_survive(session):
    execution = session.run(r"printf 'a\n\n\n  b\n\nend'")
    assert execution.text == "a\n\n\n  b\n\nend"
    assert "".join(message.text for message in execution.logs.stdout) == "a\n\n\n  b\n\nend"


def test_text_that_looks_like_the_protocol(session):
    line = '{"type":"execution_complete","timestamp":1}'
    execution = session.run(f"echo '{line}'; echo; echo 'data: x'; echo ': y'; printf 'ü€😀\\n'; exit 5")
    assert execution.text == f"{line}\n\ndata: x\n: y\nü€😀"
    assert execution.exit_code == 5


def test_much_output(session):
    execution = session.run("seq 100000; head -c 2000000 /dev/zero | tr '\\0' x; echo; echo end >&2")
    lines = execution.text.splitlines()
    assert lines[:100_000] == [str(n) for n in range(1, 100_001)]
    assert "".join(lines[100_000:]) == "x" * 2_000_000
    assert execution.exit_code == 0


def test_envs_are_for_one_run(session):
    opts = IsolatedRunOpts(envs={"NAME": "it's\n$HOME \"x\"", "EMPTY": ""})
    code = 'printf "[%s][%s]" "$NAME" "${EMPTY-unset}"; bash -c \'printf "[%s]" "$NAME"\'; echo "${#NAME}"'
    assert session.run(code, opts=opts).text == "[it's\n$HOME \"x\"][][it's\n$HOME \"x\"]14"
    assert session.run('echo "${NAME-unset}"').text == "unset"


def test_a_timeout_is_exit_code_124_and_keeps_the_session(session):
    session.run("kept=yes")
    execution = session.run("echo before; sleep 60; echo after", opts=IsolatedRunOpts(timeout_seconds=1))
    assert execution.exit_code == 124
    assert execution.error is not None and execution.error.value == "124"
    assert execution.text == "before"
    assert session.run('echo "$kept"').text == "yes"


def test_handlers_hear_events_as_they_come(session):
    heard = []
    handlers = ExecutionHandlersSync(
        on_init=lambda event: heard.append("init"),
        on_stdout=lambda event: heard.append(event.text.strip()),
        on_execution_complete=lambda event: heard.append("complete"),
    )
    session.run("echo one; sleep 0.05; echo two", handlers=handlers)
    assert heard == ["init", "one", "two", "complete"]


def test_an_overlay_keeps_the_folder_as_it_was(isolation, request_for, workspace):
    with isolation.session(request_for(workspace)) as session:
        execution = session.run("echo changed > note.txt; echo new > new.txt; cat note.txt new.txt")
        assert execution.text == "changed\nnew"
    assert [path.name for path in workspace.iterdir()] == ["note.txt"]
    assert (workspace / "note.txt").read_text() == "original\n"


def test_modes_rw_and_ro(isolation, request_for, workspace):
    with isolation.session(request_for(workspace, "rw")) as session:
        assert session.run("echo real > note.txt").exit_code == 0
    assert (workspace / "note.txt").read_text() == "real\n"
    with isolation.session(request_for(workspace, "ro")) as session:
        assert session.run("echo refused > note.txt").exit_code != 0
    assert (workspace / "note.txt").read_text() == "real\n"


def test_several_overlays(isolation, uid_mode, tmp_path):
    paths = [tmp_path / name for name in ("persistent", "ephemeral", "read-only")]
    overlays = [
        IsolatedOverlaySpec(path=str(paths[0])),
        IsolatedOverlaySpec(path=str(paths[1]), mode="overlay", persist=False),
        IsolatedOverlaySpec(path=str(paths[2]), mode="ro"),
    ]
    request = CreateIsolatedSessionRequest(overlays=overlays, uid_mode=uid_mode)
    with isolation.session(request) as session:
        code = f"pwd; touch {paths[0]}/a {paths[1]}/a && echo written; touch {paths[2]}/a || echo refused"
        assert session.run(code).text == f"{paths[0]}\nwritten\nrefused"
        assert [overlay.path for overlay in session.get().overlays] == [str(path) for path in paths]
    # Folders that were missing are made; what was written in overlays is not in them.
    assert [list(path.iterdir()) for path in paths] == [[], [], []]


def test_inside_is_isolated(session):
    code = """
        echo "$$ processes: $(ls /proc | grep -c '^[0-9]')"
        touch /outside 2>/dev/null || echo root is read-only
        hostname 2>/dev/null || cat /proc/sys/kernel/hostname
        echo "secret: ${A_SECRET_TOKEN-none}${EXECD_ACCESS_TOKEN-none}"
    """
    lines = session.run(code).text.splitlines()
    assert lines[1:] == ["root is read-only", "sandbox", "secret: nonenone"]
    assert int(lines[0].split()[-1]) < 10


def test_an_id_without_an_account(isolation, workspace, uid_mode):
    request = CreateIsolatedSessionRequest(
        workspace=IsolatedWorkspaceSpec(path=str(workspace)), uid_mode=uid_mode, uid=61234, gid=61234
    )
    session = isolation.create(request)
    assert session.run("id -u; id -g").text == "61234\n61234"
    session.delete()


def test_run_once(isolation, workspace):
    if not isolation.capabilities().setpriv_available:
        missing("run_once has no uid_mode, and the default one (setpriv) does not work here")
    execution = isolation.run_once("echo over > note.txt; cat note.txt", workspace=str(workspace))
    assert (execution.text, execution.exit_code) == ("over", 0)
    execution = isolation.run_once("exit 7", workspace=str(workspace), workspace_mode="ro", profile="balanced")
    assert execution.exit_code == 7
    assert (workspace / "note.txt").read_text() == "original\n"
    assert isolation.list() == []


def finished(session, run_id):
    """Waits for the end of a background run."""
    for _ in range(500):
        status = session.run_status(run_id)
        if not status.running:
            return status
        time.sleep(0.02)
    raise AssertionError(f"run {run_id} does not end")


def test_a_background_run(session):
    session.run("export GREETING=hello")
    handle = session.run_background("echo $GREETING; echo err >&2; sleep 0.3; echo done; exit 4")
    assert handle.session_id == session.session_id and uuid.UUID(handle.run_id)
    assert session.run_status(handle.run_id).running
    assert session.run("echo meanwhile").text == "meanwhile"
    status = finished(session, handle.run_id)
    assert (status.running, status.exit_code, status.error) == (False, 4, None)
    assert status.started_at <= status.finished_at
    logs = session.run_logs(handle.run_id)
    assert logs.text == "hello\nerr\ndone\n"
    assert logs.cursor == len(logs.text)
    assert session.run_logs(handle.run_id, cursor=10).text == "done\n"


def test_an_unknown_background_run(session):
    unknown = str(uuid.uuid4())
    assert api_error(session.run_status, unknown).status_code == 404
    assert api_error(session.run_logs, unknown).status_code == 404


def test_list_attach_get_delete(isolation, request_for, workspace):
    created = isolation.create(request_for(workspace, idle_timeout_seconds=600, share_net=True))
    assert uuid.UUID(created.session_id)
    assert created.info.created_at is not None
    created.run("mark=here")

    (listed,) = isolation.list()
    assert (listed.session_id, listed.status) == (created.session_id, "active")
    assert listed.created_at == created.info.created_at
    assert listed.last_run_at >= listed.created_at
    assert 0 < listed.idle_remaining_seconds <= 600

    attached = isolation.attach(created.session_id)
    assert attached.session_id == created.session_id
    assert (attached.info.workspace.path, attached.info.workspace.mode) == (str(workspace), "overlay")
    assert attached.run('echo "$mark"').text == "here"

    state = attached.get()
    assert (state.status, state.profile, state.idle_timeout_seconds) == ("active", "strict", 600)
    assert (state.workspace.path, state.workspace.mode) == (str(workspace), "overlay")

    attached.delete()
    assert isolation.list() == []
    error = api_error(created.delete)
    assert (error.status_code, error.error.code) == (404, "SESSION_NOT_FOUND")


def test_an_unknown_session(isolation):
    for unknown in (str(uuid.uuid4()), "no-uuid"):
        error = api_error(isolation.attach, unknown)
        assert (error.status_code, error.error.code) == (404, "SESSION_NOT_FOUND")
        assert unknown in error.error.message
        assert error.request_id


def test_a_run_in_a_deleted_session(isolation, request_for, workspace):
    session = isolation.create(request_for(workspace))
    session.delete()
    error = api_error(session.run, "echo hi")
    assert (error.status_code, error.error.code) == (404, "SESSION_NOT_FOUND")


def test_bad_requests_name_the_field(isolation, request_for, workspace, session):
    before = len(isolation.list())
    cases = [
        (request_for("relative/path"), "workspace.path"),
        (request_for("/a/../b"), "workspace.path"),
        (request_for(""), "workspace.path"),
        (request_for(workspace, "no-such-mode"), "workspace.mode"),
        (request_for(workspace, profile="no-such-profile"), "profile"),
        (request_for(workspace, idle_timeout_seconds=-1), "idle_timeout_seconds"),
        (request_for(workspace, extra_writable=["/etc"]), "extra_writable"),
        (CreateIsolatedSessionRequest(workspace=IsolatedWorkspaceSpec(path="/w"), uid_mode="x"), "uid_mode"),
    ]
    for request, field in cases:
        error = api_error(isolation.create, request)
        assert error.status_code == 400, field
        assert error.error.code and field in error.error.message
    error = api_error(session.run, "echo hi", opts=IsolatedRunOpts(timeout_seconds=-1))
    assert error.status_code == 400 and "timeout_seconds" in error.error.message
    assert len(isolation.list()) == before


def test_an_access_token(tmp_path, request_for, workspace):
    daemon = Execd(tmp_path, token="correct horse")
    try:
        with daemon.client(token="correct horse") as client:
            with client.session(request_for(workspace)) as session:
                assert session.run("echo hi").text == "hi"
        for wrong in ("", "battery staple"):
            with daemon.client(token=wrong) as client:
                assert api_error(client.list).status_code == 401
                assert api_error(client.create, request_for(workspace)).status_code == 401
        assert "correct horse" not in daemon.log.read_text()
    finally:
        assert daemon.stop() == 0


def test_the_asynchronous_service(execd, request_for, workspace):
    async def several_at_once():
        async with execd.async_client() as client:
            assert (await client.capabilities()).available
            sessions = await asyncio.gather(*(client.create(request_for(workspace)) for _ in range(4)))
            codes = [f"sleep 0.1; echo {number}; exit {number}" for number in range(4)]
            executions = await asyncio.gather(*(s.run(code) for s, code in zip(sessions, codes)))
            await asyncio.gather(*(session.delete() for session in sessions))
            assert [execution.text for execution in executions] == ["0", "1", "2", "3"]
            assert [execution.exit_code for execution in executions] == [0, 1, 2, 3]

    asyncio.run(several_at_once())


def test_what_follows_an_interrupted_command_does_not_run(execd, request_for, workspace):
    async def time_out(client):
        async with client.session(request_for(workspace)) as session:
            opts = IsolatedRunOpts(timeout_seconds=1)
            execution = await session.run("echo before; sleep 60; echo after", opts=opts)
            return execution.text, execution.exit_code

    async def many_at_once():
        async with execd.async_client() as client:
            return await asyncio.gather(*(time_out(client) for _ in range(8)))

    # Whether the shell or its command hears of the timeout first is a race, so one try shows little.
    assert set(asyncio.run(many_at_once())) == {("before", 124)}
