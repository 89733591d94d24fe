"""A real browser: Debian's Chromium, headless, driven by selenium."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builders.machine import require_debian

_QUIET = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")


def open_browser(profile: Path, downloads: Path | None = None) -> Iterator[Any]:
    """A browser that keeps its profile in a folder, and may save files into another; closed at the end."""
    chromium = require_debian("/usr/bin/chromium", "chromium")
    driver = require_debian("/usr/bin/chromedriver", "chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for flag in (*_QUIET, "disable-sync", "no-first-run", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    if downloads:
        # On a busy machine the press of a button is forgotten when its file is there, and a second file would wait for leave.
        several = {"profile.default_content_setting_values.automatic_downloads": 1}
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads), **several})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(str(driver)))
    yield opened
    opened.quit()
