"""A headless Chromium that a test drives: it opens a page, presses keys, and lets it download files.

It speaks the DevTools protocol over two pipes, so that no package and no port is needed.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

NEEDS_CHROMIUM = pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
_FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
_FLAGS += " --disable-component-update --disable-extensions --remote-debugging-pipe"
_SECONDS = 60
# the browser reads from descriptor 3 and writes to descriptor 4
_START = """
import fcntl, os, sys
first, second = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(first, 3)
os.dup2(second, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}


class Browser:
    """One page of a browser."""

    def __init__(self, process, requests, answers):
        self._process, self._requests, self._answers, self._buffer = process, requests, answers, b""
        self._number, self._session = 0, None
        self.events = []

    def call(self, method, **parameters):
        """Call a method of the protocol; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def start(self, downloads):
        """Attach to a page whose console, requests and downloads are recorded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def open(self, path):
        """Open a file, and wait until it is loaded."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(path.as_uri())}")

    def evaluate(self, expression):
        """Return the value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def press(self, key):
        """Press a key on the keyboard, as a person does."""
        text = key if len(key) == 1 else ""
        code = _CODES.get(key, ord(key[0]))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, text):
        """Write a text where the cursor is."""
        self.call("Input.insertText", text=text)

    def click(self, selector):
        """Click into the middle of an element, as a person does."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def set_width(self, width, height=800):
        """Show the page as wide as a screen of this many pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def list_requests(self):
        """Return the addresses that the page asked for."""
        requests = [event["params"]["request"]["url"] for event in self.list_events("Network.requestWillBeSent")]
        return [url for url in requests if not url.startswith("blob:")]

    def list_problems(self):
        """Return exceptions, messages of the console and refusals of the security policy."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for name in names for event in self.list_events(name)]

    def list_events(self, name):
        """Return the events of a name that have come so far."""
        self.evaluate("0")  # reads what has come
        return [event for event in self.events if event.get("method") == name]


@contextlib.contextmanager
def open_browser(profile, downloads):
    """Yield a browser with a profile of its own; another one with the same profile finds what it stored."""
    downloads.mkdir(exist_ok=True)
    to_browser, requests = os.pipe()
    answers, from_browser = os.pipe()
    command = [sys.executable, "-c", _START, str(to_browser), str(from_browser), "chromium", *_FLAGS.split()]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for descriptor in (to_browser, from_browser):
        os.close(descriptor)
    browser = Browser(process, requests, answers)
    try:
        browser.start(downloads)
        yield browser
        browser.call("Browser.close")
        process.wait(timeout=_SECONDS)
    finally:
        process.kill()
        process.wait()
        for descriptor in (requests, answers):
            os.close(descriptor)
