"""int8 by NNCF: the large 3x3 convolutions, their scales measured on the generator's own noise and classes."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino

from uni_instruct.bundle import Bundle
from uni_instruct.engines.graph_ports import DENOISED, IMAGES, NOISE, graph_feeds
from uni_instruct.errors import MissingExtraError
from uni_instruct.export.mixed_precision import convolutions, insert_neutral_clamp, rounded_convolutions
from uni_instruct.noise import draw_inputs, round_robin_class_ids

# Calibration's images. A scale follows from the mean of the ranges of so many of them, and of a range's images so many are
# made at a time: between a network's layers 8 hold more than its weights (docs/export.md, "int8" and "Memory").
CALIBRATED, BATCH, PART = 128, 8, 2
# Seeds far from those of the reference and, but for one chance in a billion, of the check.
FIRST_SEED = 1 << 61
PACKAGE = "nncf"


def check_installed() -> None:
    """Raises MissingExtraError without NNCF."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingExtraError(PACKAGE, extra="export")


def versions() -> dict[str, str]:
    """NNCF's version."""
    return {PACKAGE: version(PACKAGE)}


def quantized(model: openvino.Model, bundle: Bundle, spared: float = 0.0) -> openvino.Model:
    """The graph with int8 in its large 3x3 convolutions, activations in the mixed preset. Raises MissingExtraError.

    spared: the share of them, the first in the order of their work, that is left as it was.
    """
    check_installed()
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    logging.getLogger("nncf").setLevel(logging.ERROR)
    # All 8 bits of the weights, and one file for all processors. Without VNNI two products are added in 16 bits, which may
    # overflow: what that costs the check sees, and NNCF's remedy, weights of 7 bits, cost more (docs/export.md, "int8").
    more = AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE)
    with _calibrating_in_parts():
        made: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset(list(_calibration(bundle))),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=CALIBRATED // BATCH,
            ignored_scope=nncf.IgnoredScope(names=sorted(_left_out(model, bundle, spared))),
            advanced_parameters=more,
        )
    _keep_scales(made)
    return made


def _keep_scales(model: openvino.Model) -> None:
    """Puts an idle clamp behind each quantized convolution that no bias follows.

    OpenVINO (2026.4) moves the scale of its 8 bits on through what follows, and loses it in a normalisation made of means: the
    block's second convolution then gives zeros (docs/export.md, "int8").
    """
    for layer in model.get_ordered_ops():
        if layer.get_type_name() != "Convolution" or layer.input_value(0).get_node().get_type_name() != "FakeQuantize":
            continue
        readers = [port.get_node() for port in layer.output(0).get_target_inputs()]
        if not all(reader.get_type_name() == "Add" and _adds_constant(reader) for reader in readers):
            insert_neutral_clamp(layer)
    model.validate_nodes_and_infer_types()


def _adds_constant(layer: openvino.Node) -> bool:
    return any(value.get_node().get_type_name() == "Constant" for value in layer.input_values())


@contextmanager
def _calibrating_in_parts() -> Iterator[None]:
    """Within the block NNCF runs PART images at a time where it asks for the ranges of BATCH of them.

    It has no setting for that. A smaller batch means other scales, which cost 0.5 to 2.6 dB.
    """
    from nncf.common.factory import EngineFactory

    create: Callable[[openvino.Model], Any] = EngineFactory.create
    EngineFactory.create = staticmethod(lambda model: _InParts(create(model), model))
    try:
        yield
    finally:
        EngineFactory.create = staticmethod(create)


class _InParts:
    """An engine of NNCF's that runs a batch part by part: the least of the parts' least values is the batch's."""

    _joined: Mapping[str, Callable[..., np.ndarray]] = {"ReduceMin": np.minimum, "ReduceMax": np.maximum}

    def __init__(self, engine: Any, model: openvino.Model):
        self._engine = engine
        self._sources = {name: port.get_node().input_value(0).get_node() for port in model.outputs for name in port.get_names()}
        # Bias corrections run single layers, and ask for means.
        read = {source.get_type_name() for name, source in self._sources.items() if name not in (IMAGES, DENOISED)}
        self._can_be_parted = read <= self._joined.keys() and {NOISE} <= {port.any_name for port in model.inputs}

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What every output of the graph gives for the batch, by name. Of images, those of the last part: NNCF reads none."""
        if not self._can_be_parted:
            return dict(self._engine.infer(feeds))
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(feeds[NOISE]), PART):
            part = self._engine.infer({name: array[start : start + PART] for name, array in feeds.items()})
            for name, array in part.items():
                join = self._joined.get(self._sources[name].get_type_name())
                found[name] = join(found[name], array) if join and name in found else array
        return found


def _calibration(bundle: Bundle) -> Iterator[dict[str, np.ndarray]]:
    count = bundle.spec.affordable_images(CALIBRATED)
    class_ids = round_robin_class_ids(bundle.spec, count)
    inputs = draw_inputs(bundle.spec, list(range(FIRST_SEED, FIRST_SEED + count)), class_ids)
    yield from map(graph_feeds, inputs.parts(BATCH))


def _left_out(model: openvino.Model, bundle: Bundle, spared: float) -> set[str]:
    """Every layer but the 3x3 convolutions that round well, and of these the first."""
    rounded = rounded_convolutions(model, bundle, last_block=True)
    names = [layer.get_friendly_name() for layer in convolutions(model) if _is_3x3(layer)]
    chosen = [name for name in names if name in rounded]
    chosen = chosen[round(spared * len(chosen)) :]
    passive = ("Constant", "Parameter", "Result")
    layers = (layer for layer in model.get_ordered_ops() if layer.get_type_name() not in passive)
    return {layer.get_friendly_name() for layer in layers} - set(chosen)


def _is_3x3(layer: openvino.Node) -> bool:
    return tuple(layer.input(1).get_shape())[2:] == (3, 3)
