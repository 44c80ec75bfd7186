"""A tab of a real browser that looks at a running server, and complains of what a person would complain of."""

import os
import shutil
from contextlib import contextmanager

import pytest

FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic"]
FLAGS += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium():
    """Yield a browser without a window; skip where there is none, and fail where CI has none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        assert not os.environ.get("CI"), "expected a browser in CI, found none"
        pytest.skip("there is no browser; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page of the server. What went wrong in it is in `problems`."""

    def __init__(self, context, base, has_3d):
        self.page, self.base, self.problems = context.new_page(), base, []
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        self.page.on(
            "request", lambda sent: sent.url.startswith((base, "blob:", "data:")) or self.problems.append(sent.url)
        )
        if not has_3d:  # it draws for seconds without a GPU; the planes do without
            self.page.route(
                "**/niivue.js", lambda route: route.fulfill(status=200, body="throw 0", content_type="text/javascript")
            )

    def open(self, path="/"):
        self.page.goto(self.base + path)
        return self

    def see(self, selector, text=None):
        """Wait for an element, and return its text."""
        found = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        found.first.wait_for()
        return found.first.inner_text()

    def open_volume(self, id):
        self.open(f"/?volume={id}")
        self.see("#viewer.has-scan")
        return self

    def ask(self, question):
        """Ask, and return the answer when it has ended and its regions are shown."""
        count = self.page.locator(".answer").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.locator(".answer:not(.waits)").nth(count).wait_for()
        if not self.page.locator(".answer").first.locator(".failed").count():
            self.see("#legend", question)
        return self.page.locator(".answer .text").first.text_content()

    def go_to(self, world_lps):
        self.page.fill("#place input", ", ".join(f"{mm:.3f}" for mm in world_lps))
        self.page.press("#place input", "Enter")

    def pixel(self, plane, across, down):
        """The grey of a plane where the box of the scan has these shares, from its left and from its top."""
        script = """([plane, across, down]) => { const canvas = document.querySelector(`[data-plane=${plane}] canvas`);
            const side = Math.min(canvas.width, canvas.height);  // the box is a cube
            return [...canvas.getContext("2d").getImageData((canvas.width - side) / 2 + across * side,
                (canvas.height - side) / 2 + down * side, 1, 1).data] }"""
        red, green, blue, _ = self.page.evaluate(script, [plane, across, down])
        assert abs(red - green) <= 5 and abs(green - blue) <= 5, "no grey"
        return red
