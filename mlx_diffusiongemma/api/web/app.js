// The page: wires the form, the conversation, the parameters and the server together.

import { ApiError, listModels, streamChat } from "./api.js";
import { Chat } from "./chat.js";
import { byId, element } from "./dom.js";
import { Images } from "./images.js";
import { askForKey, keyOrThrow } from "./key.js";
import { Parameters } from "./parameters.js";
import { RewriteBar } from "./rewrite.js";
import { changesInWords, rewritten } from "./rewriting.js";

const CHARTS_OPEN = "diffusiongemma.charts";
const RETRY_SECONDS = 2; // while the model is loading
const NEAR_END = 120; // px from the end of the page within which it goes on being followed

const prompt = byId("prompt");
const chat = new Chat(byId("conversation"));
const parameters = new Parameters(byId("parameters"));
const images = new Images(byId("attachments"), showComposerError);
const rewriteBar = new RewriteBar({
  viewOf: (node) => chat.viewOf(node),
  isBusy: () => running !== null,
  onRewrite: rewrite,
  announce,
});
let running = null; // { controller, view } of the answer under way; without a view, of a rewriting
let followsEnd = true; // the reader has not scrolled away from the end

// -- asking ---------------------------------------------------------------------------------------------------------

function submit() {
  const text = prompt.value.trim();
  if (running || (!text && images.isEmpty)) return;
  if (!checkParameters()) return;
  chat.ask(text, images.take());
  prompt.value = "";
  fitPrompt();
  showComposerError("");
  byId("welcome").hidden = true;
  byId("new-chat").hidden = false;
  answer();
}

/** Ask the server for an answer to the last message, and show it. */
async function answer() {
  if (running || !checkParameters()) return;
  const view = chat.answer({
    pace: parameters.pace,
    onGrow: followEnd,
    showCharts: localStorage.getItem(CHARTS_OPEN) !== "no",
    onCharts: (open) => localStorage.setItem(CHARTS_OPEN, open ? "yes" : "no"),
    onRetry: answer,
    onRewrite: (view) => rewriteBar.choose(view),
    onUndo: undo,
  });
  running = { controller: new AbortController(), view };
  showRunning();
  followsEnd = true;
  followEnd();
  announce("The answer is being made.");
  await receive(view, running.controller.signal);
  await view.finish();
  running = null;
  showRunning();
  announce(ending(view.recording));
}

/** Read the stream of an answer to its end, good or bad. */
async function receive(view, signal) {
  const began = performance.now();
  const { recording } = view;
  try {
    for await (const chunk of chunks(signal)) {
      const length = recording.text.length;
      if (chunk.prompt_progress) view.showPrefill(chunk.prompt_progress);
      view.add(chunk);
      speak(recording.text.slice(length));
    }
  } catch (error) {
    if (error.name === "AbortError") recording.finishReason = "cancelled";
    else recording.error = inWords(error);
  }
  recording.seconds = (performance.now() - began) / 1000;
}

/** Yield the chunks of an answer; ask for a key and try again where the server wants one. */
async function* chunks(signal) {
  const body = { ...model(), messages: chat.messages(parameters.system), ...parameters.request() };
  for (;;) {
    try {
      return yield* streamChat(body, signal);
    } catch (error) {
      await keyOrThrow(error);
    }
  }
}

function model() {
  const name = byId("model").value;
  return name ? { model: name } : {};
}

/** Return an error as a line to show. */
function inWords(error) {
  if (error instanceof ApiError) return error.message;
  console.error(error);
  return `The page failed: ${error.message}`;
}

function stop() {
  if (!running) return;
  running.controller.abort();
  const player = running.view?.player;
  if (player?.end >= 0) player.seek(player.end); // do not wait for steps that are yet to be shown
}

function checkParameters() {
  const field = parameters.firstInvalid;
  if (!field) return true;
  showSettings(true);
  field.closest("details")?.setAttribute("open", "");
  field.reportValidity();
  return false;
}

function newChat() {
  stop();
  chat.clear();
  byId("welcome").hidden = false;
  byId("new-chat").hidden = true;
  byId("spoken").replaceChildren();
  prompt.focus();
}

// -- rewriting ------------------------------------------------------------------------------------------------------

