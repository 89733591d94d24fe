"""Classes are matched by name: an image keeps its class's name through teachers, starts, references and resumed runs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.class_map import has_names, ids_by_name, match_classes, renumber_labels
from uni_instruct.data import ArrayReader, Dataset, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.sample_source import reference_class_ids
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.spec import ModelSpec
from uni_instruct.train.data_fingerprint import check_same_data, saved_classes
from uni_instruct.train.pipeline import train
from uni_instruct.train.plan import load_start, make_plan
from uni_instruct.train.recipe import load_recipe

Cli = Callable[..., tuple[int, str, str]]
TEACHERS, DATAS = ("cat", "dog", "red fox"), ("dog", "red fox", "cat")
SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def data_of(names: tuple[str, ...], labels: list[int]) -> Dataset:
    """One image a label, all of its class's own brightness."""
    pixels = np.array([10 * len(names[label]) for label in labels], np.uint8)
    return Dataset(
        name="made",
        image_shape=(1, 8, 8),
        labels=np.array(labels),
        num_classes=len(names),
        class_names=names,
        licence="unknown",
        source="made",
        reader=ArrayReader(np.broadcast_to(pixels[:, None, None, None], (len(labels), 8, 8, 1)).copy()),
    )


def names_of_images(dataset: Dataset) -> list[str]:
    assert dataset.labels is not None
    return [dataset.class_names[label] for label in dataset.labels]


def bundle_of(path: Path, names: tuple[str, ...], steps: int, seed: int = 0) -> Bundle:
    spec = ModelSpec(
        name="made", noise_shape=(1, 8, 8), num_classes=3, class_names=names, steps=steps, network_args=SMALL, sigma_init=2.5
    )
    torch.manual_seed(seed)
    weights = {name: (t + 0.1 * torch.randn_like(t)).numpy() for name, t in build_denoiser(spec).state_dict().items()}
    return Bundle.write(path, spec, weights, card="# made\n")


def photos(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder with a folder for each class, of noisy grey images."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


def settings(teacher: Path, data: Path, *more: str) -> list[str]:
    return [f"teacher={teacher}", f"data={data}", "divergence=jeffreys", "loop.metric=none", *more]


@pytest.mark.parametrize("names", [(), ("0", "1", "2")])
def test_numbers_are_no_names(names: tuple[str, ...]) -> None:
    assert not has_names(names)
    assert match_classes(names, TEACHERS, "data", "teacher") is None
    assert match_classes(TEACHERS, names, "teacher", "data") is None
    assert has_names(("1", "0"))


def test_ids_go_there_and_back() -> None:
    there, back = ids_by_name(DATAS, TEACHERS), ids_by_name(TEACHERS, DATAS)
    assert there is not None
    assert back is not None
    assert there.tolist() == [1, 2, 0]
    assert there[back].tolist() == [0, 1, 2]


def test_an_accent_is_the_same_however_it_is_composed() -> None:
    found = ids_by_name(("caf\u00e9", "b"), ("b", "cafe\u0301"))
    assert found is not None
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "others", "ids"),
    [
        (("ape", "ape", "cat"), ("ape", "ape", "cat"), [0, 1, 2]),
        (("ape", "cat", "ape"), ("cat", "ape", "ape"), [1, 0, 2]),
        (("cat",), ("ape", "ape", "cat"), [2]),
        (("ape", "cat"), ("ape", "ape", "cat"), None),  # which of the two is not known
        (("ape", "ape", "cat"), ("ape", "cat", "dog"), None),
    ],
)
def test_classes_that_share_a_name_stay_apart(names: tuple[str, ...], others: tuple[str, ...], ids: list[int] | None) -> None:
    """Both were the last of that name: one class less, without a word."""
    found = ids_by_name(names, others)
    assert (None if found is None else found.tolist()) == ids
    told, note = reference_class_ids(np.arange(len(names)), names, data_of(others, [0, 1, 2]))
    assert (told is None) == (ids is None) == ("class 'ape' is not among" in note)


