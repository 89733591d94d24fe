"""A server that answers as the Hugging Face hub does, of one repository."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "5" * 40


class Hub(ThreadingHTTPServer):
    """One repository, someone/generator, at one commit; `asked` collects the paths that were asked for."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked = folder, []

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.server_port}"
        return {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        names = [str(f.relative_to(self.server.folder)) for f in self.server.folder.rglob("*") if f.is_file()]
        if not path.removeprefix("/api/models").startswith("/someone/generator/"):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif "/revision/" in path or "/resolve/" in path:
            revision = path.split("/revision/")[-1] if "/revision/" in path else path.split("/resolve/")[1].split("/")[0]
            if revision not in ("main", "v1", COMMIT):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            elif "/revision/" in path:
                found = {"id": "someone/generator", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.answer(200, json.dumps(found).encode(), {}, body)
            elif (name := path.split(f"/resolve/{revision}/")[1]) in names:
                content = (self.server.folder / name).read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                self.answer(200, content, headers, body)
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        else:  # the tree
            sizes = {name: (self.server.folder / name).stat().st_size for name in names}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.answer(200, json.dumps(tree).encode(), {}, body)

    def answer(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serving(server: Hub) -> Iterator[Hub]:
    """Within, it answers."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
