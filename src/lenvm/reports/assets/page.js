"use strict";
const create = (tag, kind, text) => {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
};
const press = (button, on) => button.setAttribute("aria-pressed", String(on));
const isPressed = (button) => button.getAttribute("aria-pressed") === "true";

// Light and dark: the system's, until the button is pressed.
const root = document.documentElement;
const themeButton = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("lenvm-theme", root.dataset.theme); } catch { /* not kept */ }
  nameTheme();
});
system.addEventListener("change", nameTheme);
nameTheme();

// Words beside a mark of a chart.
const tip = document.getElementById("tip");
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.style.display = mark ? "block" : "none";
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
  const above = box.top - tip.offsetHeight - 10;
  tip.style.top = `${above > 8 ? above : box.bottom + 10}px`;
});
addEventListener("scroll", () => { tip.style.display = "none"; }, { passive: true });

// The token view: tokens, curve and numbers of one step belong together.
const format = (x) => Math.round(x).toLocaleString("en");
const sign = (x, text) => (x > 0 ? "+" : x < 0 ? "−" : "") + text;

function describe(data, step) {
  const rows = [["step", `${step} of ${data.tokens.length}`]];
  rows.push(["token", step ? data.tokens[step - 1].replace(/[\n\t]/g, "") : "(end of the prompt)"]);
  const range = data.low ? ` (${format(data.low[step])} to ${format(data.high[step])})` : "";
  rows.push(["predicted to come", format(data.predicted[step]) + range]);
  const truth = data.true ? data.true[step] : null;
  rows.push(["true", truth === null ? "not known" : format(truth)]);
  const error = truth ? (data.predicted[step] - truth) / truth : null;
  rows.push(["error", error === null ? "–" : sign(error, `${Math.abs(100 * error).toFixed(0)}%`)]);
  rows.push(["value", data.value[step].toFixed(4).replace("-", "−")]);
  if (step) {
    const [tokens, gain] = [data.tokenGain[step - 1], data.gain[step - 1]];
    const td = sign(gain, Math.abs(gain).toFixed(4));
    rows.push(["length gain", `${sign(tokens, Math.abs(tokens).toFixed(1))} tokens (TD ${td})`]);
  } else rows.push(["length gain", "–"]);
  return rows;
}

class TraceView {
  constructor(view, article, data) {
    Object.assign(this, { view, article, data, step: 0, key: String(data.ids) });
    this.readout = article.querySelector(".readout");
    this.pins = article.querySelector(".pins");
    this.place = article.querySelector(".tokens");
    this.spans = ["prompt ▸", ...data.tokens].map((text, step) => {
      const span = create("span", step ? "" : "start", text);
      span.dataset.step = step;
      span.tabIndex = step ? -1 : 0;
      return span;
    });
    this.place.replaceChildren(...this.spans);
    const stepOf = (event) => event.target.dataset?.step;
    for (const kind of ["pointerover", "focusin", "click"])
      this.place.addEventListener(kind, (e) => { if (stepOf(e) !== undefined) view.show(this, +stepOf(e)); });
    this.place.addEventListener("keydown", (e) => this.move(e));
    const plot = this.pins.parentElement;
    plot.addEventListener("pointermove", (e) => {
      const box = plot.getBoundingClientRect();
      const share = Math.max(0, Math.min(1, (e.clientX - box.left) / box.width));
      view.show(this, Math.round(share * data.tokens.length));
    });
    this.mark(0);
  }

  move(event) {
    const last = this.spans.length - 1;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -last, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.spans[Math.max(0, Math.min(last, this.step + steps[event.key]))].focus();
  }

  paint(mode) {
    const shades = mode === "gain" ? [0, ...this.data.gainShade] : this.data.remainingShade;
    this.spans.forEach((span, step) => {
      span.style.setProperty("--shade", `${Math.abs(shades[step])}%`);
      span.dataset.tone = mode === "gain" ? (shades[step] > 0 ? "longer" : "shorter") : "remaining";
    });
  }

  mark(step) {
    const before = this.spans[this.step];
    before.classList.remove("on");
    before.tabIndex = -1;
    this.step = step;
    this.spans[step].classList.add("on");
    this.spans[step].tabIndex = 0;
    const { data, pins } = this;
    const left = `${100 * step / pins.dataset.x}%`;
    const top = (y) => `${100 - 100 * Math.min(1, y / pins.dataset.y)}%`;
    const [rule, truth, main] = pins.children;
    for (const part of pins.children) part.style.left = left;
    truth.hidden = !data.true;
    if (data.true) truth.style.top = top(data.true[step]);
    main.style.top = top(data.predicted[step]);
    pins.hidden = rule.hidden = false;
    this.readout.replaceChildren(...describe(data, step).flatMap(([name, text]) =>
      [create("dt", "", name), create("dd", name === "token" ? "code" : "", text)]));
  }
}

class TokenView {
  constructor(node) {
    this.node = node;
    const rows = JSON.parse(node.querySelector('script[type="application/json"]').textContent);
    this.traces = [...node.querySelectorAll("[data-trace]")].map((article, i) =>
      new TraceView(this, article, rows[i]));
    this.chips = [...node.querySelectorAll("[data-show]")];
    this.compare = node.querySelector("[data-compare]");
    this.modes = [...node.querySelectorAll("[data-mode]")];
    this.chips.forEach((chip) => chip.addEventListener("click", () => this.choose(chip)));
    this.compare?.addEventListener("click", () => this.toggleCompare());
    this.modes.forEach((b) => b.addEventListener("click", () => this.paint(b.dataset.mode)));
    this.paint("remaining");
    this.layOut();
  }

  /** The same step is marked in every panel that shows the same tokens. */
  show(trace, step) {
    for (const other of this.traces)
      if (other === trace || (!other.article.hidden && other.key === trace.key)) other.mark(step);
  }

  paint(mode) {
    this.modes.forEach((b) => press(b, b.dataset.mode === mode));
    this.node.querySelectorAll("[data-scale]").forEach((s) => { s.hidden = s.dataset.scale !== mode; });
    this.traces.forEach((trace) => trace.paint(mode));
  }

  choose(chip) {
    if (this.compare && isPressed(this.compare)) {
      const others = this.chips.filter((c) => c !== chip && isPressed(c));
      if (others.length) press(chip, !isPressed(chip));
    } else this.chips.forEach((c) => press(c, c === chip));
    this.layOut();
  }

  toggleCompare() {
    const on = !isPressed(this.compare);
    press(this.compare, on);
    const first = this.chips.find(isPressed);
    if (on) press(this.chips.find((c) => c !== first), true);
    else this.chips.forEach((c) => press(c, c === first));
    this.layOut();
  }

  layOut() {
    this.chips.forEach((chip, i) => { this.traces[i].article.hidden = !isPressed(chip); });
    const count = this.traces.filter((t) => !t.article.hidden).length;
    this.node.querySelector(".panels").dataset.count = Math.min(count, 3);
  }
}

document.querySelectorAll("[data-view]").forEach((node) => new TokenView(node));
