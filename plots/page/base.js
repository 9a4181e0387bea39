"use strict";
// The page of a run, or of several of the same data. Everything it shows is in one JSON text, written by report.py, and
// every name in it is the user's: it reaches the page through textContent, never as markup.
// report.py joins the files of this directory into one script: this one first, start.js last.
//
//   data      what JSON holds, then unpacked: of each run its splits, "train" and "test" or "val" (the name is in
//             `tested`), with the points of all epochs; a label is a row of `names`, those from `known` on were not
//             trained
//   state     what the reader has chosen: epoch, view, classes
//   panels    a canvas for each split of each run; all have the same axes

const data = JSON.parse(document.getElementById("data").textContent);
const SPLITS = { train: "training", val: "validation", test: "test" };

const state = {
  position: 0, // among `epochs`; between two of them while it plays
  view: { x: 0, y: 0, span: 1 }, // the middle, and how much of the x axis is seen
  hidden: new Set(), // labels
  mistakes: false, // only these
  point: null, // {panel, index}: the one that is pointed at
  marked: null, // {run, label, predicted, rows: Set of indices}: those of a confusion
  playing: null, // the time of the last frame
  clock: 0, // the position that the film has come to
};
const epochs = [
  ...new Set(data.runs.flatMap((run) => Object.values(run.splits).flatMap((split) => split.epochs))),
].sort((a, b) => a - b);
const several = data.runs.length > 1;
const panels = [];
const charts = []; // functions that move a chart's cursor to an epoch
const matrices = []; // functions that count a confusion again, for the epoch shown
const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (in `attributes`) and children, of which strings become text. */
function element(name, { attributes = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The same of an SVG. */
function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const color = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
const thousands = (count) => count.toLocaleString("en");

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return String(+value.toPrecision(digits)).replace("-", "−");
}

const isUnknown = (label) => label >= data.known;
/** A prediction for an image of an unknown class is no mistake: none could be right. */
const isMistake = (label, predicted) => label !== predicted && !isUnknown(label);
