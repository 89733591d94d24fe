"""Check that an exported engine agrees with torch. The engine runs in a new process, with the class that serving uses."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassMixture
from uni_instruct.engines.outputs import TOLERANCES, Tolerance, min_psnr_db, relative_l2
from uni_instruct.engines.record import EngineId, EngineRecord, ParityReport
from uni_instruct.errors import DiskError, ParityError
from uni_instruct.export.checked_images import check_class_ids, checked_images
from uni_instruct.export.feature_shift import MAX_SHIFT, feature_shift
from uni_instruct.noise import Inputs, draw_inputs
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import disk_errors
from uni_instruct.system.processes import die_with_parent, release_freed_memory

# Batch sizes to check: one, two, an odd one, and the largest. Only the largest runs all images, and so every class.
BATCHES = (1, 2, 7, 64)
# The largest batch for a heavy network: 16 images at once would take more memory than its weights.
HEAVY_BATCH = 8
# Every third image is a mixture of two classes. Three has no factor in common with powers of two and ten: with so many classes,
# mixtures are not always of the same ones.
MIXED_EVERY = 3
# The share of the tolerance that an engine may use if there is a more exact way to build it.
MARGIN = 0.75
_DISCARDED = "the engine was discarded; use an engine of another precision or runtime, or torch"


@dataclass(frozen=True, kw_only=True)
class Report:
    """How an engine's images differ from torch's: the worst values over all batch sizes.

    relative_l2, largest_difference, mean_difference and feature_shift are of images before rounding, in about [-1, 1]; the
    other differences are of uint8 pixels. worst_seed: seed of the image with the largest difference. latency_ms: batch size ->
    milliseconds per batch.
    """

    first_seed: int
    images: int
    classes: int
    batches: tuple[int, ...]
    finite: bool
    relative_l2: float
    largest_difference: float
    mean_difference: float
    equal_pixels: float
    largest_pixel_difference: int
    psnr_db: float
    feature_shift: float
    worst_seed: int
    batch_invariant: bool
    latency_ms: Mapping[int, float]
    machine: str
    tolerance: Tolerance


def verify(
    bundle: Bundle, record: EngineRecord, folder: Path, device: str | None = None, *, with_margin: bool = False
) -> ParityReport:
    """Compare the engine in `folder` with torch. Returns the report for engine.json.

    with_margin: also require a margin to the tolerance, for other images and processors; for an engine that can be built more
    exactly. Raises ParityError if the engine is out of tolerance. The error names the worst seed, and the first layer that
    differs, if it can be found.
    """
    from uni_instruct.export.wrong_layer import first_wrong_layer
    from uni_instruct.networks.reference import reference_outputs

    seeds, class_ids = fresh_inputs(bundle.spec, record.file_sha256)
    z = draw_inputs(bundle.spec, seeds, class_ids).noise
    release_freed_memory()  # the worker needs memory for its own copy of the weights
    results = run_worker(bundle, record.id, folder, z, class_ids, device)
    pixels, denoised = reference_outputs(bundle, z, class_ids)
    report = compare(seeds, bundle.spec, results, pixels, denoised, TOLERANCES[record.id.precision])
    if with_margin and not _has_margin(record.id, report):
        raise ParityError(  # `export_engine` catches this and tries the next way
            f"the {record.id} engine, {record.way}, does not agree with torch by a margin",
            remedy="a more exact way to build it is tried",
        )
    if problem := _problem(record.id, report):
        worst = slice(seeds.index(report.worst_seed), seeds.index(report.worst_seed) + 1)
        inputs = Inputs(z[worst], None if class_ids is None else class_ids[worst])
        file, limit = folder / record.file, report.tolerance.relative_l2
        layer = first_wrong_layer(bundle, file, record.id.precision, inputs, limit)
        where = f"; the first layer that differs is {layer}" if layer else ""
        raise ParityError(
            f"{problem} (worst seed {report.worst_seed}){where}",
            remedy=_DISCARDED,
        )
    return cast(ParityReport, asdict(report))


def fresh_inputs(spec: ModelSpec, file_sha256: str) -> tuple[list[int], ClassMixture | None]:
    """Seeds and classes for the check. The seeds follow from the engine's hash, so nothing can have been tuned on them.

    All classes are used if that many images are affordable (`check_class_ids`). Every third image mixes its class with the next
    one, in shares of a quarter, half or three quarters; the others have one class.
    """
    first, count = int(file_sha256[:15], 16), checked_images(spec, max(BATCHES))
    seeds, places = list(range(first, first + count)), np.arange(count)
    class_ids = check_class_ids(spec, count)
    if class_ids is None:
        return seeds, None
    share = np.where(places % MIXED_EVERY == 1, (places // MIXED_EVERY % 3 + 1) / 4, 0)
    return seeds, ClassMixture(class_ids, (class_ids + 1) % spec.num_classes, share.astype(np.float32))


def batches(spec: ModelSpec) -> tuple[int, ...]:
    """The batch sizes to check: those of BATCHES that are affordable; at most HEAVY_BATCH if the network is heavy."""
    from uni_instruct.networks.flops import is_heavy

    largest = HEAVY_BATCH if is_heavy(spec) else max(BATCHES)
    affordable = spec.images_for_check(max(BATCHES))
    return tuple(dict.fromkeys(min(batch, largest) for batch in BATCHES if batch <= affordable))


def run_worker(
    bundle: Bundle, engine_id: EngineId, folder: Path, z: np.ndarray, class_ids: ClassMixture | None, device: str | None = None
) -> dict[str, np.ndarray]:
    """Run `parity_worker` and return what it writes: images, denoised and latency for each batch size, and the machine.

    Raises ParityError if it fails, DiskError if there is no room for temporary files.
    """
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        inputs, outputs = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        labels = {} if class_ids is None else class_ids.arrays()
        np.savez(inputs, allow_pickle=False, noise=z, batches=np.array(batches(bundle.spec)), **labels)
        command = [sys.executable, "-P", "-m", "uni_instruct.export.parity_worker"]  # -P: ignore modules in the current folder
        arguments = [str(bundle.path), str(folder), str(engine_id), device or "", str(inputs), str(outputs)]
        ends = die_with_parent(os.getpid())
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, preexec_fn=ends)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            if done.returncode == DiskError.exit_code:
                raise DiskError(reason.partition(";")[0], remedy="free space, or set TMPDIR to a folder that has it")
            raise ParityError(f"the {engine_id} engine failed to run: {reason}", remedy=_DISCARDED)
        with np.load(outputs) as data:
            return dict(data)


def compare(
    seeds: list[int],
    spec: ModelSpec,
    results: Mapping[str, np.ndarray],
    pixels: np.ndarray,
    denoised: np.ndarray,
    tolerance: Tolerance,
) -> Report:
    """Compare the worker's results with torch's images. If any value is not finite, `finite` is False."""
    tried = batches(spec)
    found = {batch: results[f"denoised_{batch}"].astype(np.float64) for batch in tried}
    errors = {batch: images - denoised[: len(images)] for batch, images in found.items()}
    pixel_difference = {batch: np.abs(results[f"images_{batch}"].astype(int) - pixels[: len(found[batch])]) for batch in tried}
    everything = found[max(tried)]
    per_image = np.abs(errors[max(tried)]).reshape(len(seeds), -1).max(axis=1)
    return Report(
        first_seed=seeds[0],
        images=len(seeds),
        classes=min(spec.num_classes, len(seeds)),
        batches=tried,
        finite=bool(np.isfinite(denoised).all() and all(np.isfinite(images).all() for images in found.values())),
        relative_l2=max(relative_l2(images, denoised[: len(images)]) for images in found.values()),
        largest_difference=max(float(np.abs(error).max()) for error in errors.values()),
        mean_difference=max(float(np.abs(error).mean()) for error in errors.values()),
        equal_pixels=min(float((level == 0).mean()) for level in pixel_difference.values()),
        largest_pixel_difference=max(int(level.max()) for level in pixel_difference.values()),
        psnr_db=min_psnr_db([results[f"images_{batch}"] for batch in tried], pixels),
        feature_shift=feature_shift(everything, denoised) if np.isfinite(everything).all() and len(seeds) > 1 else 0.0,
        worst_seed=seeds[int(per_image.argmax())],
        batch_invariant=all(np.array_equal(images, everything[: len(images)]) for images in found.values()),
        latency_ms={batch: round(float(results[f"latency_ms_{batch}"]), 3) for batch in tried},
        machine=str(results["machine"]),
        tolerance=tolerance,
    )


def _has_margin(engine_id: EngineId, report: Report) -> bool:
    # A way that depends on the batch size is not used either, if a more exact one is left.
    tight = replace(report, tolerance=report.tolerance.tightened(MARGIN))
    return report.batch_invariant and not _problem(engine_id, tight)


def _problem(engine_id: EngineId, report: Report) -> str:
    """What is out of tolerance, in words; '' if nothing is."""
    tolerance = report.tolerance
    if not report.finite:
        return f"the {engine_id} engine or torch returns NaN or infinite values"
    if not report.relative_l2 <= tolerance.relative_l2:
        return (
            f"images of the {engine_id} engine differ from torch's by a relative L2 distance of {report.relative_l2:.1e} "
            f"(at most {tolerance.relative_l2:.0e} is allowed)"
        )
    if report.largest_pixel_difference > tolerance.pixel_difference:
        return (
            f"a pixel of the {engine_id} engine differs from torch's by {report.largest_pixel_difference} of 255 levels "
            f"(at most {tolerance.pixel_difference} are allowed)"
        )
    if report.psnr_db < tolerance.psnr_db:
        return (
            f"the PSNR between pixels of the {engine_id} engine and torch's is {report.psnr_db:.1f} dB "
            f"(at least {tolerance.psnr_db:.0f} dB is required)"
        )
    if engine_id.precision == "int8" and report.feature_shift > MAX_SHIFT:
        return (
            f"the distribution of images of the {engine_id} engine is shifted from torch's by {report.feature_shift:.1%} "
            f"in feature distance (at most {MAX_SHIFT:.0%} is allowed)"
        )
    return ""
