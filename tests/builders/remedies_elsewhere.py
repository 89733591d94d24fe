"""Messages whose remedies are not followed by tests/whole/test_remedies.py: by rule, with the reason, and those still open."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from builders.remedies import Case, Site, sites, sites_of
from builders.remedy_calls import CALLS
from builders.remedy_core import BUNDLES, CALLED, DATA, SCORES
from builders.remedy_files import FILES
from builders.remedy_requests import DEMO, REQUESTS
from builders.remedy_running import ENGINES, RUN
from builders.remedy_stages import STAGES
from builders.remedy_training import DOCTOR, PLANS, RESUMED
from builders.remedy_values import VALUES

VALUES_OF_ALL = (*VALUES, *STAGES, *FILES, *PLANS, *DOCTOR, *RESUMED, *DATA, *SCORES, *BUNDLES, *CALLED, *ENGINES, *RUN)


class Rule(NamedTuple):
    """Messages of files, or with problems or remedies, that a pattern fits; and the reason."""

    reason: str
    path: str = ""
    problem: str = ""
    remedy: str = ""
    error: str = ""

    def covers(self, site: Site) -> bool:
        asked = ((self.path, site.path), (self.problem, site.problem), (self.remedy, site.remedy), (self.error, site.error))
        return all(re.search(pattern, text) for pattern, text in asked if pattern)


RULES = (
    Rule("asks for a package", remedy=r"^(apt )?install |^pip (un)?install"),
    Rule("asks for a package", path=r"^uni_instruct/data/emoji\.py"),
    Rule("asks for a package, as the table of trackers has it", path=r"trackers\.py", problem="needs package"),
    Rule("asks for a newer version of this package", remedy="^update uni-instruct"),
    Rule("asks for an account with Weights & Biases", remedy="wandb login"),
    Rule("asks for another operating system", problem="not supported on this system"),
    Rule(
        "asks for a new copy of a damaged file",
        remedy=r"(copy|download|get|write) .*again",
    ),
    Rule("a damaged or hostile checkpoint; tests/core/checkpoints try them by the thousand", error="MalformedFile"),
    Rule("what such a checkpoint's error becomes", path=r"checkpoints/budget\.py", problem=r"^\{\} \{\}$"),
    Rule(
        "asks for a file of a project that is known; tests/core/checkpoints import files of each",
        remedy=r"^give a file with (one of )?\{\}|^import a file of",
    ),
    Rule(
        "a damaged checkpoint: its filters; tests/core/checkpoints alter every weight",
        path=r"state_dict_adapter\.py",
        problem="^filter ",
    ),
    Rule(
        "followed by tests/serve/http/test_connections.py, on connections of their own",
        path=r"^serve/(http/connections|errors)\.py",
    ),
    Rule(
        "followed by tests/serve/test_app.py, with encoders that are busy",
        path=r"^serve/routes/responses\.py",
        error="TimedOut",
    ),
    Rule(
        "followed by tests/serve/routes/test_walk.py: the server here makes fewer frames",
        path=r"^serve/routes/walk\.py",
        problem="pixels a side",
    ),
    Rule("followed by tests/train/test_recipe.py", path=r"^train/recipe\.py", problem="is a folder, not a recipe"),
    Rule("followed for every key by tests/train/test_recipe_faults.py", path=r"^train/(config|recipe_keys|recipe_file)\.py"),
    Rule("followed by tests/train/test_recipe_changes.py", path=r"^train/(recipe_changes|data_fingerprint)\.py"),
    Rule("each advice is followed by tests/train/test_recipe_changes.py", path=r"monitoring/nonfinite\.py"),
    Rule(
        "followed by tests/core/engines, where each damage is made and the engine exported again",
        remedy="export the engine again",
    ),
    Rule("asks to wait for another process, or a server", remedy=r"^wait (for|until) |the log above says|log says|^see "),
    Rule("another process removed a file meanwhile, and the same command is to be run again", remedy="^run the same command"),
    Rule(
        "the server's own states: full, late, not ready, ending",
        path=r"^serve/(models/served_model|batching/batcher|errors|process/server|http/middleware)\.py",
    ),
    Rule("asks for a disk with room: tests/serve/test_operation.py has none", path=r"^serve/metrics\.py"),
    Rule("asks for a disk with room: tests/export/test_export.py has none", path=r"^export/parity\.py", error="DiskError"),
    Rule("a load on a real server; followed by tests/serve/test_operation.py", path=r"commands/loadtest\.py"),
    Rule("a comparison's states: full, late", path=r"^serve/demo/compare\.py", error="TooManyComparisonsError|TimedOutError"),
    Rule("BentoML's own route, which runs in BentoML's process: tests/serve/process/test_process.py", path=r"bento_route\.py"),
    Rule("an engine that was just built and is discarded; export's own tests build such", error="ParityError"),
    Rule("an engine that is refused: tests/core/engines/trials/test_trial.py makes and follows it", error="EngineRefusedError"),
    Rule("asks for another machine or more GPUs", path=r"^train/optimization/(distributed|auto_precision)\.py"),
    Rule("asks for a file of 90 to 900 MB", path=r"^uni_instruct/evaluate/pretrained\.py"),
    Rule("needs an NVIDIA GPU", path=r"engines/(hardware/cuda|tensorrt)\.py|^export/tensorrt\.py"),
    Rule(
        "needs an NVIDIA GPU, or more of them",
        remedy=r"RTX GPU|^(ask for fewer|give a smaller --devices), or use torchrun|--to \{\} --sm|as --sm 89",
    ),
    Rule("asks for another processor", path=r"engines/openvino\.py", error="RequestError"),
    Rule("needs a model whose weights fill 2 GB", path=r"^export/graph\.py"),
    Rule("asks for memory", remedy="^free memory"),
    Rule(
        "asks for space on a disk; tests/core/system/test_files.py fill one",
        path=r"^uni_instruct/system/files\.py",
        problem=r"^cannot write \{\}: \{\}",
    ),
    Rule("the cache's disk is full", path=r"evaluate/classifier\.py", problem=r"^\{\}$"),
    Rule("workers that die; tests/core/sampling/test_workers.py kills them", path=r"sampling/(pool|process_pool)\.py"),
    Rule(
        "Ray's cluster; tests/core/sampling/test_ray.py starts and ends one", path=r"(sampling/ray_pool|system/ray_cluster)\.py"
    ),
    Rule("asks for the network", path=r"^uni_instruct/(hub|system/download)\.py"),
)
OPEN = Path(__file__).with_name("remedies_open.txt")


def listed() -> frozenset[str]:
    """Messages without a case as yet, from remedies_open.txt."""
    return frozenset(line for line in OPEN.read_text().splitlines() if line and not line.startswith("#"))


def unfollowed(cases: Iterable[Case]) -> frozenset[str]:
    """Messages that no case follows and no rule excuses."""
    followed = {site.key for case in cases for site in sites_of(case)}
    return frozenset(site.key for site in sites() if not any(rule.covers(site) for rule in RULES)) - followed


def cases() -> tuple[Case, ...]:
    """All that the test follows."""
    return (*CALLS, *REQUESTS, *DEMO, *VALUES_OF_ALL)


def main() -> None:
    """Writes remedies_open.txt anew."""
    head = "".join(f"{line}\n" for line in OPEN.read_text().splitlines() if line.startswith("#"))
    OPEN.write_text(head + "".join(f"{key}\n" for key in sorted(unfollowed(cases()))))


if __name__ == "__main__":
    main()
