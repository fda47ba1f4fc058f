"use strict";
// Builds the page from its values. Text of runs and data is only ever set as text, never parsed as HTML.

// Create an element with properties and children.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child != null));
  return element;
}

function formatNumber(value, digits = 5) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(Math.max(0, digits - 2)).replace("e+", "e").replace(/(\.\d*?)0+e/, "$1e").replace(".e", "e");
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function formatBytes(value, digits = 4) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) (value /= 1024), unit++;
  return `${Number(value.toPrecision(digits))} ${units[unit]}`;
}

function formatSeconds(value) {
  if (value < 60) return `${formatNumber(value, 3)} s`;
  const minutes = Math.round(value / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours.toLocaleString("en")} h ${minutes % 60} min` : `${minutes} min`;
}

// Format a value of a run's files, which may be missing or no number.
function format(value, unit, digits) {
  if (value == null) return "–";
  if (typeof value !== "number") return String(value);
  const formats = {
    number: (number) => formatNumber(number, digits), bytes: (number) => formatBytes(number), seconds: formatSeconds,
    integer: (number) => Math.round(number).toLocaleString("en"), share: (number) => `${(100 * number).toFixed(1)} %`,
  };
  return formats[unit] ? formats[unit](value) : String(value);
}

function facts(entries) {
  return make("dl", { className: "facts" }, ...entries.map(([label, value, unit]) =>
    make("div", {}, make("dt", { textContent: label }), make("dd", { textContent: format(value, unit) }))));
}

// A table that scrolls sideways; a cell is text, an element, or [value, unit].
function table(columns, rows, kinds = []) {
  const head = columns.some(Boolean) ? make("thead", {}, make("tr", {}, ...columns.map((name, place) => make("th", { textContent: name, className: kinds[place] ?? "", scope: "col" })))) : null;
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, place) => {
    const element = make("td", { className: kinds[place] ?? "" });
    element.append(cell instanceof Node ? cell : Array.isArray(cell) ? format(...cell) : String(cell ?? "–"));
    return element;
  }))));
  const region = make("div", { className: "card scroll", tabIndex: 0, role: "region" }, make("table", {}, head, body));
  region.setAttribute("aria-label", columns.join(", ") || "table");
  return region;
}

function pill(text, kind = "") {
  return make("span", { className: `pill ${kind}`, textContent: text });
}

function colored(element, name) {
  element.style.setProperty("--color", `var(--${name})`);
  return element;
}

function widened(element, share) {
  element.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return element;
}

function statusPill({ status, step, total_steps }) {
  const kind = status === "finished" ? "good" : status === "running" ? "" : "bad";
  return pill(status === "finished" ? `finished at step ${format(step, "integer")}` : `${status}, step ${format(step, "integer")} of ${format(total_steps, "integer")}`, kind);
}

// Sections of a page; those without anything to show are left out.

function curvesSection(runs) {
  if (!runs.some((run) => run.charts.length)) return [make("p", { className: "faint", textContent: "Nothing is logged yet." })];
  const charts = make("div", { className: "charts" });
  const toolbar = make("div", { className: "toolbar" });
  function draw() {
    const controls = drawCharts(charts, runs.filter((run) => run.charts.length));
    const button = (text, title, onclick) => make("button", { type: "button", textContent: text, title, onclick });
    toolbar.append(button("Zoom in", "Plus", () => controls.zoom(1.6)), button("Zoom out", "Minus", () => controls.zoom(1 / 1.6)), button("Show all", "0", controls.reset),
      make("span", { className: "faint small", textContent: "Drag over steps to zoom. Click a name to hide its curve." }));
    onTheme.push(controls.redraw);
    return [];
  }
  onceAttached.push(() => charts.append(...guarded(draw)));
  return [toolbar, charts];
}

function confusionSection({ confusion }) {
  if (!confusion) return [];
  const { labels, counts, step } = confusion;
  const rows = counts.map((row, place) => {
    const total = row.reduce((sum, count) => sum + count, 0) || 1;
    return [labels[place], ...row.map((count) => {
      const cell = make("span", { className: "share", textContent: format(count, "integer") });
      cell.style.setProperty("--share", `${Math.round((100 * count) / total)}%`);
      return cell;
    })];
  });
  const note = `Held-out examples at step ${format(step, "integer")}: a row for each label, a column for each prediction, shaded by the share of the row.`;
  return [make("p", { className: "faint small", textContent: note }), table(["", ...labels], rows, ["", ...labels.map(() => "number")])];
}

function samplesSection({ samples }) {
  if (!samples || !samples.steps.length) return [];
  const last = samples.steps.length - 1;
  const label = make("output");
  const slider = make("input", { type: "range", min: 0, max: last, value: last, step: 1 });
  slider.setAttribute("aria-label", "Step of the answers");
  const answers = samples.prompts.map(() => make("pre"));
  const titles = samples.prompts.map(() => make("h4"));
  const cards = samples.prompts.map((sample, number) => make("article", { className: "card sample" },
    make("h4", { textContent: "prompt" }), make("div", { className: "prompt", textContent: sample.prompt }),
    make("div", { className: "answers" },
      last ? make("div", {}, make("h4", { textContent: stepName(samples.steps[0]) }), make("pre", { textContent: sample.answers[0] ?? "–" })) : null,
      make("div", { className: "now" }, titles[number], answers[number]),
      sample.reference == null ? null : make("div", { className: "reference" }, make("h4", { textContent: "reference" }), make("pre", { textContent: sample.reference })))));
  function stepName(step) {
    return step ? `step ${format(step, "integer")}` : "before training";
  }
  function showStep() {
    const place = Number(slider.value), name = stepName(samples.steps[place]);
    label.textContent = name;
    slider.setAttribute("aria-valuetext", name);
    samples.prompts.forEach((sample, number) => {
      titles[number].textContent = name;
      answers[number].textContent = sample.answers[place] ?? "–";
    });
  }
  slider.oninput = showStep;
  showStep();
  const note = samples.prompts.length < samples.count ? make("p", { className: "faint small", textContent: `The first ${samples.prompts.length} of ${samples.count} prompts; all are in samples.jsonl.` }) : null;
  return [last ? make("div", { className: "step" }, make("label", { className: "faint small", textContent: "answers at" }), slider, label) : null, ...cards, note];
}

function eventsSection({ events }) {
  if (!events.count) return [];
  const rows = events.shown.map((event) => [
    [event.step, "integer"], pill(event.kind, "bad"), event.message,
    Object.entries(event.rows).map(([source, { shown, count }]) => `${shown.join(", ")}${count > shown.length ? ` and ${count - shown.length} more` : ""} of ${source}`).join("; "),
  ]);
  const note = events.count > events.shown.length ? make("p", { className: "faint small", textContent: `The first ${events.shown.length} of ${format(events.count, "integer")}; all are in metrics.jsonl.` }) : null;
  return [table(["step", "event", "what happened", "rows of the step"], rows, ["number", "", "text", "text"]), note];
}

function settingsSection({ settings, in_use: inUse }) {
  const changed = settings.filter((setting) => !setting.is_default), others = settings.filter((setting) => setting.is_default);
  return [
    table(["key", "value", "default"], changed.map(({ key, value, default: usual }) => [key, value, usual ?? "(required)"]), ["key", "code", "code faint"]),
    make("details", {}, make("summary", { textContent: `${others.length} keys at their defaults` }), table(["key", "value"], others.map(({ key, value }) => [key, value]), ["key", "code"])),
    make("details", {}, make("summary", { textContent: "What the run used where the config leaves it open" }), table(["", "value"], Object.entries(inUse), ["key", "code"])),
  ];
}

function dataSection({ data }) {
  return [make("div", { className: "cards" }, ...data.map((source) => {
    const fullest = Math.max(1, ...source.bars.map(([, , count]) => count));
    const bars = make("table", { className: "bars" }, make("tbody", {}, ...source.bars.map(([low, high, count]) => make("tr", {},
      make("td", { className: "number", textContent: `${low}–${high}` }), make("td", {}, widened(make("div", { className: "bar" }), count / fullest)), make("td", { className: "number", textContent: format(count, "integer") })))));
    bars.setAttribute("aria-label", "documents by length in tokens");
    const lengths = Object.entries(source.lengths).map(([name, value]) => `${name} ${format(value, "integer")}`).join(" · ");
    return make("article", { className: "card" }, make("h3", { textContent: source.source }), facts(source.facts),
      source.template ? make("p", { className: "faint small wrap", textContent: `Chat template: ${source.template}` }) : null,
      lengths ? make("p", { className: "faint small", textContent: `Length in tokens: ${lengths}` }) : null,
      source.bars.length ? bars : null,
      source.remarks.length ? make("ul", { className: "notes" }, ...source.remarks.map((remark) => make("li", { textContent: remark }))) : null);
  }))];
}

function memorySection({ memory, summary }) {
  const kinds = Object.entries(memory.by_kind ?? {}).filter(([, bytes]) => bytes);
  const largest = Math.max(memory.estimated ?? 0, memory.measured ?? 0, 1);
  const rows = [];
  const bar = (name, bytes, parts) => bytes == null ? [] : [make("span", { className: "small", textContent: name }),
    make("div", { className: "stack" }, ...parts.map(([color, part]) => colored(widened(make("div"), part / largest), color))), make("span", { className: "number small", textContent: format(bytes, "bytes") })];
  const estimated = kinds.length ? kinds.map(([, bytes], place) => [`c${place % NUM_COLORS}`, bytes]) : [["c0", memory.estimated]];
  rows.push(...bar("estimated", memory.estimated, estimated), ...bar("measured", memory.measured, [["c7", memory.measured]]));
  const legend = make("ul", { className: "legend" }, ...kinds.map(([kind, bytes], place) => make("li", {}, colored(make("span", { className: "dot" }), `c${place % NUM_COLORS}`), `${kind} `, make("strong", { className: "number", textContent: format(bytes, "bytes") }), "\u2003")));
  const lines = [
    `The run may take ${format(memory.available, "bytes")}. Activation checkpointing: ${memory.level} (${memory.why}).`,
    memory.estimated == null ? "The estimate is not known." : "The estimate is of the largest micro-batch, without cached weights.",
    memory.measured == null ? "Not measured: the largest micro-batch is tried only on a GPU." : "Measured by the allocator while the largest micro-batch was tried before step 1.",
    summary.peak_memory == null ? "" : `The peak of the run was ${format(summary.peak_memory, "bytes")}; without a GPU, that is of the whole process.`,
  ];
  return [make("div", { className: "card" }, make("div", { className: "memory" }, ...rows), kinds.length ? legend : null, ...lines.filter(Boolean).map((textContent) => make("p", { className: "faint small wrap", textContent })))];
}

function releasesSection({ releases }) {
  if (!releases.length) return [];
  return [table(["time", "what", "folder", "result"], releases.map((release) => {
    if (release.kind === "merge") {
      const losses = Object.entries(release.losses ?? {}).map(([onto, loss]) => `, loss ${format(loss, "number")} on ${onto}`).join("");
      return [release.time, "merge", release.out_dir, `step ${release.step}, ${release.dtype} onto ${release.onto}, ${release.merged} layers, ${format(release.num_bytes, "bytes")}${losses}`];
    }
    const compared = [
      release.tensors_checked == null ? null : `${format(release.tensors_checked, "integer")} tensors`, release.layers_checked == null ? null : `${format(release.layers_checked, "integer")} layers`,
      release.mean_kl == null ? null : `KL ${format(release.mean_kl, "number", 3)} nats`, release.top1_agreement == null ? null : `${format(release.top1_agreement, "share")} same top token`,
      release.adapter_loss == null ? null : `loss ${format(release.adapter_loss, "number")}${release.merged_loss == null ? "" : ` → ${format(release.merged_loss, "number")} merged`}`,
    ].filter(Boolean).join(", ");
    const result = make("span", {}, pill(release.matches ? "matches" : "MISMATCH", release.matches ? "good" : "bad"), ` ${[compared, ...(release.problems ?? [])].filter(Boolean).join("; ")}`);
    return [release.time, "verify", release.out_dir ?? "the adapter", result];
  }), ["key", "", "text", "text"])];
}

function reproduceSection({ command, environment }) {
  const copy = make("button", { type: "button", textContent: "Copy", onclick: () => navigator.clipboard.writeText(command).then(() => (copy.textContent = "Copied")) });
  return [
    make("div", { className: "card" }, make("pre", { textContent: command }), navigator.clipboard ? make("p", {}, copy) : null),
    make("details", {}, make("summary", { textContent: "Versions and hardware" }), table(["", ""], Object.entries(environment), ["key", "code"])),
  ];
}

const SECTIONS = { Confusion: confusionSection, Samples: samplesSection, Events: eventsSection, Settings: settingsSection, Data: dataSection, Memory: memorySection, Releases: releasesSection, Reproduce: reproduceSection };

// Build a part of the page; a value that it can't show costs that part alone.
function guarded(build, ...values) {
  try {
    return build(...values);
  } catch (problem) {
    return [make("p", { className: "faint", textContent: `This can't be shown, because a file of the run has an unexpected value: ${problem.message}` })];
  }
}

