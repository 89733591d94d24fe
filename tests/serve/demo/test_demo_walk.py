"""The demo's walk as a visitor uses it: by hand, by keys, saved and sent round; a real browser on a real server."""

import io
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.demo_page import Page, morphed, truth
from builders.servers import PATIENCE_S, Running
from uni_instruct.engine import Engine
from uni_instruct.generate import mix_classes, resolve_class_ids
from uni_instruct.noise import Between, NoisePoint, draw_inputs

pytestmark = pytest.mark.debian


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
    page.until(lambda: place_of(page) > 0.4)  # the first half of the drag ends at 0.25
    at = place_of(page)
    assert at < 0.6
    shown = morphed(engine, [Between(3, 58, at)], at)
    page.until_shown("stage-walk", shown)
    for end in (5, 8):  # neither of them, at the same place of the noise
        assert (shown != truth(engine, [Between(3, 58, at)], [end])).mean() > 0.1
    percent = round(100 * at)
    page.until(lambda: f"{100 - percent} % 5, {percent} % 8 · {percent} % of the way" in page.find("#where").text)
    # The same request in code, and from the address.
    page.find("#code-walk summary").click()
    page.until(lambda: page.find("#code-walk code").is_displayed())
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
    page.open("?seeds=3,4,5&at=1.25&n=4")
    # Each its own class: what a seed draws morphs into what the next stop's draws.
    points: list[NoisePoint] = [Between(4 + way, 5 + way, 0.25) for way in range(4)]
    first, second = ([int(c) for c in resolve_class_ids(engine.spec, range(n, n + 4))] for n in (4, 5))  # type: ignore[union-attr]
    shares = [0.0 if a == b else 0.25 for a, b in zip(first, second, strict=True)]
    shown = engine(*draw_inputs(engine.spec, points, mix_classes(engine.spec, first, second, shares)))[:, :, :, 0]
    page.until_shown("stage-walk", shown)
    sheet = np.vstack([np.hstack(shown[:2]), np.hstack(shown[2:])])
    page.find("#code-walk summary").click()
    page.until(lambda: page.find("#code-walk code").is_displayed())
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
