// The conversation: what was said, in the form of a request, and on the page.

import { AnswerView } from "./answer.js";
import { element } from "./dom.js";
import { Recording } from "./recording.js";

/** One message of the user with the answer to it. */
class Turn {
  constructor(text, images) {
    this.text = text;
    this.images = images;
    this.view = null; // of the answer
    this.element = element("section", { class: "turn" }, this.#question());
  }

  /** What this turn adds to the messages of a request. A question without an answer is left out once another follows. */
  messages(isLast) {
    const question = { role: "user", content: this.#content() };
    if (isLast) return [question];
    const answer = this.view?.recording.current;
    return answer ? [question, { role: "assistant", content: answer }] : [];
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
    turn.view?.element.remove();
    turn.view = new AnswerView(new Recording(), options);
    turn.element.append(turn.view.element);
    return turn.view;
  }

  /** Return the messages of a request for an answer in place of one; without one, to the last message. */
  messages(system, view = null) {
    const before = system ? [{ role: "system", content: system }] : [];
    const last = view ? this.#turns.findIndex((turn) => turn.view === view) : this.#turns.length - 1;
    return [...before, ...this.#turns.slice(0, last + 1).flatMap((turn, index) => turn.messages(index === last))];
  }

  /** Return the view of the answer that a node lies in; null for none. */
  viewOf(node) {
    return this.#turns.find(({ view }) => view?.element.contains(node))?.view ?? null;
  }

  clear() {
    this.#turns = [];
    this.#element.replaceChildren();
  }
}
