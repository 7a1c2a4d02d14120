"use strict";
(() => {
  const root = document.documentElement;
  const recall = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* storage may be switched off */ } };
  const press = (name, value) => {
    for (const button of document.querySelectorAll(`button[data-${name}]`)) {
      button.setAttribute("aria-pressed", String(button.dataset[name] === value));
    }
  };
  const setLanguage = (value) => {
    root.dataset.ui = value;
    root.lang = value === "zh" ? "zh-CN" : "en";
    press("language", value);
  };
  const setTheme = (value) => {
    if (value === "auto") delete root.dataset.theme; else root.dataset.theme = value;
    press("mode", value);
  };
  const language = recall("danlu.language") ?? ((navigator.language ?? "").startsWith("zh") ? "zh" : "en");
  setLanguage(language === "zh" ? "zh" : "en");
  const theme = recall("danlu.theme");
  setTheme(theme === "light" || theme === "dark" ? theme : "auto");
  root.dataset.script = "on";
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-language], button[data-mode]");
    if (!button) return;
    if (button.dataset.language) { setLanguage(button.dataset.language); remember("danlu.language", button.dataset.language); }
    if (button.dataset.mode) { setTheme(button.dataset.mode); remember("danlu.theme", button.dataset.mode); }
  });

  // a page that was written long ago, though its run was at work then
  const told = document.querySelector(".as-of");
  if (told && Date.now() / 1000 - Number(told.dataset.asOf) > 60 + 3 * Number(told.dataset.every)) {
    document.querySelector(".silent").hidden = false;
  }

  const tip = document.getElementById("tip");
  const hide = () => tip.classList.remove("on");
  document.addEventListener("pointermove", (event) => {
    const mark = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (!mark) { hide(); return; }
    tip.textContent = mark.dataset.tip;
    tip.classList.add("on");
    const box = tip.getBoundingClientRect();
    const x = Math.min(Math.max(8, event.clientX + 12), innerWidth - box.width - 8);
    const y = event.clientY - box.height - 12 < 4 ? event.clientY + 18 : event.clientY - box.height - 12;
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
  }, { passive: true });
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, { passive: true, capture: true });

  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...document.querySelectorAll("section[id]")].filter((section) => links.has(section.id));
  const strip = document.querySelector(".contents");
  let current = null;
  const follow = () => {
    const line = innerHeight * 0.3;
    let found = sections[0];
    for (const section of sections) if (section.getBoundingClientRect().top <= line) found = section;
    if (innerHeight + scrollY >= document.body.scrollHeight - 4) found = sections.at(-1);
    if (!found || found === current) return;
    if (current) links.get(current.id).removeAttribute("aria-current");
    current = found;
    const link = links.get(found.id);
    link.setAttribute("aria-current", "true");
    if (strip.scrollWidth > strip.clientWidth) strip.scrollTo({ left: link.offsetLeft - strip.clientWidth / 2 + link.offsetWidth / 2 });
  };
  document.addEventListener("scroll", follow, { passive: true });
  follow();

  // what scrolls inside itself can be scrolled by keyboard
  const reach = () => {
    for (const box of document.querySelectorAll(".scroll, .lineage-box, .excerpt, pre, .command")) {
      if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  addEventListener("resize", reach, { passive: true });
  document.addEventListener("toggle", reach, { capture: true });
  reach();

  // a link to a row inside a closed disclosure opens it
  const reveal = () => {
    const target = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    for (let node = target; node; node = node.parentElement) if (node instanceof HTMLDetailsElement) node.open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
