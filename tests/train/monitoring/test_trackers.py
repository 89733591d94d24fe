"""What a run sends to TensorBoard, Weights & Biases and Trackio is read back from their files; what is missing is refused."""

import io
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from builders.machine import files_of_at_most
from uni_instruct.errors import DiskError, RequestError
from uni_instruct.train.monitoring.trackers import (
    TRACKERS,
    TrackedRun,
    Tracker,
    TrackerKind,
    WeightsAndBiases,
    check_trackers,
    open_trackers,
    stable_id,
)

CONFIG = {"name": "digits", "objective": {"divergence": "reverse-kl", "alpha": 0.5}, "mult": [1, 2]}
GREY, COLOUR = (np.random.default_rng(c).integers(0, 256, (6, 9, c), dtype=np.uint8) for c in (1, 3))


def send_stages(tracker: Tracker) -> None:
    """Both stages count their images from zero, so the second one begins below where the first ended."""
    tracker.scalars({"teacher/loss": 0.5, "skipped_steps": 0.0}, images=64)
    tracker.picture("teacher/samples", GREY, images=64)
    tracker.scalars({"teacher/loss": 0.25, "skipped_steps": 1.0}, images=128)
    tracker.scalars({"generator/loss": -3.5}, images=32)
    tracker.picture("generator/samples", COLOUR, images=32)


def assert_same_picture(png: bytes, sheet: np.ndarray) -> None:
    """Grey may have become RGB on the way, and either may have got an alpha channel."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    np.testing.assert_array_equal(image, np.broadcast_to(sheet, image.shape))


def tensorboard_events(folder: Path) -> Any:
    """What TensorBoard reads in a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_has_scalars_and_pictures_on_disk_at_once(tmp_path: Path) -> None:
    (tracker,) = open_trackers([], tmp_path, "digits", CONFIG)
    send_stages(tracker)
    events = tensorboard_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("teacher/loss")] == [(64, 0.5), (128, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("skipped_steps")] == [(64, 0), (128, 1)]
    assert [(e.step, e.value) for e in events.Scalars("generator/loss")] == [(32, -3.5)]
    for name, sheet, step in (("teacher/samples", GREY, 64), ("generator/samples", COLOUR, 32)):
        (picture,) = events.Images(name)
        assert picture.step == step
        assert_same_picture(picture.encoded_image_string, sheet)
    tracker.scalars({"teacher/loss": 0.125}, images=192)
    assert [e.step for e in tensorboard_events(tmp_path).Scalars("teacher/loss")] == [64, 128, 192]
    tracker.close()


def test_tensorboard_goes_on_with_the_curves_of_a_resumed_run(tmp_path: Path) -> None:
    for images in (64, 128):
        (tracker,) = open_trackers(["tensorboard"], tmp_path, "digits", CONFIG)
        tracker.scalars({"teacher/loss": images / 64}, images)
        tracker.close()
    events = tensorboard_events(tmp_path).Scalars("teacher/loss")
    # Event files of one second are read in the order of their counters as text: 10 comes before 9.
    assert sorted((e.step, e.value) for e in events) == [(64, 1), (128, 2)]


def test_tensorboard_leaves_the_folder_of_a_finished_run_alone(tmp_path: Path) -> None:
    (tracker,) = open_trackers([], tmp_path, "digits", CONFIG)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_names_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's own thread dies of it, too
    others = threading.enumerate()
    (tracker,) = open_trackers([], tmp_path, "digits", CONFIG)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    full = pytest.raises(DiskError, match=f"cannot write {tmp_path}/tensorboard: File too large; raise the limit")
    with files_of_at_most(4096):
        with full:
            for images in range(5):
                tracker.picture("samples", noise, images)
        with full:
            tracker.scalars({"teacher/loss": 1.0}, 5)
        with full:
            tracker.close()
    for thread in set(threading.enumerate()) - set(others):
        thread.join()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "config"}.items():
        monkeypatch.setenv(name, value if name == "WANDB_MODE" else str(tmp_path / value))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def end_wandb() -> None:
    """What the end of the process does: waits until W&B's own process has written all."""
    import wandb

    wandb.teardown()


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """The rows that were logged; keys of nested values are joined by dots."""
    rows = [record.history.item for record in records if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_wandb_has_scalars_and_pictures(offline: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_trackers(["wandb"], tmp_path / "run", "digits", CONFIG)[1]
    send_stages(tracker)
    tracker.close()
    end_wandb()
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))

    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == (stable_id(tmp_path / "run"), "uni-instruct", "digits")
    assert {c.key: json.loads(c.value_json) for c in run.config.update if c.key != "_wandb"} == CONFIG
    metrics = {m.metric.name or m.metric.glob_name: m.metric for m in records if m.HasField("metric")}
    assert metrics["*"].step_metric == "images"

    rows = wandb_history(records)
    assert [row["images"] for row in rows] == [64, 64, 128, 32, 32]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row.get("teacher/loss") for row in rows] == [0.5, None, 0.25, None, None]
    assert rows[3]["generator/loss"] == -3.5
    for row, name, sheet in ((rows[1], "teacher/samples", GREY), (rows[4], "generator/samples", COLOUR)):
        assert_same_picture((file.parent / "files" / row[f"{name}.path"]).read_bytes(), sheet)
    assert capfd.readouterr().out == ""


