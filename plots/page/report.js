"use strict";
// The page of a run, or of several of the same data. Everything it shows is in one JSON text, written by report.py, and
// every name in it is the user's: it reaches the page through textContent, never as markup.
//
//   data      what JSON holds, then unpacked: of each run its splits, "train" and "test" or "val" (the name is in
//             `tested`), with the points of all epochs
//   state     what the reader has chosen: epoch, view, classes
//   panels    a canvas for each split of each run; all have the same axes

const data = JSON.parse(document.getElementById("data").textContent);
const NOT_FINITE = 65535; // in place of a coordinate
const MOST_IMAGES = 200; // of a confusion
const MATRIX = 40; // classes; of more, the most frequent mistakes are listed
const UNKNOWN = data.classes.length; // the label of all classes that the network was not trained on
const SPLITS = { train: "training", val: "validation", test: "test" };

const state = {
  position: 0, // among `epochs`; between two of them while it plays
  view: { x: 0, y: 0, span: 1 }, // the middle, and how much of the x axis is seen
  hidden: new Set(), // labels
  mistakes: false, // only these
  point: null, // {panel, index}: the one that is pointed at
  marked: null, // {run, rows: Set of indices}: those of a confusion
  playing: null, // the time of the last frame
  clock: 0, // the position that the film has come to
};
const epochs = [
  ...new Set(data.runs.flatMap((run) => Object.values(run.splits).flatMap((split) => split.epochs))),
].sort((a, b) => a - b);
const panels = [];
const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (in `attributes`) and children, of which strings become text. */
function element(name, { attributes = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const color = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
const number = (value, digits = 4) =>
  value === null || value === undefined ? "–" : String(+value.toPrecision(digits)).replace("-", "−");

const nameOf = (label) => (label === UNKNOWN ? "unknown" : data.classes[label]);
/** A prediction for an image of an unknown class is no mistake: none could be right. */
const isMistake = (label, predicted) => label !== predicted && label !== UNKNOWN;

// ---------------------------------------------------------------------------------------------------------------- data

/** The integers that report.pack has written: all low bytes, then all high bytes, deflated, in base 64. */
async function unpack(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const values = new Uint16Array(planes.length / 2);
  for (let i = 0; i < values.length; i++) values[i] = planes[i] | (planes[i + values.length] << 8);
  return values;
}

async function unpackRun(run) {
  for (const split of Object.values(run.splits)) {
    for (const name of ["points", "labels", "predictions"]) split[name] = await unpack(split[name]);
    // Points are drawn class by class; training points, new ones in each epoch, are sorted by class already.
    split.order = Uint32Array.from({ length: split.count }, (_, i) => i);
    if (split.rows.length) split.order.sort((a, b) => split.labels[a] - split.labels[b]);
  }
  if (run.images === "as the first run")
    Object.assign(run, { images: data.runs[0].images, sprite: data.runs[0].sprite });
  else if (run.images) {
    run.sprite = new Image();
    run.sprite.src = run.images.source;
    await run.sprite.decode();
  }
}

/** The index of the latest epoch of a split that is not after the epoch shown. */
function at(split, epoch = epochs[Math.floor(state.position)]) {
  let index = 0;
  while (index + 1 < split.epochs.length && split.epochs[index + 1] <= epoch) index++;
  return index;
}

/** Calls visit(i, x, y, label) for each point of a split that is shown, between two epochs where the film is. */
function eachPoint(split, visit) {
  const index = at(split);
  const count = split.count;
  const labels = split.labels;
  const predictions = split.predictions;
  const points = split.points;
  const from = 2 * count * index;
  const grid = split.grids[index];
  let share = state.position % 1;
  let next = null;
  // Test points keep their rows, so that they can move from one epoch to the next.
  if (share && split.rows.length && split.epochs[index + 1] === epochs[Math.floor(state.position) + 1])
    next = split.grids[index + 1];
  else share = 0;
  const to = from + 2 * count;
  for (const i of split.order) {
    const label = labels[count * index + i];
    if (state.hidden.has(label) || (state.mistakes && !isMistake(label, predictions[count * index + i]))) continue;
    if (points[from + i] === NOT_FINITE) continue;
    let x = grid[0] + grid[1] * points[from + i];
    let y = grid[2] + grid[3] * points[from + count + i];
    if (next && points[to + i] !== NOT_FINITE) {
      x += share * (next[0] + next[1] * points[to + i] - x);
      y += share * (next[2] + next[3] * points[to + count + i] - y);
    }
    visit(i, x, y, label);
  }
}

/** The centers at the epoch shown: [x, y] or null. */
function centersOf(split) {
  const index = at(split);
  const share = state.position % 1;
  const next = split.centers[index + 1];
  if (!share || !next || split.epochs[index + 1] !== epochs[Math.floor(state.position) + 1])
    return split.centers[index];
  return split.centers[index].map((center, label) =>
    center && next[label] ? center.map((value, axis) => value + share * (next[label][axis] - value)) : center,
  );
}

const prediction = (split, i) => split.predictions[split.count * at(split) + i];
const labelOf = (split, i) => split.labels[split.count * at(split) + i];

// ---------------------------------------------------------------------------------------------------------------- view

/** Shows all points of all epochs, or only those of the epoch shown. */
function fit(all) {
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const run of data.runs) {
    for (const split of Object.values(run.splits)) {
      split.grids.forEach(([x, stepX, y, stepY], index) => {
        if (!all && index !== at(split)) return;
        const corners = [[x, y], [x + 65534 * stepX, y + 65534 * stepY], ...split.centers[index].filter(Boolean)];
        for (const [cornerX, cornerY] of corners) {
          x0 = Math.min(x0, cornerX);
          x1 = Math.max(x1, cornerX);
          y0 = Math.min(y0, cornerY);
          y1 = Math.max(y1, cornerY);
        }
      });
    }
  }
  const box = panels[0].box;
  const span = 1.06 * Math.max(x1 - x0, ((y1 - y0) * box.width) / box.height, 1e-9);
  state.view = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, span };
  redraw();
}

