"""The demo as a visitor uses it: a real browser on a real server, every tab."""

import io
import json
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builders.browser import open_browser
from builders.bundles import random_bundle
from builders.servers import PATIENCE_S, Running, start
from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.generate import mix_classes, resolve_class_ids
from uni_instruct.noise import Between, NoisePoint, draw_inputs

pytestmark = pytest.mark.debian

TABS = ("walk", "grid", "compare", "about")
# What a thumb can press, in CSS pixels (WCAG 2.2, 2.5.5).
THUMB = 44


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, digits_teacher: Path) -> Path:
    """As a run writes it: the generator, and its teacher beside it."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(Bundle.open("digits").path, folder / "generator")
    shutil.copytree(digits_teacher, folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def server(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(Bundle.open(run_folder / "generator"), tmp_path_factory.mktemp("server"), "emoji", "--engine", "onnx")
    try:
        running.until_announced()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def engine(run_folder: Path) -> Engine:
    return open_engine(run_folder / "generator", "onnx")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, downloads: Path) -> Iterator[Any]:
    yield from open_browser(tmp_path_factory.mktemp("chromium"), downloads)


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


@pytest.fixture
def page(browser: Any, server: Running) -> Page:
    return Page(browser, server.url)


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


def test_dragging_the_picture_walks_through_noise(page: Page, engine: Engine) -> None:
    from selenium.webdriver import ActionChains

    page.open("?seeds=3,58,21&at=0&n=4&class=5")
    page.until_shown("stage-walk", truth(engine, [3, 4, 5, 6], [5]))
    stage = page.find("#stage-walk")
    width = stage.size["width"]
    ActionChains(page.browser).click_and_hold(stage).move_by_offset(width // 8, 0).move_by_offset(
        width // 8, 0
    ).release().perform()
    # The address follows once nothing has changed for a moment.
    page.until(lambda: float(page.query().partition("at=")[2].partition("&")[0] or 0) > 0.1)
    at = float(page.query().partition("at=")[2].partition("&")[0])
    assert 0.1 < at < 0.4
    page.until_shown("stage-walk", truth(engine, [Between(3 + way, 58 + way, at) for way in range(4)], [5]))
    assert page.run("return Number(document.getElementById('position').value)") == pytest.approx(at)
    # The whole page moved nothing: the address differs in the place alone.
    assert "seeds=3,58,21" in page.query()


def place_of(page: Page) -> float:
    return float(page.query().partition("at=")[2].partition("&")[0] or 0)


def test_dragging_morphs_one_class_into_another(page: Page, engine: Engine, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    page.open("?seeds=3,58&at=0&n=1&class=5")
    page.until_shown("stage-walk", truth(engine, [3], [5]))
    page.run("document.querySelector('#classes-to input[value=\"8\"]').click()")
    page.until(lambda: "to=8" in page.query())
    stage = page.find("#stage-walk")
    width = stage.size["width"]
    ActionChains(page.browser).click_and_hold(stage).move_by_offset(width // 4, 0).move_by_offset(
        width // 4, 0
    ).release().perform()
    page.until(lambda: place_of(page) > 0.2)
    at = place_of(page)
    assert 0.2 < at < 0.8
    shown = morphed(engine, [Between(3, 58, at)], at)
    page.until_shown("stage-walk", shown)
    for end in (5, 8):  # neither of them, at the same place of the noise
        assert (shown != truth(engine, [Between(3, 58, at)], [end])).mean() > 0.1
    percent = round(100 * at)
    page.until(lambda: f"{100 - percent} % 5, {percent} % 8 · {percent} % of the way" in page.find("#where").text)
    # The same request in code, and from the address.
    page.find("#code-walk summary").click()
    code = page.find("#code-walk code").text
    assert '"class_ids":[5,8]' in code
    subprocess.run(["bash", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "walk.png")), shown[0])
    page.open(page.query())
    page.until_shown("stage-walk", shown)
    assert page.run("return document.querySelector('#classes-to input:checked').value") == "8"


def test_the_class_alone_morphs_where_there_is_one_seed(page: Page, engine: Engine, downloads: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.open("?seeds=3&at=0.5&n=1&class=5&to=8")
    page.until_shown("stage-walk", morphed(engine, [3], 0.5))
    page.until(lambda: len(page.pictures("stops")) == 2)
    np.testing.assert_array_equal(page.pictures("stops"), truth(engine, [3, 3], [5, 8]))
    # The film goes there and back.
    page.find("#save-walk").click()
    file, deadline = downloads / "digits-3.webp", time.monotonic() + PATIENCE_S
    while not file.is_file():
        assert time.monotonic() < deadline, list(downloads.iterdir())
        time.sleep(0.1)
    film = Image.open(file)
    assert film.n_frames == 48
    for frame, share in ((0, 0.0), (6, 0.25), (24, 1.0), (42, 0.25)):
        film.seek(frame)
        small = np.asarray(film.convert("RGB"))[:: film.width // 8, :: film.width // 8, 0]
        np.testing.assert_array_equal(small, morphed(engine, [3], share)[0])
    # Keys choose the other class as they do the first; a press on a stop goes there.
    page.run("document.querySelector('#classes-to input:checked').focus()")
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT).perform()
    page.until(lambda: "to=9" in page.query())
    page.until_shown("stage-walk", engine(*draw_inputs(engine.spec, [3], mix_classes(engine.spec, 5, 9, 0.5)))[:, :, :, 0])
    page.until_shown("stops", truth(engine, [3, 3], [5, 9]))
    page.find("#stops button:nth-of-type(2)").click()
    page.until_shown("stage-walk", truth(engine, [3], [9]))
    page.run("document.querySelector('#classes-walk input[value=\"any\"]').click()")
    page.until(lambda: not page.find("#classes-to").is_displayed())
    assert "to=" not in page.query()


def test_keys_play_and_step_and_choose(page: Page, engine: Engine) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.open("?seeds=3,58&at=0&n=1&class=5")
    keys = ActionChains(page.browser)
    keys.send_keys(Keys.ARROW_RIGHT).perform()
    page.until_shown("stage-walk", truth(engine, [Between(3, 58, 0.05)], [5]))
    keys.send_keys(Keys.SPACE).perform()
    assert page.find("#play").get_attribute("aria-label") == "Pause"
    shown = page.run("return Number(document.getElementById('stage-walk').dataset.shown)")
    page.until(lambda: page.run("return Number(document.getElementById('stage-walk').dataset.shown)") > shown + 5)
    keys.send_keys(Keys.SPACE).perform()
    assert page.find("#play").get_attribute("aria-pressed") == "false"
    page.until(lambda: "of the way from seed" in page.find("#status").get_attribute("textContent"))
    # Arrows within the group of classes; the pictures follow.
    page.find("#stops button").click()
    page.run("document.querySelector('#classes-walk input:checked').focus()")
    keys.send_keys(Keys.ARROW_RIGHT).perform()
    page.until_shown("stage-walk", truth(engine, [3], [6]))
    assert "class=6" in page.query()


def test_the_stage_keeps_its_size_and_pixels_their_squares(page: Page) -> None:
    page.open("?at=0.5&n=1")
    sizes, factors = set(), []
    for count in (1, 4, 9, 16):
        page.run("document.querySelector(`#counts input[value='${arguments[0]}']`).click()", count)
        page.until(lambda count=count: len(page.pictures("stage-walk")) == count)
        sizes.add(tuple(page.find("#stage-walk").rect.values()))
        factors.append(page.run("return document.querySelector('#stage-walk canvas').getBoundingClientRect().width") / 8)
    assert len(sizes) == 1
    assert all(factor == int(factor) >= 1 for factor in factors)
    assert factors == sorted(factors, reverse=True)


def test_what_cannot_be_read_or_made_leaves_controls_and_pictures_as_they_were(page: Page, engine: Engine) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open("?seeds=3,58&at=0&n=1&class=5")
    expected = truth(engine, [3], [5])
    page.until_shown("stage-walk", expected)
    field = page.find("#seeds")
    for wrong in ("abc", "9-3", "99999999999999999999", "-1", "1-500"):
        field.send_keys(Keys.CONTROL + "a" + Keys.NULL, wrong, Keys.ENTER)
        page.until(lambda wrong=wrong: wrong[:40] in page.problem())
        assert field.get_attribute("value") == "3, 58"
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.run("document.querySelector('#classes-walk input[value=\"7\"]').click()")
    page.until(lambda: "does not answer" in page.problem())
    assert page.run("return document.querySelector('#classes-walk input:checked').value") == "5"
    assert "class=5" in page.query()
    np.testing.assert_array_equal(page.pictures("stage-walk"), expected)
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    page.run("document.querySelector('#classes-walk input[value=\"7\"]').click()")
    page.until_shown("stage-walk", truth(engine, [3], [7]))
    assert page.problem() == ""


def test_the_grid_shows_classes_by_seeds_and_a_press_starts_a_walk(page: Page, engine: Engine) -> None:
    page.open("?tab=grid&seeds=40")
    page.until(lambda: len(page.pictures("stage-grid")) == 80)
    seeds = list(range(40, 48))
    page.until_shown("stage-grid", truth(engine, seeds * 10, [label for label in range(10) for _ in seeds]))
    page.find("#grid-on").click()
    page.until_shown("stage-grid", truth(engine, list(range(48, 56)) * 10, [label for label in range(10) for _ in seeds]))
    page.find("#stage-grid .tile:nth-of-type(11)").click()  # the second row's third: class 1, seed 50
    page.until_shown("stage-walk", truth(engine, [50], [1]))
    assert "seeds=50," in page.query()
    assert "class=1" in page.query()
    # Back and forward through what was done.
    page.browser.back()
    page.until_shown("stage-grid", truth(engine, list(range(48, 56)) * 10, [label for label in range(10) for _ in seeds]))
    page.browser.back()
    page.until(lambda: page.run("return document.getElementById('first-seed').value") == "40")
    page.browser.forward()
    page.browser.forward()
    page.until(lambda: not page.run("return document.getElementById('panel-walk').hidden"))
    page.until_shown("stage-walk", truth(engine, [50], [1]))


def test_another_model_brings_its_own_classes(page: Page, engine: Engine) -> None:
    from selenium.webdriver.support.ui import Select

    page.open("?seeds=3&at=0&n=1&class=9")
    page.until_shown("stage-walk", truth(engine, [3], [9]))
    Select(page.find("#model")).select_by_visible_text("emoji")
    emoji = open_engine("emoji", "onnx")
    page.until_shown("stage-walk", truth(emoji, [3]))  # it has nine classes: the tenth is nobody's
    names = [chip.text for chip in page.browser.find_elements("css selector", "#classes-walk .chip")]
    assert names == ["each its own", *emoji.spec.class_names]
    page.run("document.querySelector('#classes-walk input[value=\"3\"]').click()")
    page.until_shown("stage-walk", truth(emoji, [3], [3]))
    assert "model=emoji" in page.query()
    assert page.find("#race").text.startswith("1 step")
    page.browser.back()
    page.browser.back()
    page.until_shown("stage-walk", truth(engine, [3], [9]))


def test_it_compares_engines_and_the_teacher(page: Page, engine: Engine, run_folder: Path) -> None:
    page.open("?tab=compare&seeds=7&class=3")
    own, seeds = truth(engine, [7, 8, 9, 10], [3]), np.array([3] * 4, dtype=np.int64)
    inputs = draw_inputs(engine.spec, [7, 8, 9, 10], seeds)
    for other, folder in (("teacher", "teacher"), ("torch-fp32", "generator")):
        page.run("document.querySelector(`#others input[value='${arguments[0]}']`).click()", other)
        images = open_engine(run_folder / folder, "torch")(*inputs)[:, :, :, 0]
        page.until_shown("stage-second", images)
        np.testing.assert_array_equal(page.pictures("stage-first"), own)
        told = f"at most {np.abs(own.astype(int) - images).max()} of 255 levels"
        page.until(lambda told=told: told in page.find("#caption-difference").text)
    page.run("document.querySelector('#others input[value=\"teacher\"]').click()")
    page.until(lambda: "4 steps" in page.find("#race-compare").text)
    assert "7 evaluations" in page.find("#caption-second").text
    page.find("#tab-walk").click()
    page.until(lambda: "4 steps" in page.find("#race").text)
    page.until(lambda: "≈" not in page.find("#race").text)  # measured, no estimate


def test_the_card_says_what_the_model_is(page: Page) -> None:
    page.open("?tab=about")
    text = page.find("#card").text
    assert "A one-step image generator" in text
    assert "FD(digits-classifier)" in text
    assert "CC-BY-4.0" in page.find("#facts").text
    page.until(lambda: page.run("return document.querySelector('#card-pictures img').naturalWidth") > 0)


def test_what_is_saved_is_what_is_shown(page: Page, engine: Engine, downloads: Path) -> None:
    page.open("?seeds=3,58&at=0.25&n=4&class=5")
    expected = truth(engine, [Between(3 + way, 58 + way, 0.25) for way in range(4)], [5])
    page.until_shown("stage-walk", expected)
    for button in ("save-picture", "save-all", "save-walk"):
        page.find(f"#{button}").click()
    files = {ending: downloads / f"digits-3_58.{ending}" for ending in ("png", "zip", "webp")}
    deadline = time.monotonic() + PATIENCE_S
    while not all(path.is_file() for path in files.values()):
        assert time.monotonic() < deadline, list(downloads.iterdir())
        time.sleep(0.1)
    saved = np.asarray(Image.open(files["png"]).convert("L"))
    sheet = np.vstack([np.hstack(expected[:2]), np.hstack(expected[2:])])
    factor = len(saved) // len(sheet)
    np.testing.assert_array_equal(saved, sheet.repeat(factor, 0).repeat(factor, 1))
    with zipfile.ZipFile(files["zip"]) as archive:
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()]
    np.testing.assert_array_equal(images, expected)
    film = Image.open(files["webp"])
    assert film.n_frames == 48
    film.seek(6)  # 48 frames for two ways: the sixth is a quarter of the first
    np.testing.assert_array_equal(np.asarray(film.convert("RGB"))[:: film.width // 16, :: film.width // 16, 0], sheet)


def test_the_lines_of_code_fetch_the_same_pictures(page: Page, engine: Engine, tmp_path: Path, server: Running) -> None:
    import sys

    page.open("?seeds=3,4,5&at=1.25&n=4")
    # Each its own class: what a seed draws morphs into what the next stop's draws.
    points: list[NoisePoint] = [Between(4 + way, 5 + way, 0.25) for way in range(4)]
    first, second = ([int(c) for c in resolve_class_ids(engine.spec, range(n, n + 4))] for n in (4, 5))  # type: ignore[union-attr]
    shares = [0.0 if a == b else 0.25 for a, b in zip(first, second, strict=True)]
    shown = engine(*draw_inputs(engine.spec, points, mix_classes(engine.spec, first, second, shares)))[:, :, :, 0]
    page.until_shown("stage-walk", shown)
    sheet = np.vstack([np.hstack(shown[:2]), np.hstack(shown[2:])])
    page.find("#code-walk summary").click()
    for language, command in (("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])):
        page.run("document.querySelector(`#code-walk input[value='${arguments[0]}']`).click()", language)
        code = page.find("#code-walk code").text
        subprocess.run([*command, code], cwd=tmp_path, check=True, capture_output=True)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "walk.png")), sheet)
        (tmp_path / "walk.png").unlink()
    page.run("document.querySelector(`#code-walk input[value='JavaScript']`).click()")
    code = page.find("#code-walk code").text.replace("const picture", "window.picture")
    page.browser.execute_async_script(f"const done = arguments[0]; (async () => {{ {code}; done() }})()")
    assert page.run("return window.picture").startswith("blob:")
    # The link that is sent round opens the same.
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {"origin": server.url, "permissions": ["clipboardReadWrite"]})
    page.find("#share").click()
    page.until(lambda: page.find("#share").text == "Link copied")
    link = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    page.open(link.partition("/ui/")[2])
    page.until_shown("stage-walk", shown)


def test_nothing_is_asked_of_another_host(page: Page, server: Running) -> None:
    for log in ("performance", "browser"):  # what earlier tests left there, some of them wrong on purpose
        page.browser.get_log(log)
    for tab in TABS:
        page.open(f"?tab={tab}")
    page.browser.get(f"{server.url}/docs")
    entries = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    assert any("/v1/walk" in url for url in asked)
    elsewhere = [url for url in asked if not url.startswith((f"{server.url}/", "data:", "blob:", "chrome"))]
    assert elsewhere == []
    severe = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "favicon" not in message and "ERR_INTERNET_DISCONNECTED" not in message] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("tab", TABS)
def test_axe_finds_no_fault(page: Page, tab: str, scheme: str) -> None:
    """Contrast, labels, keyboard, structure: https://github.com/dequelabs/axe-core."""
    from axe_selenium_python import Axe

    page.open(f"?tab={tab}&at=0.5&class=3&to=8", scheme=scheme)
    page.run("document.querySelectorAll('#code-walk, #code-grid').forEach((details) => (details.open = true))")
    axe = Axe(page.browser)
    axe.inject()
    found = axe.run()
    assert {fault["id"]: [node["html"][:200] for node in fault["nodes"]] for fault in found["violations"]} == {}
    assert {"color-contrast", "button-name"} <= {rule["id"] for rule in found["passes"]}


