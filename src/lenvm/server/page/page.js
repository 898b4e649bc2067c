// The live page: the form, its runs, and saving one as a file that opens offline.
"use strict";

(() => {
  const $ = (id) => document.getElementById(id);
  const EXAMPLES = ["Why is the sky blue?", "Tell me a short story about a lighthouse.", "Explain how bread rises.", "Give me three ideas for a rainy day."];
  const SHORTEST = 8;
  let longest = 1024; // of the slider; the server's limit may lower it
  let limit = 1024; // of prompt and answer together, less some room for the prompt
  let hasValues = true;
  let view = null;
  let abort = null;

  // -- the amount: a logarithmic slider for lengths, a linear one for tilts -----------------------

  const goal = () => document.querySelector('input[name="goal"]:checked').value;
  const fromSlider = (s) =>
    goal() === "tilt" ? Math.round((s - 500) / 5) / 2 : Math.round(SHORTEST * (longest / SHORTEST) ** (s / 1000));
  const toSlider = (n) =>
    goal() === "tilt" ? 500 + 10 * n : (1000 * Math.log(Math.max(n, SHORTEST) / SHORTEST)) / Math.log(longest / SHORTEST);
  const kept = { length: 120, tilt: 10 };

  function showGoal() {
    const tilt = goal() === "tilt";
    $("amount").setAttribute("aria-hidden", String(goal() === "none"));
    for (const id of ["slider", "number"]) $(id).disabled = goal() === "none";
    $("number").min = tilt ? -10000 : 1;
    $("number").step = tilt ? "any" : 1;
    $("number").value = tilt ? kept.tilt : kept.length;
    $("slider").value = toSlider(Number($("number").value));
    $("unit").textContent = tilt ? "above 0 shorter, below longer" : "tokens";
    $("compare").disabled = goal() === "none";
  }

  function keep() {
    kept[goal() === "tilt" ? "tilt" : "length"] = Number($("number").value);
  }

  // -- one run ------------------------------------------------------------------------------------

  function readForm() {
    const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
    const control = goal() === "none" ? null : { [goal()]: Number($("number").value) };
    const wanted = goal() === "equal_to" || goal() === "at_least" ? Math.ceil(1.5 * Number($("number").value)) : 0;
    const most = number("max_tokens");
    const controls = control && $("compare").checked ? [control, null] : [control];
    return {
      controls,
      key: $("key").value.trim(),
      body: {
        messages: [{ role: "user", content: $("prompt").value }],
        max_tokens: most && Math.max(most, Math.min(wanted, limit)),
        temperature: number("temperature"),
        seed: number("seed"),
      },
    };
  }

  async function follow(index, control, form, signal) {
    const body = { ...form.body, ...(control ? { length: control } : {}), ...(hasValues ? { track_length: true } : {}) };
    for await (const chunk of lenvmStream.chat(body, form.key, signal)) {
      const [choice] = chunk.choices;
      if (!choice) continue;
      const state = chunk.lenvm || {};
      if (state.predicted_length != null && view.record.runs[index].predicted == null) view.predict(index, state.predicted_length);
      view.add(index, { text: choice.delta.content || "", value: state.value ?? null, remaining: state.remaining ?? null });
      if (choice.finish_reason) view.finish(index, choice.finish_reason);
    }
  }

  async function generate() {
    if (abort || !$("form").reportValidity()) return;
    const form = readForm();
    abort = new AbortController();
    fail(null);
    if (view) view.close();
    const runs = form.controls.map((control) => ({ control, tokens: [], predicted: null, finish: null }));
    const record = { version: 1, model: $("model").textContent, prompt: form.body.messages[0].content, created: new Date().toISOString(), runs };
    $("run").hidden = false;
    view = new lenvmRun.View($("run"), record);
    busy(true);
    const { signal } = abort;
    try {
      await Promise.all(form.controls.map((control, i) => follow(i, control, form, signal)));
      const [run] = runs;
      $("status").textContent = `Done: ${run.tokens.length} tokens, ${lenvmRun.judge(lenvmRun.goalOf(run.control), run.tokens.length, run.finish)[0]}`;
    } catch (error) {
      if (signal.aborted) $("status").textContent = "Stopped.";
      else fail(error);
      abort.abort();
    } finally {
      runs.forEach((run, i) => run.finish || view.finish(i, "stopped"));
      if (runs.every((run) => !run.tokens.length)) $("run").hidden = true;
      busy(false);
      abort = null;
    }
  }

  function busy(on) {
    $("go").disabled = on;
    $("stop").disabled = !on;
    $("share").hidden = on || $("run").hidden;
    $("examples").hidden = $("intro").hidden = $("how").hidden = true;
    if (on) $("status").textContent = "Generating.";
  }

  function fail(error) {
    $("error").hidden = !error;
    if (!error) return;
    const network = error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message;
    $("error").textContent = network;
    if (error.status === 401) {
      document.querySelector(".more").open = true;
      $("key").focus();
    }
  }

  // -- saving -------------------------------------------------------------------------------------

  async function save() {
    const [css, script] = await Promise.all(["/page/run.css", "/page/run.js"].map((path) => fetch(path).then((r) => r.text())));
    const safe = (text) => text.replace(/</g, "\\u003c").replace(/\u2028/g, "\\u2028").replace(/\u2029/g, "\\u2029");
    const { prompt, model, created } = view.record;
    const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
    const html = [
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      `<title>LenVM: ${escape(prompt.slice(0, 60))}</title><style>${css}</style></head>`,
      `<body><main><p class="asked">${escape(prompt)}</p>`,
      `<p class="soft">${escape(model)}, ${created.slice(0, 10)}</p><section id="run"></section></main>`,
      `<script>${script}\nnew lenvmRun.View(document.getElementById("run"), ${safe(JSON.stringify(view.record))});<\/script>`,
      "</body></html>\n",
    ];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(html, { type: "text/html" }));
    link.download = `lenvm-${created.slice(0, 19).replace(/[:T]/g, "-")}.html`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  // -- wiring -------------------------------------------------------------------------------------

  async function meetServer() {
    try {
      const [model] = (await lenvmStream.get("/v1/models", $("key").value.trim())).data;
      $("model").textContent = model.id;
      if (model.max_model_len) {
        longest = Math.max(64, Math.min(1024, Math.floor(model.max_model_len / 2)));
        limit = Math.max(1, Math.floor(model.max_model_len * 0.9));
        $("max_tokens").max = model.max_model_len;
        $("max_tokens").value = Math.min(512, longest);
      }
      hasValues = model.owned_by === "lenvm" && Boolean(model.lenvm);
      if (model.owned_by === "lenvm" && !model.lenvm) {
        for (const radio of document.querySelectorAll('input[name="goal"]')) radio.disabled = radio.value !== "none";
        document.querySelector('input[value="none"]').checked = true;
        $("model").textContent += " (no value model, so no control)";
      }
      showGoal();
    } catch (error) {
      $("model").textContent = "";
      fail(error);
    }
  }

  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("stop").addEventListener("click", () => abort && abort.abort());
  $("share").addEventListener("click", () => save().catch(fail));
  $("key").addEventListener("change", meetServer);
  $("slider").addEventListener("input", () => {
    $("number").value = fromSlider(Number($("slider").value));
    keep();
  });
  $("number").addEventListener("input", () => {
    $("slider").value = toSlider(Number($("number").value));
    keep();
  });
  for (const radio of document.querySelectorAll('input[name="goal"]')) radio.addEventListener("change", showGoal);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && abort) abort.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    }
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  for (const text of EXAMPLES) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = text;
    chip.addEventListener("click", () => {
      $("prompt").value = text;
      $("prompt").focus();
    });
    $("examples").append(chip);
  }
  showGoal();
  meetServer();
})();
