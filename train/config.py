"""Recipes: what to train, on what, for how long. Frozen, checked when built; a default stands here and nowhere else."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from uni_instruct.divergence import find_divergence
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import NETWORKS

RECIPES = Path(__file__).parent / "recipes"
WEIGHTINGS = ("sid", "exact")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The denoiser that teacher, fake score and generator share."""

    architecture: str = "ddpmpp"
    conditional: bool = True
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _one_of("network.architecture", self.architecture, NETWORKS)
        _in_range("network.dropout", self.dropout, 0, 0.99)
        _in_range("network.num_blocks", self.num_blocks, 1, 64)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """EDM training of the teacher; `bundle` names a trained one instead.

    Noise levels are log-normal with p_mean and p_std; the rate rises over warmup_kimg and falls to zero over decay_kimg.
    steps is the number of steps of the Heun sampler that the teacher is sampled and compared with.
    """

    bundle: str = ""
    duration_kimg: float = 200.0
    batch: int = 128
    learning_rate: float = 1e-3
    warmup_kimg: float = 10.0
    decay_kimg: float = 0.0
    p_mean: float = -1.2
    p_std: float = 1.2
    ema_halflife_kimg: float = 5.0
    evaluate_kimg: float = 50.0
    steps: int = 18

    def __post_init__(self) -> None:
        _in_range("teacher.duration_kimg", self.duration_kimg, 1e-3, 1e9)
        _in_range("teacher.batch", self.batch, 1, 1_000_000)
        _in_range("teacher.steps", self.steps, 2, 1000)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """One-step distillation by the expanded divergence (objective.py).

    alpha scales the FGM term: 0.5 is exact, 1 and 1.2 are what the papers train images with. sigma_init is the noise level
    of the generator's input. The generator's noise levels are uniform on EDM's schedule from tmin/1000 to tmax/1000; a larger
    tmin steadies divergences that need a ratio. weighting is 'sid' or 'exact'. The critic (fake score and discriminator) is
    updated critic_updates times a step, at first alone, for critic_warmup_kimg; logit_clamp bounds the log-ratio;
    discriminator_scale weighs the discriminator's loss against the fake score's. One kimg is 1000 images of the generator's.
    """

    divergence: str = "reverse-kl"
    alpha: float = 1.0
    duration_kimg: float = 200.0
    batch: int = 128
    generator_learning_rate: float = 1e-5
    critic_learning_rate: float = 1e-5
    discriminator_scale: float = 0.1
    beta1: float = 0.0
    beta2: float = 0.999
    decay_kimg: float = 0.0
    critic_warmup_kimg: float = 0.0
    critic_updates: int = 1
    sigma_init: float = 2.5
    tmin: float = 0.0
    tmax: float = 800.0
    weighting: str = "sid"
    logit_clamp: float = 5.0
    ema_halflife_kimg: float = 5.0
    evaluate_kimg: float = 20.0

    def __post_init__(self) -> None:
        find_divergence(self.divergence)
        _one_of("distillation.weighting", self.weighting, WEIGHTINGS)
        _in_range("distillation.alpha", self.alpha, -10, 10)
        _in_range("distillation.duration_kimg", self.duration_kimg, 1e-3, 1e9)
        _in_range("distillation.batch", self.batch, 1, 1_000_000)
        _in_range("distillation.sigma_init", self.sigma_init, 1e-3, 1e4)
        _in_range("distillation.critic_updates", self.critic_updates, 1, 1000)
        _in_range("distillation.tmax", self.tmax, 1, 1000)
        _in_range("distillation.tmin", self.tmin, 0, self.tmax - 1)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What happens beside the steps, for both stages.

    metric is minimised over `samples` generated images; 'none' keeps the last weights instead of the best.
    """

    seed: int = 0
    precision: str = "32-true"
    log_kimg: float = 2.0
    state_kimg: float = 20.0
    metric: str = "FD"
    samples: int = 1797
    grid: int = 100

    def __post_init__(self) -> None:
        _one_of("loop.metric", self.metric, ("FD", "KD", "none"))
        _one_of("loop.precision", self.precision, ("32-true", "bf16-mixed"))
        for name in ("log_kimg", "state_kimg"):
            _in_range(f"loop.{name}", getattr(self, name), 1e-6, 1e9)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of it. `data` is whatever `open_dataset` takes; `measured` says what the recipe reached, or 'unmeasured'."""

    name: str
    data: str
    measured: str = "unmeasured"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML takes them."""
        return _plain(dataclasses.asdict(self))


def built_in_recipes() -> list[str]:
    """Names of the recipes that ship with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by built-in name or YAML file, with 'key=value' overrides. Raises RequestError for anything unknown.

    A key is written in full (distillation.alpha), or by its last part where that is unique (alpha).
    """
    path = RECIPES / f"{source}.yaml" if source in built_in_recipes() else Path(source)
    if not path.is_file():
        known = ", ".join(built_in_recipes())
        raise RequestError(f"recipe '{source}' is unknown", remedy=f"give a YAML file or one of {known}", param="recipe")
    values = read_yaml(path)
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values)


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values. Raises RequestError for unknown keys, wrong types and values out of range."""
    return _build(Recipe, values, prefix="")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RequestError where it is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path} is not YAML: {reason}", remedy="compare it with a built-in recipe") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds no recipe", remedy="compare it with a built-in recipe", param="recipe")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RequestError(f"--set {override} has no value", remedy="write --set key=value", param="set")
    *sections, name = _full_key(key.strip()).split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = yaml.safe_load(text)


def _full_key(key: str) -> str:
    keys = _all_keys(Recipe)
    matches = [k for k in keys if k == key] or [k for k in keys if k.rpartition(".")[2] == key]
    if not matches:
        raise RequestError(f"--set key '{key}' is unknown", remedy=f"choose one of {', '.join(keys)}", param="set")
    if len(matches) > 1:
        raise RequestError(f"--set key '{key}' is ambiguous", remedy=f"write {' or '.join(matches)}", param="set")
    return matches[0]


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    keys = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        keys += _all_keys(kind, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise RequestError(f"'{prefix.rstrip('.')}' is not a section", remedy="indent its keys below it", param="recipe")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise RequestError(
                f"recipe key '{prefix}{key}' is unknown", remedy=f"choose one of {', '.join(names)}", param="recipe"
            )
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in values]
    if missing:
        raise RequestError(f"recipe has no '{prefix}{missing[0]}'", remedy="add that line", param="recipe")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, prefix=f"{key}.")
    if isinstance(kind, types.GenericAlias):
        item = typing.get_args(kind)[0]
        if isinstance(value, list | tuple):
            return tuple(_convert(item, v, key) for v in value)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML reads 1e-4 as a string.
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    expected = getattr(kind, "__name__", str(kind))
    raise RequestError(f"recipe key '{key}' is {value!r}", remedy=f"give a value of type {expected}", param="recipe")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _one_of(key: str, value: str, allowed: typing.Iterable[str]) -> None:
    if value not in allowed:
        raise RequestError(f"{key} '{value}' is unknown", remedy=f"choose one of {', '.join(allowed)}", param="recipe")


def _in_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(f"{key} {value} is out of range", remedy=f"give {low:g} to {high:g}", param="recipe")
