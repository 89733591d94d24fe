"""A bundle's weights as other tools save them, and the check that all of them are read back."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from uni_instruct.bundle import Bundle
from uni_instruct.checkpoints.checkpoint import read_checkpoint
from uni_instruct.checkpoints.import_bundle import choose_network
from uni_instruct.checkpoints.state_dict_adapter import translate

State = dict[str, Any]


def state_of(bundle: Bundle, prefix: str = "", scale: float = 1.0) -> State:
    """The bundle's weights as a state dict, a prefix before each name."""
    weights = bundle.weights().items()
    return {prefix + name: torch.from_numpy(array * (1 if "resample" in name else scale)).clone() for name, array in weights}


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def check_is_whole(path: Path, bundle: Bundle, network: str | None = None, scale: float = 1.0) -> None:
    translation = translate(choose_network(read_checkpoint(path), network))
    expected = bundle.weights()
    assert translation.weights.keys() == expected.keys()
    for name, array in expected.items():
        assert np.allclose(translation.weights[name], array * (1 if "resample" in name else scale)), name
