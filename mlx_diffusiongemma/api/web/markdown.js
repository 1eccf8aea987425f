// The little Markdown that answers use, as elements: headings, lists, code, bold and italics. Anything else stays as
// it was written. Only text nodes and a fixed set of elements come out, and no links: a model's text cannot act.

import { element } from "./dom.js";

const FENCE = /^```/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const INLINE = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|(?<![*\w])\*(?=[^\s*])([^*]+?)\*(?![*\w])/;

/** Where in its source the text of a node begins. Every text node of a formatted text is in here. */
export const sourceStart = new WeakMap();

/**
 * Return text as a fragment of formatted blocks.
 * @param {string} text
 * @param {Array<[number, number]>} marks Parts of the text, [start, stop), that are shown as inserted.
 */
export function formatted(text, marks = []) {
  const fragment = document.createDocumentFragment();
  const lines = linesOf(text);
  while (lines.length) fragment.append(...block(lines, marks));
  return fragment;
}

/** Return the lines of a text, and where each begins. */
function linesOf(text) {
  let start = 0;
  return text.split("\n").map((line) => {
    const placed = { text: line, start };
    start += line.length + 1;
    return placed;
  });
}

/** Take the next block off the lines and return its nodes. */
function block(lines, marks) {
  const [first] = lines;
  if (FENCE.test(first.text)) return [codeBlock(lines, marks)];
  if (HEADING.test(first.text)) {
    const [, signs, title] = HEADING.exec(lines.shift().text);
    const level = Math.min(6, signs.length + 3); // below the headings of the page
    return [element(`h${level}`, {}, ...inline(title, endOf(first) - title.length, marks))];
  }
  if (ITEM.test(first.text)) return [list(lines, marks)];
  return paragraph(lines, marks);
}

function codeBlock(lines, marks) {
  lines.shift();
  const end = lines.findIndex((line) => FENCE.test(line.text));
  const code = lines.splice(0, end < 0 ? lines.length : end);
  lines.shift();
  return element("pre", { tabindex: 0 }, element("code", {}, ...plain(joined(code), code[0]?.start ?? 0, marks)));
}

function list(lines, marks) {
  const [, indent, number] = ITEM.exec(lines[0].text);
  const box = number ? element("ol", { start: number }) : element("ul");
  while (lines.length && ITEM.test(lines[0].text)) {
    const [, itsIndent, itsNumber, text] = ITEM.exec(lines[0].text);
    if (itsIndent.length > indent.length && box.lastElementChild) {
      box.lastElementChild.append(list(lines, marks));
    } else if (itsIndent.length < indent.length || Boolean(itsNumber) !== Boolean(number)) {
      break;
    } else {
      const line = lines.shift();
      box.append(element("li", {}, ...inline(text, endOf(line) - text.length, marks)));
    }
  }
  return box;
}

function paragraph(lines, marks) {
  const taken = [];
  while (lines.length && lines[0].text.trim() && !(taken.length && startsBlock(lines[0]))) taken.push(lines.shift());
  while (lines.length && !lines[0].text.trim()) lines.shift();
  return taken.length ? [element("p", {}, ...inline(joined(taken), taken[0].start, marks))] : [];
}

function startsBlock({ text }) {
  return FENCE.test(text) || HEADING.test(text) || ITEM.test(text);
}

function joined(lines) {
  return lines.map((line) => line.text).join("\n");
}

function endOf(line) {
  return line.start + line.text.length;
}

/** Return the nodes of a piece of text within a block; it begins at `start` of the source. */
function inline(text, start, marks) {
  const nodes = [];
  for (let at = 0; at < text.length; ) {
    const match = INLINE.exec(text.slice(at));
    if (!match) return [...nodes, ...plain(text.slice(at), start + at, marks)];
    const [whole, ticks, code, bold, italic] = match;
    nodes.push(...plain(text.slice(at, at + match.index), start + at, marks));
    at += match.index;
    if (code !== undefined) nodes.push(element("code", {}, ...plain(code, start + at + ticks.length, marks)));
    else if (bold !== undefined) nodes.push(element("strong", {}, ...inline(bold, start + at + 2, marks)));
    else nodes.push(element("em", {}, ...inline(italic, start + at + 1, marks)));
    at += whole.length;
  }
  return nodes;
}

/** Return text as it is, as nodes whose place in the source is known; those within a mark are insertions. */
function plain(text, start, marks) {
  const nodes = [];
  const add = (from, to, isMarked) => {
    if (from >= to) return;
    const node = document.createTextNode(text.slice(from - start, to - start));
    sourceStart.set(node, from);
    nodes.push(isMarked ? element("ins", {}, node) : node);
  };
  let at = start;
  const end = start + text.length;
  for (const [first, stop] of marks) {
    if (stop <= at || first >= end) continue;
    add(at, Math.max(at, first), false);
    add(Math.max(at, first), Math.min(end, stop), true);
    at = Math.min(end, stop);
  }
  add(at, end, false);
  return nodes;
}
