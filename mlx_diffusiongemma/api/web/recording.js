// One answer as data: what the stream brought, in order. Nothing here touches the page.

const END_MARKERS = new Set(["∎", "·", "◦", ""]); // end of the turn, padding, other control tokens, half a character

/**
 * One denoising step.
 * @typedef {Object} Frame
 * @property {number} block Canvas, from 0.
 * @property {number} step From 1.
 * @property {number} total Steps per canvas at most.
 * @property {string[]} tokens Text of every position, without what follows the end of the answer.
 * @property {boolean[]} settled Whether this step accepted the position.
 * @property {number[]} entropies Of every position, nats; empty where the server does not tell.
 * @property {boolean[]} pinned Whether pins or a grammar chose the token; empty where they chose none.
 * @property {number} entropy Their mean over the whole canvas, nats.
 * @property {number} settledCount Positions accepted, of the whole canvas.
 * @property {number} pinnedCount Positions pinned, of the whole canvas.
 * @property {number} length Positions of the canvas.
 * @property {number} textLength Characters of the text that was certain before this canvas.
 * @property {number} reasoningLength The same for the reasoning.
 */

export class Recording {
  constructor() {
    /** @type {Frame[]} */
    this.frames = [];
    this.text = ""; // of the stream; see `current`
    this.reasoning = "";
    this.toolCalls = [];
    this.finishReason = null; // "stop", "length", "tool_calls", or "cancelled" by the reader
    this.error = null; // one line
    this.usage = null;
    this.timings = null;
    this.seconds = 0;
  }

  #revisions = []; // { text, marks } after every rewriting

  /** The text as it stands now: that of the stream, or of the last rewriting. */
  get current() {
    return this.#revisions.at(-1)?.text ?? this.text;
  }

  /** The parts [start, stop) of the current text that the last rewriting wrote. */
  get marks() {
    return this.#revisions.at(-1)?.marks ?? [];
  }

  get isRevised() {
    return this.#revisions.length > 0;
  }

  /** Take over a rewriting, a choice of `/v1/edits`; its changes count characters of the text before. */
  revise({ text, changes }) {
    const before = this.current;
    let shift = 0;
    const marks = changes.map(({ start, stop, new: written }) => {
      const [first, last] = [toUnits(before, start), toUnits(before, stop)];
      const mark = [first + shift, first + shift + written.length];
      shift += written.length - (last - first);
      return mark;
    });
    this.#revisions.push({ text, marks });
  }

  /** Take the last rewriting back. */
  undo() {
    this.#revisions.pop();
  }

  /** Take over a chunk of the stream. Return the frame, if it was one. */
  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    this.timings = chunk.timings ?? this.timings;
    if (chunk.type === "diffusion_frame") return this.#addFrame(chunk);
    const choice = chunk.choices[0];
    if (!choice) return null;
    this.text += choice.delta.content ?? "";
    this.reasoning += choice.delta.reasoning_content ?? "";
    for (const call of choice.delta.tool_calls ?? []) this.#addToolCall(call);
    this.finishReason = choice.finish_reason ?? this.finishReason;
    return null;
  }

  /** Steps of every canvas. */
  get steps() {
    const steps = [];
    for (const frame of this.frames) steps[frame.block] = frame.step;
    return steps;
  }

  /** Tokens kept of every canvas. */
  get keptTokens() {
    const lengths = [];
    for (const frame of this.frames) lengths[frame.block] = frame.length;
    const total = this.usage?.completion_tokens;
    if (lengths.length && total !== undefined) {
      const before = lengths.slice(0, -1).reduce((sum, length) => sum + length, 0);
      lengths[lengths.length - 1] = Math.max(0, total - before); // all but the last canvas are kept whole
    }
    return lengths;
  }

  #addFrame(chunk) {
    const { tokens, settled, entropies, pinned = [], mean_entropy: entropy } = chunk.diffusion;
    const frame = {
      block: chunk.block,
      step: chunk.step,
      total: chunk.total,
      tokens: tokens.slice(0, lengthOfText(tokens)),
      settled,
      entropies,
      pinned,
      entropy,
      settledCount: settled.filter(Boolean).length,
      pinnedCount: pinned.filter(Boolean).length,
      length: tokens.length,
      textLength: this.text.length,
      reasoningLength: this.reasoning.length,
    };
    this.frames.push(frame);
    return frame;
  }

  #addToolCall(delta) {
    const call = (this.toolCalls[delta.index] ??= { name: "", arguments: "" });
    call.name += delta.function?.name ?? "";
    call.arguments += delta.function?.arguments ?? "";
  }
}

/** Return how many characters lie before a place in a text; the server counts these, strings count UTF-16 units. */
export function toCharacters(text, units) {
  return [...text.slice(0, units)].length;
}

function toUnits(text, characters) {
  return [...text].slice(0, characters).join("").length;
}

/** Return how many tokens there are before the markers that fill up the end of a canvas. */
function lengthOfText(tokens) {
  let length = tokens.length;
  while (length && END_MARKERS.has(tokens[length - 1])) length -= 1;
  return length;
}
