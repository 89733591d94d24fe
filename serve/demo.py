"""The web demo under /ui: images follow the seed slider. It goes through the same batcher as the API."""

import asyncio
import base64
import html
import json
import logging
import math
import os
import random
import shlex
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from uni_instruct.errors import MissingExtraError, UniInstructError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import encode
from uni_instruct.serve.models import Models
from uni_instruct.serve.responses import error_response, generate_encoded
from uni_instruct.serve.served_model import ServedModel
from uni_instruct.spec import ModelSpec

if TYPE_CHECKING:
    import fastapi
    import gradio as gr

logger = logging.getLogger(__name__)

LARGEST_SEED = 9999
LARGEST_COUNT = 64
ANY_CLASS = -1
# Up to this many classes are shown side by side, more in a list to choose from.
_MOST_RADIO_BUTTONS = 12


class DemoMount:
    """The ASGI app under /ui: the Gradio page once it is built, and until then a page that waits for it."""

    def __init__(self, models: Models):
        self._models = models
        self._app: ASGIApp | None = None
        self._failure: UniInstructError | None = None
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Builds the page in a thread, for importing Gradio takes seconds. Where that fails, /ui says why."""
        try:
            app = await asyncio.to_thread(_gradio_app, self._models)
            await self._stack.enter_async_context(app.router.lifespan_context(app))
        except MissingExtraError as error:
            self._failure = error
            logger.warning("no web demo: %s", error)
        except Exception as error:  # whatever Gradio raises: the API must not fall with its demo
            self._failure = UniInstructError(f"the web demo could not be built: {error}", remedy="the server's log says more")
            logger.exception("no web demo")
        else:
            self._app = app

    async def stop(self) -> None:
        """Ends what the page runs in the background."""
        await self._stack.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        app = self._app
        if app is None:
            error = self._failure or self._models.get().failure
            waiting = HTMLResponse((files("uni_instruct.serve") / "pages" / "waiting.html").read_text(), 503)
            app = error_response(error) if error else waiting
        await app(scope, receive, send)


def build_demo(models: Models) -> "gr.Blocks":
    """The page of the first model that is loaded: controls on the left, images on the right, the same as a curl line below."""
    import gradio as gr

    name = next(name for name, state in models.states.items() if state == "ready")
    spec = models.get(name).spec
    most = min(LARGEST_COUNT, models.settings.request_images)
    with gr.Blocks(title=f"{spec.name} · Uni-Instruct", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(_header(models.get(name)), elem_id="header")
        with gr.Row(elem_id="workbench"):
            with gr.Column(scale=2, min_width=300):
                seed = gr.Slider(0, LARGEST_SEED, 0, step=1, label="Seed", elem_id="seed")
                dice = gr.Button("⚄  Roll the dice", elem_id="dice", variant="primary")
                count = gr.Slider(1, most, min(16, most), step=1, label="Images", elem_id="count")
                label = _class_picker(spec)
                readout = gr.HTML(elem_id="readout")
            with gr.Column(scale=3, min_width=320):
                stage = gr.HTML(elem_id="stage")
        curl = gr.Code(
            label="The same over HTTP",
            language="shell",
            interactive=False,
            lines=1,
            wrap_lines=True,
            show_line_numbers=False,
            buttons=["copy"],
            elem_id="curl",
        )
        show = _show_of(models, name, most)
        _show_on_every_change(demo, show, inputs=[seed, count, label], outputs=[stage, readout, curl], dice=dice)
    return demo


_Show = Callable[..., Awaitable[tuple[str, str, str]]]


def _show_of(models: Models, name: str, most: int) -> _Show:
    """What the page calls: (seed, images, class) to the images, the readout of milliseconds, and the curl command."""
    import gradio as gr

    # Gradio passes the request to a parameter of that type, so the annotation is more than documentation.
    async def show(seed: float | None, count: float | None, label: int | None, request: gr.Request) -> tuple[str, str, str]:
        wanted = max(1, min(most, int(count or 1)))  # a field may be empty, and a client may send what it likes
        with models.using(name) as served:
            return await _show(served, int(seed or 0), wanted, label, str(request.base_url))

    return show


def _show_on_every_change(
    demo: "gr.Blocks", show: _Show, *, inputs: "list[gr.Component]", outputs: "list[gr.Component]", dice: "gr.Button"
) -> None:
    import gradio as gr

    seed = inputs[0]
    event: dict[str, object] = {
        "fn": show,
        "inputs": inputs,
        "outputs": outputs,
        # Neither Gradio's queue, which adds a round trip, nor its spinner, which would flicker at a few milliseconds.
        "queue": False,
        "show_progress": "hidden",
        # While the slider moves, only its newest place counts: older requests are dropped.
        "trigger_mode": "always_last",
        "api_visibility": "private",
    }
    demo.load(**event)
    for control in inputs:
        if not isinstance(control, gr.State):
            control.input(**event)
    rolled = dice.click(lambda: random.randint(0, LARGEST_SEED), None, seed, queue=False, show_progress="hidden")
    rolled.then(**event)


def _gradio_app(models: Models) -> "fastapi.FastAPI":
    """A FastAPI app with the page under /ui. Raises MissingExtraError without Gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "gradio", extra="serve") from error
    css = (files("uni_instruct.serve") / "pages" / "demo.css").read_text()
    app: FastAPI = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_demo(models),
        path="/ui",
        theme=gr.themes.Base(primary_hue="indigo", neutral_hue="slate"),
        css=css,
        footer_links=[],
        run_history=False,
        ssr_mode=False,  # would start Node.js where it is installed
    )
    return app


