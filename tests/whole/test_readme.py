"""README's commands, run as they stand: each must succeed, in the order given, in one empty folder."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from builders.machine import call_cli, require_debian
from builders.paths import ROOT

SERVER = "http://127.0.0.1:3000"


def console_lines() -> list[str]:
    """Every line of README's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_every_linked_file_exists() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_of_the_pages_exists() -> None:
    """Sub-commands and options named in README and docs are those of the command line."""
    known: dict[str, str] = {}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for command, rest in re.findall(r"^(?:\$ )?uni-instruct (\w+)(.*)$", page.read_text(), flags=re.MULTILINE):
            if command not in known:
                names = [command, "prepare"] if command == "data" else [command]
                done = call_cli(*names, "--help")
                assert done.returncode == 0, f"{page.name}: uni-instruct {command}"
                known[command] = done.stdout
            for option in re.findall(r"(?<=\s)--[a-z-]+", rest):
                assert option in known[command], f"{page.name}: uni-instruct {command} {option}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_console_blocks_run_in_an_empty_folder(tmp_path: Path) -> None:
    require_debian("/usr/bin/curl", "curl")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    server: subprocess.Popen[bytes] | None = None
    try:
        for line in console_lines():
            if line.startswith("uni-instruct serve"):
                server = subprocess.Popen(shlex.split(line), cwd=tmp_path, env=environment)
                wait_until_ready(server)
            else:
                done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert server is not None, "README shows no server"
        assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(20)
    assert shutil.which("uni-instruct", path=environment["PATH"])


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{SERVER}/readyz", timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    pytest.fail("the server did not become ready")
