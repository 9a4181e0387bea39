// ------------------------------------------------------------------------------------------------------------ the run

const lastRow = (run) => run.history[run.history.length - 1];
const percent = (column) => (run) => lastRow(run)[column]?.toFixed(2) ?? "–";
const figure = (column) => (run) => number(lastRow(run)[column]);

function duration(run) {
  const seconds = run.facts.elapsed;
  if (seconds == null) return "–";
  return `${Math.floor(seconds / 3600)}:${new Date((seconds % 3600) * 1000).toISOString().slice(14, 19)}`;
}

function deviceOf({ facts }) {
  const ranks = facts.ranks > 1 ? `, ${facts.ranks} ranks` : "";
  return facts.device ? facts.device + ranks : "–";
}

function versionsOf({ facts }) {
  const pairs = Object.entries(facts.versions ?? {}).map((pair) => pair.join(" "));
  return pairs.join(", ") || "–";
}

function settingOf(run, flag) {
  const value = run.args[flag];
  if (value === null || value === undefined) return "–";
  return Array.isArray(value) ? value.join(" ") : String(value);
}

// Name and value, which is empty where nothing of it was measured.
const RESULTS = [
  ["test accuracy, %", percent("test_accuracy")],
  ["nearest center, %", percent("nearest_center_accuracy")],
  ["intra-class distance", figure("intra_distance")],
  ["inter-class distance", figure("inter_distance")],
  ["epochs", (run) => String(lastRow(run).epoch)],
  ["time (h:m:s)", duration],
].filter(([, value]) => data.runs.some((run) => value(run) !== "–"));

/** A table with a column for each run; a row whose values differ is marked. */
function createTable(rows) {
  const body = element("tbody");
  if (several) {
    const names = data.runs.map((run) => element("th", { scope: "col" }, run.name));
    body.append(element("tr", {}, element("th"), ...names));
  }
  for (const [name, value] of rows) {
    const values = data.runs.map(value);
    const className = several && new Set(values).size > 1 ? "differs" : "";
    const cells = values.map((text) => element("td", {}, ...text.split("\n").map((line) => element("div", {}, line))));
    body.append(element("tr", { className }, element("th", { scope: "row" }, name), ...cells));
  }
  return element("div", { className: "scroll" }, element("table", {}, body));
}

function createFacts() {
  document.title = $("title").textContent = `Center loss: ${data.runs.map((run) => run.name).join(" and ")}`;
  if (!several)
    for (const [name, value] of RESULTS)
      $("summary").append(element("div", {}, element("dt", {}, name), element("dd", {}, value(data.runs[0]))));
  const facts = [
    ["command", (run) => (run.facts.commands ?? []).join("\n") || "–"], // of a resumed run, several
    ["device", deviceOf],
    ["versions", versionsOf],
  ];
  $("facts").append(createTable(several ? [...RESULTS, ...facts] : facts));
  const flags = [...new Set(data.runs.flatMap((run) => Object.keys(run.args)))].sort();
  const settings = flags.map((flag) => [`--${flag.replaceAll("_", "-")}`, (run) => settingOf(run, flag)]);
  $("settings").append(createTable(settings));
  for (const run of data.runs) {
    const summary = element("summary", {}, several ? `Log of ${run.name}` : "Log");
    $("logs").append(element("details", {}, summary, element("pre", { tabIndex: 0 }, run.log)));
  }
}
