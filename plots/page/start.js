// --------------------------------------------------------------------------------------------------------------- start

async function start() {
  createFacts();
  if (typeof DecompressionStream === "undefined") throw new Error("this page needs a browser of 2023 or later");
  for (const run of data.runs) await unpackRun(run);
  await unpackImages();
  for (const tested of [several, !several])
    for (const run of data.runs) createPanel(run, tested ? run.tested : "train");
  if (several) $("panels").style.setProperty("--least", `${Math.max(72 / data.runs.length - 2, 15)}rem`);
  createLegend();
  createCurves();
  const known = data.runs.filter((run) => run.splits[run.tested].isKnown);
  known.forEach(createConfusion);
  $("confusion").closest("section").hidden = !known.length;
  listenToControls();
  show(epochs.length - 1);
  panels.forEach(measure);
  fit(true);
  new ResizeObserver(redraw).observe($("panels"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.body.dataset.ready = "yes";
}

function listenToControls() {
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
  const print = (printing) => () => {
    document.documentElement.classList.toggle("printing", printing); // light, also in dark mode
    panels.forEach(draw);
  };
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
}

start().catch((error) => {
  console.error(error);
  const text = `The page cannot be drawn: ${error.message}`;
  document.querySelector("main").prepend(element("p", { attributes: { role: "alert" } }, text));
});
