// The form of parameters: remembered in this browser, and read into the fields of a request. Empty means the server's
// default and is not sent.

const STORED = "diffusiongemma.parameters";

export class Parameters {
  /** @param {HTMLFormElement} form */
  constructor(form) {
    this.#form = form;
    this.#restore();
    form.addEventListener("input", () => this.#store());
    form.addEventListener("reset", () => setTimeout(() => this.#store())); // once the fields are empty
  }

  #form;

  get system() {
    return this.#field("system").value.trim();
  }

  /** Milliseconds for which every step is shown at least. */
  get pace() {
    return Number(this.#field("pace").value);
  }

  /** Return the first field whose value cannot be sent; null if there is none. */
  get firstInvalid() {
    return [...this.#form.elements].find((field) => field.willValidate && !field.checkValidity()) ?? null;
  }

  /** Return the fields of a request. */
  request() {
    const fields = {};
    for (const field of this.#form.elements) {
      if (field.type === "number" && field.value !== "") fields[field.name] = field.valueAsNumber;
    }
    if (this.#field("enable_thinking").checked) fields.enable_thinking = true;
    if (this.#field("stop").value) fields.stop = [this.#field("stop").value];
    if (this.#field("regex").value) fields.regex = this.#field("regex").value;
    return fields;
  }

  /** Return those fields that a request for a part of an answer can have too. */
  partRequest() {
    const { max_tokens, stop, regex, enable_thinking, ...rest } = this.request();
    return rest;
  }

  #field(name) {
    return this.#form.elements.namedItem(name);
  }

  #named() {
    return [...this.#form.elements].filter((field) => field.name);
  }

  #store() {
    const values = this.#named().map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
    localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(values)));
  }

  #restore() {
    const values = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    for (const field of this.#named()) {
      const value = values[field.name];
      if (field.type === "checkbox") field.checked = value === true;
      else if (typeof value === "string" && (field.type !== "select-one" || hasOption(field, value))) field.value = value;
    }
  }
}

function hasOption(select, value) {
  return [...select.options].some((option) => option.value === value);
}
