// ---------------------------------------------------------------------------------------------------------------- view

/** Shows all points of all epochs, or only those of the epoch shown. */
function fit(all) {
  const xs = [];
  const ys = [];
  for (const run of data.runs) {
    for (const split of Object.values(run.splits)) {
      split.grids.forEach(([x, stepX, y, stepY], index) => {
        if (!all && index !== at(split)) return;
        const corners = [[x, y], [x + 65535 * stepX, y + 65535 * stepY], ...split.centers[index]];
        xs.push(...corners.map((corner) => corner[0]));
        ys.push(...corners.map((corner) => corner[1]));
      });
    }
  }
  const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const [x0, x1] = extent(xs);
  const [y0, y1] = extent(ys);
  const { width, height } = panels[0].box;
  const span = 1.06 * Math.max(x1 - x0, ((y1 - y0) * width) / height, 1e-9);
  state.view = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, span };
  redraw();
}

/** Zooms by a factor about a point of the plane, by default the middle. */
function zoom(factor, x = state.view.x, y = state.view.y) {
  const view = state.view;
  state.view = { x: x + (view.x - x) / factor, y: y + (view.y - y) / factor, span: view.span / factor };
  redraw();
}

function pan(x, y) {
  state.view.x += (x * state.view.span) / 10;
  state.view.y += (y * state.view.span) / 10;
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

/** The box of a panel that holds its points, and the pixels of its canvas. */
function measure(panel) {
  const { canvas } = panel;
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  panel.ratio = ratio;
  panel.box = {
    left: 46,
    top: 6,
    width: Math.max(canvas.clientWidth - 52, 10),
    height: Math.max(canvas.clientHeight - 46, 10),
  };
}

function toPixel(panel, x, y) {
  const { left, top, width, height } = panel.box;
  const scale = width / state.view.span;
  return [left + width / 2 + (x - state.view.x) * scale, top + height / 2 - (y - state.view.y) * scale];
}

function toPlane(panel, pixelX, pixelY) {
  const { left, top, width, height } = panel.box;
  const scale = width / state.view.span;
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
