"""Every page of the site in a real browser, on a wide and on a narrow screen, light and dark.

The tests need Chromium (Debian's package `chromium`), and the site `pip install "paged[docs]"`; without they are
skipped. `--basetemp=FOLDER` keeps the screenshots there, to be looked at.
"""

import contextlib
import functools
import http.server
import itertools
import pathlib
import subprocess
import sys
import threading

import pytest

from tests.support.browser import CHROMIUM, Browser, Tab

ROOT = pathlib.Path(__file__).parent.parent
WIDTHS = 1400, 400
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        del format, args


@contextlib.contextmanager
def _served(folder):
    """The address under which a folder's files are."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def _faults(site, tmp_path):
    """What is wrong with the pages of a folder, each as words, with the paths of the screenshots."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    found, shots = [], []
    with _served(site) as address, Browser(tmp_path / "profile") as browser:
        tab = Tab(browser)
        for page, width, is_dark in itertools.product(pages, WIDTHS, (False, True)):
            faults, height = tab.look(address + page, width, is_dark, site=address)
            how = f"{width}-{'dark' if is_dark else 'light'}"
            found += [f"{page} {how}: {fault}" for fault in faults]
            name = page.removesuffix(".html").replace("/", "_")
            shots.append(tab.screenshots(tmp_path, f"{name}-{how}", width, height))
    return found, shots


@pytest.mark.slow
@needs_chromium
def test_every_page_of_the_site_is_whole_in_a_browser(tmp_path):
    pytest.importorskip("mkdocstrings", reason='the site needs pip install "paged[docs]"')
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, shots = _faults(site, tmp_path)
    assert not found, "\n".join(found)
    assert len(shots) > 40 * 4 and all(path.stat().st_size > 5000 for paths in shots for path in paths[:1])


SOUND = """<!doctype html><html><head><style>body{background:#fff;color:#000}
@media(prefers-color-scheme:dark){body{background:#111;color:#eee}}</style></head>
<body><h1>A title</h1><pre style="overflow-x:auto">WIDE</pre>BODY</body></html>"""
PICTURE = (
    "<img alt='a picture' src='data:image/svg+xml,<svg xmlns=%22http://www.w3.org/2000/svg%22 width=%2240%22 "
    "height=%2240%22>INSIDE</svg>'>"
)
BROKEN = {
    "an error": ("<script>undefined_function()</script>", "error: ReferenceError"),
    "a message": ("<script>console.error('gone')</script>", "console: ['gone']"),
    "nothing there": ("<script src='gone.js'></script>", "console: Failed to load resource"),
    "another site": ("<script>fetch('http://localhost:9/x').catch(() => 0)</script>", "asks another site"),
    "too wide": ("<div style='width:3000px'>wide</div>", "the page is 3"),
    "past the screen": ("<div style='position:absolute;left:9px;white-space:nowrap'>" + "word " * 300, "past"),
    "cut": ("<div style='overflow:hidden;width:50px;white-space:nowrap'>words that are cut</div>", "cut: words that"),
    "overlap": ("<p>below</p><p style='margin-top:-30px'>above</p>", "overlap: below | above"),
    "no picture": ("<img alt='gone' src='gone.svg'>", "no picture: gone.svg"),
    "an empty picture": (PICTURE.replace("INSIDE", ""), "an empty picture"),
    "no words for a picture": (PICTURE.replace("alt='a picture'", ""), "a picture without words"),
    "small": (PICTURE.replace("<img ", "<img width='20' "), "a picture too small to read"),
    "always light": ("<style>body{background:#fff !important}</style>", "the page is not dark"),
}  # fmt: skip


@pytest.mark.slow
@needs_chromium
def test_the_browser_finds_what_is_broken(tmp_path):
    """A page of each kind of fault, and a sound one with code that scrolls."""
    site = tmp_path / "site"
    site.mkdir()
    whole = SOUND.replace("WIDE", "code " * 500)
    (site / "sound.html").write_text(whole.replace("BODY", ""))
    for name, (body, _) in BROKEN.items():
        (site / f"{name}.html").write_text(whole.replace("BODY", body))
    found, shots = _faults(site, tmp_path)
    assert not [fault for fault in found if fault.startswith("sound")]
    for name, (_, words) in BROKEN.items():
        assert any(fault.startswith(f"{name}.html") and words in fault for fault in found), (name, found)
    assert len(shots) == 4 * (1 + len(BROKEN))
