"""The demo's other tabs as a visitor uses them, and what holds for all: no other host, axe, a phone, a plain model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.bundles import random_bundle
from builders.demo_page import TABS, Page, truth
from builders.servers import Running, start
from uni_instruct.engine import Engine, open_engine
from uni_instruct.noise import draw_inputs

pytestmark = pytest.mark.debian

# What a thumb can press, in CSS pixels (WCAG 2.2, 2.5.5).
THUMB = 44


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
        assert "this server has one engine for this model, torch-fp32, and no teacher" in page.find("#compare-lead").text
        assert not page.find(".trio").is_displayed()
    finally:
        running.kill()
