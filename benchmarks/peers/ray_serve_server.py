"""The project's own app as one replica on Ray Serve, which may use all cores: `ray_serve_server.py PORT`."""

import os
import sys

from ray import serve

from uni_instruct.serve.ray_serve import build

if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    # Bundle and engine come from the environment, as those of the peers do.
    serve.run(build({"cpus": str(os.cpu_count() or 1)}), blocking=True)