def _class_picker(spec: ModelSpec) -> "gr.Radio | gr.Dropdown | gr.State":
    """One choice of class, or nothing to see for an unconditional generator."""
    import gradio as gr

    if not spec.num_classes:
        return gr.State(None)
    choices = [("any", ANY_CLASS), *((spec.class_name(n), n) for n in range(spec.num_classes))]
    picker = gr.Radio if spec.num_classes <= _MOST_RADIO_BUTTONS else gr.Dropdown
    return picker(choices, value=ANY_CLASS, label="Class", elem_id="label")


async def _show(served: ServedModel, seed: int, count: int, label: int | None, base_url: str) -> tuple[str, str, str]:
    """The images of `count` seeds from `seed` on, the readout of milliseconds, and the curl line."""
    seeds = list(range(seed, seed + count))
    start = time.perf_counter()
    spec = served.spec
    try:
        class_ids = resolve_class_ids(spec, seeds, None if label in (None, ANY_CLASS) else [label])
        encoded = await generate_encoded(served, seeds, class_ids, lambda images: [encode(image) for image in images])
    except UniInstructError as error:
        return f'<p class="problem">{html.escape(str(error))}</p>', "", ""
    stages = {**encoded.stage_ms, "total": 1e3 * (time.perf_counter() - start)}
    captions = [_caption(spec, *pair) for pair in zip(seeds, _ids(class_ids, count), strict=True)]
    return _gallery(encoded.files, captions), _readout(stages), _curl(served, seeds, label, base_url)


def _ids(class_ids: np.ndarray | None, count: int) -> list[int | None]:
    return [None] * count if class_ids is None else [int(n) for n in class_ids]


def _caption(spec: ModelSpec, seed: int, class_id: int | None) -> str:
    return f"seed {seed}" if class_id is None else f"seed {seed}, class {spec.class_name(class_id)}"


def _gallery(pngs: list[bytes], captions: list[str]) -> str:
    columns = math.ceil(math.sqrt(len(pngs)))
    cells = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{title}" title="{title}">'
        for png, title in zip(pngs, map(html.escape, captions), strict=True)
    )
    return f'<div class="gallery" style="--columns: {columns}">{cells}</div>'


def _readout(stages: dict[str, float]) -> str:
    tiles = "".join(f"<div><dd>{ms:.1f}<small> ms</small></dd><dt>{stage}</dt></div>" for stage, ms in stages.items())
    return f"<dl>{tiles}</dl>"


def _header(served: ServedModel) -> str:
    spec = served.spec
    channels, height, width = spec.image_shape
    classes = f" · {spec.num_classes} classes" if spec.num_classes else ""
    steps = "one step" if spec.steps == 1 else f"{spec.steps} steps"
    facts = f"{height}×{width}{' grey' if channels == 1 else ''}{classes} · {steps} · {served.engine.id}"
    return f'<h1>{html.escape(served.name)}</h1><p>{html.escape(facts)} · <a href="/docs">HTTP API</a></p>'


def _curl(served: ServedModel, seeds: list[int], label: int | None, base_url: str) -> str:
    """A command that fetches the same images."""
    body: dict[str, object] = {"model": served.name, "seeds": seeds}
    if label not in (None, ANY_CLASS):
        body["class_ids"] = [label]
    if len(seeds) > 1:
        body["grid"] = True
    # The variable, not the key itself: the page may be shown to others.
    key = ' -H "Authorization: Bearer $UNI_INSTRUCT_API_KEY"' if served.settings.keys else ""
    origin = base_url.split("/ui")[0].rstrip("/")
    data = shlex.quote(json.dumps(body, separators=(",", ":")))
    return f"curl {origin}/v1/generate -H 'Content-Type: application/json'{key} -d {data} -o images.png"
