"""Counts the activations of a step while it runs on the meta device, and imitates autocast there. FLOPs: networks/flops.py."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, kw_only=True)
class Counts:
    """FLOPs of a step, and bytes that autograd keeps for its backward pass, both per image."""

    flops: float
    activations: float


class SavedTensors:
    """A context that measures `peak`, the largest number of bytes that autograd keeps for backward passes in the block.

    Each storage is counted once, for as long as it is kept. The networks' weights are not counted.
    """

    def __init__(self, networks: Iterable[nn.Module] = ()):
        self._hooks = saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor)
        self.peak = self._now = 0
        self._uses: Counter[int] = Counter()
        # The storages are kept alive, so that their addresses are not reused for other storages.
        self._weights = [t.untyped_storage() for network in networks for t in (*network.parameters(), *network.buffers())]
        self._addresses = {storage._cdata for storage in self._weights}

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is a weight's: of one of the networks, or added by `add_weight`."""
        return tensor.untyped_storage()._cdata in self._addresses

    def add_weight(self, tensor: Tensor) -> None:
        """Do not count this tensor either."""
        self._weights.append(tensor.untyped_storage())  # kept alive, so that its address is not reused
        self._addresses.add(self._weights[-1]._cdata)

    def use(self, tensor: Tensor, change: int) -> None:
        """Count one more use of the tensor's storage (change 1), or one fewer (change -1)."""
        if self.is_weight(tensor):
            return
        storage = tensor.untyped_storage()
        self._uses[storage._cdata] += change
        if self._uses[storage._cdata] == max(change, 0):  # the first use has started, or the last use has ended
            self._now += change * storage.nbytes()
            self.peak = max(self.peak, self._now)


class _Kept:
    """Autograd holds this object instead of a saved tensor. It is deleted when autograd no longer needs the tensor."""

    def __init__(self, saved: SavedTensors, tensor: Tensor):
        self.saved, self.tensor = saved, tensor
        saved.use(tensor, 1)

    def __del__(self) -> None:
        self.saved.use(self.tensor, -1)


_IN_16_BITS = (F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm)
_IN_32_BITS = {"cuda": (F.group_norm, F.layer_norm, F.softmax), "cpu": ()}


class MetaAutocast(TorchFunctionMode):
    """Imitates autocast of that device type ('cuda' or 'cpu') for tensors on the meta device, which autocast itself ignores.

    Converted copies of weights count as weights. Resampling (grid_sample) without gradient only returns the right shape, since
    its FLOPs are not counted and tracing it would take as long as tracing a network.
    """

    def __init__(self, precision: str, device_type: str, saved: SavedTensors):
        super().__init__()
        wanted = ((_IN_16_BITS, torch.bfloat16), (_IN_32_BITS[device_type], torch.float32))
        self.saved, self.dtypes = saved, {}
        if precision != "32-true":
            self.dtypes = {function: dtype for functions, dtype in wanted for function in functions}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # On the meta device only the shape of the result matters.
        if func is F.grid_sample and args[0].is_meta and not args[0].requires_grad:
            return args[0].new_empty(*args[0].shape[:2], *args[1].shape[1:3])
        if func in self.dtypes:
            args = [self._cast(value, self.dtypes[func]) for value in args]
            kwargs = {name: self._cast(value, self.dtypes[func]) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        if func is Tensor.to and self.saved.is_weight(args[0]):
            self.saved.add_weight(result)
        return result

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        cast = value.to(dtype)
        if self.saved.is_weight(value):
            self.saved.add_weight(cast)
        return cast
