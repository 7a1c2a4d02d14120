"""The page in a real browser: nothing overflows, no text acts, both languages and both themes show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.report.build import build_report
from tests.pipelines.report.browser import dom, needs_browser

pytestmark = needs_browser

_MEASURE = """
<script>addEventListener("load", () => {
  const root = document.documentElement;
  const seen = {};
  for (const ui of ["en", "zh"]) {
    document.querySelector(`button[data-language="${ui}"]`).click();
    for (const open of [false, true]) {
      for (const node of document.querySelectorAll("details")) node.open = open || node.open;
      const wide = [];
      for (const node of document.querySelectorAll("main *")) {
        if (node.closest(".scroll, .lineage-box, .excerpt, pre, .command, .hidden, svg")) continue;
        const box = node.getBoundingClientRect();
        if (box.width && box.right > innerWidth + 1) wide.push(`${node.tagName}.${node.className}`);
      }
      seen[`${ui}-${open}`] = {inner: innerWidth, scroll: root.scrollWidth, wide,
        verdict: document.querySelector(".verdict").innerText, title: document.title, lang: root.lang};
    }
  }
  document.querySelector('button[data-mode="dark"]').click();
  seen.dark = getComputedStyle(document.body).backgroundColor;
  document.querySelector('button[data-mode="light"]').click();
  seen.light = getComputedStyle(document.body).backgroundColor;
  document.querySelector('.lineage a').dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
  document.querySelector('[data-tip]').dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 20, clientY: 200}));
  seen.tip = document.querySelector("#tip.on")?.textContent ?? null;
  parent.postMessage(JSON.stringify(seen), "*");
});</script></body>"""
# a window of the browser is never narrower than 500 pixels; a frame is as narrow as it is told
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><pre id="measured"></pre><script>
addEventListener("message", (event) => { document.getElementById("measured").textContent = event.data; });
</script><iframe src="measured.html" width="WIDTH" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def report(finished_run: Path) -> Path:
    return Path(build_report(str(finished_run)))


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window(report: Path, tmp_path: Path, width: int) -> None:
    html = report.read_text("utf-8")
    page = tmp_path / "measured.html"  # the same page without its policy, so that the measurement may run
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</body>", _MEASURE), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.replace("WIDTH", str(width)), "utf-8")
    shown = dom(frame, tmp_path / "profile", width + 100)
    found = re.search(r'<pre id="measured">(.*?)</pre>', shown, re.DOTALL)
    assert found is not None
    seen = json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    for state in ("en-false", "en-true", "zh-false", "zh-true"):
        assert seen[state]["inner"] == width
        assert seen[state]["scroll"] <= width, state
        assert seen[state]["wide"] == [], state
        assert seen[state]["title"] == "Danlu · quickstart"  # no script of the corpus has run, even without the policy
    assert seen["en-true"]["verdict"] == "Complete. Every row is accounted for."
    assert seen["zh-true"]["verdict"] == "运行完成，每一行都有去向。"
    assert (seen["en-true"]["lang"], seen["zh-true"]["lang"]) == ("en", "zh-CN")
    assert seen["dark"] != seen["light"]
    assert seen["tip"]


def test_the_page_works_under_its_own_policy(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    intruder = "<script>document.title = 'taken'</script><style>main{display:none}</style></body>"
    page.write_text(report.read_text("utf-8").replace("</body>", intruder), "utf-8")
    shown = dom(page, tmp_path / "profile", 1440)
    assert "<title>Danlu · quickstart</title>" in shown  # the intruder did not run
    assert re.search(r'<html[^>]*data-script="on"', shown)  # our script did
