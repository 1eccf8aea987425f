// The little Markdown that answers use, as elements: headings, lists, code, bold and italics. Anything else stays as
// it was written. Only text nodes and a fixed set of elements come out, and no links: a model's text cannot act.

import { element } from "./dom.js";

const FENCE = /^```/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const INLINE = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|(?<![*\w])\*(?=[^\s*])([^*]+?)\*(?![*\w])/;

/** Return text as a fragment of formatted blocks. */
export function formatted(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.split("\n");
  while (lines.length) fragment.append(...block(lines));
  return fragment;
}

/** Take the next block off the lines and return its nodes. */
function block(lines) {
  if (FENCE.test(lines[0])) return [codeBlock(lines)];
  if (HEADING.test(lines[0])) {
    const [, marks, title] = HEADING.exec(lines.shift());
    return [element(`h${Math.min(6, marks.length + 3)}`, {}, ...inline(title))]; // below the headings of the page
  }
  if (ITEM.test(lines[0])) return [list(lines)];
  return paragraph(lines);
}

function codeBlock(lines) {
  lines.shift();
  const end = lines.findIndex((line) => FENCE.test(line));
  const code = lines.splice(0, end < 0 ? lines.length : end);
  lines.shift();
  return element("pre", { tabindex: 0 }, element("code", {}, code.join("\n")));
}

function list(lines) {
  const [, indent, number] = ITEM.exec(lines[0]);
  const box = number ? element("ol", { start: number }) : element("ul");
  while (lines.length && ITEM.test(lines[0])) {
    const [, itsIndent, itsNumber, text] = ITEM.exec(lines[0]);
    if (itsIndent.length > indent.length && box.lastElementChild) {
      box.lastElementChild.append(list(lines));
    } else if (itsIndent.length < indent.length || Boolean(itsNumber) !== Boolean(number)) {
      break;
    } else {
      lines.shift();
      box.append(element("li", {}, ...inline(text)));
    }
  }
  return box;
}

function paragraph(lines) {
  const taken = [];
  while (lines.length && lines[0].trim() && !(taken.length && startsBlock(lines[0]))) taken.push(lines.shift());
  while (lines.length && !lines[0].trim()) lines.shift();
  return taken.length ? [element("p", {}, ...inline(taken.join("\n")))] : [];
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || ITEM.test(line);
}

/** Return the nodes of a piece of text within a block. */
function inline(text) {
  const nodes = [];
  for (let rest = text; rest; ) {
    const match = INLINE.exec(rest);
    if (!match) return [...nodes, rest];
    const [whole, , code, bold, italic] = match;
    nodes.push(rest.slice(0, match.index));
    if (code !== undefined) nodes.push(element("code", {}, code));
    else nodes.push(element(bold !== undefined ? "strong" : "em", {}, ...inline(bold ?? italic)));
    rest = rest.slice(match.index + whole.length);
  }
  return nodes;
}