/** Zooms by a factor about a point of the plane, by default the middle. */
function zoom(factor, x = state.view.x, y = state.view.y) {
  const view = state.view;
  state.view = { x: x + (view.x - x) / factor, y: y + (view.y - y) / factor, span: view.span / factor };
  redraw();
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    panels.forEach(draw);
  });
}

/** The box of a panel that holds its points, and the plane's window in it. */
function measure(panel) {
  const ratio = window.devicePixelRatio || 1;
  const width = panel.canvas.clientWidth;
  const height = panel.canvas.clientHeight;
  if (panel.canvas.width !== Math.round(width * ratio) || panel.canvas.height !== Math.round(height * ratio)) {
    panel.canvas.width = Math.round(width * ratio);
    panel.canvas.height = Math.round(height * ratio);
  }
  panel.ratio = ratio;
  panel.box = { left: 46, top: 6, width: Math.max(width - 52, 10), height: Math.max(height - 46, 10) };
}

function toPixel(panel, x, y) {
  const { left, top, width, height } = panel.box,
    scale = width / state.view.span;
  return [left + width / 2 + (x - state.view.x) * scale, top + height / 2 - (y - state.view.y) * scale];
}

function toPlane(panel, pixelX, pixelY) {
  const { left, top, width, height } = panel.box,
    scale = width / state.view.span;
  return [state.view.x + (pixelX - left - width / 2) / scale, state.view.y - (pixelY - top - height / 2) / scale];
}

