"""Quantize the large 3x3 convolutions to int8 with NNCF. Scales are calibrated on the generator's own noise and classes."""

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

# Calibration uses CALIBRATION_IMAGES images in batches of BATCH. NNCF computes a scale from the mean of the batches' ranges.
# PART images run at a time: the activations of 8 take more memory than the weights (docs/export.md, "int8" and "Memory").
CALIBRATION_IMAGES, BATCH, PART = 128, 8, 2
# Calibration must not use the seeds of later checks. Those of reference.npz are small. Those of the export's check start at a
# number below 2^60 (`parity.fresh_inputs`).
FIRST_SEED = 1 << 61
PACKAGE = "nncf"


def check_installed() -> None:
    """Raises MissingExtraError if NNCF is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingExtraError(PACKAGE, extra="export")


def versions() -> dict[str, str]:
    """The version of NNCF, by package name."""
    return {PACKAGE: version(PACKAGE)}


def quantized(model: openvino.Model, bundle: Bundle, skip_share: float = 0.0) -> openvino.Model:
    """Quantize the graph's large 3x3 convolutions to int8, with NNCF's mixed preset. Raises MissingExtraError without NNCF.

    skip_share: the share of these convolutions, in the order in which they run, that is not quantized.
    """
    check_installed()
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    logging.getLogger("nncf").setLevel(logging.ERROR)
    # No overflow fix, as it limits weights to 7 bits. Without VNNI, processors add two products in 16 bits, which can overflow.
    # That has cost less accuracy than 7 bits (docs/export.md, "int8"), and the checks would see it.
    more = AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE)
    with _calibrating_in_parts():
        made: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset(list(_calibration(bundle))),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=CALIBRATION_IMAGES // BATCH,
            ignored_scope=nncf.IgnoredScope(names=sorted(_ignored_layers(model, bundle, skip_share))),
            advanced_parameters=more,
        )
    _keep_scales(made)
    return made


def _keep_scales(model: openvino.Model) -> None:
    """Insert a neutral clamp behind each quantized convolution that has no bias.

    OpenVINO (2026.4) moves the scale of the 8 bits on to the layers that follow, and loses it in a `FourDimensionalNorm`. The
    block's second convolution then returns zeros (docs/export.md, "int8"). A clamp stops that.
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
    """Within the block, NNCF runs PART images at a time to find the range of values of a batch of BATCH images.

    NNCF has no setting for that, so its engine factory is replaced. A smaller BATCH would also save memory, but it changes the
    scales, which cost 0.5 to 2.6 dB of PSNR.
    """
    from nncf.common.factory import EngineFactory

    create: Callable[[openvino.Model], Any] = EngineFactory.create
    EngineFactory.create = staticmethod(lambda model: _PartwiseEngine(create(model), model))
    try:
        yield
    finally:
        EngineFactory.create = staticmethod(create)


class _PartwiseEngine:
    """An engine of NNCF that runs a batch in parts. A batch's minimum is the minimum of its parts' minima; so with maxima."""

    _joined: Mapping[str, Callable[..., np.ndarray]] = {"ReduceMin": np.minimum, "ReduceMax": np.maximum}

    def __init__(self, engine: Any, model: openvino.Model):
        self._engine = engine
        self._sources = {name: port.get_node().input_value(0).get_node() for port in model.outputs for name in port.get_names()}
        # For bias correction, NNCF runs single layers and asks for means, which `_joined` does not cover: these run whole.
        read = {source.get_type_name() for name, source in self._sources.items() if name not in (IMAGES, DENOISED)}
        self._can_be_parted = read <= self._joined.keys() and {NOISE} <= {port.any_name for port in model.inputs}

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch; returns the graph's outputs by name. Images are those of the last part only: NNCF does not read them."""
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
    count = bundle.spec.images_for_check(CALIBRATION_IMAGES)
    class_ids = round_robin_class_ids(bundle.spec, count)
    inputs = draw_inputs(bundle.spec, list(range(FIRST_SEED, FIRST_SEED + count)), class_ids)
    yield from map(graph_feeds, inputs.parts(BATCH))


def _ignored_layers(model: openvino.Model, bundle: Bundle, skip_share: float) -> set[str]:
    """Names of the layers that NNCF must ignore: all but the large 3x3 convolutions, and the first `skip_share` of these."""
    rounded = rounded_convolutions(model, bundle, last_block=True)
    names = [layer.get_friendly_name() for layer in convolutions(model) if _is_3x3(layer)]
    chosen = [name for name in names if name in rounded]
    chosen = chosen[round(skip_share * len(chosen)) :]
    passive = ("Constant", "Parameter", "Result")
    layers = (layer for layer in model.get_ordered_ops() if layer.get_type_name() not in passive)
    return {layer.get_friendly_name() for layer in layers} - set(chosen)


def _is_3x3(layer: openvino.Node) -> bool:
    return tuple(layer.input(1).get_shape())[2:] == (3, 3)
