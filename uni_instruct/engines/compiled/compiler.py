"""The C++ compiler that compiled engines need. Needs no torch."""

import os
import shutil
import sys

from uni_instruct.errors import RequestError

# torch's inductor uses this one unless the variable CXX names another.
_DEFAULT = "clang++" if sys.platform == "darwin" else "g++"


def check_compiler() -> None:
    """Raises RequestError if there is no compiler. torch itself would only say so after tracing the whole network."""
    compiler = os.environ.get("CXX", _DEFAULT)
    if shutil.which(compiler) is None:
        raise RequestError(
            f"compiled engines need a C++ compiler, and there is no '{compiler}' here",
            remedy=f"install it (Debian: apt install {_DEFAULT}), set the environment variable CXX to your compiler, "
            "or use --engine torch-fp32",
            param="engine",
        )
