"""Pictures of samples: grids of teacher and student from the same noise, and samples above their nearest training images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uni_instruct.engine import Engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.images import contact_sheet
from uni_instruct.spec import ModelSpec

ROWS, COLUMNS, MAX_SHOWN_CLASSES = 6, 10, 16
WHITE, GAP = 255, 14


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Seeds and classes of a grid of images, row by row. class_ids: int64 [len(seeds)] or None. by_class: a class a column."""

    seeds: Sequence[int]
    class_ids: np.ndarray | None
    columns: int
    by_class: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnImages:
    """The images of the grid's first rows, uint8 [N, H, W, C], and the seconds per image."""

    images: np.ndarray
    s_per_image: float


def plan_grid(spec: ModelSpec, images: int = 0) -> Grid:
    """A grid of seeds from 0 on, with at least ROWS rows and at least `images` images.

    It has a column for each class if there are 2 to MAX_SHOWN_CLASSES classes; otherwise the seeds determine the classes.
    """
    by_class = 1 < spec.num_classes <= MAX_SHOWN_CLASSES
    columns = spec.num_classes if by_class else COLUMNS
    seeds = range(max(ROWS, -(-images // columns)) * columns)
    ids = np.arange(len(seeds), dtype=np.int64) % spec.num_classes if by_class else resolve_class_ids(spec, seeds)
    return Grid(seeds=seeds, class_ids=ids, columns=columns, by_class=by_class)


def draw_rows(engine: Engine, grid: Grid, budget_s: float) -> DrawnImages:
    """Draw rows of the grid within budget_s seconds, but at least one row."""
    start, parts = time.monotonic(), list[np.ndarray]()
    for first in range(0, len(grid.seeds), grid.columns):
        # Stop if another row of average duration would exceed the budget.
        if parts and (time.monotonic() - start) * (len(parts) + 1) / len(parts) > budget_s:
            break
        row = slice(first, first + grid.columns)
        parts.append(generate_images(engine, grid.seeds[row], None if grid.class_ids is None else grid.class_ids[row]))
    images = np.concatenate(parts)
    return DrawnImages(images=images, s_per_image=(time.monotonic() - start) / len(images))


def neighbour_sheet(samples: np.ndarray, neighbours: np.ndarray, blocks: int = 2) -> np.ndarray:
    """A sheet of samples [N, H, W, C], each above its neighbours [N, k, H, W, C], in equal blocks with gaps between them."""
    count, k = neighbours.shape[:2]
    width = count // blocks
    made = []
    for first in range(0, width * blocks, width):
        block = slice(first, first + width)
        below = neighbours[block].swapaxes(0, 1).reshape(k * width, *neighbours.shape[2:])
        made.append(_joined([contact_sheet(samples[block], width), contact_sheet(below, width)], axis=0))
    return _joined(made, axis=1)


def columns_of_two(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> np.ndarray:
    """Two columns of sheets [H, W, C] with a gap between the columns, and none between rows."""
    return _joined([np.concatenate(left, axis=0), np.concatenate(right, axis=0)], axis=1)


def _joined(sheets: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate sheets along the axis, with white gaps between them."""
    shape = list(sheets[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, WHITE, dtype=np.uint8)
    parts = [part for each in sheets for part in (gap, each)][1:]
    return np.concatenate(parts, axis=axis)