/** About `count` round numbers between two. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(+(i * step).toPrecision(6));
  return found;
}

function draw(panel) {
  measure(panel);
  const { canvas, split, box } = panel,
    context = canvas.getContext("2d");
  const [x0, y1] = toPlane(panel, box.left, box.top),
    [x1, y0] = toPlane(panel, box.left + box.width, box.top + box.height);
  canvas.dataset.limits = [x0, x1, y0, y1].map((value) => value.toPrecision(9)).join(" ");
  context.setTransform(panel.ratio, 0, 0, panel.ratio, 0, 0);
  context.fillStyle = color("--ground");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.font = "12px " + getComputedStyle(document.body).fontFamily;

  context.strokeStyle = color("--grid");
  context.fillStyle = color("--soft");
  context.beginPath();
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const x of ticks(x0, x1, Math.max(box.width / 70, 4))) {
    const [pixel] = toPixel(panel, x, 0);
    context.moveTo(pixel, box.top);
    context.lineTo(pixel, box.top + box.height);
    context.fillText(number(x), pixel, box.top + box.height + 5);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const y of ticks(y0, y1, Math.max(box.height / 50, 4))) {
    const [, pixel] = toPixel(panel, 0, y);
    context.moveTo(box.left, pixel);
    context.lineTo(box.left + box.width, pixel);
    context.fillText(number(y), box.left - 5, pixel);
  }
  context.stroke();
  context.textAlign = "center";
  context.textBaseline = "bottom";
  context.fillText(panel.run.axes[0], box.left + box.width / 2, box.top + box.height + 38, box.width);
  context.save();
  context.translate(9, box.top + box.height / 2);
  context.rotate(-Math.PI / 2);
  context.textBaseline = "middle";
  context.fillText(panel.run.axes[1], 0, 0, box.height);
  context.restore();

  context.save();
  context.beginPath();
  context.rect(box.left, box.top, box.width, box.height);
  context.clip();
  drawPoints(panel, context);
  drawCenters(panel, context);
  context.restore();
  context.strokeStyle = color("--line");
  context.strokeRect(box.left, box.top, box.width, box.height);
}

function drawPoints(panel, context) {
  const { split, box } = panel,
    scale = box.width / state.view.span;
  const left = box.left + box.width / 2 - state.view.x * scale;
  const top = box.top + box.height / 2 + state.view.y * scale;
  const radius = Math.min(Math.max(110 / Math.sqrt(Math.max(...panels.map((each) => each.split.count))), 1), 2.8);
  const round = split.count <= 3000;
  const ring = []; // of what is marked or pointed at, above all others
  const unknown = new Path2D(); // circles around these
  const marked = panel.tested && state.marked?.run === panel.run ? state.marked.rows : null;
  const same =
    state.point && (state.point.panel === panel || (state.point.panel.tested && panel.tested))
      ? state.point.index
      : null;
  let last = -1;
  eachPoint(split, (i, x, y, label) => {
    const pixelX = left + x * scale;
    const pixelY = top - y * scale;
    if (
      pixelX < box.left - radius ||
      pixelX > box.left + box.width + radius ||
      pixelY < box.top - radius ||
      pixelY > box.top + box.height + radius
    )
      return;
    if (i === same || marked?.has(i)) ring.push([pixelX, pixelY, i === same ? 7 : 4.5]);
    if (label === UNKNOWN) {
      unknown.moveTo(pixelX + radius, pixelY);
      unknown.arc(pixelX, pixelY, radius, 0, 7);
      return;
    }
    if (label !== last) {
      if (round && last >= 0) context.fill();
      context.fillStyle = data.colors[label];
      context.beginPath();
      last = label;
    }
    if (round) {
      context.moveTo(pixelX, pixelY);
      context.arc(pixelX, pixelY, radius, 0, 7);
    } else {
      context.fillRect(pixelX - radius, pixelY - radius, 2 * radius, 2 * radius);
    }
  });
  if (round && last >= 0) context.fill();
  context.strokeStyle = color("--soft");
  context.stroke(unknown);
  context.strokeStyle = color("--ink");
  context.lineWidth = 1.5;
  for (const [x, y, size] of ring) {
    context.beginPath();
    context.arc(x, y, size, 0, 7);
    context.stroke();
  }
  context.lineWidth = 1;
}

function drawCenters(panel, context) {
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.font = `${data.classes.length <= 40 ? 11 : 9}px ${getComputedStyle(document.body).fontFamily}`;
  centersOf(panel.split).forEach((center, label) => {
    if (!center || state.hidden.has(label)) return;
    const [x, y] = toPixel(panel, ...center);
    context.beginPath();
    context.arc(x, y, Math.max(7.5, context.measureText(data.marks[label]).width / 2 + 3.5), 0, 7);
    context.fillStyle = "#ffffffc0";
    context.fill();
    context.lineWidth = 2;
    context.strokeStyle = data.colors[label];
    context.stroke();
    context.fillStyle = "#111";
    context.fillText(data.marks[label], x, y + 0.5);
  });
  context.lineWidth = 1;
}

// --------------------------------------------------------------------------------------------------------- the epochs

/** Shows the epoch at a position among `epochs`. */
function show(position) {
  const before = Math.floor(state.position);
  const ready = $("shown").textContent;
  state.position = Math.min(Math.max(position, 0), epochs.length - 1);
  redraw();
  if (Math.floor(state.position) === before && ready) return;
  const epoch = epochs[Math.floor(state.position)];
  $("epoch").value = Math.floor(state.position);
  $("epoch").setAttribute("aria-valuetext", `epoch ${epoch}`);
  $("shown").textContent = `${epoch} of ${epochs[epochs.length - 1]}`;
  for (const panel of panels) describe(panel);
  for (const chart of charts) chart(epoch);
  for (const matrix of matrices) matrix();
  if (state.marked) showImages(state.marked.run, state.marked.label, state.marked.predicted);
  if (state.point) pointAt(state.point.panel, state.point.index);
}

function describe(panel) {
  const epoch = panel.split.epochs[at(panel.split)];
  const row = panel.run.history.find((each) => each.epoch === epoch);
  const name = SPLITS[panel.name];
  const accuracy = row?.[`${panel.name}_accuracy`];
  const title = data.runs.length > 1 ? `${panel.run.name} · ` : "";
  const sample =
    panel.split.of > panel.split.count
      ? `; ${panel.split.count.toLocaleString("en")} of ${panel.split.of.toLocaleString("en")} shown`
      : "";
  const text = `${title}${name}, epoch ${epoch}${accuracy == null ? "" : `: accuracy ${accuracy.toFixed(2)} %`}${sample}`;
  panel.caption.textContent = text;
  panel.canvas.setAttribute("aria-label", `Features, ${text}. Press n for the next mistake.`);
}

