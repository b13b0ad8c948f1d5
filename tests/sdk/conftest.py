"""Starts the real execd, as named by EXECD_BIN, and points the published SDK at it.

The SDK normally learns where execd is from a control plane. Its adapters take that answer, a
SandboxEndpoint, as an argument, so these tests hand them one and need no control plane.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest
from opensandbox.adapters.isolated_adapter import IsolatedSessionsAdapter
from opensandbox.config.connection import ConnectionConfig
from opensandbox.config.connection_sync import ConnectionConfigSync
from opensandbox.models.isolated import CreateIsolatedSessionRequest, IsolatedWorkspaceSpec
from opensandbox.models.sandboxes import SandboxEndpoint
from opensandbox.sync.adapters.isolated_adapter import IsolatedSessionsAdapterSync

START_MAX_SECONDS = 20
STOP_MAX_SECONDS = 10
TOKEN_HEADER = "X-EXECD-ACCESS-TOKEN"


class Execd:
    """A running daemon."""

    def __init__(self, folder: pathlib.Path, token: str = ""):
        config = folder / "isolation.toml"
        config.write_text(f'upper_root = "{folder}/uppers"\n')
        self.log = folder / "execd.log"
        command = [os.environ["EXECD_BIN"], "serve", "--listen", "127.0.0.1", "--port", "0"]
        command += ["--log-format", "json", "--isolation-config", str(config)]
        # The token goes by the environment, which other users of the machine cannot read.
        environment = {**os.environ, "EXECD_ACCESS_TOKEN": token, "A_SECRET_TOKEN": "sdk-suite-secret"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        try:
            self.port = self._listening_port()
        except BaseException:
            self.stop()
            raise

    def _listening_port(self) -> int:
        deadline = time.monotonic() + START_MAX_SECONDS
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    if record.get("message") == "listening":
                        return record["port"]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"execd did not start; its log:\n{self.log.read_text()}")

    def stop(self) -> int:
        """Ends it by its own pid; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def endpoint(self, token: str = "") -> SandboxEndpoint:
        headers = {TOKEN_HEADER: token} if token else {}
        return SandboxEndpoint(endpoint=f"127.0.0.1:{self.port}", headers=headers)

    @contextlib.contextmanager
    def client(self, token: str = ""):
        """The SDK's synchronous service, with the transport a Sandbox object gives it."""
        config = ConnectionConfigSync().with_transport_if_missing()
        try:
            yield IsolatedSessionsAdapterSync(config, self.endpoint(token))
        finally:
            config.close_transport_if_owned()

    @contextlib.asynccontextmanager
    async def async_client(self, token: str = ""):
        """The SDK's asynchronous service."""
        config = ConnectionConfig().with_transport_if_missing()
        try:
            yield IsolatedSessionsAdapter(config, self.endpoint(token))
        finally:
            await config.close_transport_if_owned()


def missing(reason: str) -> None:
    """Skips, saying why; in CI what is missing is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"needed in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def execd(tmp_path_factory):
    """One daemon without a token for all tests; it has to stop cleanly in the end."""
    daemon = Execd(tmp_path_factory.mktemp("execd"))
    yield daemon
    assert daemon.stop() == 0, daemon.log.read_text()


@pytest.fixture
def isolation(execd):
    with execd.client() as client:
        yield client


@pytest.fixture(scope="session")
def uid_mode(execd):
    """The identity mode that works here; without one there is nothing to test."""
    with execd.client() as client:
        found = client.capabilities()
    if found.setpriv_available:
        return "setpriv"
    if found.userns_available:
        return "userns"
    missing(f"this machine cannot isolate: {found.message}")


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "note.txt").write_text("original\n")
    return folder


@pytest.fixture
def request_for(uid_mode):
    """Builds a create request for a folder."""

    def build(folder, mode="overlay", **options):
        return CreateIsolatedSessionRequest(
            workspace=IsolatedWorkspaceSpec(path=str(folder), mode=mode),
            uid_mode=uid_mode,
            **options,
        )

    return build


@pytest.fixture
def session(isolation, request_for, workspace):
    """A session on an overlay of the workspace; deleted afterwards."""
    with isolation.session(request_for(workspace)) as session:
        yield session
