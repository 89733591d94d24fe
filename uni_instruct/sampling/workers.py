"""Options that choose where tasks run: in this process, in several on this machine, or in actors of a Ray cluster."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from uni_instruct.errors import RequestError
from uni_instruct.sampling.pool import Pool, WorkerJob
from uni_instruct.sampling.process_pool import ProcessPool
from uni_instruct.sampling.ray_pool import RayPool
from uni_instruct.system.ray_cluster import LOCAL, import_ray

__all__ = ["LOCAL", "MAX_WORKERS", "WorkerOptions"]

MAX_WORKERS = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerOptions:
    """The number and kind of workers.

    workers: their number; None for the pool's default. ray_address: the address of a Ray cluster or LOCAL; None for processes.

    Raises MissingExtraError if there is a ray_address and Ray is not installed.
    """

    workers: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.ray_address is not None:
            import_ray()

    @property
    def wanted(self) -> bool:
        """Whether workers are requested, instead of running everything in this process."""
        return self.workers is not None or self.ray_address is not None

    def check_device(self, device: str | None) -> None:
        """Raise RequestError if workers are combined with a GPU's number, such as cuda:1: each worker is assigned a GPU."""
        if self.wanted and device is not None and ":" in device:
            raise RequestError(
                f"--device {device} names one GPU, but workers are distributed over all GPUs",
                remedy="give --device cuda, or leave --workers out",
                param="device",
            )

    def pool(self, job: WorkerJob[T]) -> AbstractContextManager[Pool[T]]:
        """Start the workers of these options on the job."""
        if self.ray_address is not None:
            return RayPool(job, self.workers, self.ray_address)
        return ProcessPool(job, self.workers or 1)
