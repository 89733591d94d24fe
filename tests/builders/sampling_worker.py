"""One of several processes that make a set of samples: `python sampling_worker.py BUNDLE OUT COUNT BATCH LOG STOP_IN_CALL`.

Writes the first seed of every batch that it makes into LOG, and waits for ever in engine call number STOP_IN_CALL.
"""

import sys
import time
from pathlib import Path

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import noise
from uni_instruct.sampling import SampleRequest, is_finished, open_run
from uni_instruct.system.progress import silent


class Logged:
    """An engine that says which batches it made."""

    def __init__(self, engine: Engine, first_seeds: dict[bytes, int], log: Path, stop_in_call: int):
        self.spec, self.id, self.device = engine.spec, engine.id, engine.device
        self.mixes_classes = engine.mixes_classes
        self._engine, self._first_seeds, self._log, self._left = engine, first_seeds, log, stop_in_call

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        while self._left == 0:
            time.sleep(60)
        self._left -= 1
        images = self._engine(noise, class_ids)
        with self._log.open("a") as log:
            log.write(f"{self._first_seeds[noise[0].tobytes()]}\n")
        return images


def main(source: str, out: str, count: str, batch: str, log: str, stop_in_call: str) -> None:
    bundle, seeds = Bundle.open(source), list(range(int(count)))
    class_ids = resolve_class_ids(bundle.spec, seeds)
    request = SampleRequest(bundle=bundle, engine="onnx-fp32", seeds=seeds, class_ids=class_ids, batch=int(batch))
    firsts = {noise([seed], bundle.spec.noise_shape)[0].tobytes(): seed for seed in seeds[:: int(batch)]}
    if is_finished(request, Path(out)):
        return
    with open_run(request, Path(out), shared=True) as run, silent("", 0, "") as shown:
        run.fill(Logged(open_engine(bundle, request.engine), firsts, Path(log), int(stop_in_call)), shown)
        run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
