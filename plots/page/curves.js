// -------------------------------------------------------------------------------------------------------------- curves

// Of each chart: title, unit, and the columns of metrics.csv with name, color and dash.
const CHARTS = [
  {
    title: "Loss",
    unit: "",
    columns: [
      ["train_loss", "training: total", "--series-3", ""],
      ["train_xent", "training: cross-entropy", "--series-0", ""],
      ["train_center", "training: λ · center loss", "--series-2", "2 3"],
      ["val_xent", "validation: cross-entropy", "--series-3", "6 3"],
      ["test_xent", "test: cross-entropy", "--series-1", ""],
    ],
  },
  {
    title: "Error rate (%)",
    unit: " %",
    columns: [
      ["train_accuracy", "training: softmax", "--series-0", ""],
      ["val_accuracy", "validation: softmax", "--series-3", ""],
      ["val_nearest_center_accuracy", "validation: nearest center", "--series-3", "6 3"],
      ["test_accuracy", "test: softmax", "--series-1", ""],
      ["nearest_center_accuracy", "test: nearest center", "--series-2", "6 3"],
    ],
  },
];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2"]; // of several runs, which have a color each

function createCurves() {
  for (const { title, unit, columns } of CHARTS) {
    const series = data.runs.flatMap((run, index) =>
      columns.map(([column, name, variable, dash], kind) => ({
        name: several ? `${run.name}, ${name}` : name,
        color: several ? `--series-${index % 4}` : variable,
        dash: several ? DASHES[kind] : dash,
        points: run.history
          .filter((row) => row[column] != null)
          .map((row) => [row.epoch, unit ? 100 - row[column] : row[column]]),
      })),
    );
    const measured = series.filter(({ points }) => points.some(([, value]) => value > 0));
    if (measured.length) createChart(title, unit, measured);
  }
}

/** The box of a chart, and the maps from epochs and values to it; values are on a logarithmic axis. */
function scaleOf(series) {
  const values = series.flatMap((each) => each.points.map((point) => point[1])).filter((value) => value > 0);
  const low = Math.log10(Math.min(...values) / 1.25);
  const high = Math.log10(Math.max(...values) * 1.25);
  const first = epochs[0];
  const last = Math.max(epochs[epochs.length - 1], first + 1);
  const box = { left: 46, top: 8, width: Math.min(500, $("curves").clientWidth - 60), height: 230 };
  return {
    ...box,
    low,
    high,
    first,
    last,
    x: (epoch) => box.left + (box.width * (epoch - first)) / (last - first),
    y: (value) => box.top + box.height * (1 - (Math.log10(Math.max(value, 1e-30)) - low) / (high - low)),
  };
}

/** A chart. `series`: name, color (a variable), dash, and points [epoch, value]. */
function createChart(title, unit, series) {
  const scale = scaleOf(series);
  const { left, top, width, height, first, last, x } = scale;
  const svg = drawn("svg", {
    viewBox: `0 0 ${left + width + 8} ${top + height + 38}`,
    role: "img",
    "aria-label": `${title} over the epochs`,
  });
  drawGrid(svg, scale);
  const cursor = drawn("line", { class: "cursor", y1: top, y2: top + height });
  const viewBox = `${left} ${top} ${width} ${height}`;
  const inner = drawn("svg", { x: left, y: top, width, height, viewBox, style: "overflow: hidden; width: auto" });
  svg.append(inner, cursor);
  const key = element("ul", { className: "key" });
  const items = series.map((each) => addSeries(inner, key, scale, each, unit));
  svg.addEventListener("click", (event) => {
    const area = svg.getBoundingClientRect();
    const pixel = ((event.clientX - area.left) / area.width) * (left + width + 8);
    const epoch = first + ((pixel - left) / width) * (last - first);
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

function drawGrid(svg, { left, top, width, height, low, high, first, last, x, y }) {
  const decades = high - low;
  let factors = [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  if (decades > 3) factors = [1];
  else if (decades > 0.7) factors = [1, 2, 5];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (Math.log10(value) < low || Math.log10(value) > high) continue;
      svg.append(drawn("line", { class: "grid", x1: left, x2: left + width, y1: y(value), y2: y(value) }));
      svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 3)));
    }
  }
  for (const epoch of ticks(first, last, 8).filter(Number.isInteger))
    svg.append(drawn("text", { x: x(epoch), y: top + height + 17, "text-anchor": "middle" }, String(epoch)));
  svg.append(drawn("text", { x: left + width / 2, y: top + height + 34, "text-anchor": "middle" }, "epoch"));
  svg.append(drawn("rect", { class: "frame", x: left, y: top, width, height }));
}

/** Draws a line and adds it to the key; returns a function that writes its value at an epoch there. */
function addSeries(svg, key, { x, y }, { name, color: variable, dash, points }, unit) {
  const style = { class: "series", stroke: `var(${variable})`, "stroke-dasharray": dash };
  const corners = points.map(([epoch, value]) => `${x(epoch)},${y(value)}`);
  svg.append(drawn("polyline", { ...style, points: corners.join(" ") }));
  if (points.length === 1) {
    const [[epoch, value]] = points;
    svg.append(drawn("circle", { cx: x(epoch), cy: y(value), r: 3, fill: `var(${variable})` }));
  }
  const text = element("span");
  const sample = drawn("svg", { viewBox: "0 0 26 8" }, drawn("line", { ...style, x1: 0, x2: 26, y1: 4, y2: 4 }));
  key.append(element("li", {}, sample, text));
  return (epoch) => {
    const measured = points.filter((point) => point[0] <= epoch).pop();
    text.textContent = `${name} ${measured ? number(measured[1], 3) + unit : "–"}`;
  };
}
