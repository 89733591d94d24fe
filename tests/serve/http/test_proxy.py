"""Behind nginx, a real one: a prefix of the path, cut off or not, and TLS."""

import io
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from builders.machine import require_debian
from builders.servers import PATIENCE_S, Running, free_port, start
from uni_instruct.bundle import Bundle

# The host's name begins as the demo's path does.
HOST = "ui.localhost"

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_http_version 1.1;
    location /images/ {{ proxy_pass {upstream}/; }}
    location /kept/images/ {{ rewrite ^/kept(/images/.*)$ $1 break; proxy_pass {upstream}; }}
  }}
}}
"""


@pytest.fixture(scope="module")
def proxied(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    nginx = require_debian("/usr/sbin/nginx", "nginx")
    openssl = require_debian("/usr/bin/openssl", "openssl")
    folder = tmp_path_factory.mktemp("proxied")
    server = start(exported_bundle, folder, "--path-prefix", "/images", "--cors-origins", "*")
    try:
        server.until_announced()
        with through_nginx(nginx, openssl, folder, server) as client:
            yield client
    finally:
        server.kill()


def through_nginx(nginx: Path, openssl: Path, folder: Path, server: Running) -> httpx.Client:
    port = free_port()
    names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST},IP:127.0.0.1"]
    keys = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        [str(openssl), "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names, *keys], check=True, capture_output=True
    )
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, upstream=server.url))
    process = subprocess.Popen([str(nginx), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
    transport = httpx.HTTPTransport(verify=ssl.create_default_context(cafile=folder / "cert.pem"), retries=20)
    return _Client(
        process,
        headers={"Host": f"{HOST}:{port}"},
        base_url=f"https://127.0.0.1:{port}",
        transport=transport,
        timeout=PATIENCE_S,
    )


class _Client(httpx.Client):
    """A client that ends its proxy when it is closed."""

    def __init__(self, process: subprocess.Popen[bytes], **options: object):
        super().__init__(**options)  # type: ignore[arg-type]
        self._process = process

    def __exit__(self, *failure: object) -> None:
        super().__exit__(*failure)  # type: ignore[arg-type]
        self._process.terminate()
        self._process.wait(PATIENCE_S)


@pytest.mark.debian
@pytest.mark.parametrize("prefix", ["/images", "/kept/images"])
def test_images_come_through_a_proxy(proxied: httpx.Client, prefix: str) -> None:
    answer = proxied.post(f"{prefix}/v1/generate", json={"seeds": [7], "format": "npz"})
    assert answer.status_code == 200
    assert np.load(io.BytesIO(answer.content))["seeds"].tolist() == [7]
    assert proxied.get(f"{prefix}/v1/nowhere").json()["error"]["code"] == "not_found"


@pytest.mark.debian
def test_pages_name_their_files_under_the_prefix(proxied: httpx.Client) -> None:
    """Whatever a page loads is answered where the browser asks for it."""
    for page in ("/images/", "/images/docs", "/images/ui/"):
        answer = proxied.get(page)
        assert answer.status_code == 200
        named = re.findall(r'<(?:a|script|link rel="stylesheet")[^>]*? (?:href|src)="([^"#]+)"', answer.text)
        links = [f"{answer.url.join(link)}" for link in named if not link.startswith("data:")]
        assert links
        for link in links:
            # By its address, as this machine need not know the name.
            own = link.replace(f"https://{HOST}:", "https://127.0.0.1:")
            assert own.startswith("https://127.0.0.1:"), link
            assert proxied.get(own, follow_redirects=True).status_code == 200, link
    config = proxied.get("/images/ui/config").json()
    assert config["root"].startswith(f"https://{HOST}:")
    assert config["root"].endswith("/images/ui")