def test_a_training_that_needs_no_labels_is_judged_on_data_of_other_classes(tmp_path: Path) -> None:
    """It was refused at its first evaluation, in the middle of the training."""
    digits = open_dataset("digits")
    np.savez(tmp_path / "data.npz", arr_0=digits.images(range(120)), class_ids=np.arange(120) % 2)
    teacher = random_bundle(tmp_path / "teacher", 3, 4)
    short = [
        "distillation.batch=8",
        "distillation.duration_kimg=0.016",
        "critic_warmup_kimg=0",
        "loop.samples=60",
        "trackers=[]",
    ]
    settings = [f"teacher={teacher.path}", f"data={tmp_path}/data.npz", "method=sid", "extractor=classifier", *short]
    bundle = train(load_recipe("digits", [*settings, "teacher.steps=2", "loop.grid=4", "report=false"]), tmp_path / "run")
    assert bundle.spec.num_classes == 10


def test_a_renumbered_data_set_keeps_every_images_name() -> None:
    dataset = data_of(DATAS, [0, 1, 2, 2, 0])
    renumbered = renumber_labels(dataset, TEACHERS, "teacher t")
    assert renumbered.class_names == TEACHERS
    assert names_of_images(renumbered) == names_of_images(dataset)
    assert renumbered.labels.tolist() == [1, 2, 0, 0, 1]
    assert renumber_labels(dataset, DATAS, "teacher t") is dataset


