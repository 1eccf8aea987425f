// What is selected of an answer, as a part of its source, and selecting words by keyboard.

import { sourceStart } from "./markdown.js";

const MOVES = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };

/**
 * Return which part of a formatted text is selected: [start, stop) of its source, without the spaces around it.
 * @param {HTMLElement} body Holds the formatted text.
 * @param {string} source
 * @returns {[number, number]|null} Null where none of its text is selected.
 */
export function selectedSpan(body, source) {
  const range = selectedRange();
  if (!range) return null;
  let start = Infinity;
  let stop = -Infinity;
  for (const node of textNodes(body)) {
    if (!range.intersectsNode(node)) continue;
    const from = node === range.startContainer ? range.startOffset : 0;
    const to = node === range.endContainer ? range.endOffset : node.length;
    if (from >= to) continue;
    start = Math.min(start, sourceStart.get(node) + from);
    stop = Math.max(stop, sourceStart.get(node) + to);
  }
  if (start >= stop) return null;
  const chosen = source.slice(start, stop);
  start += chosen.length - chosen.trimStart().length;
  stop -= chosen.length - chosen.trimEnd().length;
  return start < stop ? [start, stop] : null;
}

/** Return what is selected on the page; null for nothing. */
export function selectedRange() {
  const selection = getSelection();
  return selection.rangeCount && !selection.isCollapsed ? selection.getRangeAt(0) : null;
}

/** Selects words of a formatted text by the keys that move through text. */
export class WordCursor {
  /** Begin with the first word of a body. */
  constructor(body) {
    this.#body = body;
    this.#words = [...wordsOf(body)];
    this.#select();
  }

  #body;
  #words; // { node, start, stop }
  #anchor = 0;
  #focus = 0;

  /** Move to another word, or with Shift select up to it; return whether the key means that. */
  take({ key, shiftKey, ctrlKey, altKey, metaKey }) {
    if (!(key in MOVES) || ctrlKey || altKey || metaKey || !this.#words.length) return false;
    const isTurned = key.startsWith("Arrow") && getComputedStyle(this.#body).direction === "rtl";
    const place = this.#focus + (isTurned ? -MOVES[key] : MOVES[key]);
    this.#focus = Math.min(Math.max(place, 0), this.#words.length - 1);
    if (!shiftKey) this.#anchor = this.#focus;
    this.#select();
    return true;
  }

  #select() {
    const [first, last] = [this.#anchor, this.#focus].sort((one, other) => one - other).map((at) => this.#words[at]);
    if (!first) return;
    getSelection().setBaseAndExtent(first.node, first.start, last.node, last.stop);
    this.#words[this.#focus].node.parentElement.scrollIntoView({ block: "nearest" });
  }
}

function* textNodes(body) {
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) if (sourceStart.has(walker.currentNode)) yield walker.currentNode;
}

function* wordsOf(body) {
  const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });
  for (const node of textNodes(body)) {
    for (const { segment, index, isWordLike } of segmenter.segment(node.data)) {
      if (isWordLike) yield { node, start: index, stop: index + segment.length };
    }
  }
}
