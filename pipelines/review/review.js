"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const items = data.items;
  let kept = true;
  const recall = (key) => { try { return localStorage.getItem(key); } catch { kept = false; return null; } };
  const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { kept = false; } };

  // language and theme, as in the report
  const press = (name, value) => {
    for (const button of document.querySelectorAll(`button[data-${name}]`)) {
      button.setAttribute("aria-pressed", String(button.dataset[name] === value));
    }
  };
  const setLanguage = (value) => {
    root.dataset.ui = value;
    root.lang = value === "zh" ? "zh-CN" : "en";
    press("language", value);
    byId("note").placeholder = plain("note");
  };
  const setTheme = (value) => {
    if (value === "auto") delete root.dataset.theme; else root.dataset.theme = value;
    press("mode", value);
  };
  const plain = (key) => data.words[key][root.dataset.ui === "zh" ? 1 : 0];

  // elements: text is only ever set as text
  const element = (tag, css, ...children) => {
    const made = document.createElement(tag);
    if (css) made.className = css;
    made.append(...children);
    return made;
  };
  const say = (key, values = {}) => {
    const both = document.createDocumentFragment();
    for (const [index, css] of ["en", "zh"].entries()) {
      const form = data.words[key][index].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
      const part = element("span", css, form);
      part.lang = index ? "zh-CN" : "en";
      both.append(part);
    }
    return both;
  };
  const said = (text, lang) => {
    const block = element("div", "said");
    block.dir = "auto";
    if (lang) block.lang = lang;
    block.append(text.text === "" ? say("no_text") : text.text);
    if (text.more) block.append(element("span", "rest", say("more", { n: text.more.toLocaleString("en") })));
    return block;
  };
  const turns = (messages, lang) => messages.map((message) => {
    const known = Object.hasOwn(data.words, `role.${message.role}`);
    const who = element("p", "who", known ? say(`role.${message.role}`) : message.role);
    return element("div", known ? `turn ${message.role}` : "turn", who, said(message, lang));
  });
  const pane = (title, css, ...children) => element("section", `pane ${css}`, element("h2", "", say(title)), ...children);

  // verdicts: {item: {verdict, note, time}}
  const key = `danlu.review.${data.sample}`;
  const state = { at: 0, reviewer: "", verdicts: {} };
  const restored = recall(key);
  if (restored) {
    try {
      const found = JSON.parse(restored);
      state.reviewer = String(found.reviewer ?? "");
      for (const [item, entry] of Object.entries(found.verdicts ?? {})) take(Number(item), entry);
    } catch { /* what was kept is damaged: begin anew */ }
  }
  function take(item, entry) {
    const allowed = Object.values(data.keys);
    if (!Number.isInteger(item) || !items[item] || !entry) return false;
    const verdict = allowed.includes(entry.verdict) ? entry.verdict : null;
    const note = String(entry.note ?? "").slice(0, 10000);
    if (!verdict && !note) return false;
    state.verdicts[item] = { verdict, note, time: String(entry.time ?? "") };
    return true;
  }
  const keep = () => {
    remember(key, JSON.stringify({ reviewer: state.reviewer, verdicts: state.verdicts }));
    if (!kept) tell("unkept");
  };
  const verdict = (item) => state.verdicts[item]?.verdict ?? null;
  const judged = () => items.filter((_, index) => verdict(index)).length;
  const tell = (word) => { const box = byId("message"); box.hidden = false; box.replaceChildren(say(word)); };
  const hush = () => { if (kept) byId("message").hidden = true; };

  const show = (focus) => {
    const item = items[state.at], now = verdict(state.at), box = byId("row");
    const head = element("p", "head", element("strong", "", say("row"), ` ${state.at + 1} `, say("of"), ` ${items.length} `, say("row_end")));
    head.append(element("code", "", item.shown));
    box.replaceChildren(head);
    if (data.pairs) {
      box.append(pane("prompt", "", ...turns(item.prompt, item.lang)));
      const sides = ["left", "right"].map((side) => pane(side, now === side ? "picked" : "", ...turns(item[side], item.lang)));
      box.append(element("div", "two", ...sides));
    } else {
      const talk = pane("conversation", "", ...turns(item.messages, item.lang));
      if (item.span) {
        const place = [item.span.source, item.span.place].filter(Boolean).join(" · ");
        const source = pane("source", "source", element("p", "where", place), said(item.span, item.lang));
        box.append(element("div", "beside", talk, source));
      } else box.append(talk);
    }
    if (item.points) box.append(pane("points", "", element("ul", "", ...item.points.map((point) => element("li", "", said(point, item.lang))))));
    if (item.tools) box.append(pane("tools", "json", said(item.tools)));
    for (const button of document.querySelectorAll(".choice")) button.setAttribute("aria-pressed", String(button.dataset.verdict === now));
    byId("note").value = state.verdicts[state.at]?.note ?? "";
    byId("previous").disabled = state.at === 0;
    byId("next").disabled = state.at === items.length - 1;
    const done = judged();
    byId("count").textContent = String(done);
    byId("bar").style.setProperty("width", `${(100 * done) / Math.max(1, items.length)}%`);
    for (const [index, button] of [...byId("all").querySelectorAll("button")].entries()) mark(button, index);
    byId("live").textContent = `${plain("row")} ${state.at + 1} ${plain("of")} ${items.length} ${plain("row_end")}`;
    if (focus) { box.focus({ preventScroll: true }); document.querySelector(".progress").scrollIntoView({ block: "start" }); }
  };
  const mark = (button, index) => {
    const now = verdict(index);
    button.className = !now ? "" : ["accept", "left", "right"].includes(now) ? "good" : ["reject", "neither"].includes(now) ? "bad" : "even";
    if (index === state.at) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
  };
  const go = (to) => { if (items[to]) { state.at = to; show(true); } };
  const judge = (value) => {
    hush();
    const before = state.verdicts[state.at];
    const same = before?.verdict === value;
    state.verdicts[state.at] = { verdict: same ? null : value, note: before?.note ?? "", time: new Date().toISOString() };
    keep();
    if (same) { show(false); return; }
    const order = items.map((_, step) => (state.at + 1 + step) % items.length);
    const open = order.find((index) => !verdict(index));
    if (open === undefined) { show(false); tell("done"); } else go(open);
  };

  const lines = () => Object.entries(state.verdicts).filter(([, entry]) => entry.verdict).map(([item, entry]) => JSON.stringify({
    sample: data.sample, item: Number(item), id: items[item].id, verdict: entry.verdict, reviewer: state.reviewer, note: entry.note, time: entry.time,
  }) + "\n");
  const download = () => {
    if (!state.reviewer) { tell("no_name"); byId("reviewer").focus(); return; }
    const link = element("a", "");
    link.href = URL.createObjectURL(new Blob(lines(), { type: "application/jsonl" }));
    link.download = `verdicts-${data.stage}-${state.reviewer.replace(/[^\p{L}\p{N}_-]+/gu, "_")}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const load = async (file) => {
    let count = 0;
    for (const line of (await file.text()).split("\n")) {
      try {
        const found = JSON.parse(line);
        if (found.sample === data.sample && items[found.item]?.id === found.id && take(found.item, found)) count += 1;
      } catch { /* not a line of verdicts */ }
    }
    keep();
    show(false);
    tell(count ? "loaded" : "wrong_file");
  };

  for (const index of items.keys()) {
    const button = element("button", "", String(index + 1));
    button.type = "button";
    button.addEventListener("click", () => go(index));
    byId("all").append(element("li", "", button));
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-language], button[data-mode], button[data-verdict]");
    if (!button) return;
    if (button.dataset.language) { setLanguage(button.dataset.language); remember("danlu.language", button.dataset.language); }
    if (button.dataset.mode) { setTheme(button.dataset.mode); remember("danlu.theme", button.dataset.mode); }
    if (button.dataset.verdict) judge(button.dataset.verdict);
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element ? event.target.closest("input, textarea") : null;
    if (typing) {
      if (event.key === "Escape") { typing.blur(); byId("row").focus({ preventScroll: true }); }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const pressed = event.key.toLowerCase();
    if (data.keys[pressed]) judge(data.keys[pressed]);
    else if (pressed === "arrowleft" || pressed === "k") go(state.at - 1);
    else if (pressed === "arrowright" || pressed === "j") go(state.at + 1);
    else if (pressed === "n") byId("note").focus();
    else return;
    event.preventDefault();
  });
  byId("previous").addEventListener("click", () => go(state.at - 1));
  byId("next").addEventListener("click", () => go(state.at + 1));
  byId("note").addEventListener("input", (event) => {
    const before = state.verdicts[state.at] ?? { verdict: null, time: "" };
    state.verdicts[state.at] = { ...before, note: event.target.value };
    keep();
  });
  byId("reviewer").value = state.reviewer;
  byId("reviewer").addEventListener("input", (event) => { state.reviewer = event.target.value.trim(); hush(); keep(); });
  byId("download").addEventListener("click", download);
  byId("load").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => { if (event.target.files[0]) load(event.target.files[0]); event.target.value = ""; });

  const language = recall("danlu.language") ?? ((navigator.language ?? "").startsWith("zh") ? "zh" : "en");
  setLanguage(language === "zh" ? "zh" : "en");
  const theme = recall("danlu.theme");
  setTheme(theme === "light" || theme === "dark" ? theme : "auto");
  root.dataset.script = "on";
  state.at = Math.max(0, items.findIndex((_, index) => !verdict(index)));
  if (items.length) show(false);
  if (!kept) tell("unkept");
})();
