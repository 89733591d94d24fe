"""BentoML's supervisor, which starts a worker again that has died."""

import sys

# BentoML has it look every 10 s; circus, which does it, by itself every second.
LOOK_EVERY_S = 1.0


def look_often() -> None:
    """To be called where BentoML loads the service: in the supervisor it looks for dead workers every LOOK_EVERY_S.

    BentoML has no setting for it. In a worker nothing happens: there is no supervisor to be made.
    """
    circus = sys.modules.get("bentoml._internal.utils.circus")
    if circus is None:
        return

    class Arbiter(circus.Arbiter):  # type: ignore[name-defined]
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **{**options, "check_delay": LOOK_EVERY_S})

    circus.Arbiter = Arbiter  # type: ignore[attr-defined]
