"""The demo in headless Chromium, on a server that runs: updates a second while it is dragged, and its pictures for the docs.

    uni-instruct serve fashion-mnist &
    python benchmarks/demo.py http://127.0.0.1:3000
    python benchmarks/demo.py http://127.0.0.1:3000 --pictures docs/images

Needs Debian's chromium and chromium-driver.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from PIL import Image

DRAG_S = 6.0
# Name -> query, width, height, colour scheme.
PICTURES = {
    "demo": ("?at=0.55&n=9&model=fashion-mnist&class=1&to=3", 1280, 800, "light"),
    "demo-dark": ("?tab=grid&model=emoji", 1280, 800, "dark"),
    "demo-phone": ("?at=2.4&n=4&model=emoji", 360, 740, "light"),
}
COLOURS = 128

# Moves the slider at every frame that the browser paints, as a hand does, and counts how often the stage changes.
DRAG = """
const [seconds, done] = arguments;
const slider = document.getElementById("position"), stage = document.getElementById("stage-walk");
const shown = () => Number(stage.dataset.shown), start = performance.now(), before = shown();
const move = (now) => {
  if (now - start > 1000 * seconds) return done({ updates: shown() - before, seconds: (performance.now() - start) / 1000,
    model: document.getElementById("meter-model").textContent, total: document.getElementById("meter-total").textContent });
  slider.value = (((now - start) / 3000) % Number(slider.max)).toFixed(4);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  requestAnimationFrame(move);
};
requestAnimationFrame(move);
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots; nothing is measured then")
    arguments = parser.parse_args()
    browser = open_chromium()
    try:
        if arguments.pictures:
            for name, (query, width, height, scheme) in PICTURES.items():
                take(browser, f"{arguments.url}/ui/{query}", (width, height), scheme, arguments.pictures / f"{name}.png")
        else:
            dragging = [drag(browser, arguments.url, count) for count in (1, 4, 16)]
            print(json.dumps({"machine": describe_machine(), "dragging": dragging}))
    finally:
        browser.quit()


def drag(browser: Any, url: str, count: int) -> dict[str, object]:
    """Updates a second of `count` pictures."""
    show(browser, f"{url}/ui/?at=0&n={count}", (1280, 860), "light")
    found = browser.execute_async_script(DRAG, DRAG_S)
    rate = round(found["updates"] / found["seconds"], 1)
    return {"pictures": count, "updates_per_s": rate, "model": found["model"], "whole_way": found["total"]}


def take(browser: Any, url: str, size: tuple[int, int], scheme: str, path: Path) -> None:
    """A screenshot with few colours, which a page of documentation can carry."""
    show(browser, url, size, scheme)
    time.sleep(2)  # the greeting and the thumbnails
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


def show(browser: Any, url: str, size: tuple[int, int], scheme: str) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(url)
    ready = "return document.getElementById('app')?.getAttribute('aria-busy') === 'false' && !!document.querySelector('canvas')"
    deadline = time.monotonic() + 60
    while not browser.execute_script(ready):
        assert time.monotonic() < deadline, f"{url} does not show pictures"
        time.sleep(0.1)


def open_chromium() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    browser.set_script_timeout(10 * DRAG_S)
    return browser


if __name__ == "__main__":
    main()
