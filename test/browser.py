"""A headless Chromium for the suites of the pages, driven by playwright, which brings none."""

import contextlib
import shutil
import sys
import time
from pathlib import Path

import suite

sys.path.append(str(Path(__file__).resolve().parents[1] / "build" / "python"))  # where .ci/run puts playwright
LIMIT = 120  # seconds that anything on a page may take, on however busy a machine


@contextlib.contextmanager
def chromium(*arguments):
    """Debian's Chromium, with scrollbars that take room, as a reader's do."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        raise suite.Skip("no Chromium (Debian: chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise suite.Skip(f"no playwright ({sys.executable} -m pip install --target build/python playwright)") from None
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, timeout=1000 * LIMIT, args=arguments, ignore_default_args=["--hide-scrollbars"]) as browser:
        yield browser


def open_page(browser, path, width, scheme="light", address=""):
    """The page, and what it says as it goes on: errors and warnings, and the addresses that it asks for."""
    page, errors, requests = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), [], []
    page.set_default_timeout(1000 * LIMIT)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning", "assert") and errors.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri() + address)
    return page, errors, requests


def wait(page, condition):
    """Waits until the JavaScript expression is true. A page may forbid what playwright waits by, which is eval."""
    end = time.time() + LIMIT
    while not page.evaluate(condition):
        assert time.time() < end, f"expected that {condition}"
        time.sleep(0.02)
