// Having a part of an answer written anew: the request, and what came of it in words.

import { editText } from "./api.js";
import { keyOrThrow } from "./key.js";
import { toCharacters } from "./recording.js";

/**
 * Return the server's rewriting of a part of a text; ask for a key and try again where it wants one.
 * @param {Object} body Of `/v1/edits`, without text and selection.
 * @param {string} text
 * @param {[number, number]} span Start and stop in the text.
 * @param {AbortSignal} signal Ends the request.
 */
export async function rewritten(body, text, span, signal) {
  const selection = [span.map((place) => toCharacters(text, place))];
  for (;;) {
    try {
      return await editText({ ...body, input: text, selection }, signal);
    } catch (error) {
      await keyOrThrow(error);
    }
  }
}

/** Return the changes of a rewriting as a line to show. */
export function changesInWords(changes) {
  if (!changes.length) return "The model would write the same again.";
  return changes.map(({ old, new: written }) => `“${old}” ${written ? `became “${written}”` : "was removed"}.`).join(" ");
}
