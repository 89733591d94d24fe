"""Files that the system refuses, by whatever command they are named: one line and exit code 2, never a traceback."""

import errno
import os
from collections.abc import Callable

import pytest

from uni_instruct.errors import RequestError
from uni_instruct.system.files import as_path_error

LONG = "a" * 300
COMMANDS = (
    f"inspect {LONG}",
    f"generate {LONG} --seeds 0 --out x",
    f"evaluate {LONG} --reference digits",
    f"evaluate digits --reference {LONG}",
    f"compare {LONG} {LONG}",
    f"train {LONG} --out x",
    f"train digits --out {LONG}",
    f"train digits --dry-run --set data={LONG}",
    f"train {LONG} --status",
    f"lab digits --methods sid --out {LONG}",
    f"doctor {LONG}",
    f"data prepare {LONG} --out x.zip",
    f"data prepare digits --out {LONG}.zip",
    f"data check {LONG}",
    f"import {LONG} --out x",
    f"export {LONG} --to onnx",
    f"publish {LONG} --out x",
    f"card {LONG} --reference digits",
    f"benchmark {LONG}",
    f"serve {LONG}",
    f"package {LONG} --out x.bento",
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words.replace(LONG, "LONG").replace(" ", "_"))
def test_a_name_that_is_too_long_is_one_line(words: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = cli(*words.split())
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert code == 2
    assert line.endswith("File name too long; give a shorter name")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_what_the_system_says_of_a_file_is_a_request_error(number: int) -> None:
    refused = as_path_error(OSError(number, os.strerror(number), b"caf\xe9.json"))
    assert isinstance(refused, RequestError)
    assert refused.problem == f"caf\\udce9.json cannot be used: {os.strerror(number)}"


def test_other_errors_of_the_system_are_faults() -> None:
    assert as_path_error(OSError(errno.ENOENT, "gone", "x")) is None
    assert as_path_error(OSError(errno.EACCES, "no file is named")) is None
    assert as_path_error(OSError("not from the system")) is None
