"""LitServe with batches of up to 64: `litserve_server.py PORT [fast]`; fast: its fast queue and two API servers."""

import sys

import litserve
from model import Model
from starlette.responses import Response


class Generate(litserve.LitAPI):
    """Requests gathered by LitServe in a process of their own."""

    def setup(self, device: str) -> None:
        self.model = Model()

    def decode_request(self, request: dict[str, int]) -> int:
        return request["seed"]

    def predict(self, seeds: list[int]) -> list[bytes]:
        return self.model.pngs(seeds)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    port, fast = int(sys.argv[1]), sys.argv[2:] == ["fast"]
    api = Generate(max_batch_size=64, batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=fast)
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=2 if fast else 1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
