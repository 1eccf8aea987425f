// The button that floats beside selected text of a finished answer, to have that text written anew.

import { element } from "./dom.js";
import { selectedRange, selectedSpan, WordCursor } from "./selection.js";

const GAP = 8; // px between the selection and the bar
const KEYS = "Arrow keys choose a word, Shift selects more, Enter rewrites, Esc ends.";

export class RewriteBar {
  /**
   * @param {Object} options
   * @param {function(Node): AnswerView|null} options.viewOf Gives the answer that a node lies in.
   * @param {function(): boolean} options.isBusy Whether nothing can be rewritten now.
   * @param {function(AnswerView, [number, number]): void} options.onRewrite Called with an answer and a part of its text.
   * @param {function(string): void} options.announce Tells screen readers.
   */
  constructor(options) {
    this.#options = options;
    this.#element.addEventListener("mousedown", (event) => event.preventDefault()); // keeps what is selected
    document.addEventListener("selectionchange", () => this.#isPressed || this.#update());
    document.addEventListener("pointerdown", () => (this.#isPressed = true));
    for (const name of ["pointerup", "pointercancel"]) {
      document.addEventListener(name, () => {
        this.#isPressed = false;
        setTimeout(() => this.#update()); // once a click has changed what is selected
      });
    }
    addEventListener("resize", () => this.#update());
  }

  #options;
  #button = element("button", { type: "button", class: "primary", click: () => this.#rewrite() }, "Rewrite selection");
  #hint = element("span", { class: "bar-hint", id: "rewrite-hint", hidden: true }, KEYS);
  #element = element("div", { class: "rewrite-bar", role: "group", "aria-label": "Selected text" }, this.#button, this.#hint);
  #view = null;
  #span = null;
  #isPressed = false; // a selection by pointer is under way
  #isWorking = false;

  get isOpen() {
    return this.#element.isConnected;
  }

  /** Let words of an answer be selected by keyboard. */
  choose(view) {
    if (this.#options.isBusy()) return;
    const { body } = view;
    body.tabIndex = -1;
    body.setAttribute("aria-describedby", this.#hint.id);
    this.#hint.hidden = false;
    body.focus();
    const cursor = new WordCursor(body);
    this.#update();
    const take = (event) => {
      if (event.key === "Enter" && this.#span) {
        this.#rewrite();
      } else {
        if (!cursor.take(event)) return;
        this.#update(); // at once: the next key may leave the text before the browser tells of the selection
        this.#options.announce(`Selected: ${getSelection()}`);
      }
      event.preventDefault();
    };
    const leave = () => {
      body.removeEventListener("keydown", take);
      body.removeAttribute("tabindex");
      body.removeAttribute("aria-describedby");
      this.#hint.hidden = true;
    };
    body.addEventListener("keydown", take);
    body.addEventListener("blur", leave, { once: true });
  }

  /** Show that the selection is being rewritten. */
  begin() {
    this.#isWorking = true;
    this.#button.textContent = "Rewriting…";
    this.#button.setAttribute("aria-disabled", "true");
  }

  /** Show that the rewriting has ended, and close. */
  end() {
    this.#isWorking = false;
    this.#button.textContent = "Rewrite selection";
    this.#button.removeAttribute("aria-disabled");
    this.close();
  }

  /** Take the bar away, and what is selected with it. */
  close() {
    if (!this.isOpen) return;
    const view = this.#view;
    const hadFocus = [view.body, this.#button].includes(document.activeElement);
    this.#hide();
    getSelection().removeAllRanges();
    if (hadFocus) view.focusButtons();
  }

  #hide() {
    this.#element.remove();
    this.#view = this.#span = null;
  }

  #rewrite() {
    if (!this.#isWorking) this.#options.onRewrite(this.#view, this.#span);
  }

  /** Show the bar beside what is selected, or take it away. */
  #update() {
    if (this.#isWorking || document.activeElement === this.#button) return;
    const found = this.#options.isBusy() ? null : this.#selected();
    if (!found) {
      this.#hide();
      return;
    }
    [this.#view, this.#span] = found;
    if (this.#element.parentElement !== this.#view.element) this.#view.body.after(this.#element);
    this.#place();
  }

  /** Return the answer that all of the selection lies in, and which part of its text that is; null for none. */
  #selected() {
    const range = selectedRange();
    const view = range && this.#options.viewOf(range.commonAncestorContainer);
    const span = view?.isEditable ? selectedSpan(view.body, view.recording.current) : null;
    return span && [view, span];
  }

  #place() {
    const box = this.#view.element.getBoundingClientRect();
    const last = [...selectedRange().getClientRects()].at(-1) ?? this.#view.body.getBoundingClientRect();
    this.#element.style.left = "0"; // has all of the width while it is measured
    const left = Math.max(0, Math.min(last.left - box.left, box.width - this.#element.offsetWidth));
    this.#element.style.left = `${left}px`;
    this.#element.style.top = `${last.bottom - box.top + GAP}px`;
    this.#element.scrollIntoView({ block: "nearest" });
  }
}
