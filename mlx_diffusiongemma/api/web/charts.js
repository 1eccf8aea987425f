// Small charts as SVG. Colours come from the style sheet; every chart has its numbers as a text alternative too.

import { element, svgElement } from "./dom.js";

const WIDTH = 320;
const DOUBLE_WIDTH = 660;
const HEIGHT = 132;
const MARGIN = { top: 20, side: 8, bottom: 20 };
const INNER_HEIGHT = HEIGHT - MARGIN.top - MARGIN.bottom;
const BASELINE = MARGIN.top + INNER_HEIGHT;
const MAX_BAR = 44;
const MAX_LABELS = 12;

/** Return the charts of a finished answer, and a function that marks a position of the replay in them. */
export function answerCharts(recording) {
  const { steps, keptTokens, frames } = recording;
  const tokensPerForward = keptTokens.map((tokens, canvas) => tokens / steps[canvas]);
  const settling = settlingChart(frames);
  const figures = element(
    "div",
    { class: "charts" },
    barChart("Tokens per forward", tokensPerForward, {
      format: (value) => value.toFixed(1),
      mean: sum(keptTokens) / sum(steps),
    }),
    barChart("Steps per canvas", steps, { format: String, mean: sum(steps) / steps.length }),
    settling.figure,
  );
  return { figures, mark: settling.mark };
}

/** Return a figure with a bar per canvas, and a dashed line at the mean. */
function barChart(title, values, { format, mean }) {
  const top = Math.max(...values, Number.EPSILON);
  const slot = (WIDTH - 2 * MARGIN.side) / values.length;
  const width = Math.min(MAX_BAR, slot * 0.68);
  const y = (value) => BASELINE - (value / top) * INNER_HEIGHT;
  const labelled = (index) => index % Math.ceil(values.length / MAX_LABELS) === 0;
  const bars = values.flatMap((value, index) => {
    const middle = MARGIN.side + slot * (index + 0.5);
    const bar = { class: "bar", x: middle - width / 2, y: y(value), width, height: BASELINE - y(value), rx: 3 };
    return [
      svgElement("rect", bar),
      ...(labelled(index) ? [label(format(value), middle, y(value) - 6, "value"), label(index + 1, middle)] : []),
    ];
  });
  const line = { class: "mean", x1: MARGIN.side, x2: WIDTH - MARGIN.side, y1: y(mean), y2: y(mean) };
  const marks = values.length > 1 ? [svgElement("line", line), ...bars] : bars;
  const description = `${title}, by canvas: ${values.map(format).join(", ")}. Mean ${mean.toFixed(1)}.`;
  const note = values.length > 1 ? `by canvas · mean ${mean.toFixed(1)}` : "one canvas";
  return figure(title, note, description, marks, WIDTH);
}

/** Return a figure of how the canvases settle step by step, and a function that marks a step. */
function settlingChart(frames) {
  const width = matchMedia("(min-width: 48rem)").matches ? DOUBLE_WIDTH : WIDTH;
  const inner = width - 2 * MARGIN.side;
  const x = (index) => MARGIN.side + (frames.length > 1 ? index / (frames.length - 1) : 0.5) * inner;
  const share = (frame) => frame.settledCount / frame.length;
  const mostEntropy = Math.max(...frames.map((frame) => frame.entropy), Number.EPSILON);
  const ySettled = (frame) => BASELINE - share(frame) * INNER_HEIGHT;
  const yEntropy = (frame) => BASELINE - (frame.entropy / mostEntropy) * INNER_HEIGHT;
  const cursor = svgElement("line", { class: "cursor", y1: MARGIN.top - 6, y2: BASELINE });
  const marks = [
    ...canvases(frames).flatMap(({ start, end }) => area(start, end, x, (index) => ySettled(frames[index]))),
    ...canvases(frames).map(({ start, end }) => curve(start, end, x, (index) => yEntropy(frames[index]))),
    ...canvases(frames).map(({ start, end }) => label(frames[start].block + 1, (x(start) + x(end)) / 2)),
    cursor,
  ];
  const last = frames.at(-1);
  const description =
    `Settled positions and mean entropy over ${frames.length} steps. Entropy starts at ` +
    `${frames[0].entropy.toFixed(2)} nats and ends at ${last.entropy.toFixed(2)}.`;
  const note = element(
    "span",
    { class: "legend" },
    element("i", { class: "key settled-key" }),
    "settled",
    element("i", { class: "key entropy-key" }),
    `entropy, up to ${mostEntropy.toFixed(1)} nats`,
  );
  const mark = (position) => {
    cursor.setAttribute("visibility", position < frames.length ? "visible" : "hidden"); // the finished answer is no step
    cursor.setAttribute("x1", x(position));
    cursor.setAttribute("x2", x(position));
  };
  return { figure: figure("Settling, step by step", note, description, marks, width), mark };
}

/** Return the first and last frame of every canvas. */
function canvases(frames) {
  const spans = [];
  frames.forEach((frame, index) => {
    if (frame.block === frames[index - 1]?.block) spans.at(-1).end = index;
    else spans.push({ start: index, end: index });
  });
  return spans;
}

function area(start, end, x, y) {
  if (start === end) return [svgElement("circle", { class: "settled-dot", cx: x(start), cy: y(start), r: 2.5 })];
  const edge = points(start, end, x, y);
  return [svgElement("polygon", { class: "settled-area", points: `${x(start)},${BASELINE} ${edge} ${x(end)},${BASELINE}` })];
}

function curve(start, end, x, y) {
  if (start === end) return svgElement("circle", { class: "entropy-dot", cx: x(start), cy: y(start), r: 2.5 });
  return svgElement("polyline", { class: "entropy-line", points: points(start, end, x, y) });
}

function points(start, end, x, y) {
  const pairs = [];
  for (let index = start; index <= end; index += 1) pairs.push(`${x(index)},${y(index)}`);
  return pairs.join(" ");
}

function label(text, x, y = HEIGHT - 5, kind = "tick") {
  return svgElement("text", { class: kind, x, y, "text-anchor": "middle" }, String(text));
}

function figure(title, note, description, marks, width) {
  const axis = { class: "axis", x1: MARGIN.side, x2: width - MARGIN.side, y1: BASELINE, y2: BASELINE };
  const drawing = { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": description };
  return element(
    "figure",
    {},
    element("figcaption", {}, element("strong", {}, title), element("span", {}, note)),
    svgElement("svg", drawing, ...marks, svgElement("line", axis)),
  );
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
