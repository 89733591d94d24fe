"""What all tests of serving share."""

import pytest

from uni_instruct.serve.models import registry as models


@pytest.fixture(autouse=True)
def _garbage_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in this process leaves the collector alone: going through all that pytest holds takes a third of a second."""
    monkeypatch.setattr(models, "tune_garbage_collector", lambda: None)
