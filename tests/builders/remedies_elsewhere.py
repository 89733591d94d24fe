"""Messages whose remedies are not followed by tests/whole/test_remedies.py: by rule, with the reason, and those still open."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from builders.remedies import Case, Site, sites, sites_of
from builders.remedy_calls import CALLS
from builders.remedy_core import BUNDLES, CALLED, DATA, SCORES
from builders.remedy_files import FILES
from builders.remedy_requests import REQUESTS
from builders.remedy_running import ENGINES, RUN
from builders.remedy_stages import STAGES
from builders.remedy_training import DOCTOR, PLANS, RESUMED
from builders.remedy_values import VALUES

VALUES_OF_ALL = (*VALUES, *STAGES, *FILES, *PLANS, *DOCTOR, *RESUMED, *DATA, *SCORES, *BUNDLES, *CALLED, *ENGINES, *RUN)


class Rule(NamedTuple):
    """Messages of files, or with remedies, that a pattern fits; and the reason."""

    reason: str
    path: str = ""
    remedy: str = ""
    error: str = ""

    def covers(self, site: Site) -> bool:
        return all(
            re.search(pattern, text) for pattern, text in
            ((self.path, site.path), (self.remedy, site.remedy), (self.error, site.error)) if pattern
        )  # fmt: skip


RULES = (
    Rule("asks for a package", remedy=r"^install |^pip install"),
    Rule("asks for a new copy of a damaged file", remedy=r"download it again|copy the whole folder again|(copy|write) .*again"),
    Rule("a damaged or hostile checkpoint; tests/core/checkpoints try them by the thousand", error="MalformedFile"),
    Rule("followed for every key by tests/train/test_recipe_faults.py", path=r"^train/(config|recipe_keys|recipe_file)\.py"),
    Rule("followed by tests/train/test_recipe_changes.py", path=r"^train/(recipe_changes|same_data)\.py"),
    Rule(
        "followed by tests/core/engines, where each damage is made and the engine exported again",
        remedy="export the engine again",
    ),
    Rule("asks to wait for another process, or a server", remedy=r"^wait for |the log above says|log says more"),
    Rule(
        "the server's own states: full, late, not ready, ending",
        path=r"^serve/(served_model|batcher|errors|process|middleware)\.py",
    ),
    Rule("an engine that was just built and is discarded; export's own tests build such", error="ParityError"),
    Rule("asks for another machine or more GPUs", path=r"^train/optimization/(distributed|auto_precision)\.py"),
    Rule("asks for a file of 90 to 900 MB", path=r"^uni_instruct/evaluate/pretrained\.py"),
    Rule("asks for the network", path=r"^uni_instruct/(hub|download)\.py"),
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
    return (*CALLS, *REQUESTS, *VALUES_OF_ALL)


def main() -> None:
    """Writes remedies_open.txt anew."""
    head = "".join(f"{line}\n" for line in OPEN.read_text().splitlines() if line.startswith("#"))
    OPEN.write_text(head + "".join(f"{key}\n" for key in sorted(unfollowed(cases()))))


if __name__ == "__main__":
    main()
