"""A headless Chromium driven over its own pipe: no driver, no port, no package.

Messages of the DevTools protocol, JSON ended by a zero byte, go in by descriptor 3 and come out by
descriptor 4 (chromium --remote-debugging-pipe).
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in one browser; `with Browser(folder) as browser: browser.open(path)`."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        to_browser, self.to = os.pipe()
        self.answers, from_browser = os.pipe()
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"),
            *("--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"),
            f"--window-size={width},{height}",
        ]

        # The shell puts the two pipes where Chromium looks for them.
        place = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", place, "bash", find(), *options],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.rest, self.session, self.loaded = 0, b"", None, False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its own session: nobody else's browser
        self.process.wait()
        os.close(self.to)
        os.close(self.answers)

    def call(self, method: str, **parameters: object) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], 60)[0]:
                raise TimeoutError("the browser has not answered for a minute")
            part = os.read(self.answers, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        self.loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def open(self, path: Path) -> None:
        """Opens a file, anew if it is open, and waits until it is there."""
        self.call("Page.enable")
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.receive()

    def js(self, code: str) -> object:
        """The value of an expression; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def place(self, selector: str) -> tuple[float, float]:
        code = """(() => {
            const found = document.querySelector(%s);
            found.scrollIntoView({block: "center", inline: "center"});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
        return tuple(self.js(code % json.dumps(selector)))

    def mouse(self, kind: str, x: float, y: float) -> None:
        pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def hover(self, selector: str) -> None:
        self.mouse("mouseMoved", *self.place(selector))

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"windowsVirtualKeyCode": KEYS[key], "key": key, "code": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def dark(self, yes: bool = True) -> None:
        value = "dark" if yes else "light"
        feature = {"name": "prefers-color-scheme", "value": value}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
