"""Several processes that do one job: only the first speaks to the user."""

import os


def is_later_process() -> bool:
    """Whether this is one of the processes that work for the first."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0
