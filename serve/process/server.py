"""BentoML's server as a child process: start it, watch it, and stop it together with all processes that it has started."""

import base64
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import NoReturn

import psutil

from uni_instruct.errors import UniInstructError
from uni_instruct.serve.settings import Settings
from uni_instruct.system.processes import die_with_parent

SERVICE = "uni_instruct.serve.service:UniInstruct"
# By then only open pages of the demo have connections, so this is short. Running requests had `grace_s` before (shutdown.py).
GRACEFUL_SHUTDOWN_S = 1
_KILL_AFTER_S = 5.0
# A worker is recognised by this module name in its command line.
_WORKER = "_bentoml_impl.worker.service"
# BentoML's supervisor restarts a worker without limit, even if it fails every time. This is where we give up.
_MAX_RESTARTS = 4


class Server:
    """BentoML's supervisor and the workers it has started, listening on an IP address.

    They run in a session of their own: Ctrl-C reaches only this process, which then stops all of them in order.
    """

    def __init__(self, address: str, port: int, environment: dict[str, str], folder: str, settings: Settings):
        self.url = _url(address, port)
        self._settings = settings
        self._descendants: set[psutil.Process] = set()
        self._workers: set[int] = set()  # ids of all workers that were ever started, including those that have ended
        # This interpreter's BentoML, not whichever `bentoml` comes first on the PATH.
        command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", address, "--port", str(port)]
        command += ["--timeout-graceful-shutdown", str(GRACEFUL_SHUTDOWN_S)]
        self._supervisor = psutil.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )

    def wait_until_ready(self) -> None:
        """Block until every worker is ready.

        Raises UniInstructError if the server ends, its workers keep failing, or no generator can be loaded.
        """
        while True:
            living = self._check()
            if len(self._workers) > self._settings.workers + _MAX_RESTARTS:
                raise UniInstructError(
                    f"worker processes end before they are ready ({len(self._workers) - self._settings.workers} so far)",
                    remedy="the log above says why; if it does not, they may have run out of memory ('dmesg' shows it)",
                )
            # Ask only when a worker lives: the supervisor listens from the start, so a request without a worker would hang.
            if living:
                if self._ready_workers() >= self._settings.workers:
                    return
                if self._get("/livez")[0] == 503:
                    raise UniInstructError("the generator could not be loaded", remedy="the log above says why")
            time.sleep(0.1)

    def wait(self) -> NoReturn:
        """Block for as long as the server runs. Raises UniInstructError when it ends by itself."""
        while True:
            self._check()
            time.sleep(0.5)

    def stop(self) -> None:
        """End the supervisor and its workers: by SIGTERM, then by SIGKILL if they still run _KILL_AFTER_S after `grace_s`."""
        self._note_workers()
        # A living supervisor stops its workers itself. If it is dead, its workers are orphans that only we can still end.
        for process in [self._supervisor] if self._supervisor.poll() is None else self._descendants:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs([self._supervisor, *self._descendants], timeout=self._settings.grace_s + _KILL_AFTER_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=1)

    def _check(self) -> int:
        """Return how many workers are alive. Raises UniInstructError if their supervisor has ended."""
        status = self._supervisor.poll()
        if status is not None:
            raise UniInstructError(f"the server ended with exit code {status}", remedy="the log above says why")
        return self._note_workers()

    def _note_workers(self) -> int:
        """Remember the supervisor's children, to be able to stop them after its death. Return how many workers are alive."""
        with suppress(psutil.NoSuchProcess):
            self._descendants.update(self._supervisor.children(recursive=True))
            living = {child.pid for child in self._supervisor.children() if _is_worker(child)}
            self._workers |= living
            return len(living)
        return 0

    def _ready_workers(self) -> float:
        """Return how many workers are ready, from /metrics, which adds up all workers; /readyz answers for only one of them."""
        found = re.search(r"^uni_instruct_ready (\S+)", self._get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _headers(self) -> dict[str, str]:
        if not self._settings.keys:
            return {}
        # Basic, because its base64 can carry a key with any characters; a plain header value may only hold ASCII.
        return {"Authorization": f"Basic {base64.b64encode(b':' + self._settings.keys[0]).decode()}"}

    def _get(self, path: str) -> tuple[int, str]:
        """Return the HTTP status and the text of a page. The status is 0 if nothing answers; the text is empty on errors."""
        # Bypass any proxy that the environment names: it could not reach this machine's own address.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"{self.url}{path}", headers=self._headers())
        try:
            with direct.open(request, timeout=2) as response:
                return int(response.status), response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return _WORKER in process.cmdline()
    return False


def _url(address: str, port: int) -> str:
    """Return the URL by which a browser on this machine reaches the server."""
    # A server can listen on a wildcard address, but a browser cannot connect to one.
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
