// Images of the next message: chosen, pasted or dropped, shown as thumbnails, sent as data URLs.

import { element, icon } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MAX_BYTES = 40 * 2 ** 20; // of all together: the server takes bodies of 64 MiB, and base64 adds a third

export class Images {
  /**
   * @param {HTMLElement} list Where the thumbnails go.
   * @param {function(string): void} onError Told why an image is not taken; "" when all is well.
   */
  constructor(list, onError) {
    this.#list = list;
    this.#onError = onError;
  }

  #list;
  #onError;
  #images = []; // { name, size, url }

  /** Take files of any kind; those that are no images are refused. */
  async add(files) {
    this.#onError("");
    for (const file of files) {
      if (!TYPES.includes(file.type)) {
        this.#onError(`${file.name} is ${file.type || "of an unknown type"}, expected PNG, JPEG, WebP or GIF.`);
      } else if (this.#bytes() + file.size > MAX_BYTES) {
        this.#onError(`${file.name} is too large: images may have ${MAX_BYTES / 2 ** 20} MiB together.`);
      } else {
        this.#images.push({ name: file.name, size: file.size, url: await dataUrl(file) });
      }
    }
    this.#draw();
  }

  /** Return the images and forget them. */
  take() {
    const taken = this.#images;
    this.#images = [];
    this.#draw();
    return taken;
  }

  get isEmpty() {
    return this.#images.length === 0;
  }

  #bytes() {
    return this.#images.reduce((sum, image) => sum + image.size, 0);
  }

  #draw() {
    this.#list.replaceChildren(...this.#images.map((image) => this.#thumbnail(image)));
  }

  #thumbnail(image) {
    const remove = () => {
      this.#images = this.#images.filter((other) => other !== image);
      this.#draw();
    };
    const button = { type: "button", class: "round", "aria-label": `Remove ${image.name}`, click: remove };
    return element("li", {}, element("img", { src: image.url, alt: image.name }), element("button", button, icon("close")));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
