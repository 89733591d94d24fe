"""Compiles one engine's network to a shared library, in a process of its own.

`cache.py` calls it as `python -m uni_instruct.engines.compiled.torch_worker BUNDLE ENGINE_ID FILE`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineId
from uni_instruct.engines.torch import load_generator
from uni_instruct.errors import UniInstructError
from uni_instruct.networks.denoiser import MixedClasses
from uni_instruct.system.processes import die_with_group

# The batch size of the example inputs. Any but 1 would do: the tracer takes a size of 1 for a constant.
_EXAMPLE_BATCH = 4


def main(bundle_path: str, engine: str, path: str) -> None:
    """Compile to `path`. Raises UniInstructError if the bundle cannot be opened, RuntimeError if inductor fails."""
    bundle, engine_id = Bundle.open(bundle_path), EngineId.parse(engine)
    module, inputs = _traceable(bundle, engine_id.precision)
    batch = torch.export.Dim("batch", min=1)
    # With no_grad and freezing, weights are constants, so inductor lays them out for the processor now. It also computes now
    # whatever depends on the noise level alone (networks/one_step.py uses one level for the whole batch when it is exported).
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=(({0: batch},) * len(inputs),))
        options = {"freezing": True, "aot_inductor.output_path": path}
        torch._inductor.aot_compile(program.module(), tuple(inputs), options=options)
    _check_no_callbacks(Path(path).parent)


class _TensorInputs(nn.Module):
    """Wraps a module so that all inputs are tensors, as compiled code needs: no None, and a mixture as its three tensors."""

    def __init__(self, function: nn.Module, has_classes: bool):
        super().__init__()
        self.function, self.has_classes = function, has_classes

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the wrapped module. With classes, the last three inputs are class_ids, other_ids and share."""
        if self.has_classes:
            *inputs_alone, class_ids, other_ids, share = inputs
            out: Tensor = self.function(*inputs_alone, MixedClasses(class_ids, other_ids, share))
        else:
            out = self.function(*inputs)
        return out


def _traceable(bundle: Bundle, precision: str) -> tuple[nn.Module, Sequence[Tensor]]:
    """The module to compile, with example inputs: G(z) of a one-step generator, or a teacher's denoiser D(x; sigma)."""
    spec, generator = bundle.spec, load_generator(bundle, precision)
    noise, ids = torch.zeros(_EXAMPLE_BATCH, *spec.noise_shape), torch.zeros(_EXAMPLE_BATCH, dtype=torch.int64)
    classes = [ids, ids.clone(), torch.zeros(_EXAMPLE_BATCH)] if spec.num_classes else []
    if spec.steps == 1:
        return _TensorInputs(generator, bool(classes)).eval(), [noise, *classes]
    return _TensorInputs(generator.denoiser, bool(classes)).eval(), [noise, torch.ones(_EXAMPLE_BATCH, 1, 1, 1), *classes]


def _check_no_callbacks(folder: Path) -> None:
    """Raises RuntimeError if the code would call operators through Python, which `torch_library.py` does not support."""
    # Inductor lists such operators in a file beside the code's source, and writes this file only if there are any.
    if any(folder.rglob("*.wrapper.json")):
        raise RuntimeError("this network has operators that inductor does not compile")


if __name__ == "__main__":
    die_with_group()  # so that the compiler, a child process, ends with this one
    try:
        main(*sys.argv[1:])
    except UniInstructError as error:
        sys.exit(str(error))
