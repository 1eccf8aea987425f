// The server's HTTP interface, as far as the page uses it. Addresses are relative, so a prefix in a proxy does no harm.

import { eventData } from "./sse.js";

const KEY_NAME = "diffusiongemma.key";
const STREAM = {
  stream: true,
  stream_options: { include_usage: true },
  diffusion_frames: true,
  return_progress: true,
};

/** What the server said about a request that it could not serve; status 0 where nothing was reached. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

/** The API key of this tab. It is forgotten when the tab is closed. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY_NAME) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY_NAME, key) : sessionStorage.removeItem(KEY_NAME)),
};

/** Return the names of the models, the default first. */
export async function listModels() {
  const answer = await send("v1/models");
  return (await answer.json()).data.map((model) => model.id);
}

/**
 * Ask for an answer; yield the chunks of its stream, drafts among them.
 * @param {Object} body Of `/v1/chat/completions`, without the fields that ask for a stream.
 * @param {AbortSignal} signal Ends the request.
 */
export async function* streamChat(body, signal) {
  const answer = await post("v1/chat/completions", { ...body, ...STREAM }, signal);
  try {
    for await (const data of eventData(answer.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server reported an error.", answer.status);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off.");
  }
  throw new ApiError("The connection ended before the answer did.");
}

/**
 * Ask for another text in place of a part of one; return the new text and its changes.
 * @param {Object} body Of `/v1/edits`.
 * @param {AbortSignal} signal Ends the request.
 */
export async function editText(body, signal) {
  const answer = await post("v1/edits", body, signal);
  try {
    return (await answer.json()).choices[0];
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke off.");
  }
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!answer.ok) throw new ApiError(await errorMessage(answer), answer.status);
  return answer;
}

async function errorMessage(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered ${answer.status} ${answer.statusText}`.trim();
  }
}
