// A run on screen: the curve of the predicted rest, and each answer with its tokens coloured by value.
// The live page feeds it token by token; a saved run is fed all at once. No state outside a view.
"use strict";

const lenvmRun = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const WORDS = { equal_to: "equal to", at_most: "at most", at_least: "at least", tilt: "tilt" };

  function make(parent, tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function draw(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  const tokens = (n) => `${n.toLocaleString("en")} token${n === 1 ? "" : "s"}`;

  /** The goal of a control as {kind, amount}; null where there is none. */
  function goalOf(control) {
    const kind = control && Object.keys(WORDS).find((name) => control[name] != null);
    return kind ? { kind, amount: control[kind] } : null;
  }

  /** How a finished length stands to its goal: [words, met]. */
  function judge(goal, length, finish) {
    const cut = finish === "length" ? ", cut off" : finish === "stopped" ? ", stopped" : "";
    if (!goal || goal.kind === "tilt") return [`ended after ${tokens(length)}${cut}`, false];
    const { kind, amount } = goal;
    const gap = length - amount;
    if (kind === "at_most") return gap <= 0 ? [`within ${amount}${cut}`, !cut] : [`${tokens(gap)} over ${amount}${cut}`, false];
    if (kind === "at_least") return gap >= 0 ? [`past ${amount}${cut}`, !cut] : [`${tokens(-gap)} short of ${amount}${cut}`, false];
    if (gap === 0) return [`exactly ${amount}${cut}`, !cut];
    const share = Math.round((100 * Math.abs(gap)) / amount);
    return [`${tokens(Math.abs(gap))} ${gap < 0 ? "short of" : "over"} ${amount} (${share}%)${cut}`, false];
  }

  /** A pleasant step for about `count` ticks up to `top`. */
  function step(top, count) {
    const rough = Math.max(1, top / count);
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  }

  /** A top that lone spikes do not decide: a little over what this share of the numbers keeps to. */
  function usual(numbers, share) {
    if (!numbers.length) return 0;
    const sorted = [...numbers].sort((a, b) => a - b);
    return Math.min(sorted[sorted.length - 1], 1.25 * sorted[Math.floor(share * (sorted.length - 1))]);
  }

  /** [x, y] points as a path. */
  const toPath = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  /** Each number with the few before it, so that the eye sees the way and not the jitter. */
  function smooth(points) {
    let mean = 0, weight = 0;
    return points.map(([t, n]) => {
      mean = 0.75 * mean + n;
      weight = 0.75 * weight + 1;
      return [t, mean / weight];
    });
  }

  class Answer {
    constructor(parent, side, run, view) {
      this.side = side;
      this.run = run;
      this.view = view;
      this.spans = [];
      this.goal = goalOf(run.control);
      this.card = make(parent, "article", `card answer ${side}`);
      const title = this.goal ? `${WORDS[this.goal.kind]} ${this.goal.amount}` : "without control";
      make(this.card, "h2", "", title[0].toUpperCase() + title.slice(1));
      this.figure = make(this.card, "p", "figure");
      this.verdict = make(this.card, "p", "verdict", "");
      this.ruler = make(this.card, "div", "ruler");
      this.rest = make(this.ruler, "div", "rest");
      this.done = make(this.ruler, "div", "done");
      if (this.goal && this.goal.kind !== "tilt") this.target = make(this.ruler, "div", "target");
      this.text = make(this.card, "p", "tokens");
      this.text.tabIndex = 0;
      this.text.setAttribute("role", "group");
      this.text.setAttribute("aria-label", `Answer, ${title}. Arrow keys walk through its tokens.`);
      this.follows = !run.finish; // the newest token stays in sight until the reader scrolls away
      this.text.addEventListener("scroll", () => {
        this.follows = this.text.scrollTop + this.text.clientHeight > this.text.scrollHeight - 40;
      });
      this.detail = make(this.card, "p", "detail");
      this.text.addEventListener("pointerover", (event) => this.point(this.spans.indexOf(event.target)));
      this.text.addEventListener("pointerleave", () => this.point(-1));
      this.text.addEventListener("blur", () => this.point(-1));
      this.text.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 }[event.key];
        if (!move || !this.spans.length) return;
        event.preventDefault();
        const from = this.at === undefined || this.at < 0 ? (move > 0 ? -move : this.spans.length) : this.at;
        this.point(Math.min(this.spans.length - 1, Math.max(0, from + move)), true);
      });
    }

    /** One token: {text, value, remaining}. */
    add(token) {
      const span = make(this.text, "span", token.value == null ? "plain" : "", token.text);
      if (token.value != null) {
        const far = 2 * Math.min(1, -token.value) - 1; // -1 at the end, 0 in the middle, 1 far away
        span.style.setProperty("--hue", far > 0 ? "var(--far)" : "var(--near)");
        span.style.setProperty("--much", `${Math.round(100 * Math.abs(far) ** 0.7)}%`);
      }
      this.spans.push(span);
      if (this.follows) this.text.scrollTop = this.text.scrollHeight;
    }

    /** Mark a token; with keys it is brought into sight, too. */
    point(index, keys = false) {
      if (this.at >= 0 && this.spans[this.at]) this.spans[this.at].classList.remove("at");
      this.at = index;
      const token = this.run.tokens[index];
      if (token) {
        this.spans[index].classList.add("at");
        if (keys) this.spans[index].scrollIntoView({ block: "nearest" });
        const rest = token.remaining == null ? "" : `, about ${tokens(Math.round(token.remaining))} to come`;
        this.detail.textContent = `${tokens(index + 1)}${rest}`;
      } else this.detail.textContent = "";
      this.view.cursor = token ? index + 1 : null;
      this.view.redraw();
    }

    refresh(scale) {
      const { run } = this;
      const length = run.tokens.length;
      const last = run.tokens[length - 1];
      const rest = run.finish ? 0 : last ? last.remaining ?? 0 : run.predicted ?? 0;
      this.figure.textContent = length.toLocaleString("en");
      const of = this.target && this.goal.kind === "equal_to" && !run.finish ? ` of ${this.goal.amount}` : "";
      const more = run.finish || !rest ? "" : `, ${Math.round(rest).toLocaleString("en")} more expected`;
      make(this.figure, "small", "", `${of} token${length === 1 && !of ? "" : "s"}${more}`);
      const percent = (n) => `${Math.min(100, (100 * n) / scale)}%`;
      this.done.style.width = percent(length);
      this.rest.style.width = percent(length + rest);
      if (this.target) this.target.style.left = percent(this.goal.amount);
      this.card.classList.toggle("waiting", !run.finish);
      if (run.finish && !this.judged) {
        this.judged = true;
        const [words, met] = judge(this.goal, length, run.finish);
        const said = run.predicted == null ? "" : `; predicted ${Math.round(run.predicted)} before it began`;
        this.verdict.textContent = words + (this.goal && this.goal.kind !== "tilt" ? "" : said);
        this.verdict.classList.toggle("met", met);
        if (run.finish === "stop") make(this.text, "span", "plain end", "end");
      }
    }
  }

  class View {
    /** record: {prompt, model, runs: [{control, tokens, predicted, finish}]}. */
    constructor(root, record) {
      this.record = record;
      root.replaceChildren();
      root.classList.add("run");
      const curve = make(root, "div", "card curve");
      const head = make(curve, "div", "curve-head");
      make(head, "h2", "", "Tokens the model still expects to write");
      const keys = make(head, "div", "keys");
      this.chart = draw(curve, "svg", { class: "chart", role: "img", "aria-label": "Expected remaining tokens against tokens written" });
      const legend = make(curve, "p", "legend");
      legend.append("far from the end");
      make(legend, "i");
      legend.append("about to end");
      const answers = make(root, "div", "answers");
      this.answers = record.runs.map((run) => new Answer(answers, goalOf(run.control) ? "guided" : "free", run, this));
      for (const answer of this.answers) {
        const key = make(keys, "span", answer.side === "free" ? "k-free" : "");
        make(key, "i");
        key.append(answer.side === "free" ? "without control" : "with control");
        for (const token of answer.run.tokens) answer.add(token);
      }
      this.target = this.answers.map((a) => a.goal).find((g) => g && g.kind !== "tilt");
      if (this.target) {
        const key = make(keys, "span", "k-exact");
        make(key, "i");
        key.append(`straight to ${this.target.amount}`);
      }
      this.observer = new ResizeObserver(() => this.redraw());
      this.observer.observe(this.chart);
      this.redraw();
    }

    /** A token of one run. */
    add(index, token) {
      this.record.runs[index].tokens.push(token);
      this.answers[index].add(token);
      this.redraw();
    }

    /** The prediction before the first token. */
    predict(index, length) {
      this.record.runs[index].predicted = length;
      this.redraw();
    }

    /** A run is over: "stop", "length", or "stopped" by the reader. */
    finish(index, reason) {
      this.record.runs[index].finish = reason;
      this.redraw();
    }

    close() {
      this.observer.disconnect();
    }

    redraw() {
      if (this.pending) return;
      this.pending = true;
      requestAnimationFrame(() => {
        this.pending = false;
        this.paint();
      });
    }

    paint() {
      const runs = this.record.runs;
      const goal = this.target ? this.target.amount : 0;
      const longest = Math.max(1, ...runs.map((r) => r.tokens.length));
      const expected = runs.map((r) => {
        const last = r.tokens[r.tokens.length - 1];
        return r.finish ? r.tokens.length : r.tokens.length + (last ? last.remaining ?? 0 : r.predicted ?? 0);
      });
      const scale = 1.08 * Math.max(8, goal, longest, ...expected);
      for (const answer of this.answers) answer.refresh(scale);
      const tops = runs.flatMap((r) => [r.predicted ?? 0, usual(r.tokens.map((t) => t.remaining ?? 0), r.control || runs.length < 2 ? 0.97 : 0.8)]);
      const high = 1.05 * Math.max(8, goal, ...tops);
      this.paintChart(scale, high);
    }

    paintChart(right, top) {
      const svg = this.chart;
      const width = svg.clientWidth || 640, height = svg.clientHeight || 240;
      const left = 46, bottom = height - 26, above = 12;
      const x = (n) => left + ((width - left - 8) * n) / right;
      const y = (n) => bottom - ((bottom - above) * Math.min(n, top)) / top;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.replaceChildren();
      for (let n = 0, s = step(top, 4); n <= top; n += s) {
        draw(svg, "line", { class: "grid", x1: left, x2: width - 8, y1: y(n), y2: y(n) });
        draw(svg, "text", { x: left - 8, y: y(n) + 4, "text-anchor": "end" }, n.toLocaleString("en"));
      }
      for (let n = 0, s = step(right, width / 90); n <= right; n += s)
        draw(svg, "text", { x: x(n), y: bottom + 18, "text-anchor": "middle" }, n.toLocaleString("en"));
      if (this.target) draw(svg, "line", { class: "exact", x1: x(0), y1: y(this.target.amount), x2: x(this.target.amount), y2: y(0) });
      for (const { run, side } of [...this.answers].reverse()) {
        const points = [[0, run.predicted], ...run.tokens.map((t, i) => [i + 1, t.remaining])].filter(([, n]) => n != null);
        if (!points.length) continue;
        const ended = run.finish === "stop" && points[points.length - 1][1] === 0;
        const trend = smooth(ended ? points.slice(0, -1) : points);
        if (ended) trend.push(points[points.length - 1]);
        const place = ([t, n]) => [x(t), y(n)];
        draw(svg, "path", { class: `jitter ${side}`, d: toPath(points.map(place)) });
        draw(svg, "path", { class: `line ${side}`, d: toPath(trend.map(place)) });
        const [t, n] = trend[trend.length - 1];
        draw(svg, "circle", { class: `dot ${side}`, cx: x(t), cy: y(n), r: 4 });
      }
      if (this.cursor) draw(svg, "line", { class: "cursor", x1: x(this.cursor), x2: x(this.cursor), y1: above, y2: bottom });
    }
  }

  return { View, goalOf, judge };
})();
