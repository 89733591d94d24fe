"""The demo in a real browser, and the images that its stages have to show."""

from collections.abc import Callable
from typing import Any

import numpy as np

from builders.servers import PATIENCE_S
from uni_instruct.engine import Engine
from uni_instruct.generate import mix_classes, resolve_class_ids
from uni_instruct.noise import Between, NoisePoint, draw_inputs

TABS = ("walk", "grid", "compare", "about")


class Page:
    """The demo in the browser."""

    def __init__(self, browser: Any, url: str):
        self.browser, self.url = browser, url

    def open(self, query: str = "", width: int = 1280, height: int = 860, scheme: str = "light") -> "Page":
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.browser.get(f"{self.url}/ui/{query}")
        self.until(lambda: self.run("return document.getElementById('app')?.getAttribute('aria-busy')") == "false")
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def until(self, true: Callable[[], object]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: true())

    def pictures(self, stage: str) -> np.ndarray:
        """What the stage shows: uint8 [N, H, W], the red of grey."""
        script = """
            const read = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return [...document.querySelectorAll(`#${arguments[0]} canvas`)].map((canvas) =>
                [canvas.height, canvas.width, [...read(canvas)].filter((_, index) => index % 4 === 0)])"""
        shown = self.run(script, stage)
        return np.array([np.array(values, dtype=np.uint8).reshape(height, width) for height, width, values in shown])

    def until_shown(self, stage: str, expected: np.ndarray) -> None:
        self.until(lambda: np.array_equal(self.pictures(stage), expected))

    def until_nearly_shown(self, stage: str, expected: np.ndarray, levels: int = 1) -> None:
        def nearly() -> bool:
            shown = self.pictures(stage)  # none, before the first images are there
            return shown.shape == expected.shape and np.abs(shown.astype(int) - expected).max() <= levels

        self.until(nearly)

    def query(self) -> str:
        return str(self.run("return location.search"))

    def problem(self) -> str:
        return str(self.run("const p = document.getElementById('problem'); return p.hidden ? '' : p.textContent"))


def truth(engine: Engine, points: list[NoisePoint], classes: list[int] | None = None) -> np.ndarray:
    """Their images; the class is each start's own where none is given."""
    starts = [point.start if isinstance(point, Between) else point for point in points]
    class_ids = resolve_class_ids(engine.spec, starts, classes)
    return engine(*draw_inputs(engine.spec, points, class_ids))[:, :, :, 0]


def morphed(engine: Engine, points: list[NoisePoint], share: float) -> np.ndarray:
    """On the way from class 5 to class 8."""
    return engine(*draw_inputs(engine.spec, points, mix_classes(engine.spec, [5] * len(points), 8, [share] * len(points))))[
        :, :, :, 0
    ]
