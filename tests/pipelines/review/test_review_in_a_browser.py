"""The review page in a real browser, under its own policy: keys give verdicts, nothing overflows, no text acts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.review import page, sample, verdicts
from tests.pipelines.report.browser import dom, needs_browser
from tests.pipelines.report.test_report_in_a_browser import _FRAME
from tests.pipelines.review.run import make_run

pytestmark = needs_browser

_DRIVER = """
addEventListener("securitypolicyviolation", (event) => { (window.broken ??= []).push(event.violatedDirective); });
addEventListener("error", (event) => parent.postMessage(JSON.stringify({error: event.message}), "*"));
addEventListener("load", () => {
  const seen = {wide: []};
  const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const ids = JSON.parse(document.getElementById("data").textContent).items.map((item) => item.id);
  const measure = (state) => {
    for (const node of document.querySelectorAll("body *")) {
      if (node.closest(".hidden, .skip, svg, script")) continue;
      const box = node.getBoundingClientRect();
      if (box.width && (box.right > innerWidth + 1 || box.left < -1)) seen.wide.push(`${state} ${node.tagName}.${node.className}`);
    }
  };
  window.Blob = class { constructor(pieces) { seen.lines = pieces.join(""); } };
  URL.createObjectURL = () => "blob:null/none";
  HTMLAnchorElement.prototype.click = () => {};  // a download would leave the frame
  document.getElementById("download").click();
  seen.asked = document.getElementById("message").innerText;
  document.getElementById("reviewer").value = "韩 梅梅";
  document.getElementById("reviewer").dispatchEvent(new Event("input"));
  for (const key of KEYS) press(key);
  document.querySelector(".all").open = true;
  for (const ui of ["en", "zh"]) {
    document.querySelector(`button[data-language="${ui}"]`).click();
    measure(ui);
    seen[ui] = document.querySelector("#row .head strong").innerText;
  }
  const hostile = ids.indexOf("row-0004");
  if (hostile >= 0) {
    document.querySelectorAll("#all button")[hostile].click();
    measure("hostile");
    seen.hostile = document.querySelector("#row .said").textContent;
  }
  document.getElementById("download").click();
  seen.count = document.getElementById("count").textContent;
  seen.kept = JSON.parse(localStorage.getItem(Object.keys(localStorage).find((key) => key.startsWith("danlu.review"))) ?? "{}");
  seen.title = document.title;
  seen.broken = window.broken ?? [];
  seen.inner = innerWidth;
  seen.images = document.images.length;
  parent.postMessage(JSON.stringify(seen), "*");
});
"""


def driven(written: Path, folder: Path, keys: str, width: int) -> dict[str, Any]:
    """What the page shows after these keys; its policy lets the driver run besides its own script, and nothing else."""
    driver = _DRIVER.replace("KEYS", json.dumps(list(keys)))
    digest = base64.b64encode(hashlib.sha256(driver.encode("utf-8")).digest()).decode()
    html = written.read_text("utf-8").replace("script-src &#39;", f"script-src &#39;sha256-{digest}&#39; &#39;", 1)
    (folder / "measured.html").write_text(html.replace("</body>", f"<script>{driver}</script></body>"), "utf-8")
    (folder / "frame.html").write_text(_FRAME.replace("WIDTH", str(width)), "utf-8")
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom(folder / "frame.html", folder / "profile", width + 110), re.DOTALL)
    assert found is not None
    text = found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    seen = dict(json.loads(text))
    assert "error" not in seen, seen
    return seen


@pytest.mark.parametrize(("stage", "width", "keys"), [("chat", 390, "arsa"), ("pairs", 1440, "1234s")])
def test_keys_give_verdicts_that_can_be_imported(tmp_path: Path, stage: str, width: int, keys: str) -> None:
    run = make_run(tmp_path, 80)
    directory = str(run / stage / "f00d")
    drawn = sample.draw(directory, 80 if stage == "chat" else 30)
    sample.keep(directory, drawn)
    page.write(directory, drawn, str(tmp_path / "out"))
    seen = driven(tmp_path / "out" / "review.html", tmp_path, keys, width)
    assert seen["inner"] == width
    assert seen["wide"] == []
    assert seen["broken"] == []
    assert (seen["title"], seen["images"]) == (f"Danlu · {stage}", 0)  # no text of a row has acted
    assert seen["asked"] == "Enter your name first."
    assert seen["en"].strip() == f"Row {len(keys) + 1} of {len(drawn.items)}"
    assert seen["zh"].strip() == f"第 {len(keys) + 1} 条，共 {len(drawn.items)} 条"
    if stage == "chat":
        assert seen["hostile"].startswith("</script><script>document.title")
        assert "⟨U+202E⟩⟨NUL⟩" in seen["hostile"]
    assert seen["count"] == str(len(keys))
    assert seen["kept"]["reviewer"] == "韩 梅梅"
    file = tmp_path / "verdicts.jsonl"
    file.write_text(seen["lines"], "utf-8")
    done = verdicts.import_files(directory, [str(file)])
    assert (done.added, done.reviewers) == (len(keys), {"韩 梅梅"})
    said = {"a": "accept", "r": "reject", "s": "skip", "1": "left", "2": "right", "3": "tie", "4": "neither"}
    assert [item.verdict for item in verdicts.imported(directory)] == [said[key] for key in keys]
