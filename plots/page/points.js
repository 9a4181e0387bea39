// -------------------------------------------------------------------------------------------------------------- points

const font = (size) => `${size}px ${getComputedStyle(document.body).fontFamily}`;

function draw(panel) {
  measure(panel);
  const { canvas, box } = panel;
  const context = canvas.getContext("2d");
  context.setTransform(panel.ratio, 0, 0, panel.ratio, 0, 0);
  context.fillStyle = color("--ground");
  context.fillRect(0, 0, canvas.width, canvas.height);
  drawAxes(panel, context);
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

/** The grid, its numbers and the names of the axes. */
function drawAxes(panel, context) {
  const { canvas, box } = panel;
  const [right, bottom] = [box.left + box.width, box.top + box.height];
  const [x0, y1] = toPlane(panel, box.left, box.top);
  const [x1, y0] = toPlane(panel, right, bottom);
  canvas.dataset.limits = [x0, x1, y0, y1].map((value) => value.toPrecision(9)).join(" ");
  context.font = font(12);
  context.strokeStyle = color("--grid");
  context.fillStyle = color("--soft");
  context.beginPath();
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const x of ticks(x0, x1, Math.max(box.width / 70, 4))) {
    const [pixel] = toPixel(panel, x, 0);
    context.moveTo(pixel, box.top);
    context.lineTo(pixel, bottom);
    context.fillText(number(x), pixel, bottom + 5);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const y of ticks(y0, y1, Math.max(box.height / 50, 4))) {
    const [, pixel] = toPixel(panel, 0, y);
    context.moveTo(box.left, pixel);
    context.lineTo(right, pixel);
    context.fillText(number(y), box.left - 5, pixel);
  }
  context.stroke();
  context.textAlign = "center";
  context.textBaseline = "bottom";
  context.fillText(panel.run.axes[0], box.left + box.width / 2, bottom + 38, box.width);
  context.save();
  context.translate(9, box.top + box.height / 2);
  context.rotate(-Math.PI / 2);
  context.textBaseline = "middle";
  context.fillText(panel.run.axes[1], 0, 0, box.height);
  context.restore();
}

/** The points, class by class: those of unknown classes hollow, with rings around what is marked or pointed at. */
function drawPoints(panel, context) {
  const { split, box } = panel;
  const most = Math.max(...panels.map((each) => each.split.count));
  const radius = Math.min(Math.max(110 / Math.sqrt(most), 1), 2.8);
  const isRound = split.count <= 3000; // squares are faster
  const right = box.left + box.width + radius;
  const bottom = box.top + box.height + radius;
  const paths = new Map(); // of each label
  const rings = [];
  eachPoint(split, (i, x, y, label) => {
    const [pixelX, pixelY] = toPixel(panel, x, y);
    if (pixelX < box.left - radius || pixelX > right || pixelY < box.top - radius || pixelY > bottom) return;
    const size = ringOf(panel, i);
    if (size) rings.push([pixelX, pixelY, size]);
    if (!paths.has(label)) paths.set(label, new Path2D());
    const path = paths.get(label);
    if (isRound || isUnknown(label)) {
      path.moveTo(pixelX + radius, pixelY);
      path.arc(pixelX, pixelY, radius, 0, 7);
    } else {
      path.rect(pixelX - radius, pixelY - radius, 2 * radius, 2 * radius);
    }
  });
  for (const [label, path] of paths) {
    context.fillStyle = context.strokeStyle = data.colors[label];
    if (isUnknown(label)) context.stroke(path);
    else context.fill(path);
  }
  context.strokeStyle = color("--ink");
  context.lineWidth = 1.5;
  for (const [x, y, size] of rings) {
    context.beginPath();
    context.arc(x, y, size, 0, 7);
    context.stroke();
  }
  context.lineWidth = 1;
}

/** The radius of the ring around a point: large if it is pointed at, small if it is marked, else 0. */
function ringOf(panel, i) {
  const { point, marked } = state;
  if (point?.index === i && (point.panel === panel || (point.panel.tested && panel.tested))) return 7;
  return panel.tested && marked?.run === panel.run && marked.rows.has(i) ? 4.5 : 0;
}

/** A cross at each center and, away from the others, its mark. Where no class shown was trained, crosses alone. */
function drawCenters(panel, context) {
  const centers = centersOf(panel.split).map((center) => toPixel(panel, ...center));
  const middle = [0, 1].map((axis) => centers.reduce((sum, center) => sum + center[axis], 0) / centers.length);
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.font = font(data.known <= 40 ? 12 : 9);
  context.lineJoin = "round";
  centers.forEach((center, label) => {
    if (state.hidden.has(label)) return;
    const [x, y] = center;
    const cross = new Path2D(`M${x - 4} ${y}h8M${x} ${y - 4}v8`);
    context.strokeStyle = color("--ground");
    context.lineWidth = 3.5;
    context.stroke(cross);
    context.strokeStyle = color(panel.split.isKnown ? "--ink" : "--soft");
    context.lineWidth = 1.3;
    context.stroke(cross);
    if (!panel.split.isKnown) return;
    const distance = Math.hypot(x - middle[0], y - middle[1]) || 1;
    const textX = x + (13 * (x - middle[0])) / distance;
    const textY = y + (13 * (y - middle[1])) / distance;
    context.strokeStyle = color("--ground");
    context.lineWidth = 3;
    context.strokeText(data.marks[label], textX, textY);
    context.fillStyle = color("--ink");
    context.fillText(data.marks[label], textX, textY);
  });
  context.lineWidth = 1;
}
