"""Drives a headless Chromium over its DevTools protocol, through a pipe: no package beyond Python and Chromium.

    with Browser() as browser:
        page = browser.open(path, width=400)
        page.evaluate("document.title")
        page.click("#play-flow")
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path


def find_chromium():
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Browser:
    """Messages are JSON, each ended by a zero byte, on file descriptors 3 (to Chromium) and 4 (from it)."""

    def __init__(self, timeout=300):
        self.timeout, self.last, self.answers, self.events = timeout, 0, {}, []
        self.changed = threading.Condition()
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_read, self.write_end = os.pipe()
        self.read_end, from_write = os.pipe()

        def plumb():  # before exec: whatever numbers the pipes have, Chromium wants 3 and 4
            a, b = os.dup(to_read), os.dup(from_write)
            os.dup2(a, 3), os.dup2(b, 4)
        self.process = subprocess.Popen(
            [find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-pipe", "--user-data-dir=" + self.profile, "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=plumb, start_new_session=True)
        os.close(to_read), os.close(from_write)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        left = b""
        while data := os.read(self.read_end, 1 << 16):
            *whole, left = (left + data).split(b"\0")
            with self.changed:
                for text in whole:
                    message = json.loads(text)
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.changed.notify_all()
        with self.changed:
            self.answers[None] = "gone"
            self.changed.notify_all()

    def call(self, method, session=None, **parameters):
        with self.changed:
            self.last += 1
            number = self.last
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_end, data):]
        with self.changed:
            if not self.changed.wait_for(lambda: number in self.answers or None in self.answers, self.timeout):
                raise TimeoutError(f"{method}: no answer from Chromium in {self.timeout} s")
            if number not in self.answers:
                raise RuntimeError("Chromium has ended")
            answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path, width, height=900, dark=False):
        return Page(self, Path(path).resolve().as_uri(), width, height, dark)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)


class Page:
    def __init__(self, browser, url, width, height, dark):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.bringToFront")  # timers of a page behind another are slowed
        self.call("Page.navigate", url=url)

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, expression):
        """The value of a JavaScript expression; a promise's when it is fulfilled."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails'].get('exception', {}).get('description', result['exceptionDetails'])}")
        return result["result"].get("value")

    def wait(self, expression, timeout=300):
        end = time.time() + timeout
        while not self.evaluate(expression):
            if time.time() > end:
                raise TimeoutError(f"expected in {timeout} s that {expression}")
            time.sleep(0.1)

    def click(self, selector, timeout=300):
        """A real click in the middle of the element, once it lies still there and nothing lies over it: the page may scroll smoothly, and draws."""
        place = f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: "center", behavior: "instant"}});
            const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2; return [x, y, e.contains(document.elementFromPoint(x, y))]; }})()"""
        end, before = time.time() + timeout, None
        while (now := self.evaluate(place)) != before or not now[2]:
            if time.time() > end:
                raise TimeoutError(f"expected {selector} to lie still and open to a click, found {now}")
            before = now
            time.sleep(0.1)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=now[0], y=now[1], button="left", clickCount=1)

    def press(self, selector, key, times=1):
        """Key presses, with the element in focus."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus({{preventScroll: true}})")
        code = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36}[key]
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path, whole=False):
        more = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **more)["data"]))

    def events(self):
        with self.browser.changed:
            return [e for e in self.browser.events if e.get("sessionId") == self.session]

    def errors(self):
        """What the console shows as an error or a warning, and exceptions."""
        found = []
        for e in self.events():
            p = e["params"]
            if e["method"] == "Runtime.exceptionThrown":
                found.append(p["exceptionDetails"].get("exception", {}).get("description") or p["exceptionDetails"]["text"])
            elif e["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
            elif e["method"] == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                found.append(p["entry"]["text"])
        return found

    def requests(self):
        """Addresses that the page has asked for."""
        return [e["params"]["request"]["url"] for e in self.events() if e["method"] == "Network.requestWillBeSent"]
