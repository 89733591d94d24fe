"""What identifies this machine for engines: the processor and NVIDIA GPUs, which decide an engine's results and speed."""

import hashlib
import os
import platform
from pathlib import Path
from typing import TypedDict

CPUINFO = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")
DRIVER = Path("/proc/driver/nvidia/version")
# Keys of /proc/cpuinfo with the processor's features, by architecture. They decide which kernels a runtime uses. A virtual
# machine may hide some of them, so the model's name alone is not enough.
_FEATURE_KEYS = ("flags", "Features", "isa")
# The features that matter most for a network's speed, by Linux's names.
_SPEED_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8")
_NAMES = ("model name", "Model", "uarch", "CPU implementer", "CPU part", "model", "stepping")


def machine() -> str:
    """Processor and GPUs in words, as 'x86_64 AMD EPYC ... (abilities 1f2e3d4c)'. Equal texts mean that engines run alike.

    The number is a hash of the processor's features.
    """
    return "; ".join([_processor(), *_gpus()])


class MachineFacts(TypedDict):
    """A machine, for a report: processor and GPUs, features that matter for speed, CPUs, system, Python version."""

    machine: str
    abilities: list[str]
    cpus_of_machine: int
    cpus_usable: int
    system: str
    python: str


def machine_facts() -> MachineFacts:
    """This machine, for a report."""
    flags = _first_core().get("flags", "").split()
    return {
        "machine": machine(),
        "abilities": [name for name in _SPEED_FEATURES if name in flags],
        "cpus_of_machine": os.cpu_count() or 1,
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor in words: from Linux's facts on the first core; on other systems, from `platform`."""
    facts = _first_core()
    if not facts:
        return f"{platform.machine()} {platform.processor()}".strip()
    name = " ".join(facts[key] for key in _NAMES if key in facts)
    able = " ".join(sorted(facts[key] for key in _FEATURE_KEYS if key in facts))
    digest = hashlib.sha256(" ".join(sorted(able.split())).encode()).hexdigest()[:8]
    return f"{platform.machine()} {name} (abilities {digest})"


def _first_core() -> dict[str, str]:
    """Linux's facts on the first core, from /proc/cpuinfo; {} on other systems."""
    try:
        first, _, _ = CPUINFO.read_text(errors="replace").partition("\n\n")
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _gpus() -> list[str]:
    """The GPU models that NVIDIA's driver lists, the driver's version, and CUDA_VISIBLE_DEVICES if set; [] without GPUs."""
    try:
        files = sorted(GPUS.glob("*/information"))
        models = [line.partition(":")[2].strip() for file in files for line in file.read_text().splitlines() if "Model" in line]
        driver = DRIVER.read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*models, f"driver {driver}", *([] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"])] if models else []
