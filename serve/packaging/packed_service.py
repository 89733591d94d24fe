"""What `service.py` in a packaged Bento calls: which generators lie beside it, and what its image is made of."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from uni_instruct.serve.settings import variable

if TYPE_CHECKING:
    from bentoml.images import Image

# In the Bento's src/: the generators by name and in their order, their folders, what pip installs.
CONTENTS, BUNDLES, REQUIREMENTS, WHEELS = "contents.json", "bundles", "requirements.txt", "wheels"
# How far `package` counts.
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
    """Has the server, which reads the environment when it is imported, serve these generators, where that names no others."""
    if not os.environ.get(variable("bundle")):
        names = json.loads((src / CONTENTS).read_text())["bundles"]
        os.environ[variable("bundle")] = json.dumps([f"{name}={src / BUNDLES / name}" for name in names])


def image_of(src: Path) -> "Image":
    """The container's image: the Python that the pins were taken from, the pins, the wheel."""
    from bentoml.images import Image

    lines = (src / REQUIREMENTS).read_text().splitlines()
    python = json.loads((src / CONTENTS).read_text())["python"]
    # Pinned already. BentoML adds itself.
    packages = [line for line in lines if not line.startswith("bentoml==")]
    return Image(python_version=python, lock_python_packages=False).python_packages(*packages).build_include(WHEELS)
