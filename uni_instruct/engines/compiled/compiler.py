"""The C++ compiler behind compiled engines. Needs no torch."""

import os
import shutil
import sys

from uni_instruct.errors import RequestError

# What torch's inductor takes where CXX does not name another.
_DEFAULT = "clang++" if sys.platform == "darwin" else "g++"


def check_compiler() -> None:
    """Raises RequestError where there is none: torch would say so only after it has traced the whole network."""
    compiler = os.environ.get("CXX", _DEFAULT)
    if shutil.which(compiler) is None:
        raise RequestError(
            f"compiled engines need a C++ compiler, and there is no '{compiler}' here",
            remedy=f"install it (Debian: apt install {_DEFAULT}), name yours in CXX, or use --engine torch-fp32",
            param="engine",
        )
