"""`train --dry-run`: its words say what the configuration says, its numbers are those of the networks and steps that train."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from uni_instruct.bundle import Bundle
from uni_instruct.divergence import DIVERGENCES
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import build_denoiser
from uni_instruct.train.dry_run.cost import cost_of, count_parameters, phases, players_without_storage
from uni_instruct.train.dry_run.counting import SavedTensors, count_flops
from uni_instruct.train.dry_run.formula import DIVERGENCE_WORDS, critic_lines, method_lines, objective_lines
from uni_instruct.train.dry_run.report import needs
from uni_instruct.train.dry_run.trial import CountedSteps, Limits, TimedSteps, distillation_stage, teacher_stage
from uni_instruct.train.methods import METHODS
from uni_instruct.train.objective_config import ObjectiveConfig
from uni_instruct.train.optimization.parallel import start_fabric
from uni_instruct.train.plan import Plan, make_plan
from uni_instruct.train.recipe import load_recipe, parse_recipe
from uni_instruct.train.stages.distillation import DistillationStage, Players

REWARD = "def brightness(images, class_ids):\n    return images.mean(dim=(1, 2, 3))\n"
TINY = [
    "network.model_channels=16",
    "network.channel_mult=[1]",
    "network.attn_resolutions=[8]",
    "critic_updates=1",
    "teacher.duration_kimg=0.1",
    "teacher.batch=8",
    "distillation.batch=8",
    "distillation.duration_kimg=0.16",
    "distillation.critic_warmup_kimg=0",
]


@cache
def tiny_plan(*changes: str) -> Plan:
    return make_plan(load_recipe("digits", [*TINY, *changes]))


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
            ["DI is zero, as h is constant", "noise levels 0.002..24.4 (Karras rho schedule, tmin 0 to tmax 800)"],
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
        (objective(divergence="chi-square", exact_sim=False), ["SIM (weight held fixed, which is biased)"], ["differentiated"]),
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
        (objective(weighting="sid"), ["weighted by 1 / mean |G(z) - D_q|"], ["exactly", "alike"]),
        (objective(weighting="exact"), ["weighted exactly"], ["mean |G(z)"]),
        (objective(weighting="uniform"), ["weighted alike"], ["mean |G(z)"]),
        (objective(tmin=340, tmax=1000), ["0.507..80 (Karras rho schedule, tmin 340 to tmax 1000)"], []),
        (objective(noise="lognormal", noise_mean=-0.8), ["logarithm is normal, mean -0.8, deviation 1.2"], ["Karras"]),
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
        (["critic_updates=5", "critic_noise=lognormal"], ["5 updates a step, at noise levels whose log"], ["generator's"]),
        (["noise=lognormal", "critic_noise=lognormal"], ["at the generator's noise levels"], ["logarithm"]),
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
    departures = [line for line in method_lines(changed) if line.startswith("departs")]
    assert departures == [f"departs from the method's settings: alpha 0.7 (not {usual}), tmax 900 (not 800)"]
    restored = dataclasses.replace(changed, alpha=method.settings.get("alpha", 0.5), tmax=800.0)
    assert not any(line.startswith("departs") for line in method_lines(restored))


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
    assert "digits, 1,797 images of 8x8x1, 10 classes, is named but not used" in told


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
    players = Players.from_teacher(build_denoiser(plan.teacher_spec), recipe)
    stage = DistillationStage(players, recipe, start_fabric(1, "32-true"), None)

    told = [(p.objective, p.critic_alone) for p in phases(recipe) for _ in range(p.images // stage.batch)]
    warmup = 0.05 * 1000
    assert told == [(stage.objective_at(i), i * stage.batch < warmup) for i in range(stage.total_steps)]
    assert [phase.until_kimg for phase in phases(recipe)] == [0.032, 0.056, 0.072, 0.16]


# --- counts


def test_flops_of_a_convolution_a_matrix_product_and_attention() -> None:
    image, kernel = torch.zeros(2, 3, 5, 7, requires_grad=True), torch.zeros(8, 3, 3, 3, requires_grad=True)
    forward = 2 * (2 * 8 * 5 * 7) * (3 * 9)
    assert count_flops(lambda: F.conv2d(image, kernel, padding=1)) == forward
    assert count_flops(lambda: F.conv2d(image, kernel, padding=1).sum().backward()) == 3 * forward
    assert count_flops(lambda: F.conv2d(image.detach(), kernel, padding=1).sum().backward()) == 2 * forward
    assert count_flops(lambda: torch.zeros(4, 5, device="meta") @ torch.zeros(5, 6, device="meta")) == 2 * 4 * 5 * 6
    q = torch.zeros(1, 1, 64, 16)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 64 * 64 * 16)


def test_saved_tensors_are_counted_while_they_are_kept_and_weights_are_not() -> None:
    layer = nn.Linear(10, 20, bias=False)
    x = torch.zeros(4, 10)
    with SavedTensors([layer]) as saved:
        hidden = layer(x)  # keeps x
        loss = (hidden * hidden).sum()  # keeps hidden, twice the same storage
        assert saved.peak == 4 * (4 * 10 + 4 * 20)
        loss.backward()
        layer(x).square().sum().backward()  # no more than that, as the first was let go
    assert saved.peak == 4 * (4 * 10 + 4 * 20)


@pytest.mark.parametrize(
    ("changes", "alone", "trained", "evaluated"),
    [
        # The integral family differentiates no denoiser: generator and fake score are trained, teacher and fake score are read.
        (["method=diff-instruct", "critic_updates=3"], False, 4, 4),  # the others train the fake score on images of their own
        (["method=diff-instruct", "distillation.micro_batch=2"], False, 2, 3),  # the critic's images are made once more
        (["method=dmd", "fake_guidance=2"], False, 3, 3),
        (["method=sid"], True, 1, 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_steps_flops_are_those_of_its_trainings_and_evaluations(
    changes: list[str], alone: bool, trained: int, evaluated: int
) -> None:
    plan = tiny_plan(*changes)
    training, evaluation = flops_of_the_teacher()
    counted = CountedSteps(plan).distillation(plan.recipe.objective, alone).flops
    assert counted == trained * training + evaluated * evaluation


def test_a_backward_pass_is_two_forward_passes_but_for_the_images_gradient() -> None:
    training, evaluation = flops_of_the_teacher()
    assert 2.9 < training / evaluation < 3


@cache
def flops_of_the_teacher() -> tuple[float, float]:
    """A training step's and an evaluation's, per image."""
    counted = CountedSteps(tiny_plan())
    return counted.teacher().flops, counted.evaluation()


def test_a_rewards_flops_count(tmp_path: Path) -> None:
    (tmp_path / "product.py").write_text(
        "import torch\n\ndef reward(images, class_ids):\n    return (images.flatten(1) @ torch.ones(64, 50)).mean(1)\n"
    )
    plan = tiny_plan("method=diff-instruct", f"reward={tmp_path / 'product.py'}:reward", "reward_scale=1")
    training, evaluation = flops_of_the_teacher()
    counted = CountedSteps(plan).distillation(plan.recipe.objective, False).flops
    assert counted == 2 * training + 2 * evaluation + 2 * (2 * 64 * 50)


@pytest.mark.parametrize(
    "changes",
    [
        ["method=f-distill", "discriminator=own", "critic_updates=1", "teacher_guidance=2", "network.dropout=0.1"],
        ["method=uni-instruct", "loop.precision=bf16-mixed"],
    ],
    ids=lambda changes: changes[0],
)
def test_counts_without_storage_are_those_of_a_real_step(changes: list[str]) -> None:
    plan = tiny_plan(*changes)
    counts = CountedSteps(plan).distillation(plan.recipe.objective, False)
    fabric, kept = start_fabric(1, plan.recipe.loop.precision), {}
    for images in (3, 6):
        stage = distillation_stage(plan, fabric, plan.recipe.objective, False, images)
        step(stage)
        with SavedTensors([stage.generator.module, stage.critic.module, stage.update_generator.teacher]) as saved:
            flops = count_flops(lambda stage=stage: step(stage))
        kept[images] = saved.peak
        assert flops / stage.batch == pytest.approx(counts.flops, rel=1e-9)
    # What grows with the images: real mixed precision keeps copies of weights as well.
    assert (kept[6] - kept[3]) / 3 == pytest.approx(counts.activations, rel=0.01)


def step(stage: DistillationStage) -> None:
    stage.step(0, torch.Generator().manual_seed(0), False)


@pytest.mark.parametrize("changes", [["method=sid"], ["method=sida"], ["method=sida", "discriminator=own"]], ids=" ".join)
def test_parameters_are_those_of_the_networks(changes: list[str]) -> None:
    plan = tiny_plan(*changes)
    players = Players.from_teacher(build_denoiser(plan.teacher_spec), plan.recipe)
    added = [m for m in (players.critic.head, players.critic.own_encoder) if m is not None]
    assert count_parameters(players_without_storage(plan)) == {
        "generator": sum(p.numel() for p in players.generator.parameters()),
        "fake_score": sum(p.numel() for p in players.critic.fake_score.parameters()),
        "discriminator": sum(p.numel() for m in added for p in m.parameters()),
        "teacher": sum(p.numel() for p in players.teacher.parameters()),
    }


def test_memory_is_what_a_stage_holds(tiny_teacher: Bundle) -> None:
    averages, given = "distillation.ema_power_std=[0.05, 0.1]", f"teacher.bundle={tiny_teacher.path}"
    plan = tiny_plan("method=sida", averages, given, "distillation.batch=6")
    memory = cost_of(plan, budget_s=0).generator.memory
    stage = distillation_stage(plan, start_fabric(1, "32-true"), plan.recipe.objective, False, 6)
    step(stage)
    with SavedTensors([stage.generator.module, stage.critic.module, stage.update_generator.teacher]) as saved:
        step(stage)
    assert memory.activations == pytest.approx(saved.peak, rel=0.01)
    networks = [stage.generator.module, stage.critic.module, stage.update_generator.teacher]
    assert memory.weights == sum(t.nbytes for n in networks for t in (*n.parameters(), *n.buffers()))
    assert memory.averages == sum(t.nbytes for n in stage.averages.modules().values() for t in (*n.parameters(), *n.buffers()))
    states = [s for o in (stage.generator, stage.critic) for s in o.optimizer.state.values()]
    assert memory.moments == sum(s[name].nbytes for s in states for name in ("exp_avg", "exp_avg_sq"))
    assert memory.gradients == max(sum(p.nbytes for p in n.parameters()) for n in networks)


@pytest.mark.parametrize(
    ("limits", "images"),
    [
        (Limits(images=5, fixed_bytes=0, bytes_per_image=1, budget_s=1e9), 5),
        (Limits(images=5, fixed_bytes=0, bytes_per_image=1, budget_s=0), 0),
        (Limits(images=5, fixed_bytes=2**60, bytes_per_image=1, budget_s=1e9), 0),
    ],
    ids=["free", "no time", "no memory"],
)
def test_steps_are_timed_within_time_and_memory(limits: Limits, images: int) -> None:
    plan = tiny_plan("method=sid")
    flops = CountedSteps(plan).evaluation()
    timed = TimedSteps(plan, flops, weights_bytes=1)
    timing, twice = (timed.distillation(plan.recipe.objective, False, f, limits) for f in (flops, 2 * flops))
    assert timing is not None
    assert twice is not None
    assert (timing.images, twice.images) == (images, images)
    if not images:  # scaled from one evaluation, which these FLOPs are
        assert (timing.s_per_image, twice.s_per_image) == (timed.evaluation_s, 2 * (timed.evaluation_s or 0))
    assert TimedSteps(plan, flops, weights_bytes=2**60).teacher(flops, limits) is None


def test_accumulated_steps_are_timed_with_their_accumulation() -> None:
    plan = tiny_plan("teacher.micro_batch=2")
    fabric = start_fabric(1, "32-true")
    assert len(teacher_stage(plan, fabric, 2).share.parts) == 2
    assert len(teacher_stage(tiny_plan(), fabric, 2).share.parts) == 1


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
    for words in ("# OBJECTIVE", "0 to 0.016 kimg, the critic alone:", "method dmd (arXiv 2311.18828)", "# NEEDS", "# COST"):
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
    counted = CountedSteps(plan)
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
