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
  const { run, name, split } = panel;
  const epoch = split.epochs[at(split)];
  const accuracy = run.history.find((row) => row.epoch === epoch)?.[`${name}_accuracy`];
  let text = `${several ? `${run.name} · ` : ""}${SPLITS[name]}, epoch ${epoch}`;
  if (accuracy != null) text += `: accuracy ${accuracy.toFixed(2)} %`;
  else if (!split.isKnown) text += ": classes that were not trained";
  if (split.of > split.count) text += `; ${thousands(split.count)} of ${thousands(split.of)} shown`;
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
