"""Headless Chromium through chromedriver's own protocol: open, ask, drag, look.

    with browser(tmp_path) as page:
        page.open("http://127.0.0.1:6006/#scalars")
        page.until("return document.title === 'TensorBoard'")
        page.screenshot(path)

Nothing outside this machine is asked for; the profile is fresh and ends with the test.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ext.mesh.forks import free_port

PACKAGES = ("chromium", "chromium-driver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--window-size=1280,1600",
)
DEEP_TEXT = """
const all = (root) => {
  let text = "";
  for (const node of root.childNodes) {
    if (node.nodeType === 3) text += " " + node.textContent;
    if (node.nodeType !== 1 || ["SCRIPT", "STYLE", "TEMPLATE"].includes(node.tagName)) continue;
    if (node.shadowRoot) text += all(node.shadowRoot);
    text += all(node);
  }
  return text;
};
return all(document.body);
"""
"""Text of the page, also inside the elements' own trees (TensorBoard is made of them)."""


@functools.cache
def unavailable() -> str | None:
    """Why no browser can be started here; None where one can. As root, Debian's packages are
    installed first.
    """
    if _programs():
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no chromium and chromedriver here, and not root on Debian to install them"
    quiet = {"capture_output": True, "text": True, "check": False, "timeout": 600}
    subprocess.run(["apt-get", "update"], **quiet)
    done = subprocess.run(["apt-get", "install", "-y", *PACKAGES], **quiet)
    if _programs():
        return None
    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return f"apt-get install {' '.join(PACKAGES)} failed: {' '.join(last)}"


def _programs() -> tuple[str, str] | None:
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    return (driver, chromium) if driver and chromium else None


class Page:
    """One tab."""

    def __init__(self, driver: str, session: str) -> None:
        self._base = f"{driver}/session/{session}"

    def _ask(self, what: str, value: dict[str, Any] | None = None) -> Any:
        return _request(f"{self._base}/{what}", value)

    def open(self, address: str) -> None:
        """Go there and wait until it is loaded."""
        self._ask("url", {"url": address})

    def script(self, text: str, *args: Any) -> Any:
        """The value that a function body returns in the page."""
        return self._ask("execute/sync", {"script": text, "args": list(args)})

    def until(self, text: str, *args: Any, timeout_s: float = 60) -> Any:
        """The first true value that a function body returns."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.script(text, *args)):
            if time.monotonic() > deadline:
                shown = self.script(DEEP_TEXT)[:2000]
                raise AssertionError(f"never true in {timeout_s} s: {text}\n{shown}")
            time.sleep(0.2)
        return value

    def text(self) -> str:
        """All text of the page."""
        return " ".join(self.script(DEEP_TEXT).split())

    def until_text(self, *words: str, timeout_s: float = 60) -> str:
        """The text, as soon as all words are in it."""
        deadline = time.monotonic() + timeout_s
        while missing := [word for word in words if word not in self.text()]:
            if time.monotonic() > deadline:
                raise AssertionError(f"{missing} not on the page:\n{self.text()[:2000]}")
            time.sleep(0.2)
        return self.text()

    def complaints(self) -> list[str]:
        """What the console said, warnings and errors, since the last call."""
        entries = self._ask("se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: Path) -> Path:
        """Keep what is seen as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._ask("screenshot")))
        return path


def _request(address: str, value: dict[str, Any] | None = None, method: str = "") -> Any:
    body = None if value is None else json.dumps(value).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers, method=method or None)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.loads(answer.read())["value"]


def wait_for_server(address: str, process: subprocess.Popen, timeout_s: float = 60) -> None:
    """Return when a local server answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.1)


@contextmanager
def serving(command: list[str], address: str, log: Path) -> Iterator[None]:
    """A local server that answers at `address`, until the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for_server(address, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A fresh Chromium; everything of it is under `folder`."""
    driver, chromium = _programs()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    arguments = [*FLAGS, f"--user-data-dir={folder / 'profile'}"]
    options = {"binary": chromium, "args": arguments}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    with serving([driver, f"--port={port}"], f"{address}/status", folder / "chromedriver.log"):
        made = _request(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        try:
            yield Page(address, made["sessionId"])
        finally:
            _request(f"{address}/session/{made['sessionId']}", method="DELETE")
