"""A browser without a window, driven through the W3C WebDriver protocol of chromedriver."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if BROWSER and DRIVER else "needs the browser chromium and its driver chromedriver"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
Point = tuple[float, float]


class Browser:
    """One window of the browser."""

    def __init__(self, address: str, flags: Sequence[str]) -> None:
        self.address = address
        options = {"binary": BROWSER, "args": list(flags)}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        answer = self._send("", {"capabilities": {"alwaysMatch": capabilities}})
        self.address += f"/{answer['sessionId']}"

    def _send(self, path: str, content: Any = None, method: str = "POST") -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                words = json.load(error)["value"]["message"]
            raise RuntimeError(words.splitlines()[0]) from None

    def open(self, page: Path) -> None:
        """Load a file and wait until it is ready."""
        self._send("/url", {"url": page.as_uri()})

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window."""
        self._send("/window/rect", {"width": width, "height": height})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns; it waits for a promise."""
        return self._send("/execute/sync", {"script": script, "args": arguments})

    def mouse(self, points: Sequence[Point], *, pressed: bool = False) -> None:
        """Move the mouse from point to point of the window; with a button held from the first."""
        moves: list[dict[str, Any]] = [
            {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)} for x, y in points
        ]
        if pressed:
            moves.insert(1, {"type": "pointerDown", "button": 0})
            moves.append({"type": "pointerUp", "button": 0})
        self._act({"type": "pointer", "id": "mouse", "actions": moves})

    def wheel(self, point: Point, down: int) -> None:
        """Turn the wheel at a point of the window."""
        scroll = {"type": "scroll", "x": round(point[0]), "y": round(point[1]), "duration": 0}
        scroll |= {"deltaX": 0, "deltaY": down}
        self._act({"type": "wheel", "id": "wheel", "actions": [scroll]})

    def press(self, key: str) -> None:
        """Press and release a key; those without a letter have the codes of WebDriver."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": strokes})

    def _act(self, actions: dict[str, Any]) -> None:
        self._send("/actions", {"actions": [actions]})

    def log(self) -> list[str]:
        """The messages of the console since the last call."""
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]


def _driver() -> tuple[subprocess.Popen[str], int]:
    """A running driver and its port; it ends at once if its random port is taken in IPv6."""
    for _ in range(5):
        driver = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert driver.stdout is not None
        for line in driver.stdout:
            if "started successfully" in line:
                return driver, int(line.rstrip(".\n").rpartition(" ")[2])
        driver.wait()
        driver.stdout.close()
    raise RuntimeError("chromedriver does not start")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty profile, which ends with the block."""
    driver, port = _driver()
    with driver, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        try:
            flags = [*FLAGS, f"--user-data-dir={profile}"]
            page = Browser(f"http://127.0.0.1:{port}/session", flags)
            try:
                yield page
            finally:
                page._send("", method="DELETE")
        finally:
            driver.terminate()
