// One answer on the page: the draft while it is made, then the text, its figures, the replay and the charts.

import { CanvasView } from "./canvas.js";
import { answerCharts } from "./charts.js";
import { element, icon } from "./dom.js";
import { formatted } from "./markdown.js";
import { Player } from "./player.js";

const ENDINGS = { length: "cut off at the token limit", cancelled: "stopped" };

export class AnswerView {
  /**
   * @param {Recording} recording What to show; it may still grow.
   * @param {Object} options
   * @param {number} options.pace See `Player`.
   * @param {boolean} options.showCharts Whether the charts are open.
   * @param {function(): void} options.onGrow Called when a draft was drawn while the answer is made.
   * @param {function(): void} options.onRetry Called when another answer is wanted.
   * @param {function(AnswerView): void} options.onRewrite Called when a part of the text shall be chosen and rewritten.
   * @param {function(AnswerView): void} options.onUndo Called when the last rewriting shall be taken back.
   * @param {function(boolean): void} options.onCharts Called when the charts were opened or closed.
   */
  constructor(recording, options) {
    this.recording = recording;
    this.player = new Player(recording, options.pace, () => this.#draw());
    this.#options = options;
    this.#canvas = new CanvasView(element("span", { class: "canvas", "aria-hidden": "true" }));
    this.#certain = element("span");
    this.body.append(this.#certain, this.#canvas.element);
    this.element = element("article", { class: "answer live", "aria-busy": "true" }, ...this.#parts());
  }

  /** Where the text stands. */
  body = element("div", { class: "text", dir: "auto", role: "group", "aria-label": "Answer" });

  #options;
  #canvas;
  #certain; // text that no later step changes
  #reasoning = element("div", { class: "reasoning-text" });
  #thought = element("details", { class: "reasoning", hidden: true }, element("summary", {}, "Thought"), this.#reasoning);
  #tools = element("div", { class: "tools" });
  #status = element("p", { class: "progress-text" }, "Waiting for the model");
  #bar = element("progress", { max: 1, value: 0, "aria-hidden": "true" });
  #pinLegend = pinLegend();
  #progress = element("div", { class: "progress" }, this.#bar, this.#status, this.#pinLegend);
  #after = element("div", { class: "after" });
  #rewriteButton = quietButton("Rewrite", () => this.#rewrite());
  #undoButton = quietButton("Undo the rewriting", () => this.#options.onUndo(this));
  #notice = null; // of the last rewriting
  #slider = null;
  #playButton = null;
  #where = null;
  #markCharts = () => {};

  /** Take over a chunk of the stream. */
  add(chunk) {
    if (this.recording.add(chunk)) this.player.arrived();
  }

  /** Show that the prompt is being read. */
  showPrefill({ processed, total }) {
    this.#status.textContent = processed < total ? `Reading the prompt: ${processed} of ${total} tokens` : "Denoising";
  }

  /** Show the end of the answer once the screen has caught up with the stream. */
  async finish() {
    await this.player.complete();
    this.element.classList.remove("live");
    this.element.removeAttribute("aria-busy");
    this.#progress.remove();
    this.#after.append(...this.#afterParts());
    this.#draw();
    this.#after.querySelector(".replay")?.scrollIntoView({ block: "nearest" }); // the charts may stay below
  }

  /** Whether the text is complete, on the screen, and there is some: it can be selected and rewritten. */
  get isEditable() {
    const { classList } = this.element;
    return this.player.isAtEnd && !classList.contains("live") && !classList.contains("drafting") && this.#hasText;
  }

  get #hasText() {
    return this.recording.current.trim() !== "";
  }

  /** Take over a rewriting; see `Recording`. */
  revise(choice) {
    this.recording.revise(choice);
    this.#drawRevision();
  }

  /** Take the last rewriting back. */
  undo() {
    this.recording.undo();
    this.#drawRevision();
    this.focusButtons();
  }

  /** Tell what became of a rewriting; "" takes that away. */
  showNotice(text, isError = false) {
    this.#notice?.remove();
    this.#notice = isError ? errorLine(text) : element("p", { class: "notice" }, text);
    if (text) this.#after.prepend(this.#notice);
  }

  /** Give the focus to what rewrites. */
  focusButtons() {
    (this.#rewriteButton.hidden ? this.#undoButton : this.#rewriteButton).focus();
  }

  #parts() {
    return [element("h3", { class: "who" }, "DiffusionGemma"), this.#thought, this.body, this.#tools, this.#progress, this.#after];
  }

  #draw() {
    const { frames } = this.recording;
    const frame = frames[this.player.position];
    if (this.player.isAtEnd) this.#drawFinished();
    else if (frame) this.#drawFrame(frame);
    if (this.#slider) this.#drawReplay(frame);
    else this.#options.onGrow();
  }

  #drawFrame(frame) {
    this.element.classList.add("drafting");
    this.#drawReasoning(this.recording.reasoning.slice(0, frame.reasoningLength));
    this.#drawCertain(this.recording.text.slice(0, frame.textLength));
    this.#canvas.draw(frame);
    this.#status.textContent = describe(frame);
    this.#bar.value = frame.settledCount / frame.length;
    this.#pinLegend.hidden = frame.pinnedCount === 0;
  }

  #drawFinished() {
    const { text, current, marks, reasoning, toolCalls, frames, finishReason } = this.recording;
    const last = frames.at(-1);
    const wasCut = !finishReason || finishReason === "cancelled";
    this.#drawReasoning(reasoning);
    this.#tools.replaceChildren(...toolCalls.map(toolCall));
    if (wasCut && last && last.textLength === text.length) {
      this.#drawFrame(last); // its canvas was never finished
      return;
    }
    this.element.classList.remove("drafting");
    this.#canvas.clear();
    this.#certain.replaceChildren(formatted(current, marks));
  }

  #drawRevision() {
    this.showNotice("");
    this.#draw();
    this.#showButtons();
  }

