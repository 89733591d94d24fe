"""What every request passes first: CORS, keys, limits, a proxy's prefix, stopping. On the app, in this process."""

import asyncio
import contextlib
import json
import os
from typing import Any

import pytest
from starlette.routing import Mount

from builders.serving import app_of, client_of, run
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.serve.http.middleware import RequestMiddleware, put_request_middleware_first
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.process.shutdown import GracefulShutdown
from uni_instruct.serve.settings import Settings

PAGE = "https://page.example"


def test_every_answer_tells_the_browser_that_the_page_may_read_it(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        app = app_of(tiny_bundle, api_key="sesame", cors_origins=f"https://other.example, {PAGE}/", max_body_bytes=1000)
        async with client_of(app) as client:
            key = {"Authorization": "Bearer sesame", "Origin": PAGE}
            answers = [
                (401, await client.post("/v1/generate", headers={"Origin": PAGE})),
                (413, await client.post("/v1/generate", content=b" " * 2000, headers=key)),
                (404, await client.get("/nowhere", headers=key)),
                (405, await client.get("/v1/generate", headers=key)),
                (400, await client.post("/v1/generate", json={"seeds": [-1]}, headers=key)),
                (200, await client.post("/v1/generate", json={}, headers=key)),
            ]
            preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
            # As OpenAI's client in a browser asks, and one that gzips its bodies.
            asked = (
                "authorization, content-encoding, content-type, x-stainless-lang, x-stainless-retry-count, x-stainless-timeout"
            )
            preflight["Access-Control-Request-Headers"] = asked
            answers.append((200, await client.options("/v1/generate", headers=preflight)))
            app.state.models.stopping.begun = True
            answers.append((503, await client.post("/v1/generate", json={}, headers=key)))
            for status, answer in answers:
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == PAGE, status
            assert answers[6][1].headers["access-control-allow-headers"] == asked
            assert "X-Seeds" in answers[5][1].headers["access-control-expose-headers"]
            stranger = await client.post("/v1/generate", json={}, headers={**key, "Origin": "https://stranger.example"})
            assert "access-control-allow-origin" not in stranger.headers

    run(work())


def test_credentials_in_raw_bytes_are_401(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle, api_key="sesame\n, schlüssel ")) as client:
            for header in (b"Basic \xff\xfe\x80", b"Bearer \xff", b"Basic " + b"A" * 5000, b"Bearer"):
                assert (await client.get("/v1/models", headers={"Authorization": header})).status_code == 401
            for header in (b"Bearer sesame", "Bearer schlüssel".encode()):
                assert (await client.get("/v1/models", headers={"Authorization": header})).status_code == 200

    run(work())


@pytest.mark.parametrize("cut_off", [True, False], ids=["cut off by the proxy", "left by the proxy"])
def test_routes_are_found_behind_a_prefix(tiny_bundle: Bundle, cut_off: bool) -> None:
    async def work() -> None:
        before = "" if cut_off else "/images"
        async with client_of(app_of(tiny_bundle, path_prefix="/images/", api_key="sesame")) as client:
            assert (await client.get(f"{before}/livez")).status_code == 200
            assert (await client.get(f"{before}/v1/models")).status_code == 401
            headers = {"Authorization": "Bearer sesame"}
            assert (await client.post(f"{before}/v1/generate", json={"seeds": [7]}, headers=headers)).status_code == 200
            assert (await client.get(f"{before}/v1/generate", headers=headers)).status_code == 405

    run(work())


