// Having a part of an answer written anew: the request, and what came of it in words.

import { editText } from "./api.js";
import { keyOrThrow } from "./key.js";
import { toCharacters } from "./recording.js";

/**
 * Return the server's rewriting of a part of a text, its changes without the words that stayed; ask for a key and try again where it wants one.
 * @param {Object} body Of `/v1/edits`, without text and selection.
 * @param {string} text
 * @param {[number, number]} span Start and stop in the text.
 * @param {AbortSignal} signal Ends the request.
 */
export async function rewritten(body, text, span, signal) {
  const selection = [span.map((place) => toCharacters(text, place))];
  for (;;) {
    try {
      const choice = await editText({ ...body, input: text, selection }, signal);
      return { ...choice, changes: choice.changes.map(narrowed) };
    } catch (error) {
      await keyOrThrow(error);
    }
  }
}

/** Return the changes of a rewriting as a line to show. */
export function changesInWords(changes) {
  if (!changes.length) return "The model would write the same again.";
  return changes.map(inWords).join(" ");
}

function inWords({ old, new: written }) {
  if (!old) return `“${written.trim()}” was added.`;
  return written ? `“${old}” became “${written}”.` : `“${old.trim()}” was removed.`;
}

/** Return a change without the words at both ends that are the same before and after. */
function narrowed({ start, stop, old, new: written }) {
  const [before, after] = [old, written].map((text) => text.split(/(\s+)/));
  const most = Math.min(before.length, after.length);
  let head = 0;
  while (head < most && before[head] === after[head]) head += 1;
  let tail = 0;
  while (tail < most - head && before.at(-1 - tail) === after.at(-1 - tail)) tail += 1;
  const middle = (words) => words.slice(head, words.length - tail).join("");
  const characters = (words) => [...words.join("")].length;
  return {
    start: start + characters(before.slice(0, head)),
    stop: stop - characters(before.slice(before.length - tail)),
    old: middle(before),
    new: middle(after),
  };
}
