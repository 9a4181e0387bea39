// ----------------------------------------------------------------------------------------------------------- confusion

const MOST_IMAGES = 200; // of a confusion
const MATRIX = 40; // classes; of more, the most frequent mistakes are listed

/** The confusion of a run's tested images of known classes. */
function createConfusion(run) {
  const split = run.splits[run.tested];
  const title = element("h3");
  const figure = element("figure", {}, title);
  $("confusion").append(figure);
  const update = data.known <= MATRIX ? createMatrix(run, figure) : createMistakes(run, figure);
  matrices.push(() => {
    const start = several ? `${run.name} · ` : "";
    const of = split.of > split.count ? `, ${thousands(split.count)} of ${thousands(split.of)} images` : "";
    title.textContent = `${start}${SPLITS[run.tested]}, epoch ${split.epochs[at(split)]}${of}`;
    update(...countPairs(split));
  });
}

/** The images of each pair of classes, true * known + predicted, and of each true class, at the epoch shown. */
function countPairs(split) {
  const counts = new Uint32Array(data.known * data.known);
  const totals = new Uint32Array(data.known);
  for (let i = 0; i < split.count; i++) {
    const label = labelOf(split, i);
    if (isUnknown(label)) continue;
    counts[label * data.known + prediction(split, i)]++;
    totals[label]++;
  }
  return [counts, totals];
}

const pairOf = (index) => [Math.floor(index / data.known), index % data.known];

/** A table of all pairs; returns the function that fills it. */
function createMatrix(run, figure) {
  const classes = data.names.slice(0, data.known);
  const long = classes.some((name) => name.length > 3) ? "long" : "";
  const heads = classes.map((name, label) =>
    element("th", { scope: "col", title: name }, element("span", { className: long }, data.short[label])),
  );
  const cells = [];
  const rows = classes.map((name, label) => {
    const row = element("tr", {}, element("th", { scope: "row", title: name }, data.short[label]));
    for (let predicted = 0; predicted < data.known; predicted++) {
      const cell = element("button", { type: "button" });
      cell.addEventListener("click", () => showImages(run, label, predicted));
      cells.push(cell);
      row.append(element("td", {}, cell));
    }
    return row;
  });
  const head = element("thead", {}, element("tr", {}, element("th", {}, "true \\ predicted"), ...heads));
  const table = element("table", { className: "matrix" }, head, element("tbody", {}, ...rows));
  figure.append(element("div", { className: "scroll", tabIndex: 0 }, table));
  return (counts, totals) =>
    cells.forEach((cell, index) => {
      const [label, predicted] = pairOf(index);
      const share = counts[index] / Math.max(totals[label], 1);
      cell.textContent = counts[index] || "";
      cell.disabled = !counts[index];
      cell.style.background = share ? `rgb(63 144 218 / ${0.12 + 0.6 * share})` : "";
      const text = `${counts[index]} of class ${data.names[label]} predicted as ${data.names[predicted]}`;
      cell.setAttribute("aria-label", text);
    });
}

/** A list of the most frequent mistakes; returns the function that fills it. */
function createMistakes(run, figure) {
  const list = element("ol", { className: "mistakes" });
  figure.append(list);
  return (counts, totals) => {
    const wrong = [...counts.keys()].filter((index) => counts[index] && isMistake(...pairOf(index)));
    wrong.sort((a, b) => counts[b] - counts[a] || a - b);
    const items = wrong.slice(0, MATRIX).map((index) => {
      const [label, predicted] = pairOf(index);
      const text = `${data.short[label]} → ${data.short[predicted]}: ${counts[index]} of ${totals[label]}`;
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", () => showImages(run, label, predicted));
      return element("li", {}, button);
    });
    list.replaceChildren(...items);
  };
}

/** Shows the test images of a class that are predicted as another, and marks their points. */
function showImages(run, label, predicted) {
  const split = run.splits[run.tested];
  const found = [];
  for (let i = 0; i < split.count; i++)
    if (labelOf(split, i) === label && prediction(split, i) === predicted) found.push(i);
  state.marked = { run, label, predicted, rows: new Set(found) };
  const shown = found.slice(0, MOST_IMAGES);
  const more = found.length > shown.length ? `, the first ${shown.length} shown` : "";
  const names = `${data.names[label]} predicted as ${data.names[predicted]}`;
  const title = `${names}, epoch ${split.epochs[at(split)]}: ${found.length}${more}`;
  const close = element("button", { type: "button" }, "Close");
  close.addEventListener("click", () => {
    state.marked = null;
    $("images").hidden = true;
    redraw();
  });
  const buttons = shown.map((i) => imageButton(run, i, label, predicted));
  $("images").hidden = false;
  $("images").replaceChildren(element("h3", {}, title, close), element("div", {}, ...buttons));
  redraw();
}

/** An image that leads to its point. */
function imageButton(run, i, label, predicted) {
  const row = run.splits[run.tested].rows[i];
  const text = `${SPLITS[run.tested]} image ${row}: class ${data.names[label]}, predicted ${data.names[predicted]}`;
  const options = { type: "button", title: text, attributes: { "aria-label": text } };
  const button = element("button", options, data.images ? picture(i) : String(row));
  button.addEventListener("click", () => {
    const panel = panels.find((each) => each.run === run && each.tested);
    panel.canvas.scrollIntoView({ block: "center" });
    pointAt(panel, i);
  });
  return button;
}
