// The conversation: what was said, in the form of a request, and on the page.

import { AnswerView } from "./answer.js";
import { element } from "./dom.js";
import { Recording } from "./recording.js";

/** One message of the user with the answer to it. */
class Turn {
  constructor(text, images) {
    this.text = text;
    this.images = images;
    this.recording = null;
    this.element = element("section", { class: "turn" }, this.#question());
  }

  /** What this turn adds to the messages of a request. A question without an answer is left out once another follows. */
  messages(isLast) {
    const question = { role: "user", content: this.#content() };
    if (isLast) return [question];
    return this.recording?.text ? [question, { role: "assistant", content: this.recording.text }] : [];
  }

  #content() {
    if (!this.images.length) return this.text;
    const images = this.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
    return [...images, ...(this.text ? [{ type: "text", text: this.text }] : [])];
  }

  #question() {
    const images = this.images.map((image) => element("img", { src: image.url, alt: image.name }));
    return element(
      "article",
      { class: "question" },
      element("h3", { class: "visually-hidden" }, "You"),
      ...(images.length ? [element("div", { class: "pictures" }, ...images)] : []),
      ...(this.text ? [element("div", { class: "text", dir: "auto" }, this.text)] : []),
    );
  }
}

export class Chat {
  /** @param {HTMLElement} element Where the turns go. */
  constructor(element) {
    this.#element = element;
  }

  #element;
  #turns = [];

  /** Add a message of the user. */
  ask(text, images) {
    const turn = new Turn(text, images);
    this.#turns.push(turn);
    this.#element.append(turn.element);
  }

  /** Begin an answer to the last message, in the place of the one it may have; return its view. */
  answer(options) {
    const turn = this.#turns.at(-1);
    turn.element.querySelector(".answer")?.remove();
    turn.recording = new Recording();
    const view = new AnswerView(turn.recording, options);
    turn.element.append(view.element);
    return view;
  }

  /** Return the messages of a request for an answer to the last message. */
  messages(system) {
    const before = system ? [{ role: "system", content: system }] : [];
    return [...before, ...this.#turns.flatMap((turn, index) => turn.messages(index === this.#turns.length - 1))];
  }

  clear() {
    this.#turns = [];
    this.#element.replaceChildren();
  }
}
