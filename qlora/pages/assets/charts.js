"use strict";
// Charts of runs over their steps, drawn by uPlot: one for each quantity, with one zoom and one cursor for all.

const NUM_COLORS = 8;
const BYTE_STEPS = Array.from({ length: 44 }, (_, power) => 2 ** power);
const DASHES = [[6, 4], [2, 3], [10, 3, 2, 3]];

function colorOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Add the charts to an element, and return what the toolbar needs: { zoom, reset, redraw }.
function drawCharts(host, runs) {
  const quantities = [...new Set(runs.flatMap((run) => run.charts.map((chart) => chart.quantity)))];
  const charts = [];
  const steps = runs.flatMap((run) => run.charts.flatMap((chart) => chart.curves.flatMap(({ steps }) => [steps[0], steps.at(-1)])));
  const first = Math.min(...steps), last = Math.max(...steps);
  const whole = first < last ? [first, last] : [first - 1, last + 1];
  let view = whole;

  function setView(from, to) {
    if (to - from < 1) return;
    view = [Math.max(whole[0], from), Math.min(whole[1], to)];
    for (const chart of charts) chart.show(view);
  }
  function zoom(factor, around) {
    const [from, to] = view, center = around ?? (from + to) / 2;
    setView(center - (center - from) / factor, center + (to - center) / factor);
  }
  const controls = {
    view: () => view,
    setView,
    zoom,
    reset: () => setView(...whole),
    redraw: () => charts.forEach((chart) => chart.redraw()),
  };
  for (const quantity of quantities) {
    const curves = runs.flatMap((run, place) => curvesOf(run, place, quantity, runs.length > 1));
    const { title } = runs.flatMap((run) => run.charts).find((chart) => chart.quantity === quantity);
    const events = quantity === "loss" ? runs.flatMap((run) => run.events.shown) : [];
    charts.push(makeChart(host, { quantity, title, curves, events, isWide: quantity === quantities[0] }, controls));
  }
  return controls;
}

// A run's curves of a quantity, with how they are drawn: by set in one run, by run where several are compared.
function curvesOf(run, place, quantity, isCompared) {
  const chart = run.charts.find((each) => each.quantity === quantity);
  if (!chart) return [];
  const sources = [...new Set(run.charts.flatMap((each) => each.curves.map((curve) => curve.source)))];
  const isSmoothed = chart.curves.some((curve) => curve.is_smoothed);
  const isRaw = (curve) => isSmoothed && curve.is_training && !curve.is_smoothed;
  const shown = isCompared ? chart.curves.filter((curve) => !isRaw(curve)) : chart.curves;
  return shown.map((curve) => {
    const number = sources.indexOf(curve.source);
    const own = curve.is_smoothed ? `${curve.source}, smoothed` : curve.source;
    return {
      ...curve,
      label: isCompared ? (shown.length > 1 ? `${run.name}: ${own}` : run.name) : own,
      color: `c${(isCompared ? place : number) % NUM_COLORS}`,
      dash: isCompared && !curve.is_training ? DASHES[(number - 1 + DASHES.length) % DASHES.length] : undefined,
      alpha: isRaw(curve) ? 0.32 : 1,
      width: isRaw(curve) ? 1 : curve.is_smoothed || !curve.is_training ? 2 : 1.4,
      hasPoints: !curve.is_training || curve.steps.length < 3,
    };
  });
}