  #drawCertain(text) {
    if (this.#certain.textContent !== text || this.#certain.firstElementChild) this.#certain.textContent = text;
  }

  #drawReasoning(text) {
    this.#thought.hidden = !text;
    if (this.#reasoning.textContent !== text) this.#reasoning.textContent = text;
  }

  // -- after the answer ---------------------------------------------------------------------------------------------

  #afterParts() {
    const { recording } = this;
    const parts = [element("div", { class: "actions" }, element("p", { class: "figures" }, summary(recording)), this.#buttons())];
    if (recording.error) parts.unshift(errorLine(recording.error));
    if (recording.frames.length) parts.push(this.#replay(), this.#charts());
    return parts;
  }

  #rewrite() {
    this.player.seek(this.player.end); // a draft cannot be rewritten
    this.#options.onRewrite(this);
  }

  #buttons() {
    const copy = quietButton("Copy", () => this.#copy(copy));
    const retry = quietButton("Try again", () => this.#options.onRetry());
    retry.classList.add("retry");
    this.#showButtons();
    const buttons = [this.#undoButton, this.#rewriteButton, ...(this.recording.text ? [copy] : []), retry];
    return element("div", { class: "buttons" }, ...buttons);
  }

  #showButtons() {
    this.#undoButton.hidden = !this.recording.isRevised;
    this.#rewriteButton.hidden = !this.#hasText || this.element.classList.contains("drafting");
  }

  async #copy(button) {
    try {
      await navigator.clipboard.writeText(this.recording.current);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  #replay() {
    const end = this.recording.frames.length;
    const seek = () => {
      this.#keepHeight();
      this.player.seek(Number(this.#slider.value));
    };
    const toggle = () => {
      this.#keepHeight();
      this.player.toggle();
    };
    this.#playButton = element("button", { type: "button", class: "round", click: toggle });
    this.#slider = element("input", { type: "range", min: 0, max: end, step: 1, "aria-label": "Denoising step", input: seek });
    this.#where = element("span", { class: "where" });
    const scale = element("span", { class: "heat-scale", "aria-hidden": "true" }, "sure", element("i"), "unsure", this.#pinLegend);
    return element("div", { class: "replay" }, this.#playButton, this.#slider, this.#where, scale);
  }

  /** Keep the slider where it is although drafts are shorter than the answer. */
  #keepHeight() {
    if (this.player.isAtEnd) this.body.style.minHeight = `${this.body.offsetHeight}px`;
  }

  #drawReplay(frame) {
    const { position, isPlaying, end } = this.player;
    const name = isPlaying ? "Pause the replay" : "Replay the denoising";
    if (this.#playButton.getAttribute("aria-label") !== name) {
      this.#playButton.setAttribute("aria-label", name);
      this.#playButton.replaceChildren(icon(isPlaying ? "pause" : "play"));
    }
    const where = frame ? `Step ${position + 1} of ${end}` : "Finished answer";
    this.#slider.value = position;
    this.#slider.setAttribute("aria-valuetext", frame ? `${where}, ${describe(frame)}` : where);
    this.#where.textContent = frame ? `${where} · ${describe(frame)}` : where;
    this.#markCharts(position);
  }

  #charts() {
    const { figures, mark } = answerCharts(this.recording);
    this.#markCharts = mark;
    const attributes = { class: "chart-box", open: this.#options.showCharts, toggle: () => this.#options.onCharts(box.open) };
    const box = element("details", attributes, element("summary", {}, "Charts"), figures);
    return box;
  }
}

/** Return a step in words. */
function describe(frame) {
  const pinned = frame.pinnedCount > 0 ? ` · ${frame.pinnedCount} pinned` : "";
  return (
    `canvas ${frame.block + 1}, step ${frame.step} of at most ${frame.total} · ` +
    `${frame.settledCount} of ${frame.length} settled${pinned} · entropy ${frame.entropy.toFixed(2)}`
  );
}

/** Return a sample of what pinned tokens look like. */
function pinLegend() {
  const sample = element("span", { class: "token settled pinned" }, element("span", {}, "pinned"));
  return element("span", { class: "pin-legend", "aria-hidden": "true", hidden: true }, sample);
}

function quietButton(name, click) {
  return element("button", { type: "button", class: "quiet", click }, name);
}

function errorLine(text) {
  return element("p", { class: "error", role: "alert" }, icon("alert"), text);
}

/** Return the figures of an answer in one line. */
function summary(recording) {
  const { steps, keptTokens, usage, timings, finishReason } = recording;
  const tokens = usage?.completion_tokens ?? keptTokens.reduce((sum, kept) => sum + kept, 0);
  const forwards = steps.reduce((sum, count) => sum + count, 0);
  const rate = timings?.predicted_per_second;
  return [
    ENDINGS[finishReason],
    recording.frames.length > 0 && [count(tokens, "token"), count(steps.length, "canvas", "canvases"), count(forwards, "step")],
    forwards > 0 && `${(tokens / forwards).toFixed(1)} tokens per forward`,
    rate && `${rate.toFixed(1)} tokens/s`,
    Number.isSafeInteger(timings?.seed) && `seed ${timings.seed}`,
    recording.seconds > 0 && `${recording.seconds.toFixed(1)} s`,
  ]
    .flat()
    .filter(Boolean)
    .join(" · ");
}

function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

function toolCall(call) {
  const text = `${call.name}(${call.arguments})`;
  return element("p", { class: "tool-call" }, element("strong", {}, "Tool call "), element("code", {}, text));
}
