"""Published methods as special cases of the objective: the keys that each sets. A recipe names one, and may override keys."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of METHODS: the keys of ObjectiveConfig that a method sets, its paper, and how this version differs from it."""

    name: str
    source: str
    settings: dict[str, object] = field(default_factory=dict)
    note: str = ""


# adversarial_scale is the paper's scale of the adversarial term divided by its scale of the divergence: SiDA 0.01 / 100,
# DMD2 3e-3 / 1. Here the divergence has scale 1.
METHODS = {
    m.name: m
    for m in (
        Method(
            name="diff-instruct",
            source="arXiv 2305.18455",
            settings={"family": "integral", "weighting": "uniform", "noise": "lognormal"},
        ),
        Method(
            name="dmd",
            source="arXiv 2311.18828",
            settings={"family": "integral", "regression_scale": 0.25},
            note="the regression compares pixels (mean square); the paper compares LPIPS features",
        ),
        Method(
            name="dmd2",
            source="arXiv 2405.14867",
            settings={"family": "integral", "adversarial_scale": 3e-3, "critic_updates": 5},
        ),
        Method(
            name="f-distill",
            source="arXiv 2502.15681",
            settings={
                "family": "integral",
                "divergence": "jensen-shannon",
                "adversarial_scale": 1e-3,
                "critic_updates": 5,
                "ratio_mean": "running",
            },
        ),
        Method(
            name="sim",
            source="arXiv 2410.16794",
            settings={"alpha": 1.0, "weighting": "uniform", "noise": "lognormal"},
            note="the squared distance of scores; the paper also uses pseudo-Huber",
        ),
        Method(name="sid", source="arXiv 2404.04057", settings={"alpha": 1.0}),
        Method(name="sida", source="arXiv 2410.14919", settings={"alpha": 1.0, "adversarial_scale": 1e-4}),
        Method(
            name="sid-lsg",
            source="arXiv 2406.01561",
            settings={
                "alpha": 1.0,
                "teacher_guidance": 1.5,
                "fake_guidance": 1.5,
                "fake_training_guidance": 1.5,
            },
        ),
        Method(
            name="di++",
            source="arXiv 2410.18881",
            settings={"family": "integral", "weighting": "uniform", "noise": "lognormal", "reward_scale": 1.0},
        ),
        Method(name="di-star", source="arXiv 2410.20898", settings={"alpha": 1.0, "reward_scale": 1.0}),
        Method(
            name="uni-instruct",
            source="arXiv 2505.20755",
            settings={"divergence": "forward-kl", "adversarial_scale": 1e-4},
        ),
    )
}

# The keys that define a method. A recipe that is switched to another method gets these from that method. critic_updates and
# ratio_mean are tuning rather than definition, and are kept.
METHOD_DEFINING_KEYS = frozenset(key for m in METHODS.values() for key in m.settings) - {"critic_updates", "ratio_mean"}