function makeChart(host, { quantity, title, curves, events, isWide }, controls) {
  let isLog = false, plot = null;
  const area = make("div", { className: "plot", tabIndex: 0, role: "application" });
  area.setAttribute("aria-label", `${title} over steps. Arrow keys move the cursor, plus and minus zoom, 0 shows all, L switches to a log scale.`);
  const logButton = make("button", { type: "button", textContent: "log", title: "Logarithmic scale (L)", onclick: toggleLog });
  logButton.setAttribute("aria-pressed", "false");
  const values = curves.map(() => make("output"));
  const legend = make("ul", { className: "legend" }, ...curves.map((curve, place) => {
    const swatch = make("span", { className: `swatch${curve.alpha < 1 ? " faded" : ""}${curve.dash ? " dashed" : ""}` });
    swatch.style.setProperty("--color", `var(--${curve.color})`);
    const button = make("button", { type: "button", title: "Show or hide" }, swatch, make("span", { className: "name", textContent: curve.label }), values[place]);
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      const shown = !plot.series[place + 1].show;
      plot.setSeries(place + 1, { show: shown });
      button.setAttribute("aria-pressed", String(shown));
    };
    return make("li", {}, button);
  }));
  host.append(make("section", { className: `card chart${isWide ? " wide" : ""}` },
    make("div", { className: "head" }, make("h3", { textContent: title }), logButton), area, legend));

  function columns() {
    return uPlot.join(curves.map((curve) => [curve.steps, isLog ? curve.values.map((value) => (value > 0 ? value : null)) : curve.values]));
  }
  function draw() {
    const hidden = plot ? plot.series.map((series) => !series.show) : [];
    plot?.destroy();
    const axis = {
      stroke: () => colorOf("faint"), font: "12px system-ui, sans-serif", ticks: { show: false },
      grid: { stroke: () => colorOf("line"), width: 1 },
    };
    plot = new uPlot({
      width: area.clientWidth || 600,
      height: isWide ? 340 : 220,
      padding: [10, 30, 0, 0],
      legend: { show: false },
      scales: { x: { time: false }, y: isLog ? { distr: 3, log: 10 } : quantity === "peak_memory" ? { range: (_, low, high) => [0, 1.1 * high] } : {} },
      axes: [
        { ...axis, space: 70, size: 30, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString("en") : "")) },
        { ...axis, size: 62, incrs: quantity === "peak_memory" ? BYTE_STEPS : undefined, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : formatValue(quantity, tick, 3))) },
      ],
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, dataIdx: nearest, points: { size: 7 },
        bind: { dblclick: () => () => (controls.reset(), null) } },
      series: [{}, ...curves.map((curve, place) => ({
        label: curve.label, show: !hidden[place + 1], width: curve.width, alpha: curve.alpha, dash: curve.dash, spanGaps: true,
        stroke: () => colorOf(curve.color), points: { show: curve.hasPoints, size: 6, fill: () => colorOf(curve.color), width: 0 },
      }))],
      hooks: { setCursor: [showValues], setSelect: [selectSteps], draw: [markEvents] },
    }, columns(), area);
    show(controls.view());
    showValues(plot);
  }
  // The point of a series that is nearest to the cursor: series have points at different steps.
  function nearest(u, series, index) {
    const column = u.data[series];
    for (let distance = 0; series && distance < column.length; distance++) {
      if (column[index - distance] != null) return index - distance;
      if (column[index + distance] != null) return index + distance;
    }
    return index;
  }
  function showValues(u) {
    const at = u.cursor.idx == null ? Infinity : u.data[0][u.cursor.idx];
    curves.forEach((curve, place) => {
      const index = nearestIndex(curve.steps, at);
      values[place].textContent = formatValue(quantity, curve.values[index], 5);
      values[place].title = `step ${curve.steps[index].toLocaleString("en")}`;
    });
  }
  function selectSteps(u) {
    const { left, width } = u.select;
    if (width > 4) controls.setView(u.posToVal(left, "x"), u.posToVal(left + width, "x"));
    if (width) u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  }
  function markEvents(u) {
    const { ctx, bbox } = u, size = 5 * devicePixelRatio;
    ctx.save();
    ctx.fillStyle = colorOf("bad");
    for (const { step } of events) {
      const x = u.valToPos(step, "x", true), bottom = bbox.top + bbox.height;
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bottom - 1.6 * size);
      ctx.lineTo(x - size, bottom);
      ctx.lineTo(x + size, bottom);
      ctx.fill();
    }
    ctx.restore();
  }
  function show([min, max]) {
    plot.setScale("x", { min, max });
  }
  function toggleLog() {
    isLog = !isLog;
    logButton.setAttribute("aria-pressed", String(isLog));
    draw();
  }
  function moveCursor(by) {
    const all = plot.data[0], [from, to] = controls.view();
    const index = plot.cursor.idx == null ? (by > 0 ? nearestIndex(all, from) : nearestIndex(all, to)) : plot.cursor.idx + by;
    const step = all[Math.max(0, Math.min(all.length - 1, index))];
    plot.setCursor({ left: plot.valToPos(step, "x"), top: plot.over.clientHeight / 2 }, true, true);
  }
  area.addEventListener("keydown", (event) => {
    const at = plot.cursor.idx == null ? undefined : plot.data[0][plot.cursor.idx];
    const actions = {
      ArrowLeft: () => moveCursor(event.shiftKey ? -20 : -1), ArrowRight: () => moveCursor(event.shiftKey ? 20 : 1),
      "+": () => controls.zoom(1.6, at), "=": () => controls.zoom(1.6, at), "-": () => controls.zoom(1 / 1.6, at),
      0: controls.reset, Escape: controls.reset, l: toggleLog, L: toggleLog,
    };
    if (actions[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  draw();
  new ResizeObserver(() => area.clientWidth && area.clientWidth !== plot.width && plot.setSize({ width: area.clientWidth, height: plot.height })).observe(area);
  return { show, redraw: () => plot.redraw(true, true) };
}

// The index of the step nearest to a value, in ascending steps.
function nearestIndex(steps, value) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - steps[low - 1] <= steps[low] - value ? low - 1 : low;
}

function formatValue(quantity, value, digits) {
  if (value == null) return "";
  return quantity === "peak_memory" ? formatBytes(value, digits) : formatNumber(value, digits);
}