def test_a_body_of_nonsense_does_not_stop_the_server(tiny_bundle: Bundle) -> None:
    """Where large bodies are allowed: one error is made of a list, not one for each of its items."""

    async def work() -> None:
        async with client_of(app_of(tiny_bundle, max_body_bytes=5_000_000)) as client:
            body = b'{"seeds": [' + b'"",' * 1_000_000 + b"1]}"
            answer = await client.post("/v1/generate", content=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("seeds[0] is ''; give a list of integers")
        async with client_of(app_of(tiny_bundle)) as client:
            assert (await client.post("/v1/generate", content=body)).status_code == 413

    run(work())


def test_while_it_stops_it_answers_503_and_says_when_to_come_back(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        app = app_of(tiny_bundle)
        async with client_of(app) as client:
            app.state.models.stopping.begun = True
            app.state.models.fail_waiting()
            answer = await client.post("/v1/generate", json={})
            assert (answer.status_code, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
            assert answer.json()["error"]["message"].startswith("the server is stopping; try again in a second")
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            assert 'uni_instruct_requests_total{route="guard",status="503"} 1.0' in (await client.get("/metrics")).text

    run(work())


def test_what_runs_is_waited_for_but_not_for_ever(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        for grace_s, ends in ((5.0, True), (0.05, False)):
            stopping = app_of(tiny_bundle, grace_s=grace_s).state.models.stopping
            events: list[str] = []
            with stopping.request:
                waiting = asyncio.create_task(stopping._finish(lambda: events.append("end")))  # noqa: B023
                await asyncio.sleep(0.3)
                events.append("request is over")
            await waiting
            assert events == (["request is over", "end"] if ends else ["end", "request is over"])

    run(work())


def test_the_access_log_is_a_line_of_json_a_request(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle, access_log=True, api_key="sesame")) as client:
            capsys.readouterr()
            headers = {"Authorization": "Bearer sesame", "User-Agent": 'a "browser"\n'.strip()}
            made = await client.post("/v1/generate", json={"seeds": [7]}, headers=headers)
            await client.get("/v1/spec%0Aforged")
            first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
            assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/generate", 200)
            assert first["bytes"] == len(made.content)
            assert first["user_agent"] == 'a "browser"'
            assert first["timing"] == made.headers["server-timing"]
            assert (second["path"], second["status"]) == ("/v1/spec\nforged", 401)
            assert "sesame" not in json.dumps([first, second])

    run(work())


def test_a_log_that_nobody_reads_any_more_spoils_no_answer(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle, access_log=True)) as client:
            reader, writer = os.pipe()
            os.close(reader)
            with os.fdopen(writer, "w") as broken:
                monkeypatch.setattr("sys.stdout", broken)
                assert (await client.post("/v1/generate", json={"seeds": [7]})).status_code == 200
                monkeypatch.undo()
                with contextlib.suppress(BrokenPipeError):
                    broken.close()

    run(work())


def test_bentomls_timers_are_gone_and_the_guards_come_first() -> None:
    from bentoml._internal.server.http.traffic import TimeoutMiddleware
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware

    settings = Settings(bundle=("digits",))
    guards = Middleware(RequestMiddleware, settings=settings, metrics=ServerMetrics(), stopping=GracefulShutdown(1.0))
    order: list[Any] = [Middleware(TimeoutMiddleware, timeout=60), Middleware(GZipMiddleware), guards]
    app = Starlette(middleware=order)
    put_request_middleware_first(app, tracing=False)
    assert [middleware.cls for middleware in app.user_middleware] == [GZipMiddleware]
    assert isinstance(app.middleware_stack, RequestMiddleware)


def test_no_path_of_its_own_can_be_a_proxys_prefix(tiny_bundle: Bundle) -> None:
    """Of /v1/models nobody could say whether /v1 was the proxy's or is the server's."""
    folders = set()
    for route in app_of(tiny_bundle, ui=True).routes:
        parts = (f"{route.path}/files" if isinstance(route, Mount) else route.path).strip("/").split("/")  # type: ignore[attr-defined]
        folders |= {"/".join(["", *parts[:count]]) for count in range(1, len(parts)) if "{" not in parts[count - 1]}
    assert {"/v1", "/ui", "/static_content"} <= folders
    for folder in folders:
        with pytest.raises(RequestError, match=f"UNI_INSTRUCT_PATH_PREFIX is {folder}/; choose another, such as /images: "):
            Settings(path_prefix=f"{folder}/")
    assert Settings(path_prefix="/v1/apps").prefix == "/v1/apps"
