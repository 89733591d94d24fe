"""One-step image generators: train, export, serve, sample and evaluate.

The core is this package without its stages `train`, `export` and `serve`. It defines what a one-step generator is and runs it.
The names that a notebook needs are exported here and documented in docs/python.md. Each is imported at its first use.
"""

import importlib

__version__ = "0.1.0"

# Name -> the module that defines it. No name may equal a module's name: Python binds an imported submodule, such as
# `uni_instruct.generate`, to the package, where it would replace the function. Types are in __init__.pyi.
_EXPORTED = {
    "Bundle": "uni_instruct.bundle",
    "open_engine": "uni_instruct.engine",
    "generate_images": "uni_instruct.generate",
    "mix_classes": "uni_instruct.generate",
    "read_samples": "uni_instruct.sampling",
    "evaluate_images": "uni_instruct.evaluate.evaluator",
    "train_recipe": "uni_instruct.train.api",
    "export_bundle": "uni_instruct.export.api",
}

__all__ = ["__version__", *_EXPORTED]


def __getattr__(name: str) -> object:
    if name not in _EXPORTED:
        raise AttributeError(f"module 'uni_instruct' has no attribute '{name}'")
    value: object = getattr(importlib.import_module(_EXPORTED[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTED})
