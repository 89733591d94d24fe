"""Build a Bento of generators: their bundles and engines, this package's wheel and pinned requirements, without torch."""

import json
import logging
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

import yaml

from uni_instruct import __version__
from uni_instruct.bundle import CARD, CONFIG, DECODER, ENGINES, SAMPLES, WEIGHTS, Bundle
from uni_instruct.engine import RUNTIMES
from uni_instruct.engines.record import StoredEngine
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.reference import REFERENCE
from uni_instruct.serve.demo.about import NEIGHBOURS
from uni_instruct.serve.packaging.packed_service import BUNDLES, CONTENTS, REQUIREMENTS, SERVICE_PY, WHEELS
from uni_instruct.serve.packaging.pins import pins
from uni_instruct.serve.packaging.wheel import make_wheel
from uni_instruct.serve.settings import PREFIX
from uni_instruct.system.files import atomic_file, disk_errors
from uni_instruct.system.processes import die_with_parent
from uni_instruct.system.progress import Progress

# The extra of this package that is installed in a Bento's image. Engines whose runtime needs another extra cannot run there.
EXTRA = "serve"
# Files of a bundle that are copied into the Bento, if the bundle has them.
_PARTS = (CONFIG, WEIGHTS, DECODER, REFERENCE, CARD, SAMPLES, NEIGHBOURS)
# `bentoml import` reads only xz. Weights and a wheel hardly compress, so a thorough search for matches gains nothing:
# preset 0 takes three times as long as these settings, and the sizes agree to four digits.
_XZ_FILTER: dict[str, int] = {
    "id": lzma.FILTER_LZMA2,
    "preset": 0,
    "dict_size": 4096,
    "mf": lzma.MF_HC3,
    "nice_len": 3,
    "depth": 1,
    "mode": lzma.MODE_FAST,
    "lc": 0,
    "lp": 0,
    "pb": 0,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackagedBundle:
    """One generator in a Bento: `Bundle.weights_sha256`, which identifies its images, and the ids of its engines."""

    weights_sha256: str
    engines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PackagedBento:
    """A finished Bento: its tag, its path (an archive or a folder in BentoML's store), its size and its contents.

    bundles: by name. The first one serves requests that name no model. requirements: pinned, and the wheel as the last one.
    """

    tag: str
    path: str
    file_bytes: int
    wheel: str
    requirements: tuple[str, ...]
    bundles: Mapping[str, PackagedBundle]


def package(sources: Mapping[str, str], out: Path | None, engine: str | None, bar: Progress) -> PackagedBento:
    """Build a Bento of these generators (name -> source) and write the archive `out`, or an entry in BentoML's store if None.

    engine: an engine id; all other engines are left out. bar advances by packed_service.STEPS in total.
    Raises RequestError if a generator cannot be served without torch or `out` exists, BundleError for damaged files,
    DiskError if writing fails, and UniInstructError if a tool (pip, bentoml) fails.
    """
    if out is not None:
        _check_out(out)
    bundles = {name: Bundle.open(source) for name, source in sources.items()}
    engines = {name: _engines(bundle, engine) for name, bundle in bundles.items()}
    bar.advance(1, "generators")
    with tempfile.TemporaryDirectory(prefix="uni-instruct-package-") as folder, disk_errors(Path(folder)):
        context, home = Path(folder) / "context", Path(folder) / "home"
        (context / WHEELS).mkdir(parents=True)
        for name, bundle in bundles.items():
            _copy(bundle, engines[name], context / BUNDLES / name)
        bar.advance(1, "this package's wheel")
        wheel = make_wheel(context / WHEELS)
        bar.advance(1, "pinned requirements")
        requirements = (*pins(EXTRA), f"./{WHEELS}/{wheel.name}")
        held = {name: _contents(bundle, engines[name]) for name, bundle in bundles.items()}
        _write_context(context, requirements, held)
        bar.advance(1, "the Bento")
        store = home if out is not None else Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml").absolute()
        tag = _build(context, store)
        path = store / "bentos" / Path(*tag.split(":"))
        bar.advance(1, "the archive" if out is not None else "its size")
        if out is not None:
            _archive(path, out)
            path = out
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        bar.advance(1, "done")
    return PackagedBento(tag=tag, path=str(path), file_bytes=size, wheel=wheel.name, requirements=requirements, bundles=held)


def _check_out(out: Path) -> None:
    if out.suffix != ".bento":
        raise RequestError(f"--out {out} does not end in .bento", remedy=f"give a file such as {out.stem}.bento", param="out")
    if out.exists():
        raise RequestError(f"--out {out} exists already", remedy="choose another --out, or remove it", param="out")


def _engines(bundle: Bundle, wanted: str | None) -> list[StoredEngine]:
    """Return the bundle's engines that go into the Bento, after checking that each file matches its hash.

    Raises RequestError if no engine can run without torch or `wanted` is not among those that can.
    """
    bundle.check_makes_pictures()
    if bundle.spec.steps != 1:
        raise RequestError(
            f"{bundle.path} is a teacher of {bundle.spec.steps} steps, which needs torch",
            remedy="package the generator that 'train' distilled from it",
            param="bundle",
        )
    present = {str(engine_id): stored for engine_id, stored in bundle.engines().items() if _runs_in_bento(stored)}
    if not present:
        export = f"uni-instruct export {quote(str(bundle.path))} --to onnx"
        raise RequestError(f"{bundle.path} has no engine that runs without torch", remedy=export, param="bundle")
    if wanted is not None and wanted not in present:
        remedy = f"choose one of {', '.join(present)}"
        raise RequestError(f"{bundle.path} has no engine {wanted} that runs in a Bento", remedy=remedy, param="engine")
    kept = [stored for name, stored in present.items() if wanted in (None, name)]
    for stored in kept:
        stored.file()
    return kept


def _runs_in_bento(stored: StoredEngine) -> bool:
    runtime = RUNTIMES.get(stored.engine_id.runtime)
    return runtime is not None and runtime.extra == EXTRA


def _copy(bundle: Bundle, engines: list[StoredEngine], target: Path) -> None:
    """Copy the bundle with only these engines. Other files in its folder, such as a teacher, are not copied."""
    target.mkdir(parents=True)
    for part in _PARTS:
        if (bundle.path / part).is_file():
            shutil.copyfile(bundle.path / part, target / part)
    for stored in engines:
        shutil.copytree(stored.folder, target / ENGINES / stored.folder.name, copy_function=shutil.copyfile)
    # Opening checks the hash of the weights: an incomplete copy is found now, not in production.
    Bundle.open(target)


def _contents(bundle: Bundle, engines: list[StoredEngine]) -> PackagedBundle:
    names = tuple(str(stored.engine_id) for stored in engines)
    return PackagedBundle(weights_sha256=bundle.weights_sha256, engines=names)


def _write_context(context: Path, requirements: tuple[str, ...], held: Mapping[str, PackagedBundle]) -> None:
    """Write the other files that BentoML packs: contents.json, requirements.txt, service.py, bentofile.yaml and README.md."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    contents = {
        "uni_instruct": __version__,
        "python": python,
        "bundles": {name: asdict(bundle) for name, bundle in held.items()},
    }
    (context / CONTENTS).write_text(json.dumps(contents, indent=2) + "\n")
    (context / REQUIREMENTS).write_text("\n".join(requirements) + "\n")
    (context / "service.py").write_text(SERVICE_PY)
    build = {
        "service": "service:UniInstruct",
        "name": "uni-instruct",
        "include": ["service.py", CONTENTS, REQUIREMENTS, f"{WHEELS}/**", f"{BUNDLES}/**"],
        # The container sends no usage statistics to BentoML or Gradio.
        "envs": [
            {"name": "BENTOML_DO_NOT_TRACK", "value": "true"},
            {"name": "GRADIO_ANALYTICS_ENABLED", "value": "False"},
        ],
    }
    (context / "bentofile.yaml").write_text(yaml.safe_dump(build, sort_keys=False))
    lines = [f"- `{name}`: weights {bundle.weights_sha256}, {', '.join(bundle.engines)}" for name, bundle in held.items()]
    text = f"# One-step image generators\n\nPackaged by uni-instruct {__version__} for Python {python}.\n\n"
    (context / CARD).write_text(text + "\n".join(lines) + "\n")


def _build(context: Path, home: Path) -> str:
    """Run `bentoml build` and return the Bento's tag, name:version.

    It runs in a process of its own, because a build imports the service and changes the working directory.
    """
    # UNI_INSTRUCT_* variables of this shell configure a server. The build would read them when it imports the service.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    # BENTOML_NO_LOCAL_URL: otherwise the requirements could name BentoML by a path that exists only on this machine.
    environment |= {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true", "BENTOML_NO_LOCAL_URL": "true"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bentoml", "build", "--output", "tag"],
        cwd=context,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=die_with_parent(os.getpid()),
    )
    words = done.stdout.split()
    if done.returncode or not words:
        _log.error("%s", done.stderr.strip())
        raise UniInstructError(f"bentoml build ended with exit code {done.returncode}", remedy="the log above says why")
    return words[-1].removeprefix("__tag__:")


def _archive(bento: Path, out: Path) -> None:
    """Write the archive that `bentoml import` reads, in the format of `bentoml export`."""
    with (
        atomic_file(out) as partial,
        lzma.open(partial, "wb", filters=[_XZ_FILTER]) as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        archive.add(bento, arcname=".")
