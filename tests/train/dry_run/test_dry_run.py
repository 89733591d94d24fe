"""`train --dry-run`: its words say what the configuration says."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from builders.plans import TINY, tiny_plan
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import build_denoiser
from uni_instruct.train.dry_run.cost import phases
from uni_instruct.train.dry_run.formula import DIVERGENCE_WORDS, critic_lines, method_lines, objective_lines
from uni_instruct.train.dry_run.report import needs
from uni_instruct.train.dry_run.trial import StepCounter
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.divergences.table import DIVERGENCES
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.optimization.distributed import start_fabric
from uni_instruct.train.plan import make_plan
from uni_instruct.train.recipe import load_recipe, parse_recipe
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage

REWARD = "def brightness(images, class_ids):\n    return images.mean(dim=(1, 2, 3))\n"


def objective(**changes: object) -> ObjectiveConfig:
    return ObjectiveConfig(**changes)  # type: ignore[arg-type]


# --- words


@pytest.mark.parametrize(
    ("config", "said", "unsaid"),
    [
        (
            objective(),
            ["minimise reverse KL divergence KL(student || teacher), expanded over noise levels: FGM x 2(1 - 0.5) + SIM"],
            ["weight differentiated", "adversarial", "regression", "reward", "density ratio", "guidance", "alone", "DI +"],
        ),
        (
            objective(),
            ["DI is zero, as h is constant", "noise levels: 0.002..24.4 (Karras rho schedule, tmin 0 to tmax 800)"],
            [],
        ),
        (objective(alpha=1.2), ["FGM x 2(1 - 1.2) + SIM"], ["FGM is zero"]),
        (objective(alpha=1.0), [": SIM", "FGM is zero, as alpha is 1"], ["FGM x"]),
        (
            objective(divergence="forward-kl"),
            [
                "KL(teacher || student)",
                ": SIM (weight differentiated)",
                "h is linear in r; FGM is zero, as h is proportional to r",
            ],
            ["FGM x", "reverse"],
        ),
        (
            objective(divergence="jensen-shannon", alpha=0.75),
            [
                "Jensen-Shannon",
                "DI + FGM x 2(1 - 0.75) + SIM (weight differentiated)",
                "the logit clamped to +-5, r scaled to mean 1",
            ],
            ["is zero"],
        ),
        (objective(divergence="chi-square", exact_sim=False), ["SIM (weight held fixed: biased gradient)"], ["differentiated"]),
        (objective(divergence="chi-square", di=False, sim=False), [": FGM x 2(1 - 0.5)"], ["SIM", "DI"]),
        (objective(fgm=False, sim=False), ["expanded over noise levels: nothing", "DI is zero"], []),
        (objective(divergence="jeffreys", mix=0.25), ["0.5 forward KL + 1.5 reverse KL", "DI is zero, as h is linear"], []),
        (objective(divergence="alpha", order=3), ["alpha divergence of order 3 ", ": DI + FGM"], ["order 0.5"]),
        (
            objective(divergence="r*log(r) - r + 1"),
            ["with f(r) = r*log(r) - r + 1, expanded", ": SIM", "FGM is zero"],
            ["DI +"],
        ),
        (
            objective(family="integral", divergence_scale=2.0),
            ["minimise 2 x reverse KL divergence KL(student || teacher), summed over noise levels"],
            ["SIM", "FGM", "DI", "alpha"],
        ),
        (
            objective(adversarial_scale=1e-4, regression_scale=0.25, reward="r.py:f", reward_scale=3.0),
            ["+ 0.0001 x pixels x adversarial", "+ 0.25 x squared distance", "- 3 x reward r.py:f", "(the divergence alone)"],
            [],
        ),
        (
            objective(divergence_scale=0.0, reward="r.py:f", reward_scale=1.0),
            ["minimise - 1 x reward r.py:f"],
            ["KL", "weight"],
        ),
        (objective(weighting="sid"), ["weighted by 1 / mean |G(z) - D_q|"], ["exact", "same weight"]),
        (objective(weighting="exact"), ["exact weighting"], ["mean |G(z)"]),
        (objective(weighting="uniform"), ["the same weight for every noise level"], ["mean |G(z)"]),
        (objective(tmin=340, tmax=1000), ["0.507..80 (Karras rho schedule, tmin 340 to tmax 1000)"], []),
        (
            objective(noise="lognormal", noise_mean=-0.8),
            ["noise levels: log sigma normal with mean -0.8, standard deviation 1.2"],
            ["Karras"],
        ),
        (
            objective(divergence="forward-kl", ratio_mean="running", ratio_bins=8),
            ["running mean of its noise bin (8 bins)"],
            [],
        ),
        (objective(divergence="forward-kl", ratio_mean="none", logit_clamp=3), ["+-3, r not scaled"], ["mean 1"]),
        (
            objective(teacher_guidance=1.5, fake_guidance=2.0),
            ["teacher under classifier-free guidance of 1.5", "fake score under classifier-free guidance of 2"],
            ["trained"],
        ),
    ],
)
def test_the_formula_says_what_the_configuration_says(config: ObjectiveConfig, said: list[str], unsaid: list[str]) -> None:
    words = "\n".join(objective_lines(config))
    assert [part for part in said if part not in words] == []
    assert [part for part in unsaid if part in words] == []


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ([], ["critic: fake score; 1 update a step, at the generator's"], ["discriminator", "without", "augmented"]),
        (["divergence=forward-kl"], ["discriminator on the fake score's encoder (its loss x 0.1)"], ["own"]),
        (["adversarial_scale=1", "discriminator=own"], ["discriminator on an encoder of its own"], ["score's enc"]),
        (["critic_updates=5", "critic_noise=lognormal"], ["5 updates a step; noise levels: log sigma"], ["generator's"]),
        (["noise=lognormal", "critic_noise=lognormal"], ["at the generator's noise levels"], ["log sigma"]),
        (["fake_training_guidance=1.5"], ["fake score trained under classifier-free guidance of 1.5"], []),
        (["objective.label_dropout=0.1"], ["fake score trained without the class for 0.1 of the images"], []),
        (["distillation.augment=0.12"], ["augmented with probability 0.12"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_critics_words(changes: list[str], said: list[str], unsaid: list[str]) -> None:
    recipe = load_recipe("digits", [*TINY, *changes])
    words = "\n".join(critic_lines(recipe.objective, recipe))
    assert [part for part in said if part not in words] == []
    assert [part for part in unsaid if part in words] == []


def test_a_discriminator_is_told_in_phases_that_only_prepare_it() -> None:
    recipe = load_recipe("digits", [*TINY, "divergence=forward-kl"])
    assert "discriminator" in critic_lines(objective(), recipe)[0]


def test_every_divergence_has_its_words() -> None:
    assert DIVERGENCE_WORDS.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_told_with_its_source_and_its_departures(name: str, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    changes = [f"method={name}", f"reward={tmp_path / 'reward.py'}:brightness"]
    method, plain = METHODS[name], load_recipe("digits", [*TINY[:3], *changes]).objective
    assert f"method {name} ({method.source})" in method_lines(plain)
    assert (f"note: {method.note}" in method_lines(plain)) == bool(method.note)

    changed = dataclasses.replace(plain, alpha=0.7, tmax=900.0, critic_updates=method.settings.get("critic_updates", 1))
    usual = f"{method.settings.get('alpha', 0.5):g}"
    departures = [line for line in method_lines(changed) if line.startswith("differs")]
    assert departures == [f"differs from the method's settings: alpha 0.7 (not {usual}), tmax 900 (not 800)"]
    restored = dataclasses.replace(changed, alpha=method.settings.get("alpha", 0.5), tmax=800.0)
    assert not any(line.startswith("differs") for line in method_lines(restored))


# --- needs


def test_a_given_teacher_and_the_reverse_kl_need_no_data(tiny_teacher: Bundle) -> None:
    told = needs(tiny_plan(f"teacher.bundle={tiny_teacher.path}", "data=", "metric=none"))
    assert told["real_data"].startswith("none needed, as the teacher is given")
    assert "digits" not in told["real_data"]
    assert told["density_ratio"] == "none needed, as the weight h of reverse-kl is constant"
    assert told["teacher"] == f"given, {tiny_teacher.path}"
    assert (told["reward"], told["pairs"], told["generator_start"]) == ("none", "none", "the teacher's weights")


@pytest.mark.parametrize(
    ("given", "changes", "why"),
    [
        (False, ["metric=none"], "to train the teacher"),
        (False, [], "to train the teacher, for the metric FD"),
        (True, [], "for the metric FD"),
        (True, ["metric=none", "divergence=forward-kl"], "for the density ratio"),
        (True, ["metric=none", "adversarial_scale=1"], "for the adversarial term"),
        (True, ["metric=KD", "method=f-distill"], "for the density ratio, for the adversarial term, for the metric KD"),
    ],
)
def test_why_data_are_needed(tiny_teacher: Bundle, given: bool, changes: list[str], why: str) -> None:
    bundle = [f"teacher.bundle={tiny_teacher.path}"] if given else []
    told = needs(tiny_plan(*bundle, *changes))
    assert told["real_data"] == f"digits, 1,797 images of 8x8x1, 10 classes: {why}"
    assert ("learned" in told["density_ratio"]) == ("for the density ratio" in why)
    assert told["teacher"].startswith("given" if given else "trained first, 0.1 kimg in steps of 8 images")


def test_data_that_are_named_for_nothing_are_told(tiny_teacher: Bundle) -> None:
    told = needs(tiny_plan(f"teacher.bundle={tiny_teacher.path}", "metric=none"))["real_data"]
    assert told.startswith("none needed")
    assert "digits, 1,797 images of 8x8x1, 10 classes, named in the recipe but not used" in told


def test_reward_pairs_and_start_are_told(tmp_path: Path, tiny_teacher: Bundle, tiny_bundle: Bundle) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    reward = f"{tmp_path / 'reward.py'}:brightness"
    changes = ["method=dmd", f"reward={reward}", "reward_scale=2", "regression_pairs=1234", "teacher.steps=10"]
    told = needs(tiny_plan(f"teacher.bundle={tiny_teacher.path}", f"distillation.start={tiny_bundle.path}", *changes))
    assert told["reward"] == reward
    assert told["pairs"] == "1,234 images of the teacher's, 19 evaluations each"
    assert told["generator_start"] == str(tiny_bundle.path)


# --- phases


def test_phases_are_those_that_training_goes_through() -> None:
    recipe = load_recipe("digits", [*TINY, "distillation.critic_warmup_kimg=0.05"])
    schedule = [
        {"until_kimg": 0.03, "objective": {"method": "dmd2"}},
        {"until_kimg": 0.07, "objective": {"method": "diff-instruct"}},
    ]
    recipe = parse_recipe(recipe.to_dict() | {"schedule": schedule})
    plan = make_plan(recipe)
    models = DistillationModels.from_teacher(build_denoiser(plan.teacher_spec), recipe)
    stage = DistillationStage(models, recipe, start_fabric(1, "32-true"), None)

    told = [(p.objective, p.critic_alone) for p in phases(recipe) for _ in range(p.images // stage.batch)]
    warmup = 0.05 * 1000
    assert told == [(stage.objective_at(i).config, i * stage.batch < warmup) for i in range(stage.total_steps)]
    assert [phase.until_kimg for phase in phases(recipe)] == [0.032, 0.056, 0.072, 0.16]


# --- the command


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe with a critic's warm-up, a schedule, pairs, a user's own f and reward."""
    (tmp_path / "reward.py").write_text(REWARD)
    small = ["teacher.batch=4", "distillation.batch=4", "distillation.critic_warmup_kimg=0.014"]
    values = load_recipe("digits", [*TINY, *small]).to_dict() | {
        "measured": "not yet\nbut soon: # 1",
        "schedule": [{"until_kimg": 0.05, "objective": {"method": "dmd"}}],
        "objective": {
            "method": "di-star",
            "divergence": "(r*log(r)\n - r + 1)",
            "reward": f"{tmp_path / 'reward.py'}:brightness",
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_output_is_the_recipe_with_comments(
    cli: Callable[..., tuple[int, str, str]], recipe_file: Path, tmp_path: Path
) -> None:
    code, out, err = cli("train", recipe_file, "--dry-run")
    assert code == 0, err
    (tmp_path / "again.yaml").write_text(out)
    assert load_recipe(str(tmp_path / "again.yaml")) == load_recipe(str(recipe_file))

    comments, _, recipe = out.partition("\n\n")
    assert all(line.startswith("#") for line in comments.splitlines())
    assert "#" not in recipe.replace("# 1", "")
    for words in (
        "# OBJECTIVE",
        "0 to 0.016 kimg, warm-up of the critic:",
        "method dmd (arXiv 2311.18828)",
        "# NEEDS",
        "# COST",
    ):
        assert words in comments
    assert "(a step measured on 4 images here)" in comments


def test_json_holds_the_same_facts(cli: Callable[..., tuple[int, str, str]], recipe_file: Path) -> None:
    code, out, err = cli("train", recipe_file, "--dry-run", "--json")
    assert code == 0, err
    told, recipe = json.loads(out), load_recipe(str(recipe_file))
    assert parse_recipe(told["recipe"]) == recipe
    assert [phase["critic_alone"] for phase in told["objective"]] == [True, False, False]
    assert told["objective"][2]["lines"] == [
        *method_lines(recipe.objective),
        *objective_lines(recipe.objective),
        *critic_lines(recipe.objective, recipe),
    ]
    assert told["images"] == {"teacher": 100, "generator": 160}
    assert told["needs"]["pairs"].startswith("1,000 images of the teacher's, 35 evaluations")
    plan = make_plan(recipe)
    counted = StepCounter(plan)
    phase_flops = [phase["flops_per_image"] for phase in told["objective"]]
    assert told["flops_per_image"] == {"teacher": counted.teacher().flops, "generator": phase_flops[-1]}
    whole = 100 * counted.teacher().flops + 1000 * 35 * counted.evaluation()
    assert told["flops"] == whole + 16 * phase_flops[0] + 36 * phase_flops[1] + 108 * phase_flops[2]
    speeds, flops = told["s_per_1000_images"], told["flops_per_image"]
    whole_s = (
        0.1 * speeds["teacher"] + (told["flops"] - 100 * flops["teacher"]) * speeds["generator"] / flops["generator"] / 1000
    )
    assert told["time_s"] == pytest.approx(whole_s)
    assert all(memory["total"] == pytest.approx(sum(memory.values()) / 2) for memory in told["memory_mb"].values())


def test_a_dry_run_refuses_what_training_would_refuse(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("train", "digits", "--dry-run", "--set", "teacher.bundle=nowhere")
    assert (code, out) == (RequestError.exit_code, "")
    assert "there is no bundle nowhere" in err
