"""Chromium without a window, driven through a pipe: `Browser` and `Tab`. A page is looked at as a reader sees it.

The pipe carries messages of the DevTools protocol: JSON, each ended by a zero byte. No other package is needed.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

SECONDS = 60  # for one answer of the browser


def _found() -> str | None:
    """A Chromium that runs. Some systems have a file of its name that only says how to install it."""
    for path in filter(None, map(shutil.which, ("chromium", "chromium-browser"))):
        if subprocess.run([path, "--version"], capture_output=True, timeout=SECONDS).returncode == 0:
            return path
    return None


CHROMIUM = _found()
SLICE = 2000  # pixels of a page in one screenshot
# The browser reads its commands from file 3 and answers to file 4.
_START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
_OPTIONS += ("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")

# Tells what is wrong with a page, at the size and in the colours that it has now.
LOOK = """(async (isDark) => {
  const faults = [], root = document.documentElement, wide = root.clientWidth;
  await document.fonts.ready;
  if (root.scrollWidth > wide + 1) faults.push(`the page is ${root.scrollWidth} wide on a screen of ${wide}`);
  const isDarkAt = ([r, g, b, a]) => a === 0 ? null : r + g + b < 384;
  const ground = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
  if (isDarkAt([...ground, 1]) !== isDark) faults.push(`the page is ${isDark ? 'not dark' : 'dark'}`);
  for (const image of document.images) {
    const name = image.getAttribute('src');
    image.loading = 'eager';
    try { await image.decode(); } catch { faults.push(`no picture: ${name}`); continue; }
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
    if (new Set(new Uint32Array(bytes.buffer)).size < 5) faults.push(`an empty picture: ${name}`);
    if (isDarkAt(bytes) === !isDark) faults.push(`a picture in the wrong colours: ${name}`);
    if (!image.alt) faults.push(`a picture without words: ${name}`);
    const box = image.getBoundingClientRect();
    if (box.width < 0.8 * image.naturalWidth || box.height < 1) faults.push(`a picture too small to read: ${name}`);
  }
  // Where the words of an element can be seen: what the boxes around it leave, and whether one of them cuts or scrolls.
  const places = new Map();
  const place = (element) => {
    if (!element) return { left: -1e9, right: 1e9, top: -1e9, bottom: 1e9, scrolls: false };
    if (places.has(element)) return places.get(element);
    const style = getComputedStyle(element), own = { ...place(element.parentElement) };
    if (style.position === 'fixed') Object.assign(own, place(null));
    const box = element.getBoundingClientRect(), isRoot = element === root || element === document.body;
    if (!isRoot && style.display !== 'inline' && style.overflowX !== 'visible') {
      own.left = Math.max(own.left, box.left); own.right = Math.min(own.right, box.right);
      own.top = Math.max(own.top, box.top); own.bottom = Math.min(own.bottom, box.bottom);
      own.scrolls ||= ['auto', 'scroll'].includes(style.overflowX) || style.textOverflow === 'ellipsis';
    }
    places.set(element, own);
    return own;
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), words = [];
  const range = document.createRange();
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const holder = node.parentElement;
    if (!node.data.trim() || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(holder.tagName)) continue;
    if (!holder.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    const seen = place(holder);
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      const left = Math.max(box.left, seen.left), right = Math.min(box.right, seen.right);
      const top = Math.max(box.top, seen.top), bottom = Math.min(box.bottom, seen.bottom);
      const text = node.data.trim().slice(0, 60);
      const isCut = box.right > seen.right + 1 || box.left < seen.left - 1;
      if (isCut && !seen.scrolls && bottom > top) faults.push(`cut: ${text}`);
      if (right > wide + 1 && !seen.scrolls && box.left < wide) faults.push(`past the screen: ${text}`);
      const isThere = right - left > 1 && bottom - top > 1 && right > 0 && left < wide;
      if (isThere) words.push({ left, right, top, bottom, text, holder });
    }
  }
  // Whether one of two words is behind a box that is painted, such as a title that stays while others scroll.
  const isCovered = (a, b) => {
    const x = (Math.max(a.left, b.left) + Math.min(a.right, b.right)) / 2;
    const y = (Math.max(a.top, b.top) + Math.min(a.bottom, b.bottom)) / 2;
    for (const element of document.elementsFromPoint(x, y)) {
      if (element.contains(a.holder) && element.contains(b.holder)) return false;
      const style = getComputedStyle(element), ground = style.backgroundColor;
      if (style.boxShadow !== 'none' || !/^rgba\\(.*, 0\\)$/.test(ground)) return true;
    }
    return false;
  };
  words.sort((a, b) => a.top - b.top);
  for (let i = 0; i < words.length; i++) for (let j = i + 1; j < words.length && words[j].top < words[i].bottom; j++) {
    const [a, b] = [words[i], words[j]];
    if (a.holder === b.holder) continue;
    // The box of a line of text is higher than its letters.
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - b.top;
    if (across > 1 && down > 0.35 * Math.min(a.bottom - a.top, b.bottom - b.top) && !isCovered(a, b))
      faults.push(`overlap: ${a.text} | ${b.text}`);
  }
  if (!words.length) faults.push('no words');
  return { faults: [...new Set(faults)], height: root.scrollHeight, pictures: document.images.length };
})"""


class Browser:
    """A browser with a profile of its own in a folder, until the end of a `with` block."""

    def __init__(self, folder):
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # Past 4, so that none of the two is lost when they become 3 and 4.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        command = [sys.executable, "-c", _START, *map(str, high), CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=high, **quiet)
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._numbers, self._read, self.events = itertools.count(1), b"", []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A browser ends where its pipe does. One that hangs is killed.
        os.close(self._to)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def call(self, method, session=None, **arguments):
        """Give a command, and return its answer. Events that come before are kept in ``events``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next(method)).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait_for(self, method):
        """Wait until an event has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next(method))

    def _next(self, what):
        end = time.monotonic() + SECONDS
        while b"\0" not in self._read:
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium gave no answer to {what} in {SECONDS} s.")
            found = os.read(self._from, 1 << 16)
            if not found:
                raise RuntimeError(f"Chromium ended while it was asked for {what}.")
            self._read += found
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


class Tab:
    """One tab of a browser."""

    def __init__(self, browser):
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **arguments):
        return self._browser.call(method, self._session, **arguments)

    def run(self, script):
        """The value of an expression, or of the promise that it gives."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def look(self, address, width, is_dark, site=""):
        """Open a page on a screen of a width. Returns its faults, what the console says included, and its height.

        A request that leaves ``site``, where one is named, is a fault.
        """
        self._browser.events.clear()
        self._resize(width, 900)
        wished = {"prefers-color-scheme": "dark" if is_dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wished.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=address)
        self._browser.wait_for("Page.loadEventFired")
        told = self.run(f"{LOOK}({'true' if is_dark else 'false'})")
        return [*told["faults"], *_complaints(self._browser.events, site)], told["height"]

    def _resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshots(self, folder, name, width, height):
        """Write the whole page, as one file or several."""
        paths = []
        self._resize(width, min(SLICE, height))
        for number, top in enumerate(range(0, height, SLICE)):
            self.run(f"scrollTo(0, {top})")
            shot = self.call("Page.captureScreenshot", format="png")
            paths.append(folder / f"{name}-{number}.png")
            paths[-1].write_bytes(base64.b64decode(shot["data"]))
        return paths


def _complaints(events, site):
    """What events say that went wrong."""
    found = []
    for event in events:
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            found.append(f"error: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            found.append(f"console: {[one.get('value', one.get('description')) for one in told['args']]}")
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            found.append(f"console: {told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if site and not address.startswith((site, "data:", "blob:")):
                found.append(f"asks another site: {address}")
    return found