/** Have a part of a finished answer written anew, in its place. */
async function rewrite(view, span) {
  if (running || !checkParameters()) return;
  running = { controller: new AbortController(), view: null };
  showRunning();
  rewriteBar.begin();
  view.showNotice("");
  announce("The selection is being rewritten.");
  try {
    const body = { ...model(), messages: chat.messages(parameters.system, view), ...parameters.partRequest() };
    const choice = await rewritten(body, view.recording.current, span, running.controller.signal);
    const words = changesInWords(choice.changes);
    if (choice.changes.length) view.revise(choice);
    if (choice.changes.every((change) => !change.new)) view.showNotice(words); // there is nothing to mark
    announce(words);
  } catch (error) {
    if (error.name !== "AbortError") view.showNotice(inWords(error), true);
    announce(error.name === "AbortError" ? "Stopped." : "");
  }
  running = null;
  showRunning();
  rewriteBar.end();
}

function undo(view) {
  if (running) return;
  view.undo();
  announce("The rewriting is undone.");
}

// -- what is said to screen readers ---------------------------------------------------------------------------------

/** Say what happens. */
function announce(text) {
  byId("announcements").textContent = text;
}

/** Read text out once it is certain. Drafts are never read. */
function speak(text) {
  if (text.trim()) byId("spoken").append(element("span", {}, text));
}

function ending(recording) {
  byId("spoken").replaceChildren(); // the same text stands in the conversation
  if (recording.error) return ""; // an alert of its own
  if (recording.finishReason === "cancelled") return "Stopped.";
  return `The answer is finished, after ${recording.frames.length} denoising steps.`;
}

// -- the frame of the page ------------------------------------------------------------------------------------------

function showRunning() {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  if (hadFocus) byId(running ? "stop" : "send").focus(); // the button under the finger has changed its meaning
}

function showComposerError(text) {
  byId("composer-error").textContent = text;
  byId("composer-error").hidden = !text;
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** Keep the end in view, unless the reader has scrolled away from it. */
function followEnd() {
  if (followsEnd) byId("main").scrollTop = byId("main").scrollHeight;
}

function noteScrolling() {
  const { scrollHeight, scrollTop, clientHeight } = byId("main");
  followsEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
}

function showSettings(open) {
  byId("settings").hidden = !open;
  byId("settings-button").setAttribute("aria-expanded", String(open));
  if (!open) byId("settings-button").focus();
}

function nameThemeButton() {
  const other = globalThis.theme.current() === "dark" ? "light" : "dark";
  byId("theme-button").setAttribute("aria-label", `Use the ${other} theme`);
  return other;
}

/** Fill the list of models; wait while the server loads, ask for a key where it wants one. */
async function showModels() {
  const state = byId("server-state");
  try {
    const names = await listModels();
    byId("model").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    document.querySelector(".model").hidden = names.length === 0;
    state.textContent = "";
  } catch (error) {
    state.textContent = error.message;
    if (error.status === 401 && (await askForKey(error.message))) showModels();
    else if (error.status === 503) setTimeout(showModels, RETRY_SECONDS * 1000);
  }
}

// -- events ---------------------------------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fitPrompt);
prompt.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) images.add(event.clipboardData.files);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (running) stop();
  else if (rewriteBar.isOpen) rewriteBar.close();
  else if (!byId("settings").hidden) showSettings(false);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) images.add(event.dataTransfer.files);
});

byId("main").addEventListener("scroll", noteScrolling, { passive: true });
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", async (event) => {
  await images.add([...event.target.files]);
  event.target.value = ""; // so that the same file may be chosen again
  prompt.focus();
});
byId("suggestions").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  prompt.value = event.target.textContent;
  submit();
  prompt.focus();
});
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", newChat);
byId("theme-button").addEventListener("click", () => globalThis.theme.choose(nameThemeButton()));
document.addEventListener("themechange", nameThemeButton);
byId("settings-button").addEventListener("click", () => showSettings(byId("settings").hidden));
byId("settings-close").addEventListener("click", () => showSettings(false));
byId("parameters").addEventListener("submit", (event) => event.preventDefault());
byId("key-button").addEventListener("click", async () => {
  if (await askForKey()) showModels();
});

nameThemeButton();
showModels();
