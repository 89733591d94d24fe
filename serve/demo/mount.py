"""The web demo under /ui: Gradio carries the page, whose own script (pages/demo.js) asks the HTTP API for its pictures."""

import asyncio
import logging
import os
import re
from contextlib import AsyncExitStack
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.errors import MissingExtraError, UniInstructError
from uni_instruct.serve.errors import NotFoundError, error_response
from uni_instruct.serve.models.registry import Models

if TYPE_CHECKING:
    import fastapi
    import gradio as gr

logger = logging.getLogger(__name__)

TITLE = "Uni-Instruct: images in one step"
# What the page asks of Gradio. The rest of it (uploads, a function API, a proxy, files) is for other pages: it stays shut.
_GRADIO_GETS = re.compile(r"(|assets/.*|static/.*|theme\.css|config|gradio_api/(heartbeat|startup-events|info).*)")
# Gradio's template describes Gradio, with pictures from elsewhere, and names a manifest at the root of the host.
_GRADIO_HEAD = re.compile(r'\s*<meta\s+(?:property|name)="(?:og|twitter):[^>]*>|\s*<link rel="manifest"[^>]*>')


class DemoMount:
    """The ASGI app under /ui: the page once Gradio is built, and until then one that waits for it."""

    def __init__(self, models: Models):
        self._models = models
        self._app: ASGIApp | None = None
        self._failure: UniInstructError | None = None
        self._stack = AsyncExitStack()
        self._pages = _Pages(directory=str(files("uni_instruct.serve") / "pages"))

    async def start(self) -> None:
        """Builds the page in a thread, for importing Gradio takes seconds. Where that fails, /ui says why."""
        try:
            app = await asyncio.to_thread(_gradio_app)
            await self._stack.enter_async_context(app.router.lifespan_context(app))
        except MissingExtraError as error:
            self._failure = error
            logger.warning("no web demo: %s", error)
        except Exception as error:  # whatever Gradio raises: the API must not fall with its demo
            self._failure = UniInstructError(f"the web demo could not be built: {error}", remedy="the server's log says more")
            logger.exception("no web demo")
        else:
            self._app = _with_own_head(app)

    async def stop(self) -> None:
        """Ends what the page runs in the background."""
        await self._stack.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        await self._answer_of(scope)(scope, receive, send)

    def _answer_of(self, scope: Scope) -> ASGIApp:
        path = scope["path"].partition("/ui/")[2]
        if scope["path"].endswith("/ui"):
            # To the address with a slash, from which the page's files are named; relative, as a proxy may add a prefix.
            query = scope["query_string"].decode("ascii", "replace")
            return RedirectResponse("ui/" + (f"?{query}" if query else ""))
        if path.startswith("pages/"):
            return self._pages
        if self._app is None:
            error = self._failure or self._models.get().failure
            waiting = HTMLResponse((files("uni_instruct.serve") / "pages" / "waiting.html").read_text(), 503)
            return error_response(error) if error else waiting
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not _GRADIO_GETS.fullmatch(path):
            return error_response(NotFoundError(f"there is no /ui/{path[:80]} for {scope.get('method')}", remedy="open /ui"))
        return self._app


class _Pages(StaticFiles):
    """The page's own files, under /ui/pages/. Browsers ask each time whether they have changed, by their tag."""

    def get_path(self, scope: Scope) -> str:
        return str(scope["path"].partition("/ui/pages/")[2])

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "no-cache"
        return response


def build_page() -> "gr.Blocks":
    """The page's markup in Gradio's frame. It has no events: what moves is the script's, and the queue has nothing to do."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_text("demo.html"), apply_default_css=False, elem_id="demo", js_on_load=None)
    # Gradio's queue looks for work a thousand times a second, and there is none.
    page._queue.start = lambda: None
    return page


def _gradio_app() -> "fastapi.FastAPI":
    """A FastAPI app with the page under /ui. Raises MissingExtraError without Gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "gradio", extra="serve") from error
    app: FastAPI = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(),
        path="/ui",
        footer_links=[],
        run_history=False,
        ssr_mode=False,  # would start Node.js where it is installed
    )
    return app


def _with_own_head(app: ASGIApp) -> ASGIApp:
    """The app, whose pages in HTML describe this project: what is shown where a link to them is sent round."""

    head = _text("head.html")

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[Message] = []

        async def keep(message: Message) -> None:
            started = parts[0] if parts else message
            kind = dict(started.get("headers", [])).get(b"content-type", b"")
            if not kind.startswith(b"text/html"):
                await send(message)
                return
            parts.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                body = b"".join(part.get("body", b"") for part in parts)
                # Ours stands in the page itself: what Gradio is given, it adds by script, seconds later.
                text = _GRADIO_HEAD.sub("", body.decode()).replace("</head>", f"{head}</head>", 1)
                await HTMLResponse(text, parts[0]["status"])(scope, receive, send)

        await app(scope, receive, keep)

    return wrapped


def _text(name: str) -> str:
    return (files("uni_instruct.serve") / "pages" / name).read_text(encoding="utf-8")
