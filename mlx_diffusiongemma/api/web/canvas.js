// Drawing one frame: a span per token that stays where it is, so that the text settles in place.

import { element } from "./dom.js";

const HEAT_FROM = [0.02, 0.3, 1, 2]; // nats from which a token is drawn one level warmer
const SPACE_AND_INK = /^(\s*)([^]*)$/;
const MARKERS = new Set("·∎⟨⟩⟦⟧◦"); // what the server shows in place of control tokens

/** The draft canvas. Screen readers do not see it: they get the text once it is certain. */
export class CanvasView {
  constructor(place) {
    this.element = place;
  }

  #shown = []; // { span, text, look } of every token

  /** Draw a frame in place of the last one. */
  draw(frame) {
    frame.tokens.forEach((text, index) => this.#drawToken(index, text, lookOf(frame, index)));
    for (const { span } of this.#shown.splice(frame.tokens.length)) span.remove();
  }

  clear() {
    this.#shown = [];
    this.element.replaceChildren();
  }

  #drawToken(index, text, look) {
    const shown = this.#shown[index];
    if (shown?.text === text) {
      if (shown.look !== look) shown.span.className = shown.look = look;
      return;
    }
    const [, space, ink] = SPACE_AND_INK.exec(text);
    // A new element, so that its entrance is animated; the colour lies under the ink alone.
    const span = element("span", { class: look }, space, element("span", {}, ink));
    if (shown) shown.span.replaceWith(span);
    else this.element.append(span);
    this.#shown[index] = { span, text, look };
  }
}

/** Return the class names of a token: settled, or how uncertain the model is about it; and whether it is pinned. */
function lookOf(frame, index) {
  const pinned = frame.pinned[index] ? " pinned" : "";
  const marker = MARKERS.has(frame.tokens[index]) ? " marker" : "";
  if (frame.settled[index]) return `token settled${pinned}${marker}`;
  return `token heat-${heat(frame.entropies[index] ?? frame.entropy)}${pinned}${marker}`;
}

function heat(entropy) {
  return HEAT_FROM.filter((bound) => entropy >= bound).length;
}
