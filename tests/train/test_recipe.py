"""Recipes: what a method fixes, what a recipe adds, what a user changes, and what is refused before anything is opened."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from uni_instruct.errors import RequestError
from uni_instruct.schedule import KarrasLevels, LogNormalLevels
from uni_instruct.train.config import DECAY_NAMES, TRACKER_NAMES, Recipe
from uni_instruct.train.monitoring.health import SYMPTOMS
from uni_instruct.train.monitoring.nonfinite import ADVICE
from uni_instruct.train.monitoring.trackers import TRACKERS
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.objective.reward import open_reward
from uni_instruct.train.optimization.optimizer import DECAYS
from uni_instruct.train.plan import make_plan
from uni_instruct.train.recipe import all_keys, load_recipe, parse_recipe
from uni_instruct.train.recipe_help import explained_keys

REWARD = "def ink(images, class_ids):\n    return images.mean(dim=(1, 2, 3))\n"


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(REWARD)
    return f"{tmp_path}/rewards.py:ink"


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_method_sets_what_it_names_and_leaves_the_rest_as_it_is(method: object, reward: str) -> None:
    recipe = load_recipe("digits", [f"method={method.name}", f"reward={reward}"])
    objective = recipe.objective
    for key, value in method.settings.items():
        assert getattr(objective, key) == value
    own = method.settings.keys() | {"method", "reward", "critic_updates"}
    for key, default in dataclasses.asdict(ObjectiveConfig()).items():
        assert key in own or getattr(objective, key) == default, key
    assert objective.critic_updates == method.settings.get("critic_updates", 2)  # the recipe's own tuning


def test_methods_are_told_apart() -> None:
    assert len({str(sorted(m.settings.items())) for m in METHODS.values()}) == len(METHODS)


def test_changes_go_on_top_of_a_method_in_any_order() -> None:
    first = load_recipe("digits", ["method=uni-instruct", "divergence=jeffreys", "mix=0.3"])
    second = load_recipe("digits", ["mix=0.3", "divergence=jeffreys", "method=uni-instruct"])
    assert first == second
    assert (first.objective.divergence, first.objective.mix, first.objective.adversarial_scale) == ("jeffreys", 0.3, 1e-4)


def test_several_changes_may_follow_one_set_and_a_teacher_is_its_bundle(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, errors = cli("train", "digits", "--dry-run", "--json", "--set", "alpha=0.7", "teacher=digits", "tmax=900")
    assert (code, out) == (2, "")
    assert "teacher" in errors
    assert "is a one-step generator" in errors
    code, out, _ = cli("train", "digits", "--dry-run", "--json", "alpha=0.7", "--set", "teacher.duration_kimg=1", "tmax=900")
    assert code == 0
    resolved = parse_recipe(json.loads(out)["recipe"])
    assert (resolved.objective.alpha, resolved.objective.tmax, resolved.teacher.duration_kimg) == (0.7, 900, 1)


def test_recipe_written_out_is_the_recipe(reward: str) -> None:
    schedule = "schedule=[{until_kimg: 10, objective: {method: sid}}, {until_kimg: 20, objective: {method: sida}}]"
    recipe = load_recipe("digits", [schedule, "method=di-star", f"reward={reward}", "ema_power_std=[0.05, 0.1]"][:3])
    assert parse_recipe(recipe.to_dict()) == recipe
    assert [objective.method for objective in recipe.objectives] == ["sid", "sida", "di-star"]
    assert recipe.schedule[1].objective.adversarial_scale == 1e-4


def test_one_value_stands_for_a_list_of_one() -> None:
    assert load_recipe("digits", ["distillation.ema_halflife_kimg=7"]).distillation.ema_halflife_kimg == (7.0,)


def test_noise_levels_are_the_objectives() -> None:
    objective = ObjectiveConfig(noise="karras", tmin=100, tmax=700, critic_noise="lognormal", noise_mean=-0.5)
    assert objective.levels == KarrasLevels(100, 700)
    assert objective.critic_levels == LogNormalLevels(-0.5, 1.2)
    assert ObjectiveConfig(tmax=700).critic_levels == KarrasLevels(0, 700)


def test_every_advice_names_keys_that_exist() -> None:
    advice = [*ADVICE.values(), *(symptom.remedy for symptom in SYMPTOMS.values())]
    named = {key for words in advice for key in re.findall(r"(?:objective|distillation|teacher|loop)\.\w+", words)}
    assert len(named) > 5
    assert named <= set(all_keys())


@pytest.mark.parametrize(
    ("settings", "ratio", "data"),
    [
        ({}, False, False),
        ({"family": "integral"}, False, False),
        ({"divergence": "jeffreys"}, True, True),
        ({"divergence": "jeffreys", "mix": 0.0}, False, False),
        ({"divergence": "alpha", "order": 0.0}, False, False),
        ({"divergence": "-log(r)"}, False, False),
        ({"divergence": "r*log(r)"}, True, True),
        ({"adversarial_scale": 0.1}, False, True),
        ({"divergence": "jeffreys", "divergence_scale": 0.0, "adversarial_scale": 0.1}, False, True),
    ],
)
def test_what_an_objective_needs_follows_from_it(settings: dict, ratio: bool, data: bool) -> None:
    objective = ObjectiveConfig(**settings)
    assert (objective.needs_ratio, objective.needs_discriminator) == (ratio, data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": {"metod": "sid"}}, "recipe key 'objective.metod' is unknown; choose one of method"),
        ({"objective": {"family": "forward"}}, "objective.family 'forward' is unknown; choose one of expanded, integral"),
        ({"objective": {"di": False, "fgm": False, "sim": False}}, "objective.di, fgm and sim are all false"),
        ({"objective": {"tmin": 800}}, "objective.tmin 800"),
        ({"objective": {"method": "sid", "divergence_scale": 0}}, "reward_scale are all 0; give one of them a value above 0"),
        ({"objective": {"mix": 1.5}}, "objective.mix 1.5 is out of range; give 0 to 1"),
        (
            {"schedule": [{"until_kimg": 500, "objective": {}}]},
            "schedule's until_kimg [500.0] do not rise, or reach duration_kimg 200",
        ),
        (
            {"schedule": [{"until_kimg": 5, "objective": {"discriminator": "own"}}]},
            "objective.discriminator differs between phases",
        ),
        ({"schedule": [{"objective": {}}]}, "the recipe has no key 'schedule.until_kimg'"),
        ({"loop": {"trackers": ["clearml"]}}, "loop.trackers 'clearml' is unknown; choose one of tensorboard"),
        ({"distillation": {"ema_halflife_kimg": []}}, "distillation.ema_halflife_kimg is empty"),
        (
            {"data": "", "teacher": {"bundle": "t"}, "objective": {"divergence": "jeffreys"}},
            "divergence 'jeffreys' needs real data",
        ),
        ({"data": "", "teacher": {"bundle": "t"}, "objective": {"method": "sida"}}, "an adversarial term needs real data"),
        ({"data": "", "teacher": {"bundle": "t"}, "objective": {"method": "sid"}}, "metric 'FD' needs data to compare with"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(values: dict, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_recipe({"name": "x", "data": "digits"} | values)
    assert message in str(refused.value)


def test_a_teacher_alone_is_enough_where_nothing_needs_data() -> None:
    values = {"name": "x", "teacher": {"bundle": "t"}, "objective": {"method": "sid"}, "loop": {"metric": "none"}}
    assert parse_recipe(values).data == ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return images.mean()", "returns shape [] for 2 images, not shape [2]"),
        ("return images.mean(dim=1)", "returns shape [2, 8, 8] for 2 images, not shape [2]"),
        ("return 3.0", "returns a float for 2 images, not shape [2]"),
        ("return images.mean(dim=(1, 2, 3)).detach()", "has no gradient to the images"),
        ("return (images.sum(dim=(1, 2, 3)) / 0)", "returns [nan, nan] for two grey images: rewards must be finite"),
        ("return images.mean(dim=(1, 2, 3)) @ images", "fails on images [2, 1, 8, 8]"),
    ],
)
def test_reward_is_tried_before_it_is_used(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(f"def reward(images, class_ids):\n    {body}\n")
    with pytest.raises(RequestError, match="write a function of images") as refused:
        open_reward(f"{tmp_path}/bad.py:reward", (1, 8, 8), 10)
    assert message in str(refused.value)


def test_reward_that_fits_is_given_back(reward: str) -> None:
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(open_reward(reward, (1, 8, 8), 0)(images, None), images.mean(dim=(1, 2, 3)))


def test_every_key_of_a_recipe_is_explained_in_one_line(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, _ = cli("train", "--help-recipe")
    assert code == 0
    known = {key.key: key for key in explained_keys()}
    assert set(known) == {*all_keys(), "schedule[].until_kimg", "schedule[].objective"}
    for key in known.values():
        assert 10 < len(key.meaning) < 100, key.key
        assert "\n" not in key.meaning, key.key
        columns = (key.key, key.default, key.range, *key.meaning.split()[:2])  # a narrow window wraps what follows
        assert re.search("^" + " +".join(map(re.escape, columns)), printed, re.M), key


def test_defaults_are_printed_as_a_recipe_writes_them() -> None:
    printed = {key.key: key.default for key in explained_keys()}
    for key, text in printed.items():
        section, _, name = key.rpartition(".")
        if text not in ("-", "(required)"):
            recipe = load_recipe("digits", [f"{key}={text}"])
            default = getattr(type(getattr(recipe, section)) if section else Recipe, name)
            assert getattr(getattr(recipe, section) if section else recipe, name) == default, key


def test_the_words_of_a_recipe_are_those_of_the_tables() -> None:
    assert set(DECAY_NAMES) == set(DECAYS)
    assert set(TRACKER_NAMES) == set(TRACKERS)


def test_a_folder_of_pictures_in_place_of_a_recipe_is_told_how_to_become_its_data(tmp_path: Path) -> None:
    pictures = tmp_path / "my: pictures"
    pictures.mkdir()
    with pytest.raises(RequestError, match="is a folder, not a recipe") as refused:
        load_recipe(str(pictures))
    advised = re.search(r"'(name: .*)' and '(data: .*)', and train that", str(refused.value))
    assert advised is not None
    (tmp_path / "mine.yaml").write_text("\n".join(advised.groups()))
    assert load_recipe(str(tmp_path / "mine.yaml")).data == str(pictures)


def test_a_folder_without_classes_becomes_a_recipe_without_classes(tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(pictures / f"{number}.png")
    with pytest.raises(RequestError, match="is a folder, not a recipe") as refused:
        load_recipe(str(pictures))
    advised = re.findall(r"'([^']*)'", str(refused.value).partition("; ")[2])
    (tmp_path / "mine.yaml").write_text("\n".join(advised))
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.data, recipe.network.conditional) == (str(pictures), False)
    assert make_plan(recipe).dataset is not None  # which refuses classes that the data do not have


def test_a_recipe_that_says_nothing_of_its_objective_has_one_that_trains() -> None:
    """The exact reverse KL, whether the section is missing or empty; a section with any key has Uni-Instruct's own defaults."""
    for values in ({}, {"objective": None}, {"objective": {}}):
        objective = parse_recipe({"name": "x", "data": "digits"} | values).objective
        assert (objective.method, objective.divergence, objective.alpha) == ("sid", "reverse-kl", 0.5)
        assert not objective.needs_discriminator
    assert parse_recipe({"name": "x", "data": "digits", "objective": {"tmin": 150}}).objective.divergence == "forward-kl"


