// ------------------------------------------------------------------------------------------------ panels and one point

function createPanel(run, name) {
  const attributes = { role: "application", "aria-roledescription": "scatter plot" };
  const canvas = element("canvas", { tabIndex: 0, attributes });
  const caption = element("figcaption");
  const panel = { run, name, tested: name === run.tested, split: run.splits[name], canvas, caption };
  $("panels").append(element("figure", {}, caption, canvas));
  listenToPointer(panel);
  listenToKeys(panel);
  panels.push(panel);
  measure(panel);
}

function listenToPointer(panel) {
  const { canvas } = panel;
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
  const turn = (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // else the page could not be scrolled past the plots
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), ...toPlane(panel, ...inside(event)));
  };
  canvas.addEventListener("wheel", turn, { passive: false });
}

function listenToKeys(panel) {
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
  panel.canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
}

/** The index of the nearest point that is shown within ten pixels, or null. */
function nearest(panel, pixelX, pixelY) {
  let best = 100;
  let found = null;
  eachPoint(panel.split, (i, x, y) => {
    const [px, py] = toPixel(panel, x, y);
    const distance = (px - pixelX) ** 2 + (py - pixelY) ** 2;
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
function picture(i) {
  const { columns, width, height } = data.images;
  const canvas = element("canvas", { width, height });
  const from = [(i % columns) * width, Math.floor(i / columns) * height, width, height];
  canvas.getContext("2d").drawImage(sprite, ...from, 0, 0, width, height);
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
  const { split } = panel;
  const label = labelOf(split, index);
  const predicted = prediction(split, index);
  const lines = [
    element("p", {}, `class ${data.names[label]}${isUnknown(label) ? " (not trained)" : ""}`),
    element("p", { className: isMistake(label, predicted) ? "wrong" : "" }, `predicted ${data.names[predicted]}`),
    element("p", {}, `epoch ${split.epochs[at(split)]}: (${number(found[0])}, ${number(found[1])})`),
  ];
  if (split.rows.length) lines.push(element("p", {}, `${SPLITS[panel.name]} image ${split.rows[index]}`));
  const image = split.rows.length && data.images ? [picture(index)] : [];
  box.replaceChildren(...image, element("div", {}, ...lines));
  moveBeside(box, panel, found);
}

/** Moves the box below and right of a point, or where the window has room. */
function moveBeside(box, panel, point) {
  const [x, y] = toPixel(panel, ...point);
  const area = panel.canvas.getBoundingClientRect();
  const room = document.documentElement.clientWidth - box.offsetWidth - 8;
  const below = area.top + y + 14;
  const top = below + box.offsetHeight > innerHeight ? area.top + y - box.offsetHeight - 14 : below;
  box.style.left = `${Math.max(Math.min(area.left + x + 14, room), 8) + scrollX}px`;
  box.style.top = `${top + scrollY}px`;
}

/** Goes to the next (1) or previous (-1) mistake of a panel that is shown. */
function nextMistake(panel, direction) {
  const wrong = [];
  eachPoint(panel.split, (i, x, y, label) => {
    if (isMistake(label, prediction(panel.split, i))) wrong.push(i);
  });
  if (!wrong.length) return pointAt(panel, null);
  let current = direction > 0 ? -1 : 0;
  if (state.point?.panel === panel) current = wrong.indexOf(state.point.index);
  pointAt(panel, wrong[(current + direction + wrong.length) % wrong.length]);
}
