"""Who does the work: this process, several on this machine, or a Ray cluster's actors."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from uni_instruct.errors import RequestError
from uni_instruct.ray_cluster import LOCAL, import_ray
from uni_instruct.sampling.pool import Pool, WorkerJob
from uni_instruct.sampling.process_pool import ProcessPool
from uni_instruct.sampling.ray_pool import RayPool

__all__ = ["LOCAL", "MAX_WORKERS", "WorkerOptions"]

MAX_WORKERS = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerOptions:
    """workers: how many, None for as many as usual. ray_address: where Ray is to be found, None for processes.

    Raises MissingExtraError where Ray is asked for and not installed.
    """

    workers: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.ray_address is not None:
            import_ray()

    @property
    def wanted(self) -> bool:
        """Whether anybody but this process is asked for."""
        return self.workers is not None or self.ray_address is not None

    def check_device(self, device: str | None) -> None:
        """Raises RequestError where workers are asked for and one GPU by its number: each sees a GPU of its own."""
        if self.wanted and device is not None and ":" in device:
            raise RequestError(
                f"workers take the GPUs in turn, and {device} is one",
                remedy="give --device cuda, or no --workers",
                param="device",
            )

    def pool(self, job: WorkerJob[T]) -> AbstractContextManager[Pool[T]]:
        """The workers, opening the job."""
        if self.ray_address is not None:
            return RayPool(job, self.workers, self.ray_address)
        return ProcessPool(job, self.workers or 1)