def test_wandb_resumes_a_run_by_its_id(offline: None, tmp_path: Path) -> None:
    for images in (64, 128):
        tracker = open_trackers(["wandb"], tmp_path / "run", "digits", CONFIG)[1]
        assert isinstance(tracker, WeightsAndBiases)
        assert tracker._run.settings.resume == "allow"  # only W&B's server can show what that does
        tracker.scalars({"teacher/loss": 1.0}, images)
        tracker.close()
    end_wandb()
    parts = [list(wandb_records(file)) for file in (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")]
    assert sorted(row["images"] for part in parts for row in wandb_history(part)) == [64, 128]
    ids = {record.run.run_id for part in parts for record in part if record.HasField("run")}
    assert ids == {stable_id(tmp_path / "run")}


def test_wandb_without_a_login_is_refused(offline: None, tmp_path: Path) -> None:
    """In a process of its own: W&B reads its environment once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "online", "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    code = "from pathlib import Path\nfrom uni_instruct.train.monitoring.trackers import open_trackers\n"
    code += f"open_trackers(['wandb'], Path({str(tmp_path)!r}), 'digits', {{}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert re.search(
        r"RequestError: tracker 'wandb' cannot start: .+; run 'wandb login', or set WANDB_MODE=offline$", done.stderr.strip()
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackio reads where its store lies when it is imported."""
    store = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(store))
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        pytest.importorskip("trackio")
        yield store


def trackio_rows(store: Path, name: str) -> list[tuple[int, dict[str, Any]]]:
    with sqlite3.connect(store / "uni-instruct.db") as database:
        found = database.execute("select step, metrics from metrics where run_name = ? order by rowid", [name])
        return [(step, json.loads(metrics)) for step, metrics in found]


def test_trackio_has_scalars_and_pictures(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_trackers(["trackio"], tmp_path, "digits", CONFIG)[1]
    send_stages(tracker)
    tracker.close()
    rows = trackio_rows(store, stable_id(tmp_path))
    assert [step for step, _ in rows] == [64, 64, 128, 32, 32]
    assert [rows[i][1] for i in (0, 2, 3)] == [
        {"teacher/loss": 0.5, "skipped_steps": 0.0},
        {"teacher/loss": 0.25, "skipped_steps": 1.0},
        {"generator/loss": -3.5},
    ]
    for (_, row), name, sheet in ((rows[1], "teacher/samples", GREY), (rows[4], "generator/samples", COLOUR)):
        assert_same_picture((store / "media" / row[name]["file_path"]).read_bytes(), sheet)
    with sqlite3.connect(store / "uni-instruct.db") as database:
        ((config,),) = database.execute("select config from configs where run_name = ?", [stable_id(tmp_path)])
    assert CONFIG.items() <= json.loads(config).items()
    assert capfd.readouterr().out == ""


def test_trackio_goes_on_with_a_resumed_run(store: Path, tmp_path: Path) -> None:
    for images in (64, 128):
        tracker = open_trackers(["trackio"], tmp_path, "digits", CONFIG)[1]
        tracker.scalars({"teacher/loss": 1.0}, images)
        tracker.close()
    name = stable_id(tmp_path)
    assert [step for step, _ in trackio_rows(store, name)] == [64, 128]
    with sqlite3.connect(store / "uni-instruct.db") as database:
        assert len(set(database.execute("select run_id from metrics where run_name = ?", [name]))) == 1


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^tracker 'mlflow' is unknown; choose one of tensorboard, wandb, trackio$"):
        open_trackers(["mlflow"], tmp_path, "digits", CONFIG)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tensorboard", r"pip install 'uni-instruct\[train\]'"),
        ("wandb", "pip install wandb"),
        ("trackio", "pip install trackio"),
    ],
)
def test_a_missing_package_is_refused(name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say that there is none
    with pytest.raises(RequestError, match=f"^tracker '{name}' needs package '{name}', which is not installed; {remedy}$"):
        open_trackers([name], tmp_path, "digits", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RequestError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_checking_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom uni_instruct.train.monitoring.trackers import check_trackers\ncheck_trackers(['tensorboard'])\n"
        "assert not sys.modules.keys() & {'torch', 'tensorboard', 'wandb', 'trackio'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_one_tracker_cannot_start_the_others_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Recording:
        def __init__(self, run: TrackedRun): ...

        def scalars(self, values: object, images: int) -> None: ...

        def picture(self, name: str, sheet: np.ndarray, images: int) -> None: ...

        def close(self) -> None:
            closed.append(True)

    def refuse(run: TrackedRun) -> NoReturn:
        raise RequestError("no", remedy="yes")

    monkeypatch.setitem(TRACKERS, "recording", TrackerKind(package="numpy", install="", open=Recording))
    monkeypatch.setitem(TRACKERS, "refusing", TrackerKind(package="numpy", install="", open=refuse))
    assert len(open_trackers(["recording", "recording"], tmp_path, "digits", CONFIG)) == 2
    assert closed == []
    with pytest.raises(RequestError, match="no; yes"):
        open_trackers(["recording", "refusing"], tmp_path, "digits", CONFIG)
    assert closed == [True]


def test_an_id_belongs_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It outlives a move, and is shared neither with a run of the same name nor with a later one in its place."""
    first, second = tmp_path / "a" / "fkl lr=1e-4/№2", tmp_path / "b" / "fkl lr=1e-4/№2"
    first.mkdir(parents=True)
    monkeypatch.chdir(first)
    drawn = stable_id(Path())
    assert drawn.rpartition("-")[0] == "-2"
    assert stable_id(first) == drawn != stable_id(second)
    moved = first.rename(tmp_path / "elsewhere")
    assert stable_id(moved) == drawn
    assert stable_id(first) != drawn
    assert not set(stable_id(tmp_path / "what? 100% #1: x")) & set("/\\#?%: ")


def wandb_records(file: Path) -> Iterator[Any]:
    """The records in W&B's offline file: 7 bytes, then a LevelDB log: 32 KiB blocks of (checksum, length, kind, bytes)."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""