function runSections(run) {
  return Object.entries(SECTIONS).map(([name, section]) => [name, guarded(section, run)]).filter(([, content]) => content.length);
}

function comparedSections(runs, differing) {
  const names = runs.map((run, place) => make("span", {}, colored(make("span", { className: "dot" }), `c${place % NUM_COLORS}`), run.name));
  const rows = runs.map(({ summary }, place) => [names[place], statusPill(summary), [summary.best_loss, "number"], [summary.loss, "number"], [summary.learning_rate, "number"], [summary.rank, "integer"], [summary.seconds, "seconds"], [summary.size, "bytes"]]);
  const columns = ["run", "status", "lowest held-out loss", "training loss", "learning rate", "rank", "training time", "size"];
  const keys = Object.entries(differing).map(([key, values]) => [key, ...values]);
  return [
    ["Runs", [table(columns, rows, ["name", "", ...Array(6).fill("number")])]],
    ["Curves", guarded(curvesSection, runs)],
    ["Differences", [keys.length ? table(["key", ...runs.map((run) => run.name)], keys, ["key", ...runs.map(() => "code")]) : make("p", { className: "faint", textContent: "The runs have the same settings." })]],
    ["Each run", runs.map((run) => make("details", { className: "run" }, make("summary", { textContent: run.name }), facts(run.facts), ...runSections(run).flatMap(([name, content]) => [make("h2", { textContent: name }), ...content.filter(Boolean)])))],
  ];
}