@pytest.mark.parametrize("tab", TABS)
def test_on_a_phone_nothing_moves_sideways_and_thumbs_find_their_targets(page: Page, tab: str) -> None:
    page.open(f"?tab={tab}&at=0.5&class=3&to=8", width=360, height=740)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    script = """return [...document.querySelectorAll("#app button, #app select, #app .chip, #app input[type=text]")]
        .filter((target) => target.checkVisibility()).map((target) => [target.outerHTML.slice(0, 80), target.offsetHeight])"""
    assert [target for target in page.run(script) if target[1] < THUMB] == []
    if tab in ("walk", "grid"):
        stage, side = (page.find(f"#panel-{tab} {part}").rect for part in (".stage", ".side"))
        assert stage["y"] + stage["height"] <= side["y"]
        assert stage["width"] == stage["height"] >= 330


@pytest.mark.slow
def test_without_classes_and_other_engines_it_shows_what_there_is(browser: Any, tmp_path: Path) -> None:
    bundle = random_bundle(tmp_path / "plain", seed=1, num_classes=0)
    running = start(bundle, tmp_path)
    try:
        running.until_announced()
        page = Page(browser, running.url)
        own = open_engine(bundle, "torch")

        def images(seeds: list[int]) -> np.ndarray:
            return own(*draw_inputs(own.spec, list(seeds), None))[:, :, :, 0]

        page.open("?seeds=3&at=0&n=4")
        page.until_nearly_shown("stage-walk", images([3, 4, 5, 6]))
        assert not page.find("#classes-walk").is_displayed()
        assert not page.find("#model").is_displayed()
        page.find("#tab-grid").click()
        page.until(lambda: len(page.pictures("stage-grid")) > 60)
        seeds = list(range(3, 3 + len(page.pictures("stage-grid"))))
        page.until_nearly_shown("stage-grid", images(seeds))
        page.find("#tab-compare").click()
        assert "This server has one engine of this model, torch-fp32" in page.find("#compare-lead").text
        assert not page.find(".trio").is_displayed()
    finally:
        running.kill()
