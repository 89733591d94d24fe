"""How often BentoML's supervisor looks for dead workers, which it then restarts."""

import importlib
import sys
from typing import Any

# BentoML sets 10 s. The default of circus, the library that its supervisor is built on, is 1 s.
CHECK_EVERY_S = 1.0


def check_workers_often() -> None:
    """Make BentoML's supervisor look for dead workers every CHECK_EVERY_S seconds.

    Call it in the module that BentoML loads as the service. BentoML has no setting for the interval, so this replaces the class
    of its supervisor. In a worker it does nothing, because no supervisor is created there.
    """
    if "bentoml_cli.serve" not in sys.modules:
        return
    # BentoML loads the service first and takes `Arbiter` from this module afterwards, so replacing it here is early enough.
    circus: Any = importlib.import_module("bentoml._internal.utils.circus")

    class Arbiter(circus.Arbiter):
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **{**options, "check_delay": CHECK_EVERY_S})

    circus.Arbiter = Arbiter