function play(on) {
  if (on && state.position >= epochs.length - 1) show(0);
  state.playing = on ? performance.now() : null;
  state.clock = state.position;
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
  if (on) requestAnimationFrame(step);
  else show(Math.floor(state.position));
}

/** A frame of the film, which takes twelve seconds, a short one less. */
function step(now) {
  if (state.playing === null) return;
  state.clock += (Math.max(now - state.playing, 0) / 1000) * Math.max(epochs.length / 12, 1.5);
  state.playing = now;
  show(matchMedia("(prefers-reduced-motion: reduce)").matches ? Math.floor(state.clock) : state.clock);
  if (state.position >= epochs.length - 1) play(false);
  else requestAnimationFrame(step);
}

// --------------------------------------------------------------------------------------------------------- one point

/** The index of the nearest point that is shown within ten pixels, or null. */
function nearest(panel, pixelX, pixelY) {
  let best = 100;
  let found = null;
  eachPoint(panel.split, (i, x, y) => {
    const [px, py] = toPixel(panel, x, y),
      distance = (px - pixelX) ** 2 + (py - pixelY) ** 2;
    if (distance < best) [best, found] = [distance, i];
  });
  return found;
}

/** Where a point is at the epoch shown: [x, y], or null where it is hidden. */
function place(panel, index) {
  let found = null;
  eachPoint(panel.split, (i, x, y) => {
    if (i === index) found = [x, y];
  });
  return found;
}

/** A test image on a canvas of its own. */
function picture(run, i) {
  const { columns, width, height } = run.images,
    canvas = element("canvas", { width, height });
  canvas
    .getContext("2d")
    .drawImage(run.sprite, (i % columns) * width, Math.floor(i / columns) * height, width, height, 0, 0, width, height);
  return canvas;
}

/** Tells about a point, beside it; null: about none. */
function pointAt(panel, index) {
  const box = $("point");
  const found = index === null ? null : place(panel, index);
  state.point = found ? { panel, index } : null;
  box.hidden = !found;
  redraw();
  if (!found) return;
  const { split, run } = panel,
    label = labelOf(split, index),
    predicted = prediction(split, index);
  const lines = element(
    "div",
    {},
    element("p", {}, `class ${nameOf(label)}`),
    element("p", { className: isMistake(label, predicted) ? "wrong" : "" }, `predicted ${data.classes[predicted]}`),
    element("p", {}, `epoch ${split.epochs[at(split)]}: (${number(found[0])}, ${number(found[1])})`),
  );
  if (split.rows.length) lines.append(element("p", {}, `${SPLITS[panel.name]} image ${split.rows[index]}`));
  box.replaceChildren(...(split.rows.length && run.images ? [picture(run, index)] : []), lines);
  const [x, y] = toPixel(panel, ...found),
    area = panel.canvas.getBoundingClientRect();
  const room = document.documentElement.clientWidth - box.offsetWidth - 8;
  const below = area.top + y + 14;
  box.style.left = `${Math.max(Math.min(area.left + x + 14, room), 8) + scrollX}px`;
  box.style.top = `${(below + box.offsetHeight > innerHeight ? area.top + y - box.offsetHeight - 14 : below) + scrollY}px`;
}

/** Goes to the next (1) or previous (-1) mistake of a panel that is shown. */
function nextMistake(panel, direction) {
  const wrong = [];
  eachPoint(panel.split, (i, x, y, label) => {
    if (isMistake(label, prediction(panel.split, i))) wrong.push(i);
  });
  if (!wrong.length) return pointAt(panel, null);
  const current = state.point?.panel === panel ? wrong.indexOf(state.point.index) : direction > 0 ? -1 : 0;
  pointAt(panel, wrong[(current + direction + wrong.length) % wrong.length]);
}

