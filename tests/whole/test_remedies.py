"""Every error ends in what to do about it. Here each is provoked, its own words are followed, and it does not come again."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from httpx import Response
from starlette.testclient import TestClient

from builders.bundles import random_bundle
from builders.remedies import sites, sites_of
from builders.remedies_elsewhere import RULES, VALUES_OF_ALL, cases, listed, unfollowed
from builders.remedy_calls import CALLS, Call
from builders.remedy_requests import DEMO, REQUESTS, Ask, Request
from builders.remedy_running import ENGINES
from builders.remedy_training import COMPLETE
from builders.remedy_values import Value
from builders.serving import app_of
from builders.vae import write_vae
from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset
from uni_instruct.errors import UniInstructError
from uni_instruct.sampling.run import REQUEST

Cli = Callable[..., tuple[int, str, str]]
# What a remedy leads to where this machine ends, or where it asks for more than one thing: said, and not the same again.
ON_THE_WAY = {"{} exists already": "snapshots", "--sm '{}' cannot be read": "is not installed"}


def renamed(bundle: Bundle, folder: Path, names: tuple[str, ...]) -> Path:
    """The bundle with other names for its first classes."""
    named = dataclasses.replace(bundle.spec, class_names=(*names, *bundle.spec.class_names[len(names) :]))
    return Bundle.write(folder, named, bundle.weights(), "# named\n").path


def result(path: Path, weights: str, distance: float = 1.0, **other: str) -> Path:
    """What 'evaluate --json' writes, as far as 'compare' reads it."""
    values = {"FD(digits)": distance, "recall": 0.5}
    generator = {"weights_sha256": weights, "samples": 64, "values": values, "by_set": [values, values]}
    facts = {"reference": {"name": "digits", "samples": 1797}, "extractor": {"sha256": "e"}, "classes": "data"}
    path.write_text(json.dumps(facts | {"scores": {"generator": generator}} | other))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, tiny_teacher: Bundle) -> dict[str, Path]:
    """Bundles and data that no case changes."""
    folder = tmp_path_factory.mktemp("remedies")
    digits = open_dataset("digits")
    write_vae(folder / "vae")
    (folder / "begun_run").mkdir()
    (folder / "begun_run" / "recipe.yaml").write_text(COMPLETE)
    np.savez(folder / "unlabelled.npz", arr_0=digits.images(range(64)))
    return {
        "tiny": tiny_bundle.path,
        "plain": random_bundle(folder / "plain", 3, num_classes=0).path,
        "latents": random_bundle(folder / "latents", 3, image_shape=(4, 8, 8), latents=True).path,
        "numbers": renamed(tiny_bundle, folder / "numbers", tuple(str(n) for n in range(1, 11))),
        "twins": renamed(tiny_bundle, folder / "twins", ("ape", "ape")),
        "weights": tiny_bundle.path / "model.safetensors",
        "unlabelled": folder / "unlabelled.npz",
        "digits": folder / "unlabelled.npz",
        "teacher": tiny_teacher.path,
        "vae": folder / "vae",
        "begun_run": folder / "begun_run",
        "result": result(folder / "result.json", "a"),
        "other": result(folder / "other.json", "b"),
        "endless": result(folder / "endless.json", "a", float("inf")),
        "uniform": result(folder / "uniform.json", "b", classes="uniform"),
    }


@pytest.fixture
def places(tmp_path: Path, shared: dict[str, Path]) -> dict[str, Path]:
    """The shared things, and what a case may change: folders that hold something, a run, a bundle of its own."""
    own = {name: tmp_path / name for name in ("out", "filled", "run", "begun", "copy")}
    for name in ("filled", "run"):
        own[name].mkdir()
        (own[name] / "notes.txt").write_text("mine")
    (own["run"] / "recipe.yaml").write_text("name: x\ndata: digits\n")
    (own["run"] / "log.jsonl").write_text("")
    own["bento"] = tmp_path / "there.bento"
    own["bento"].write_text("mine")
    shutil.copytree(shared["tiny"], own["run"] / "generator")
    shutil.copytree(shared["tiny"], own["copy"])
    partial = tmp_path / ".begun.partial"
    partial.mkdir()
    (partial / REQUEST).write_text(json.dumps({"generator": "other", "engine": "onnx-fp32"}))
    return shared | own | {"tmp": tmp_path}


def is_long(call: Call) -> bool:
    return call.words.startswith(LONG) or "--engine onnx " in call.words or "0-1024" in call.words or "--workers" in call.words


def filled_in(words: list[str], places: dict[str, Path]) -> list[str]:
    named = {name: str(path) for name, path in places.items()}
    return [word.format(**named) if "{" in word and '"' not in word else word for word in words]


# Checks that count what a step of training costs, which takes seconds.
COUNTED = (
    "{}.batch {} cannot be divided",
    "loop.precision 16-mixed",
    "(_memory)",
    "(_disk)",
    "data set '{}' has {} classes and {} images, too few for a classifier",
)
# Commands whose remedy, once followed, is at work for seconds.
LONG = ("evaluate", "export", "import", "average", "train", "benchmark", "package", "compare {tiny}")
PARAMETERS = [
    pytest.param(call, id=f"{call.path}: {call.message}", marks=[pytest.mark.slow] if is_long(call) else []) for call in CALLS
]


@pytest.mark.parametrize("call", PARAMETERS)
def test_what_the_command_line_advises_works(cli: Cli, places: dict[str, Path], call: Call) -> None:
    code, _, errors = cli(*filled_in(call.words.split(), places))
    line = errors.splitlines()[-1] if errors else ""
    assert code == 2, errors
    message = line.removeprefix("error: ")
    found = [site for site in sites_of(call) if site.fits(message)]
    assert found, f"'{message}' is not of {call.path}: {call.message}"
    remedy = message[len(message) - len(message.partition("; ")[2]) :]
    code, _, errors = cli(*filled_in(call.follow(remedy, call.words.split()), places))
    if code and (onward := ON_THE_WAY.get(call.message)):
        assert onward in errors
        assert not any(site.fits(errors.splitlines()[-1].removeprefix("error: ")) for site in found)
    else:
        assert code == 0, f"{remedy} -> {errors}"


def advised(value: Value) -> object:
    takes_seconds = value.message in COUNTED or value in ENGINES
    return pytest.param(value, id=f"{value.path}: {value.message}", marks=[pytest.mark.slow] if takes_seconds else [])


@pytest.mark.parametrize("value", [advised(value) for value in VALUES_OF_ALL])
def test_what_is_advised_from_python_and_over_http_works(tmp_path: Path, value: Value) -> None:
    with pytest.raises(UniInstructError) as refused:
        value.wrong(tmp_path)
    message = str(refused.value)
    assert any(site.fits(message) for site in sites_of(value)), message
    assert "\n" not in message
    assert value.follow(refused.value.remedy, tmp_path) is not None


@pytest.fixture(scope="module")
def server(shared: dict[str, Path]) -> Iterator[TestClient]:
    """Two models, in this process: tiny with classes, plain without."""
    with TestClient(
        app_of(f"tiny={shared['tiny']}", f"plain={shared['plain']}", max_body_bytes=4000, request_images=32)
    ) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        yield client


def asked(client: TestClient, ask: Ask) -> Response:
    method, path, body = ask
    if isinstance(body, tuple):
        return client.request(method, path, content=body[0], headers={"Content-Encoding": body[1]})
    return client.request(method, path, json=body)


@pytest.fixture(scope="module")
def demo(shared: dict[str, Path]) -> Iterator[TestClient]:
    """One model with the demo."""
    with TestClient(app_of("digits", ui=True)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("request_", DEMO, ids=lambda request: f"{request.path}: {request.message}")
def test_what_the_demo_advises_works(demo: TestClient, request_: Request) -> None:
    test_what_a_server_advises_works(demo, request_)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: f"{request.path}: {request.message}")
def test_what_a_server_advises_works(server: TestClient, request_: Request) -> None:
    answer = asked(server, request_.wrong)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert any(site.fits(error["message"]) for site in sites_of(request_)), error
    answer = asked(server, request_.follow(error["remedy"], server))
    assert answer.status_code == 200, f"{error} -> {answer.text[:400]}"


def test_each_message_of_the_product_is_followed_or_listed_with_the_reason() -> None:
    """Fails where a message is added: give it a case, or say in builders/remedies_elsewhere.py why it has none."""
    assert len(sites()) - len([site for site in sites() if any(rule.covers(site) for rule in RULES)]) > 250
    unknown = unfollowed(cases())
    assert sorted(unknown - listed()) == [], "give them cases"
    assert sorted(listed() - unknown) == [], "these are followed now, or gone: python -m builders.remedies_elsewhere, in tests/"
