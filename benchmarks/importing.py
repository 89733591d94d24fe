"""How long reading and importing a checkpoint takes, and how much memory: `python benchmarks/importing.py FILE`.

Each in a process of its own; the peak is that of the whole process, interpreter and libraries included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine

READ = "from uni_instruct.checkpoints.checkpoint import read_checkpoint; read_checkpoint(sys.argv[1])"
IMPORT = (
    "from pathlib import Path; from uni_instruct.checkpoints.import_bundle import ImportRequest, bundle_from_checkpoint; "
    "bundle_from_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]) / 'bundle', ImportRequest())"
)
MEASURED = """
import resource, sys, time
start = time.perf_counter()
{work}
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measure(work: str, file: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MEASURED.format(work=work), str(file), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    time_s, peak = map(float, done.stdout.split())
    return {"time_s": round(time_s, 2), "peak_mb": round(peak / 2**20), "peak_per_size": round(peak / file.stat().st_size, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    result = {"file_mb": round(file.stat().st_size / 2**20), "read": measure(READ, file), "import": measure(IMPORT, file)}
    print(json.dumps({**result, "machine": describe_machine()}, indent=2))


if __name__ == "__main__":
    main()
