"""Functions that `service.py` in a packaged Bento calls: they select the Bento's generators and define its image."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from uni_instruct.serve.settings import variable

if TYPE_CHECKING:
    from bentoml.images import Image

# Names in the Bento's src/: the list of generators in their order, their folders, pinned requirements, this package's wheel.
CONTENTS, BUNDLES, REQUIREMENTS, WHEELS = "contents.json", "bundles", "requirements.txt", "wheels"
# The number of steps on the progress bar of `package`. It is here because the command reads it before it imports bento.py.
STEPS = 6
SERVICE_PY = f'''\
"""The service of the generators in {BUNDLES}/. UNI_INSTRUCT_BUNDLE names others, mounted into the container."""

from pathlib import Path

from uni_instruct.serve.packaging.packed_service import image_of, serve_own_bundles

HERE = Path(__file__).parent
serve_own_bundles(HERE)

from uni_instruct.serve.service import UniInstruct  # noqa: E402

UniInstruct.image = image_of(HERE)
'''


def serve_own_bundles(src: Path) -> None:
    """Set UNI_INSTRUCT_BUNDLE to the Bento's own generators, unless it is set already.

    Must run before the service is imported, because the service reads the environment at import. src: the Bento's src/ folder.
    """
    if not os.environ.get(variable("bundle")):
        names = json.loads((src / CONTENTS).read_text())["bundles"]
        os.environ[variable("bundle")] = json.dumps([f"{name}={src / BUNDLES / name}" for name in names])


def image_of(src: Path) -> "Image":
    """Return the container image: the Python version that the pins were taken from, the pinned packages and the wheel."""
    from bentoml.images import Image

    lines = (src / REQUIREMENTS).read_text().splitlines()
    python = json.loads((src / CONTENTS).read_text())["python"]
    # The versions are pinned already (no lock file needed), and BentoML adds itself to the image.
    packages = [line for line in lines if not line.startswith("bentoml==")]
    return Image(python_version=python, lock_python_packages=False).python_packages(*packages).build_include(WHEELS)