function createPanel(run, name) {
  const canvas = element("canvas", {
      tabIndex: 0,
      attributes: { role: "application", "aria-roledescription": "scatter plot" },
    }),
    caption = element("figcaption");
  const panel = { run, name, tested: name === run.tested, split: run.splits[name], canvas, caption };
  $("panels").append(element("figure", {}, caption, canvas));
  let dragged = null;
  const inside = (event) => {
    const area = canvas.getBoundingClientRect();
    return [event.clientX - area.left, event.clientY - area.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    dragged = inside(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => (dragged = null));
  canvas.addEventListener("pointercancel", () => (dragged = null));
  canvas.addEventListener("pointerleave", () => pointAt(panel, null));
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = inside(event);
    if (!dragged) return pointAt(panel, nearest(panel, x, y));
    const scale = panel.box.width / state.view.span;
    state.view.x -= (x - dragged[0]) / scale;
    state.view.y += (y - dragged[1]) / scale;
    dragged = [x, y];
    redraw();
  });
  canvas.addEventListener("dblclick", (event) => zoom(event.shiftKey ? 0.5 : 2, ...toPlane(panel, ...inside(event))));
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // else the page could not be scrolled past the plots
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), ...toPlane(panel, ...inside(event)));
    },
    { passive: false },
  );
  const keys = {
    "+": () => zoom(1.5),
    "=": () => zoom(1.5),
    "-": () => zoom(1 / 1.5),
    0: () => fit(true),
    n: () => nextMistake(panel, 1),
    p: () => nextMistake(panel, -1),
    " ": () => play(state.playing === null),
    Escape: () => pointAt(panel, null),
    ArrowLeft: () => pan(-1, 0),
    ArrowRight: () => pan(1, 0),
    ArrowUp: () => pan(0, 1),
    ArrowDown: () => pan(0, -1),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  panels.push(panel);
  measure(panel);
}

function pan(x, y) {
  state.view.x += (x * state.view.span) / 10;
  state.view.y += (y * state.view.span) / 10;
  redraw();
}

// -------------------------------------------------------------------------------------------------------------- legend

function createLegend() {
  const labels = [...data.classes.keys()];
  const legend = labels.map((label) => {
    const [name, mark, short] = [data.classes[label], data.marks[label], data.short[label]];
    return { title: name, color: data.colors[label], text: name.startsWith(mark) ? short : `${mark} ${short}` };
  });
  if (data.runs.some((run) => run.splits[run.tested].labels.includes(UNKNOWN))) {
    labels.push(UNKNOWN);
    legend.push({ title: "classes left out of the training", className: "unknown", text: "unknown" });
  }
  const buttons = labels.map((label) => {
    const { title, className = "", color = "", text } = legend[label];
    const button = element(
      "button",
      { type: "button", title, className, attributes: { style: `--class: ${color}` } },
      element("span", {}, text),
    );
    button.addEventListener("click", () =>
      hide((hidden) => (hidden.has(label) ? hidden.delete(label) : hidden.add(label))),
    );
    button.addEventListener("dblclick", () =>
      hide((hidden) =>
        labels.forEach((other) => (other === label ? hidden.delete(other) : hidden.add(other))),
      ),
    );
    return button;
  });
  const hide = (change) => {
    change(state.hidden);
    buttons.forEach((button, label) => button.setAttribute("aria-pressed", String(!state.hidden.has(label))));
    if (state.point) pointAt(state.point.panel, null);
    redraw();
  };
  $("legend").append(...buttons);
  $("all").addEventListener("click", () => hide((hidden) => hidden.clear()));
  $("none").addEventListener("click", () => hide((hidden) => labels.forEach((label) => hidden.add(label))));
  hide(() => {});
}

// -------------------------------------------------------------------------------------------------------------- curves

const charts = []; // functions that move the cursor to an epoch

