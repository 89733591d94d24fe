"""Mount the web demo under /ui. Gradio serves the page; its own script (pages/demo.js) requests images from the HTTP API."""

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
# The paths that the page needs of Gradio. Its others (uploads, a function API, a proxy, files) are not needed and are blocked.
_GRADIO_GETS = re.compile(r"(|assets/.*|static/.*|theme\.css|config|gradio_api/(heartbeat|startup-events|info).*)")
# Tags to remove from Gradio's template: they describe Gradio with pictures from other hosts, and link a manifest at the root.
_GRADIO_HEAD = re.compile(r'\s*<meta\s+(?:property|name)="(?:og|twitter):[^>]*>|\s*<link rel="manifest"[^>]*>')


class DemoMount:
    """The ASGI app under /ui: the demo once it is built, a page that waits for it before, or the error if building failed."""

    def __init__(self, models: Models):
        self._models = models
        self._app: ASGIApp | None = None
        self._failure: UniInstructError | None = None
        self._stack = AsyncExitStack()
        self._pages = _Pages(directory=str(files("uni_instruct.serve") / "pages"))

    async def start(self) -> None:
        """Build the page in a thread, because importing Gradio takes seconds. If that fails, /ui answers with the error."""
        try:
            app = await asyncio.to_thread(_gradio_app)
            await self._stack.enter_async_context(app.router.lifespan_context(app))
        except MissingExtraError as error:
            self._failure = error
            logger.warning("no web demo: %s", error)
        except Exception as error:  # Gradio may raise anything, and the API must go on without the demo
            self._failure = UniInstructError(f"the web demo could not be built: {error}", remedy="the server's log says more")
            logger.exception("no web demo")
        else:
            self._app = _with_own_head(app)

    async def stop(self) -> None:
        """End Gradio's background tasks."""
        await self._stack.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        await self._answer_of(scope)(scope, receive, send)

    def _answer_of(self, scope: Scope) -> ASGIApp:
        path = scope["path"].partition("/ui/")[2]
        if scope["path"].endswith("/ui"):
            # Redirect to /ui/, because the page's links are relative to it. The redirect is relative too, as a proxy may add a
            # prefix.
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
    """The page's own files, under /ui/pages/. With `no-cache` browsers revalidate them each time, by their ETag."""

    def get_path(self, scope: Scope) -> str:
        return str(scope["path"].partition("/ui/pages/")[2])

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "no-cache"
        return response


def build_page() -> "gr.Blocks":
    """Build the Gradio page from demo.html. It has no Gradio events, because the page's own script does everything."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_text("demo.html"), apply_default_css=False, elem_id="demo", js_on_load=None)
    # Do not start Gradio's queue: it would poll for events a thousand times a second, and there are none.
    page._queue.start = lambda: None
    return page


def _gradio_app() -> "fastapi.FastAPI":
    """Return a FastAPI app with the page under /ui. Raises MissingExtraError if Gradio is not installed."""
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
        ssr_mode=False,  # server-side rendering would start Node.js if it is installed
    )
    return app


def _with_own_head(app: ASGIApp) -> ASGIApp:
    """Wrap the app so that its HTML pages have head.html in their head: tags for previews of shared links, styles, scripts."""

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
                # Written into the HTML itself: tags that are given to Gradio are added only by script, seconds later.
                text = _GRADIO_HEAD.sub("", body.decode()).replace("</head>", f"{head}</head>", 1)
                await HTMLResponse(text, parts[0]["status"])(scope, receive, send)

        await app(scope, receive, keep)

    return wrapped


def _text(name: str) -> str:
    return (files("uni_instruct.serve") / "pages" / name).read_text(encoding="utf-8")
