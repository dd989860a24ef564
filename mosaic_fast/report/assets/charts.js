// Line and stacked charts. Their crosshairs move together; the legend shows the values under the crosshair.

const WIDTH = 520, HEIGHT = 200, LEFT = 44, RIGHT = 10, TOP = 8, BOTTOM = 22;
const crosshair = new EventTarget();

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].find((candidate) => candidate * power >= rough) * power;
  const ticks = [];
  for (let tick = Math.ceil(low / unit) * unit; tick <= high + unit * 1e-9; tick += unit) ticks.push(+tick.toFixed(12));
  return ticks;
}

const isSmoothed = (one) => Boolean(one.smooth) && one.points.length > 4;

function smoothed(points, half = 2) {
  return points.map(([x], i) => {
    const window = points.slice(Math.max(0, i - half), i + half + 1);
    return [x, window.reduce((sum, [, y]) => sum + y, 0) / window.length];
  });
}

const linePath = (points, x, y) => points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

// series: {label, letter, tone, run, points: [[step, value]], smooth, dots}; tone names a CSS colour, run B is dashed.
function chart({ title, note, series, format = number, low = null, high = null, stacked = false }) {
  const shown = series.filter((one) => one.points.length);
  if (!shown.length) return null;
  const drawn = stacked ? stack(shown) : shown;
  const xs = [...new Set(shown.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
  const ys = drawn.flatMap((one) => one.points.map(([, y]) => y));
  const bottom = low ?? Math.min(...(stacked ? [0] : ys)), top = high ?? Math.max(...ys);
  const room = top > bottom ? (top - bottom) * 0.04 : Math.abs(top) * 0.1 || 1;
  const y0 = low ?? (stacked ? 0 : bottom - room), y1 = high ?? top + room;
  const first = xs[0], last = xs.at(-1);
  const x = (value) => (last > first ? LEFT + ((value - first) / (last - first)) * (WIDTH - LEFT - RIGHT) : (LEFT + WIDTH - RIGHT) / 2);
  const y = (value) => TOP + (1 - (value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);

  const canvas = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "canvas", role: "img", tabindex: 0, "aria-label": title });
  for (const tick of niceTicks(y0, y1, 4)) {
    canvas.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }));
    canvas.append(svg("text", { x: LEFT - 6, y: y(tick) + 3.5, class: "tick", "text-anchor": "end" }, format(tick)));
  }
  for (const tick of niceTicks(first, last, 6).filter(Number.isInteger)) {
    canvas.append(svg("text", { x: x(tick), y: HEIGHT - 6, class: "tick", "text-anchor": "middle" }, String(tick)));
  }
  drawn.forEach((one) => drawSeries(canvas, one, x, y, stacked));
  const line = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cross", visibility: "hidden" });
  canvas.append(line);

  const values = shown.map(() => el("span"));
  const at = el("span", { class: "at" });
  const show = (step) => {
    const near = step === null ? null : xs.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best));
    at.textContent = `step ${near ?? last}`;
    line.setAttribute("visibility", near === null ? "hidden" : "visible");
    if (near !== null) { line.setAttribute("x1", x(near)); line.setAttribute("x2", x(near)); }
    shown.forEach((one, i) => {
      const point = one.points.findLast(([a]) => a <= (near ?? last) && (near === null || a === near));
      values[i].textContent = point ? format(point[1]) : "\u2013";
    });
  };
  const move = (step) => crosshair.dispatchEvent(new CustomEvent("move", { detail: step }));
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const inside = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    move(first + Math.min(1, Math.max(0, inside)) * (last - first));
  });
  canvas.addEventListener("pointerleave", () => move(null));
  let index = xs.length - 1;
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    index = Math.min(xs.length - 1, Math.max(0, index + by));
    move(xs[index]);
  });
  canvas.addEventListener("blur", () => move(null));
  crosshair.addEventListener("move", (event) => { if (canvas.isConnected) show(event.detail); });
  show(null);
  return el("figure", { class: "chart" },
    el("figcaption", {}, el("h3", {}, title), at, note ? el("p", {}, note) : null,
      shown.some(isSmoothed) ? el("p", { class: "smoothing" }, "Bold line: mean of up to 5 steps around. Faint line and the figures here: the step itself.") : null),
    el("ul", { class: "legend" }, legend(shown, values, stacked)),
    canvas);
}

// One entry a label; of two runs, both values beside it.
function legend(series, values, stacked) {
  const labels = [...new Set(series.map((one) => one.label))];
  return labels.map((label) => {
    const places = series.map((_, i) => i).filter((i) => series[i].label === label);
    return el("li", {}, places.map((i) => swatch(series[i], stacked)), el("span", {}, label),
      places.map((i) => el("b", {}, series[i].letter ? el("small", {}, series[i].letter) : null, values[i])));
  });
}

function drawSeries(canvas, one, x, y, stacked) {
  const dash = one.run ? " second" : "", tone = `tone-${one.tone}`;
  if (stacked) {
    const upper = linePath(one.points, x, y), lower = linePath([...one.base].reverse(), x, y).replace("M", "L");
    canvas.append(svg("path", { d: `${upper}${lower}Z`, class: `area ${tone}` }));
    return;
  }
  const line = isSmoothed(one) ? smoothed(one.points) : one.points;
  if (isSmoothed(one)) canvas.append(svg("path", { d: linePath(one.points, x, y), class: `line faint ${tone}` }));
  canvas.append(svg("path", { d: linePath(line, x, y), class: `line ${tone}${dash}` }));
  if (one.dots || one.points.length === 1) {
    for (const [a, b] of one.points) canvas.append(svg("circle", { cx: x(a), cy: y(b), r: 3.6, class: `dot ${tone}${dash}` }));
  }
}

function stack(series) {
  const below = new Map();
  return series.map((one) => {
    const base = one.points.map(([x]) => [x, below.get(x) ?? 0]);
    const points = one.points.map(([x, y]) => [x, y + (below.get(x) ?? 0)]);
    points.forEach(([x, y]) => below.set(x, y));
    return { ...one, points, base };
  });
}

function swatch(one, stacked) {
  const dash = one.run ? " second" : "";
  const mark = stacked ? svg("rect", { x: 2, y: 1, width: 12, height: 8, class: "area" })
    : one.dots ? svg("circle", { cx: 8, cy: 5, r: 3.6, class: `dot${dash}` })
      : svg("line", { x1: 0, x2: 16, y1: 5, y2: 5, class: `line${dash}` });
  mark.classList.add(`tone-${one.tone}`);
  return svg("svg", { viewBox: "0 0 16 10", width: 16, height: 10, "aria-hidden": "true" }, mark);
}
