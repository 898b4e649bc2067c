"use strict";
const tip = document.getElementById("tip");
const dark = () => {
  const asked = document.documentElement.dataset.theme;
  return asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
document.getElementById("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  paintAll();
});
const visible = (text) => text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥") || "∅";
function colour(state, mode, longest) {
  const alpha = dark() ? 0.75 : 0.55;
  if (mode === "length") return `rgba(10,110,189,${alpha * Math.min(1, state.length / longest)})`;
  const gain = Math.max(-1, Math.min(1, state.gain * 12));
  return gain > 0 ? `rgba(194,87,26,${alpha * gain})` : `rgba(10,110,189,${-alpha * gain})`;
}
function paint(view) {
  const longest = Math.max(...view.trace.states.map((s) => s.length));
  view.spans.forEach((span, i) => {
    span.style.background = colour(view.trace.states[i + 1], view.mode, longest);
  });
}
const views = [];
const paintAll = () => views.forEach(paint);
function show(view, i, span) {
  const s = view.trace.states[i + 1];
  const lines = [`token ${i + 1}: ${JSON.stringify(view.trace.tokens[i])}`,
    `predicted remaining ${Math.round(s.length)}`];
  if (s.p10 !== undefined) lines.push(`80% between ${Math.round(s.p10)} and ${Math.round(s.p90)}`);
  if (s.remaining_true !== null) lines.push(`true remaining ${s.remaining_true}`);
  lines.push(`value ${s.value.toFixed(4)}, length gain ${s.gain >= 0 ? "+" : ""}${s.gain.toFixed(4)}`);
  tip.textContent = lines.join("\n");
  const box = span.getBoundingClientRect();
  tip.style.display = "block";
  tip.style.left = `${Math.min(box.left, innerWidth - tip.offsetWidth - 8)}px`;
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.top = `${below ? box.bottom + 6 : box.top - tip.offsetHeight - 6}px`;
  const mark = view.root.querySelector("svg .mark");
  const scale = mark.dataset;
  const x = Number(scale.left) + ((i + 1) / view.trace.tokens.length) * Number(scale.width);
  mark.setAttribute("x1", x); mark.setAttribute("x2", x);
  mark.style.visibility = "visible";
}
function hide(view) {
  tip.style.display = "none";
  view.root.querySelector("svg .mark").style.visibility = "hidden";
}
document.querySelectorAll("[data-trace]").forEach((root) => {
  const trace = JSON.parse(root.querySelector("script").textContent);
  const view = { root, trace, mode: "length", spans: [] };
  const place = root.querySelector(".tokens");
  trace.tokens.forEach((token, i) => {
    const span = document.createElement("span");
    span.textContent = visible(token);
    span.tabIndex = 0;
    for (const on of ["mouseenter", "focus"]) span.addEventListener(on, () => show(view, i, span));
    for (const off of ["mouseleave", "blur"]) span.addEventListener(off, () => hide(view));
    place.append(span);
    view.spans.push(span);
  });
  root.querySelectorAll("button[data-mode]").forEach((button) => {
    button.addEventListener("click", () => {
      view.mode = button.dataset.mode;
      root.querySelectorAll("button[data-mode]").forEach((b) =>
        b.setAttribute("aria-pressed", String(b === button)));
      paint(view);
    });
  });
  views.push(view);
});
paintAll();
