"""CUDA graphs of a torch function: one launch where there were hundreds, at batch sizes of 1, 2, 4 and so on."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uni_instruct.networks.denoiser import ClassLabels, MixedClasses

# Runs before a capture, in which libraries choose their kernels and take their memory.
_WARM_UP = 3


class _Captured(NamedTuple):
    """A graph, and the places that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    noise: Tensor
    class_ids: ClassLabels | None
    images: Tensor


class CapturedBatches:
    """The function of noise [B, *noise_shape] and class ids [B] or None, replayed from graphs; larger batches are split.

    Mixtures of classes have graphs of their own, so that images of one class do no work for them.
    Safe from several threads. What a graph was captured with (rounding, autocast) it keeps.
    """

    def __init__(self, function: Callable[[Tensor, ClassLabels | None], Tensor], most: int = 64):
        self._function, self._most, self._lock = function, most, threading.Lock()
        self._captured: dict[tuple[int, bool], _Captured] = {}

    def __call__(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """What the function gives, as a tensor of the caller's own."""
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
        # Rows beyond count keep what an earlier batch left there: valid inputs, whose images nobody reads.
        captured.noise[:count].copy_(noise)
        for place, values in zip(_tensors(captured.class_ids), _tensors(class_ids), strict=True):
            place[:count].copy_(values)
        captured.graph.replay()
        return captured.images[:count].clone()

    def _capture(self, size: int, noise: Tensor, class_ids: ClassLabels | None) -> _Captured:
        z = noise.new_zeros(size, *noise.shape[1:])
        labels = _like(class_ids, [part.new_zeros(size) for part in _tensors(class_ids)])
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self._function(z, labels)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            images = self._function(z, labels)
        return _Captured(graph, z, labels, images)


def _tensors(class_ids: ClassLabels | None) -> tuple[Tensor, ...]:
    """What a graph reads of the classes."""
    if class_ids is None:
        return ()
    return tuple(class_ids) if isinstance(class_ids, MixedClasses) else (class_ids,)


def _like(class_ids: ClassLabels | None, tensors: Sequence[Tensor]) -> ClassLabels | None:
    """Classes of the same kind, of other tensors."""
    if class_ids is None:
        return None
    return MixedClasses(*tensors) if isinstance(class_ids, MixedClasses) else tensors[0]


def _rows(class_ids: ClassLabels | None, part: slice) -> ClassLabels | None:
    return _like(class_ids, [tensor[part] for tensor in _tensors(class_ids)])


def padded_size(count: int, most: int) -> int:
    """The next power of two, at most `most`."""
    return min(most, 1 << (count - 1).bit_length())
