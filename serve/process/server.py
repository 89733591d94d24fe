"""BentoML's server as a child process: started, watched, and stopped with everything that it has started."""

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
from uni_instruct.processes import die_with_parent
from uni_instruct.serve.settings import Settings

SERVICE = "uni_instruct.serve.service:UniInstruct"
# Open pages of the demo would hold the server for longer; requests that run have had their own grace before.
GRACEFUL_SHUTDOWN_S = 1
_KILL_AFTER_S = 5.0
# The supervisor starts a worker again for ever, also one that can never live.
_WORKER = "_bentoml_impl.worker.service"
_MAX_RESTARTS = 4


class Server:
    """BentoML's supervisor and the workers it has started, listening on an IP address.

    It has a session of its own: Ctrl-C reaches this process alone, which then stops all of them.
    """

    def __init__(self, address: str, port: int, environment: dict[str, str], folder: str, settings: Settings):
        self.url = _url(address, port)
        self._settings = settings
        self._family: set[psutil.Process] = set()
        self._workers: set[int] = set()  # that have been started, also those that have ended
        # This Python, not the `bentoml` that happens to come first on the path.
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
        """Until every worker is warm. Raises UniInstructError where the server ends or cannot load the generator."""
        while True:
            living = self._check()
            if len(self._workers) > self._settings.workers + _MAX_RESTARTS:
                raise UniInstructError(
                    f"workers end before they are ready, {len(self._workers) - self._settings.workers} of them so far",
                    remedy="the log above says why; without a word there they may lack memory, as 'dmesg' would say",
                )
            # The supervisor listens from the start: without a worker a request would only wait.
            if living:
                if self._ready_workers() >= self._settings.workers:
                    return
                if self._get("/livez")[0] == 503:
                    raise UniInstructError("the generator could not be loaded", remedy="the log above says why")
            time.sleep(0.1)

    def wait(self) -> NoReturn:
        """Until the server ends by itself, which is an error."""
        while True:
            self._check()
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends the supervisor, and with it its workers: by SIGTERM, and by SIGKILL well after their grace."""
        self._note_workers()
        # A living supervisor stops its workers itself; without it they are orphans, which only we still know.
        for process in [self._supervisor] if self._supervisor.poll() is None else self._family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs([self._supervisor, *self._family], timeout=self._settings.grace_s + _KILL_AFTER_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=1)

    def _check(self) -> int:
        """How many workers live. Raises UniInstructError where their supervisor does not."""
        status = self._supervisor.poll()
        if status is not None:
            raise UniInstructError(f"the server ended with exit code {status}", remedy="the log above says why")
        return self._note_workers()

    def _note_workers(self) -> int:
        """Remembers the workers, so that they can be stopped also when the supervisor is gone. How many live."""
        with suppress(psutil.NoSuchProcess):
            self._family.update(self._supervisor.children(recursive=True))
            living = {child.pid for child in self._supervisor.children() if _is_worker(child)}
            self._workers |= living
            return len(living)
        return 0

    def _ready_workers(self) -> float:
        """How many workers are ready, by the sum of their metrics; /readyz is answered by only one of them."""
        found = re.search(r"^uni_instruct_ready (\S+)", self._get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _headers(self) -> dict[str, str]:
        if not self._settings.keys:
            return {}
        # Basic, as it carries any key: a header of its own may hold ASCII only.
        return {"Authorization": f"Basic {base64.b64encode(b':' + self._settings.keys[0]).decode()}"}

    def _get(self, path: str) -> tuple[int, str]:
        """The HTTP status and the text of a page; 0 where nothing answers."""
        # Past any proxy that the environment names: it would not find this machine's own address.
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
    """The URL by which a browser on this machine finds the server."""
    # The wildcard addresses are for listening; a browser needs one that it can call.
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