/** A chart on a logarithmic axis. `series`: name, color (a variable), dash, and points [epoch, value]. */
function createChart(title, unit, series) {
  const [left, top, width, height] = [46, 8, Math.min(500, $("curves").clientWidth - 60), 230];
  const values = series.flatMap((each) => each.points.map((point) => point[1])).filter((value) => value > 0);
  const low = Math.log10(Math.min(...values) / 1.25);
  const high = Math.log10(Math.max(...values) * 1.25);
  const first = epochs[0];
  const last = Math.max(epochs[epochs.length - 1], first + 1);
  const x = (epoch) => left + (width * (epoch - first)) / (last - first);
  const y = (value) => top + height * (1 - (Math.log10(Math.max(value, 1e-30)) - low) / (high - low));
  const svg = drawn("svg", {
    viewBox: `0 0 ${left + width + 8} ${top + height + 38}`,
    role: "img",
    "aria-label": `${title} over the epochs`,
  });
  const decades = high - low;
  const factors = decades > 3 ? [1] : decades > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (Math.log10(value) < low || Math.log10(value) > high) continue;
      svg.append(drawn("line", { class: "grid", x1: left, x2: left + width, y1: y(value), y2: y(value) }));
      svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 3)));
    }
  }
  for (const epoch of ticks(first, last, 8).filter(Number.isInteger)) {
    svg.append(drawn("text", { x: x(epoch), y: top + height + 17, "text-anchor": "middle" }, String(epoch)));
  }
  svg.append(drawn("text", { x: left + width / 2, y: top + height + 34, "text-anchor": "middle" }, "epoch"));
  svg.append(drawn("rect", { class: "frame", x: left, y: top, width, height }));
  const cursor = drawn("line", { class: "cursor", y1: top, y2: top + height });
  const key = element("ul", { className: "key" });
  const items = [];
  const inner = drawn("svg", {
    x: left,
    y: top,
    width,
    height,
    viewBox: `${left} ${top} ${width} ${height}`,
    style: "overflow: hidden; width: auto",
  });
  svg.append(inner, cursor);
  for (const { name, color: variable, dash, points } of series) {
    const style = { class: "series", stroke: `var(${variable})`, "stroke-dasharray": dash };
    inner.append(
      drawn("polyline", { ...style, points: points.map(([epoch, value]) => `${x(epoch)},${y(value)}`).join(" ") }),
    );
    if (points.length === 1)
      inner.append(drawn("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, fill: `var(${variable})` }));
    const text = element("span");
    const sample = drawn("svg", { viewBox: "0 0 26 8" }, drawn("line", { ...style, x1: 0, x2: 26, y1: 4, y2: 4 }));
    key.append(element("li", {}, sample, text));
    items.push((epoch) => {
      const measured = points.filter((point) => point[0] <= epoch).pop();
      text.textContent = `${name} ${measured ? number(measured[1], 3) + unit : "–"}`;
    });
  }
  svg.addEventListener("click", (event) => {
    const area = svg.getBoundingClientRect();
    const epoch =
      first + ((((event.clientX - area.left) / area.width) * (left + width + 8) - left) / width) * (last - first);
    const distances = epochs.map((each) => Math.abs(each - epoch));
    show(distances.indexOf(Math.min(...distances)));
  });
  charts.push((epoch) => {
    cursor.setAttribute("x1", x(epoch));
    cursor.setAttribute("x2", x(epoch));
    items.forEach((item) => item(epoch));
  });
  $("curves").append(element("figure", {}, element("h3", {}, title), svg, key));
}

function createCurves() {
  const several = data.runs.length > 1;
  for (const [title, unit, measures] of [
    [
      "Loss",
      "",
      [
        ["train_loss", "training: total", "--series-3", ""],
        ["train_xent", "training: cross-entropy", "--series-0", ""],
        ["train_center", "training: λ · center loss", "--series-2", "2 3"],
        ["val_xent", "validation: cross-entropy", "--series-3", "6 3"],
        ["test_xent", "test: cross-entropy", "--series-1", ""],
      ],
    ],
    [
      "Error rate (%)",
      " %",
      [
        ["train_accuracy", "training: softmax", "--series-0", ""],
        ["val_accuracy", "validation: softmax", "--series-3", ""],
        ["val_nearest_center_accuracy", "validation: nearest center", "--series-3", "6 3"],
        ["test_accuracy", "test: softmax", "--series-1", ""],
        ["nearest_center_accuracy", "test: nearest center", "--series-2", "6 3"],
      ],
    ],
  ]) {
    const series = data.runs.flatMap((run, index) =>
      measures.map(([column, name, variable, dash], kind) => ({
        name: several ? `${run.name}, ${name}` : name,
        color: several ? `--series-${index % 4}` : variable,
        dash: several ? ["", "6 3", "2 3", "8 3 2 3", "1 2"][kind] : dash,
        points: run.history
          .filter((row) => row[column] != null) // validation has columns only where it has images
          .map((row) => [row.epoch, unit ? 100 - row[column] : row[column]]),
      })),
    );
    const measured = series.filter(({ points }) => points.some(([, value]) => value > 0));
    if (measured.length) createChart(title, unit, measured);
  }
}

// ----------------------------------------------------------------------------------------------------------- confusion

const matrices = []; // functions that count again, for the epoch shown

function createConfusion(run) {
  const split = run.splits[run.tested];
  const count = data.classes.length;
  const title = element("h3");
  const figure = element("figure", {}, title);
  $("confusion").append(figure);
  const cells = [];
  const list = element("ol", { className: "mistakes" });
  if (count <= MATRIX) {
    const long = data.classes.some((name) => name.length > 3) ? "long" : "";
    const head = element(
      "tr",
      {},
      element("th", {}, "true \\ predicted"),
      ...data.classes.map((name, label) =>
        element("th", { scope: "col", title: name }, element("span", { className: long }, data.short[label])),
      ),
    );
    const rows = data.classes.map((name, label) =>
      element(
        "tr",
        {},
        element("th", { scope: "row", title: name }, data.short[label]),
        ...data.classes.map((_, predicted) => {
          const cell = element("button", { type: "button" });
          cell.addEventListener("click", () => showImages(run, label, predicted));
          cells.push(cell);
          return element("td", {}, cell);
        }),
      ),
    );
    const table = element("table", { className: "matrix" }, element("thead", {}, head), element("tbody", {}, ...rows));
    figure.append(element("div", { className: "scroll", tabIndex: 0 }, table));
  } else figure.append(list);

  matrices.push(() => {
    const counts = new Uint32Array(count * count);
    const totals = new Uint32Array(count);
    const from = split.count * at(split);
    for (let i = 0; i < split.count; i++) {
      const label = split.labels[from + i];
      if (label === UNKNOWN) continue;
      counts[label * count + split.predictions[from + i]]++;
      totals[label]++;
    }
    const of =
      split.of > split.count ? `, ${split.count.toLocaleString("en")} of ${split.of.toLocaleString("en")} images` : "";
    title.textContent = `${data.runs.length > 1 ? `${run.name} · ` : ""}${SPLITS[run.tested]}, epoch ${split.epochs[at(split)]}${of}`;
    cells.forEach((cell, index) => {
      const [label, predicted] = [Math.floor(index / count), index % count],
        share = counts[index] / Math.max(totals[label], 1);
      cell.textContent = counts[index] || "";
      cell.disabled = !counts[index];
      cell.style.background = share ? `rgb(63 144 218 / ${0.12 + 0.6 * share})` : "";
      cell.setAttribute(
        "aria-label",
        `${counts[index]} of class ${data.classes[label]} predicted as ${data.classes[predicted]}`,
      );
    });
    if (!cells.length) {
      const wrong = [...counts.keys()].filter((index) => counts[index] && Math.floor(index / count) !== index % count);
      wrong.sort((a, b) => counts[b] - counts[a] || a - b);
      list.replaceChildren(
        ...wrong.slice(0, MATRIX).map((index) => {
          const [label, predicted] = [Math.floor(index / count), index % count];
          const button = element(
            "button",
            { type: "button" },
            `${data.short[label]} → ${data.short[predicted]}: ${counts[index]} of ${totals[label]}`,
          );
          button.addEventListener("click", () => showImages(run, label, predicted));
          return element("li", {}, button);
        }),
      );
    }
  });
}

/** Shows the test images of a class that are predicted as another, and marks their points. */
function showImages(run, label, predicted) {
  const split = run.splits[run.tested];
  const from = split.count * at(split);
  const found = [];
  for (let i = 0; i < split.count; i++)
    if (split.labels[from + i] === label && split.predictions[from + i] === predicted) found.push(i);
  state.marked = { run, label, predicted, rows: new Set(found) };
  const shown = found.slice(0, MOST_IMAGES);
  const more = found.length > shown.length ? `, the first ${shown.length} shown` : "";
  const close = element("button", { type: "button" }, "Close");
  close.addEventListener("click", () => {
    state.marked = null;
    $("images").hidden = true;
    redraw();
  });
  const panel = panels.find((each) => each.run === run && each.tested);
  const buttons = shown.map((i) => {
    const text = `${SPLITS[run.tested]} image ${split.rows[i]}: class ${data.classes[label]}, predicted ${data.classes[predicted]}`;
    const button = element(
      "button",
      { type: "button", title: text, attributes: { "aria-label": text } },
      run.images ? picture(run, i) : String(split.rows[i]),
    );
    button.addEventListener("click", () => {
      panel.canvas.scrollIntoView({ block: "center" });
      pointAt(panel, i);
    });
    return button;
  });
  const title = `${data.classes[label]} predicted as ${data.classes[predicted]}, epoch ${split.epochs[at(split)]}: ${found.length}${more}`;
  $("images").hidden = false;
  $("images").replaceChildren(element("h3", {}, title, close), element("div", {}, ...buttons));
  redraw();
}

// ------------------------------------------------------------------------------------------------------------ the run

const duration = (seconds) =>
  seconds == null
    ? "–"
    : `${Math.floor(seconds / 3600)}:${new Date((seconds % 3600) * 1000).toISOString().slice(14, 19)}`;

/** A table with a column for each run; a row whose values differ is marked. */
function createTable(rows) {
  const several = data.runs.length > 1;
  const head = several
    ? [element("tr", {}, element("th"), ...data.runs.map((run) => element("th", { scope: "col" }, run.name)))]
    : [];
  return element(
    "div",
    { className: "scroll" },
    element(
      "table",
      {},
      element(
        "tbody",
        {},
        ...head,
        ...rows.map(([name, value]) => {
          const values = data.runs.map(value);
          const differs = several && new Set(values).size > 1;
          return element(
            "tr",
            { className: differs ? "differs" : "" },
            element("th", { scope: "row" }, name),
            ...values.map((text) => element("td", {}, text)),
          );
        }),
      ),
    ),
  );
}

function createFacts() {
  const names = data.runs.map((run) => run.name).join(" and ");
  document.title = $("title").textContent = `Center loss: ${names}`;
  if (data.runs.length === 1) {
    const run = data.runs[0];
    const last = run.history[run.history.length - 1];
    for (const [name, value] of [
      ["test accuracy", last.test_accuracy == null ? "–" : `${last.test_accuracy.toFixed(2)} %`],
      ["nearest center", last.nearest_center_accuracy == null ? "–" : `${last.nearest_center_accuracy.toFixed(2)} %`],
      ["intra / inter-class distance", `${number(last.intra_distance, 3)} / ${number(last.inter_distance, 3)}`],
      ["epochs", String(last.epoch)],
      ["time (h:m:s)", duration(run.facts.elapsed)],
    ]) {
      $("summary").append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    }
  }
  const final = (column, digits) => (run) => number(run.history[run.history.length - 1][column], digits);
  const percent = (column) => (run) => run.history[run.history.length - 1][column]?.toFixed(2) ?? "–";
  $("facts").append(
    createTable([
      ...(data.runs.length > 1
        ? [
            ["test accuracy, %", percent("test_accuracy")],
            ["nearest center, %", percent("nearest_center_accuracy")],
            ["intra-class distance", final("intra_distance", 4)],
            ["inter-class distance", final("inter_distance", 4)],
            ["time (h:m:s)", (run) => duration(run.facts.elapsed)],
          ]
        : []),
      ["command", (run) => (run.facts.commands ?? []).join("\n") || "–"],
      [
        "device",
        (run) =>
          run.facts.device ? run.facts.device + (run.facts.ranks > 1 ? `, ${run.facts.ranks} ranks` : "") : "–",
      ],
      [
        "versions",
        (run) =>
          Object.entries(run.facts.versions ?? {})
            .map((pair) => pair.join(" "))
            .join(", ") || "–",
      ],
    ]),
  );
  const flags = [...new Set(data.runs.flatMap((run) => Object.keys(run.args)))].sort();
  const text = (value) =>
    value === null || value === undefined ? "–" : Array.isArray(value) ? value.join(" ") : String(value);
  $("settings").append(
    createTable(flags.map((flag) => [`--${flag.replaceAll("_", "-")}`, (run) => text(run.args[flag])])),
  );
  for (const run of data.runs) {
    $("logs").append(
      element(
        "details",
        {},
        element("summary", {}, data.runs.length > 1 ? `Log of ${run.name}` : "Log"),
        element("pre", { tabIndex: 0 }, run.log),
      ),
    );
  }
}

// --------------------------------------------------------------------------------------------------------------- start

async function start() {
  createFacts();
  if (typeof DecompressionStream === "undefined") throw new Error("this page needs a browser of 2023 or later");
  for (const run of data.runs) await unpackRun(run);
  const several = data.runs.length > 1;
  for (const test of [several, !several])
    for (const run of data.runs) createPanel(run, test ? run.tested : "train");
  if (several) $("panels").style.setProperty("--least", `${Math.max(72 / data.runs.length - 2, 15)}rem`);
  createLegend();
  createCurves();
  data.runs.forEach(createConfusion);

  $("epoch").max = epochs.length - 1;
  $("epoch").addEventListener("input", () => {
    if (state.playing !== null) play(false);
    show(Number($("epoch").value));
  });
  $("play").addEventListener("click", () => play(state.playing === null));
  $("in").addEventListener("click", () => zoom(1.5));
  $("out").addEventListener("click", () => zoom(1 / 1.5));
  $("fit").addEventListener("click", () => fit(true));
  $("fit-epoch").addEventListener("click", () => fit(false));
  $("mistakes").addEventListener("change", () => {
    state.mistakes = $("mistakes").checked;
    redraw();
  });
  show(epochs.length - 1);
  panels.forEach(measure);
  fit(true);
  new ResizeObserver(redraw).observe($("panels"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const [event, printing] of [
    ["beforeprint", true],
    ["afterprint", false],
  ]) {
    addEventListener(event, () => {
      document.documentElement.classList.toggle("printing", printing); // light, also in dark mode
      panels.forEach(draw);
    });
  }
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  console.error(error);
  document
    .querySelector("main")
    .prepend(element("p", { attributes: { role: "alert" } }, `The page cannot be drawn: ${error.message}`));
});
