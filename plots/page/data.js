// ---------------------------------------------------------------------------------------------------------------- data

/** Integers of 16 bits that are deflated, in base 64. */
async function unpack(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint16Array(await new Response(stream).arrayBuffer());
}

async function unpackRun(run) {
  for (const split of Object.values(run.splits)) {
    for (const name of ["points", "labels", "predictions"]) split[name] = await unpack(split[name]);
    split.isKnown = split.labels.some((label) => !isUnknown(label));
    // Points are drawn class by class; training points, new ones in each epoch, are sorted by class already.
    split.order = Uint32Array.from({ length: split.count }, (_, i) => i);
    if (split.rows.length) split.order.sort((a, b) => split.labels[a] - split.labels[b]);
  }
}

const sprite = new Image(); // all test images
async function unpackImages() {
  if (!data.images) return;
  sprite.src = data.images.source;
  await sprite.decode();
}

/** The index of the latest epoch of a split that is not after the epoch shown. */
function at(split, epoch = epochs[Math.floor(state.position)]) {
  let index = 0;
  while (index + 1 < split.epochs.length && split.epochs[index + 1] <= epoch) index++;
  return index;
}

/** How far the film is from a split's epoch to its next one, if that is the next of all. */
function progress(split) {
  const isNext = split.epochs[at(split) + 1] === epochs[Math.floor(state.position) + 1];
  return isNext ? state.position % 1 : 0;
}

/** Calls visit(i, x, y, label) for each point of a split that is shown, between two epochs where the film is. */
function eachPoint(split, visit) {
  const { count, labels, predictions, points } = split;
  const index = at(split);
  const from = 2 * count * index;
  const to = from + 2 * count;
  const grid = split.grids[index];
  // Test points keep their rows, so that they can move from one epoch to the next.
  const share = split.rows.length ? progress(split) : 0;
  const next = share ? split.grids[index + 1] : null;
  for (const i of split.order) {
    const label = labels[count * index + i];
    if (state.hidden.has(label)) continue;
    if (state.mistakes && !isMistake(label, predictions[count * index + i])) continue;
    let x = grid[0] + grid[1] * points[from + i];
    let y = grid[2] + grid[3] * points[from + count + i];
    if (next) {
      x += share * (next[0] + next[1] * points[to + i] - x);
      y += share * (next[2] + next[3] * points[to + count + i] - y);
    }
    visit(i, x, y, label);
  }
}

/** The centers at the epoch shown: [x, y]. */
function centersOf(split) {
  const index = at(split);
  const share = progress(split);
  if (!share) return split.centers[index];
  const next = split.centers[index + 1];
  return split.centers[index].map((center, label) =>
    center.map((value, axis) => value + share * (next[label][axis] - value)),
  );
}

const prediction = (split, i) => split.predictions[split.count * at(split) + i];
const labelOf = (split, i) => split.labels[split.count * at(split) + i];
