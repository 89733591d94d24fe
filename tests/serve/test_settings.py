"""Settings: where they come from, in which order, and what is refused; API keys, which no message may hold."""

import base64
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from builders.machine import run_cli
from uni_instruct.bundle import default_generator, shipped_generators
from uni_instruct.errors import RequestError
from uni_instruct.serve.api_keys import given_key, is_one_of, read_keys
from uni_instruct.serve.commands.serve import _NO_OPTIONS, serve
from uni_instruct.serve.settings import Settings, as_environment, settings_from_environment, variable


def two_values(name: str, kind: object, folder: Path) -> tuple[Any, Any]:
    """Two values of a setting that differ from each other and from its default."""
    if name == "api_key_file":
        for key in ("first", "second"):
            (folder / key).write_text(f"{key}\n")
        return str(folder / "first"), str(folder / "second")
    if kind is bool:
        default = getattr(Settings(), name)
        return not default, default
    if name == "bundle":
        return ("first", "other=second"), ("third",)
    if kind is int:
        return 2048, 4096
    return (1.5, 2.5) if kind is float else ("/first", "/second")


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda setting: str(setting.name))
def test_an_option_wins_over_the_variable_and_the_variable_over_the_default(setting: Any, tmp_path: Path) -> None:
    name = setting.name
    # A request must fit the queue, whichever of the two is changed.
    room = {} if name == "queue_images" else {"queue_images": 10_000}
    option, environment = two_values(name, setting.type, tmp_path)

    def read(text: str, given: object) -> object:
        return getattr(settings_from_environment({variable(name): text} if text else {}, {name: given, **room}), name)

    written = as_environment(Settings(**{name: environment}, **room))[variable(name)]
    assert read(written, option) == option
    assert read(written, None) == environment
    assert read("", None) == getattr(Settings(**room), name)
    if name not in _NO_OPTIONS:
        parameter = next(parameter for parameter in serve.params if parameter.name == name)
        assert parameter.default is None  # else it would win over the environment


def test_every_setting_reaches_the_server_as_it_was_given() -> None:
    settings = Settings(workers=3, ui=False, api_key="one,two", timeout_s=2.5, cors_origins="*", engine=None)
    assert settings_from_environment(as_environment(settings)) == settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORKERS", "two", "UNI_INSTRUCT_WORKERS is two; give an integer"),
        ("WORKERS", "0", "UNI_INSTRUCT_WORKERS is 0; give a number above 0, at most 10000"),
        ("TIMEOUT_S", "nan", "UNI_INSTRUCT_TIMEOUT_S is nan"),
        ("GRACE_S", "inf", "UNI_INSTRUCT_GRACE_S is inf"),
        ("UI", "perhaps", "UNI_INSTRUCT_UI is perhaps; give true or false"),
        ("QUEUE_IMAGES", "8", "UNI_INSTRUCT_QUEUE_IMAGES is 8; give at least request_images, 256"),
        ("CONNECTIONS", "2", "UNI_INSTRUCT_CONNECTIONS is 2; give a number above 3, at most 1000000"),
        ("MAX_BODY_BYTES", "0", "UNI_INSTRUCT_MAX_BODY_BYTES is 0; give a number above 0, at most 2147483648"),
        ("RELOAD_S", "-1", "UNI_INSTRUCT_RELOAD_S is -1.0; give 0, or a number above 0, at most 86400"),
        ("PATH_PREFIX", "images", "UNI_INSTRUCT_PATH_PREFIX is images; give a path, such as /images"),
        ("API_KEY_FILE", "/nowhere", "UNI_INSTRUCT_API_KEY_FILE /nowhere cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(RequestError, match="UNI_INSTRUCT") as refused:
        settings_from_environment({f"UNI_INSTRUCT_{name}": value})
    assert message in str(refused.value)


def test_settings_come_from_the_environment() -> None:
    environment = {"UNI_INSTRUCT_TIMEOUT_S": "2.5", "UNI_INSTRUCT_UI": "no", "UNI_INSTRUCT_ENGINE": "", "OTHER": "x"}
    settings = settings_from_environment(environment)
    assert (settings.timeout_s, settings.ui, settings.engine) == (2.5, False, None)
    assert settings.bundle[0] == default_generator()
    assert sorted(settings.bundle) == shipped_generators()
    assert not settings_from_environment({"UNI_INSTRUCT_WORKERS": "2"}).serves_ui


def test_keys_are_stripped_when_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\nopen sesame \r\n".replace("open ", "") + "schlüssel\n\n", encoding="utf-8")
    assert read_keys("one\n, two ", str(file)) == (b"one", b"two", b"sesame", "schlüssel".encode())
    file.write_bytes(b"\xef\xbb\xbfsesame\r\nopen\r\n")
    assert read_keys(None, str(file)) == (b"sesame", b"open")
    assert read_keys(None, None) == ()


@pytest.mark.parametrize("text", [" ", "\n", ",", "good,se\nsame", "se same", "se\x00same", "se\u200bsame"])
def test_a_key_that_cannot_be_one_is_refused_and_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        Settings(api_key=text)
    assert not any(part in str(refused.value) for part in ("same", "good"))
    assert "same" not in repr(Settings(api_key="sesame"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RequestError, match="contains no key; add one, or unset the variable"):
        Settings(api_key_file=str(tmp_path / "empty"))


def test_the_command_refuses_a_bad_key_in_one_line_without_it() -> None:
    done = run_cli("serve", "digits", env={**os.environ, "UNI_INSTRUCT_API_KEY": "open sesame"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: a key in UNI_INSTRUCT_API_KEY has a space or a control character inside; ")
    assert "sesame" not in done.stderr


def test_keys_are_taken_from_the_header_as_bytes() -> None:
    key = "schlüssel".encode()
    for header in (b"Bearer " + key, b"bearer  " + key + b" ", b"Basic " + base64.b64encode(b"anyone:" + key)):
        assert is_one_of(given_key(header), (b"other", key))
    for header in (b"", b"Basic \xff\xfe", b"Basic !", b"Basic " + base64.b64encode(b"\xff\xfe"), b"Bearer \xff", key):
        assert not is_one_of(given_key(header), (b"other", key))
