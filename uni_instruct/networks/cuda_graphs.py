"""CUDA graphs of a torch function: one launch in place of hundreds. There is a graph for each batch size 1, 2, 4 and so on."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uni_instruct.networks.denoiser import ClassLabels, MixedClasses

# Runs before a capture, in which libraries choose their kernels and allocate their memory.
_WARM_UP = 3


class _Captured(NamedTuple):
    """A graph with its static input and output tensors."""

    graph: torch.cuda.CUDAGraph
    noise: Tensor
    class_ids: ClassLabels | None
    images: Tensor


class CudaGraphRunner:
    """A function of noise [B, *noise_shape] and class ids [B] (or None), replayed from CUDA graphs.

    Batches larger than `most` are split. Mixtures of classes have separate graphs, so that plain classes do not pay for them.
    Thread-safe. Settings at the time of the capture, such as float32 precision and autocast, stay in effect for the graph.
    """

    def __init__(self, function: Callable[[Tensor, ClassLabels | None], Tensor], most: int = 64):
        self._function, self._most, self._lock = function, most, threading.Lock()
        self._captured: dict[tuple[int, bool], _Captured] = {}

    def __call__(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """The function's result, as a new tensor that later calls do not overwrite."""
        starts = range(0, len(noise), self._most)
        parts = [slice(start, start + self._most) for start in starts]
        with self._lock, torch.cuda.device(noise.device):
            made = [self._run(noise[part], _rows(class_ids, part)) for part in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _run(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        count = len(noise)
        size = padded_size(count, self._most)
        kind = size, isinstance(class_ids, MixedClasses)
        if kind not in self._captured:
            self._captured[kind] = self._capture(size, noise, class_ids)
        captured = self._captured[kind]
        # Rows from count on keep an earlier batch's inputs, which are valid. Their images are dropped below.
        captured.noise[:count].copy_(noise)
        for place, values in zip(_tensors(captured.class_ids), _tensors(class_ids), strict=True):
            place[:count].copy_(values)
        captured.graph.replay()
        return captured.images[:count].clone()

    def _capture(self, size: int, noise: Tensor, class_ids: ClassLabels | None) -> _Captured:
        z = noise.new_zeros(size, *noise.shape[1:])
        labels = _like(class_ids, [part.new_zeros(size) for part in _tensors(class_ids)])
        # The warm-up must run on a side stream, as torch asks before a capture.
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(_WARM_UP):
                self._function(z, labels)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images = self._function(z, labels)
        return _Captured(graph, z, labels, images)


def _tensors(class_ids: ClassLabels | None) -> tuple[Tensor, ...]:
    """The tensors of the classes that a graph reads."""
    if class_ids is None:
        return ()
    return tuple(class_ids) if isinstance(class_ids, MixedClasses) else (class_ids,)


def _like(class_ids: ClassLabels | None, tensors: Sequence[Tensor]) -> ClassLabels | None:
    """The tensors as classes of the same type as class_ids."""
    if class_ids is None:
        return None
    return MixedClasses(*tensors) if isinstance(class_ids, MixedClasses) else tensors[0]


def _rows(class_ids: ClassLabels | None, part: slice) -> ClassLabels | None:
    return _like(class_ids, [tensor[part] for tensor in _tensors(class_ids)])


def padded_size(count: int, most: int) -> int:
    """The smallest power of two that is at least count; at most `most`."""
    return min(most, 1 << (count - 1).bit_length())