function themeButton() {
  const root = document.documentElement, prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const button = make("button", { type: "button", className: "theme" });
  function apply(isDark) {
    root.classList.toggle("dark", isDark);
    button.textContent = isDark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark ? "light" : "dark"} colours`);
    onTheme.forEach((redraw) => redraw());
  }
  prefersDark.addEventListener("change", (event) => apply(event.matches));
  button.onclick = () => apply(!root.classList.contains("dark"));
  apply(prefersDark.matches);
  return button;
}

// Functions to call once the page is attached, because charts need their widths, and when its colours change.
const onceAttached = [], onTheme = [];

function buildPage({ runs, differing, version }) {
  const isCompared = runs.length > 1, [run] = runs;
  const sections = isCompared ? comparedSections(runs, differing) : [["Curves", guarded(curvesSection, runs)], ...runSections(run)];
  const anchor = (name) => name.toLowerCase().replaceAll(" ", "-");
  const head = isCompared
    ? make("div", {}, make("h1", { textContent: `${runs.length} runs` }))
    : make("div", {}, make("div", { className: "line" }, make("h1", { textContent: run.name }), statusPill(run.summary)), make("p", { className: "faint small wrap", textContent: run.summary.run }));
  const progress = isCompared || run.summary.status === "finished" ? null : make("div", { className: "progress" }, widened(make("div"), run.summary.step / run.summary.total_steps));
  document.getElementById("page").append(...[
    make("header", {}, head, themeButton()),
    make("nav", {}, ...sections.map(([name]) => make("a", { href: `#${anchor(name)}`, textContent: name }))),
    progress,
    isCompared ? null : facts(run.facts),
    make("main", {}, ...sections.map(([name, content]) => make("section", { id: anchor(name) }, make("h2", { textContent: name }), ...content.filter(Boolean)))),
    make("footer", { textContent: `Written by qlora ${version}. Curves are drawn by uPlot.` }),
  ].filter(Boolean));
  onceAttached.forEach((attach) => attach());
}

buildPage(JSON.parse(document.getElementById("values").textContent));