def test_one_key_set_leaves_the_rest_of_the_default_objective(tmp_path: Path) -> None:
    """The key made a section of its own, and so the forward KL of what was the reverse."""
    (tmp_path / "mine.yaml").write_text("name: x\ndata: digits\n")
    objective = load_recipe(str(tmp_path / "mine.yaml"), ["critic_updates=2"]).objective
    assert (objective.method, objective.divergence, objective.alpha, objective.critic_updates) == ("sid", "reverse-kl", 0.5, 2)
    assert load_recipe(str(tmp_path / "mine.yaml"), ["method=uni-instruct"]).objective.divergence == "forward-kl"


def test_what_was_measured_is_not_said_of_a_changed_recipe() -> None:
    measured = load_recipe("digits").measured
    assert "FD(digits-classifier)" in measured
    for kept in (["name=mine"], ["loop.samples=100"]):
        assert load_recipe("digits", kept).measured == measured
    for changed in (["data=other.zip"], ["learning_rate=1e-4"], ["method=dmd2"], ["alpha=0.5", "name=mine"]):
        overrides = [word.replace("learning_rate", "teacher.learning_rate") for word in changed]
        assert load_recipe("digits", overrides).measured == "unmeasured"
    assert load_recipe("digits", ["alpha=1", "measured=FD 2"]).measured == "FD 2"
