// Asking for the API key of a server that wants one.

import { apiKey } from "./api.js";
import { byId } from "./dom.js";

/** Ask for a key where that is what an error means; throw it where it is not, or where no key is entered. */
export async function keyOrThrow(error) {
  if (error.status !== 401 || !(await askForKey(error.message))) throw error;
}

/**
 * Show the dialog; resolve to whether a key was entered.
 * @param {string} reason What the server said, or nothing.
 */
export function askForKey(reason = "") {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = reason;
  field.value = apiKey.get();
  byId("key-cancel").onclick = () => dialog.close("cancel");
  byId("key-form").onsubmit = (event) => {
    event.preventDefault();
    apiKey.set(field.value.trim());
    dialog.close("used");
  };
  dialog.returnValue = "cancel"; // what Escape leaves
  dialog.showModal();
  field.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "used"), { once: true });
  });
}
