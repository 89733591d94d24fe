"""A server with a run of digits and its teacher, and a browser that looks at its demo."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders.browser import open_browser
from builders.demo_page import Page
from builders.servers import Running, start
from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, digits_teacher: Path) -> Path:
    """As a run writes it: the generator, and its teacher beside it."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(Bundle.open("digits").path, folder / "generator")
    shutil.copytree(digits_teacher, folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def server(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(Bundle.open(run_folder / "generator"), tmp_path_factory.mktemp("server"), "emoji", "--engine", "onnx")
    try:
        running.until_announced()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def engine(run_folder: Path) -> Engine:
    return open_engine(run_folder / "generator", "onnx")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, downloads: Path) -> Iterator[Any]:
    yield from open_browser(tmp_path_factory.mktemp("chromium"), downloads)


@pytest.fixture
def page(browser: Any, server: Running) -> Page:
    return Page(browser, server.url)
