"""BentoML's supervisor, which starts a worker again that has died."""

import importlib
import sys
from typing import Any

# BentoML has it look every 10 s; circus, which does it, by itself every second.
CHECK_EVERY_S = 1.0


def check_workers_often() -> None:
    """To be called where BentoML loads the service: in the supervisor it looks for dead workers every CHECK_EVERY_S.

    BentoML has no setting for it. In a worker nothing happens: there is no supervisor to be made.
    """
    if "bentoml_cli.serve" not in sys.modules:
        return
    # Imported here: BentoML loads the service first, and this module when it makes the supervisor.
    circus: Any = importlib.import_module("bentoml._internal.utils.circus")

    class Arbiter(circus.Arbiter):
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **{**options, "check_delay": CHECK_EVERY_S})

    circus.Arbiter = Arbiter
