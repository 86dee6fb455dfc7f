"""A browser for tests: Chromium without a window, over its DevTools protocol."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 15.0  # seconds


class Page:
    """One page.

    Args:
      socket: to its DevTools.
    """

    def __init__(self, socket):
        self._numbers = itertools.count(1)
        self._socket = socket

    def ask(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url):
        self.ask("Page.enable")
        self.ask("Page.navigate", url=url)

    def value(self, expression):
        answer = self.ask(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            value = self.value(expression)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"{expression} stays false")

    def draw(self, selector, *strokes):
        """Draw with the mouse; places are shares of the element's sides."""
        box = self.value(
            f"(() => {{ const b = document.querySelector('{selector}')"
            ".getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        for stroke in strokes:
            places = [(box[0] + x * box[2], box[1] + y * box[3]) for x, y in stroke]
            self._mouse("mousePressed", places[0])
            for place in places[1:]:
                self._mouse("mouseMoved", place)
            self._mouse("mouseReleased", places[-1])

    def click(self, selector):
        self.value(f"document.querySelector('{selector}').click()")

    def picture(self, file):
        """Write a picture of the page."""
        answer = self.ask("Page.captureScreenshot", format="png")
        Path(file).write_bytes(base64.b64decode(answer["data"]))

    def _mouse(self, kind, place):
        self.ask(
            "Input.dispatchMouseEvent",
            type=kind,
            x=place[0],
            y=place[1],
            button="left",
            buttons=0 if kind == "mouseReleased" else 1,
            clickCount=1,
        )


@contextlib.contextmanager
def browser(width=900, height=640):
    """A page in a browser of its own."""
    from websockets.sync.client import connect

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--hide-scrollbars",
                f"--window-size={width},{height}",
                f"--user-data-dir={folder}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            address = _address(Path(folder) / "DevToolsActivePort")
            with connect(address, max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait(10)


def _address(file):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            port = int(file.read_text().splitlines()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                pages = json.load(answer)
            return next(
                page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"
            )
        time.sleep(0.05)
    raise AssertionError("the browser does not start")
