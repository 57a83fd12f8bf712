"""Every picture in a real browser, on a wide and a narrow screen, light and dark: words have room, and are there.

The tests need Chromium (Debian's package `chromium`), and are skipped where there is none.
"""

import html
import json
import re
import subprocess

import numpy as np
import pytest

import paged
from examples import pictures as examples
from paged import pictures
from tests.support.browser import CHROMIUM

# Tells for each picture which words leave it or overlap, how wide each line is, and how many colours an image of it
# has. The page waits until all images are drawn.
SCRIPT = """
const faults = [];
window.onerror = (message) => { faults.push(`error: ${message}`); };
const colours = (svg) => new Promise((done) => {
  const image = new Image();
  image.onerror = () => { faults.push('the picture does not load'); done(0); };
  image.onload = () => {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const data = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    done([new Set(data).size, data[0] & 255]);
  };
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(svg.outerHTML);
});
window.onload = async () => {
  const found = [];
  for (const svg of document.querySelectorAll('svg.pgd')) {
    const whole = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
    const widths = boxes.map(([words, box]) => box.width * svg.viewBox.baseVal.width / whole.width);
    for (const [words, box] of boxes)
      if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1 ||
          box.bottom > whole.bottom + 1) faults.push(`cut: ${words}`);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      // The box of a line of text is higher than its letters.
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 0.35 * Math.min(a.height, b.height))
        faults.push(`overlap: ${boxes[i][0]} | ${boxes[j][0]}`);
    }
    found.push({ widths, colours: await colours(svg), scrolls: document.documentElement.scrollWidth });
  }
  document.body.innerText = 'RESULT ' + JSON.stringify({ faults, found }) + ' END';
};
"""


def _looked_at(page, tmp_path, width, is_dark):
    """What the browser tells of a page."""
    path = tmp_path / "page.html"
    path.write_text(page.html.replace("</body>", f"<script>{SCRIPT}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told = re.search(r"RESULT (.*) END", html.unescape(done.stdout), re.DOTALL)
    assert told, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(told.group(1))


def _every_picture():
    spec = paged.AttentionSpec(num_q_heads=64, num_kv_heads=8, head_dim=64, window=2000)
    layout = paged.PageLayout(page_size=16, num_kv_heads=8, head_dim=64)
    random = np.random.default_rng(0)
    lengths, tables = random.integers(1, 8192, 64), random.permutation(64 * 512).reshape(64, 512)
    batch, attend = paged.RaggedBatch.decode(lengths, tables), paged.lower(spec, layout, target="xla")
    by_head = spec.replace(mask=paged.PerHead((paged.Window(300), paged.Chunk(256))))
    records = examples.read_run(examples.RUN.read_text(encoding="utf-8"))
    return [
        *examples.drawn(records).values(),
        pictures.pages(attend, batch, num_pages=64 * 512),
        pictures.pages(attend, batch, 3),
        pictures.heads(by_head),
        pictures.mask(by_head, 1000, 1024),
        pictures.schedule(attend, batch),
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_every_picture_has_room_for_its_words_in_a_browser(width, is_dark, tmp_path):
    shown = _every_picture()
    told = _looked_at(pictures.Page("Pictures", "", tuple(shown)), tmp_path, width, is_dark)
    assert not told["faults"]
    for picture, found in zip(shown, told["found"], strict=True):
        colours, background = found["colours"]
        assert colours >= 5 and (background < 100) == is_dark, picture.title
        assert found["scrolls"] <= max(width, 500), "the page itself must not scroll sideways"
        for box, actual in zip(picture.boxes, found["widths"], strict=True):
            assert actual <= box.width + 1, f"{box} is {actual:.1f} wide"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_browser_finds_words_that_are_cut_and_overlap(tmp_path):
    canvas = pictures._canvas.Canvas(100)
    canvas.text(10, 20, "one line of words that is far too long for it")
    canvas.text(12, 22, "another")
    picture = pictures.Picture.of(canvas, "broken", "broken", "")
    faults = _looked_at(pictures.Page("Pictures", "", (picture,)), tmp_path, 1200, False)["faults"]
    assert any(fault.startswith("cut: one line") for fault in faults) and any("overlap" in fault for fault in faults)
