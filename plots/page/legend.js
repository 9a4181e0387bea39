// -------------------------------------------------------------------------------------------------------------- legend

function createLegend() {
  const labels = [...data.names.keys()];
  const buttons = labels.map(legendButton);
  const hide = (change) => {
    change(state.hidden);
    buttons.forEach((button, label) => button.setAttribute("aria-pressed", String(!state.hidden.has(label))));
    if (state.point) pointAt(state.point.panel, null);
    redraw();
  };
  const only = (label) => (hidden) =>
    labels.forEach((other) => (other === label ? hidden.delete(other) : hidden.add(other)));
  buttons.forEach((button, label) => {
    button.addEventListener("click", () => hide((hidden) => hidden.delete(label) || hidden.add(label)));
    button.addEventListener("dblclick", () => hide(only(label)));
  });
  $("legend").append(...buttons);
  $("all").addEventListener("click", () => hide((hidden) => hidden.clear()));
  $("none").addEventListener("click", () => hide((hidden) => labels.forEach((label) => hidden.add(label))));
  hide(() => {});
}

function legendButton(label) {
  const name = data.names[label];
  const mark = data.marks[label];
  const short = data.short[label];
  const options = {
    type: "button",
    title: isUnknown(label) ? `${name}: not trained` : name,
    className: isUnknown(label) ? "unknown" : "",
    attributes: { style: `--class: ${data.colors[label]}` },
  };
  const text = isUnknown(label) || name.startsWith(mark) ? short : `${mark} ${short}`;
  return element("button", options, element("span", {}, text));
}