@pytest.mark.parametrize("others", [("cat", "dog", "wolf"), ("cat", "dog", "red fox", "wolf"), ("cat", "dog")])
def test_other_classes_are_refused_with_both_lists(others: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as refused:
        renumber_labels(data_of(DATAS, [0, 1, 2]), others, "teacher t")
    assert f"data set 'made' has the classes (dog, red fox, cat), teacher t ({', '.join(others)})" in str(refused.value)


def test_data_are_numbered_as_their_teacher_is(tmp_path: Path) -> None:
    # Folders are read in the order of their names: cat, dog, red fox.
    teacher = bundle_of(tmp_path / "teacher", DATAS, steps=4)
    plan = make_plan(load_recipe("digits", settings(teacher.path, photos(tmp_path / "photos", TEACHERS))))
    assert plan.dataset is not None
    assert plan.dataset.class_names == DATAS == plan.teacher_spec.class_names
    assert names_of_images(plan.dataset) == names_of_images(open_dataset(tmp_path / "photos"))


def test_data_of_other_classes_are_refused_by_train_and_doctor(cli: Cli, tmp_path: Path) -> None:
    teacher = bundle_of(tmp_path / "teacher", DATAS, steps=4)
    given = settings(teacher.path, photos(tmp_path / "photos", ("cat", "dog", "wolf")))
    said = f"data set 'photos' has the classes (cat, dog, wolf), teacher {teacher.path} (dog, red fox, cat)"
    code, _, errors = cli("train", "digits", "--out", tmp_path / "run", *given)
    assert (code, said in errors, (tmp_path / "run").exists()) == (2, True, False), errors
    code, out, _ = cli("doctor", "digits", "--json", *given)
    found = {finding["subject"]: finding for finding in json.loads(out)}
    assert (code, found["recipe"]["ok"], said in found["recipe"]["words"]) == (2, False, True)


def test_doctor_tries_a_teacher_on_the_classes_that_it_knows(cli: Cli, tmp_path: Path) -> None:
    """The same weights under two orders of the same classes denoise the same images alike."""
    data, words = photos(tmp_path / "photos", TEACHERS), []
    first = bundle_of(tmp_path / "first", TEACHERS, steps=4)
    denoiser, ids = load_denoiser(first), ids_by_name(DATAS, TEACHERS)
    assert ids is not None
    denoiser.renumber_classes(ids)
    weights = {name: tensor.numpy() for name, tensor in denoiser.state_dict().items()}
    second = Bundle.write(tmp_path / "second", dataclasses.replace(first.spec, class_names=DATAS), weights, "# made\n")
    for teacher in (first, second):
        _, out, _ = cli("doctor", "digits", "--json", *settings(teacher.path, data))
        words.append(next(finding["words"] for finding in json.loads(out) if finding["subject"] == "teacher"))
    assert words[0] == words[1]
    assert "of the noise is left" in words[0]


@pytest.mark.parametrize("network", ["ddpmpp", "adm", "edm2"])
def test_a_renumbered_network_answers_as_before_under_the_new_numbers(network: str) -> None:
    args = SMALL if network != "edm2" else {**SMALL, "model_channels": 64}
    spec = ModelSpec(name="x", noise_shape=(1, 8, 8), num_classes=3, network=network, network_args=args)
    denoiser = build_denoiser(spec).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # fresh networks answer zero
    x, sigma, ids = torch.randn(3, 1, 8, 8), torch.full((3, 1, 1, 1), 0.7), np.array([1, 2, 0])
    with torch.no_grad():
        before = denoiser(x, sigma, torch.from_numpy(ids))
        other = denoiser(x, sigma, torch.arange(3))
        denoiser.renumber_classes(ids)
        torch.testing.assert_close(denoiser(x, sigma, torch.arange(3)), before)
    assert not torch.allclose(before, other)


def test_a_start_is_taken_class_by_class(tmp_path: Path) -> None:
    teacher, start = bundle_of(tmp_path / "t", TEACHERS, steps=4), bundle_of(tmp_path / "s", DATAS, steps=1, seed=1)
    data = photos(tmp_path / "photos", TEACHERS)
    plan = make_plan(load_recipe("digits", settings(teacher.path, data, f"distillation.start={start.path}")))
    assert plan.start is not None
    x, sigma = torch.randn(1, 1, 8, 8), torch.full((1, 1, 1, 1), 2.5)
    with torch.no_grad():
        for name in TEACHERS:
            mine = load_start(plan.start, plan.teacher_spec)(x, sigma, torch.tensor([TEACHERS.index(name)]))
            theirs = load_denoiser(start)(x, sigma, torch.tensor([DATAS.index(name)]))
            torch.testing.assert_close(mine, theirs)


def test_a_start_of_other_classes_is_refused(tmp_path: Path) -> None:
    teacher, start = bundle_of(tmp_path / "t", TEACHERS, steps=4), bundle_of(tmp_path / "s", ("a", "b", "c"), steps=1)
    given = settings(teacher.path, photos(tmp_path / "photos", TEACHERS), f"distillation.start={start.path}")
    with pytest.raises(RequestError, match=r"the teacher has the classes \(cat, dog, red fox\), .* \(a, b, c\)"):
        make_plan(load_recipe("digits", given))


def test_a_run_goes_on_in_the_order_that_it_began_with(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", load_recipe("digits", [f"data={photos(tmp_path / 'photos', TEACHERS)}"])
    assert saved_classes(run) == ()
    begun = make_plan(recipe, DATAS).dataset  # as if the folders had sorted so
    assert begun is not None
    check_same_data(run, begun, write=True)
    assert saved_classes(run) == ()  # nothing is trained
    (run / "log.jsonl").touch()
    assert saved_classes(run) == DATAS
    plan = make_plan(recipe, saved_classes(run))
    assert plan.dataset is not None
    assert plan.teacher_spec.class_names == DATAS
    check_same_data(run, plan.dataset, write=True)
    photos(tmp_path / "more", ("wolf",))
    (tmp_path / "more" / "wolf").rename(tmp_path / "photos" / "wolf")
    other = make_plan(recipe, saved_classes(run)).dataset
    assert other is not None
    with pytest.raises(RequestError, match=r"has other classes \(got wolf\) since the run"):
        check_same_data(run, other, write=True)


def test_a_reference_is_matched_by_name_and_what_is_missing_is_said() -> None:
    reference = data_of(TEACHERS, [0, 1, 2])
    ids, note = reference_class_ids(np.array([0, 1, 2]), DATAS, reference)
    assert (ids.tolist(), note) == ([1, 2, 0], "")
    ids, note = reference_class_ids(np.array([0, 1]), ("cat", "wolf"), reference)
    assert ids is None
    assert note == "no class_accuracy: class 'wolf' is not among the reference's (cat, dog, red fox)"
