/** The settings drawer: system prompt, sampling, answer format and tools of the conversation; theme, language and key. */

import { readSchema, readTools, SAMPLING } from "./conversation.js";
import { h, icon } from "./dom.js";
import { setLanguage, t } from "./i18n.js";
import { apiKey, preferences } from "./store.js";

const EXAMPLE_TOOLS = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "Current weather in a city",
    parameters: { type: "object", properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } }, required: ["city"] },
  },
}];
const EXAMPLE_SCHEMA = { type: "object", properties: { name: { type: "string" }, tags: { type: "array", items: { type: "string" } } }, required: ["name", "tags"] };

export class Drawer {
  /**
   * @param {HTMLElement} body where the fields go
   * @param {import("./chat.js").Chat} chat
   * @param {{languageChanged: () => void, keyChanged: () => void}} page
   */
  constructor(body, chat, page) {
    this.body = body;
    this.chat = chat;
    this.page = page;
    this.defaults = {}; // the model's own values of sampling fields, where the server tells them
    this.open = new Set(["system", "sampling"]); // sections that are unfolded
  }

  get settings() {
    return this.chat.current.settings;
  }

  /** Builds the fields for the current conversation and language. */
  show() {
    this.body.replaceChildren(
      this.#section("system", "set.system", this.#system()),
      this.#section("sampling", "set.sampling", this.#sampling()),
      this.#section("output", "set.output", this.#output()),
      this.#section("tools", "set.tools", this.#tools()),
      this.#section("page", "set.page", this.#page()),
    );
  }

  /** Unfolds a section and puts the cursor there. */
  focus(name) {
    this.open.add(name);
    const section = this.body.querySelector(`[data-section="${name}"]`);
    if (!section) return;
    section.open = true;
    section.scrollIntoView({ block: "nearest" });
    const target = name === "page" ? "input[type=password]" : "textarea, input";
    section.querySelector(target)?.focus();
  }

  #section(name, title, fields) {
    const section = h("details", { "data-section": name, open: this.open.has(name) }, h("summary", {}, t(title), icon("down")), h("div", { class: "fields" }, ...fields));
    section.addEventListener("toggle", () => this.open[section.open ? "add" : "delete"](name));
    return section;
  }

  #set(name, value) {
    this.settings[name] = value;
    this.chat.settingsChanged();
  }

  #system() {
    const area = h("textarea", { rows: 4, placeholder: t("set.system.hint"), "aria-label": t("set.system"), dir: "auto" });
    area.value = this.settings.system;
    area.addEventListener("input", () => this.#set("system", area.value));
    return [area];
  }

  #sampling() {
    const rows = SAMPLING.map((field) => this.#number(field));
    const stop = h("textarea", { rows: 2, id: "set-stop" });
    stop.value = this.settings.stop;
    stop.addEventListener("input", () => this.#set("stop", stop.value));
    const stopRow = h("div", { class: "field" }, h("label", { for: "set-stop" }, t("p.stop")), h("p", { class: "hint" }, t("p.stop.hint")), stop);
    const onclick = () => {
      this.chat.resetSettings();
      this.show();
      this.body.querySelector(".reset").focus();
    };
    const reset = h("button", { type: "button", class: "quiet reset", onclick }, icon("again"), t("set.reset"));
    return [h("p", { class: "hint" }, t("set.sampling.note")), ...rows, stopRow, reset];
  }

  #number({ name, min, max, step, slider }) {
    const id = `set-${name}`;
    const input = h("input", { type: "number", id, min, max, step: step === 1 ? 1 : "any", placeholder: this.defaults[name] ?? t("set.default"), inputmode: step === 1 ? "numeric" : "decimal" });
    const value = this.settings.sampling[name];
    input.value = value ?? "";
    const row = h("div", { class: "field number" }, h("label", { for: id, title: name }, t(`p.${name}`)), input);
    const range = slider && h("input", { type: "range", min, max, step, "aria-label": t(`p.${name}`), tabindex: "-1" });
    const neutral = this.defaults[name] ?? 0;
    const show = () => {
      row.classList.toggle("set", input.value !== "");
      if (range) range.value = input.value === "" ? neutral : input.value;
    };
    const store = () => {
      const number = input.valueAsNumber;
      if (Number.isNaN(number)) delete this.settings.sampling[name];
      else this.settings.sampling[name] = number;
      const bad = !input.validity.valid;
      input.setAttribute("aria-invalid", String(bad));
      input.title = bad ? t("bad.number", { name: t(`p.${name}`), min, max }) : "";
      this.chat.settingsChanged();
      show();
    };
    input.addEventListener("input", store);
    if (range) {
      range.addEventListener("input", () => {
        input.value = range.value;
        store();
      });
      row.append(range);
    }
    row.append(h("p", { class: "hint" }, t(`p.${name}.hint`)));
    show();
    return row;
  }

  #output() {
    const editor = this.#json("schema", t("f.schema"), EXAMPLE_SCHEMA, readSchema);
    editor.hidden = this.settings.format !== "json_schema";
    const change = (value) => {
      this.#set("format", value);
      editor.hidden = value !== "json_schema";
    };
    const formats = ["text", "json_object", "json_schema"].map((value) => [value, t(`f.${value}`)]);
    return [choice("format", t("set.output"), formats, this.settings.format, change), editor];
  }

  #tools() {
    const editor = this.#json("tools", t("tools.label"), EXAMPLE_TOOLS, readTools);
    const uses = ["auto", "required", "none"].map((value) => [value, t(`tools.${value}`)]);
    return [h("p", { class: "hint" }, t("tools.hint")), editor, choice("tool_choice", t("tools.choice"), uses, this.settings.tool_choice, (value) => this.#set("tool_choice", value))];
  }

  /** A text area for JSON that says at once what is wrong. */
  #json(name, label, example, read) {
    const area = h("textarea", { rows: 6, class: "mono", "aria-label": label, spellcheck: "false", autocapitalize: "off", "aria-describedby": `bad-${name}` });
    const problem = h("p", { class: "problem", id: `bad-${name}`, role: "status" });
    const insert = h("button", { type: "button", class: "quiet", onclick: () => {
      area.value = JSON.stringify(example, null, 2);
      store();
      area.focus();
    } }, t("f.example"));
    const check = () => {
      let text = "";
      try {
        if (area.value.trim()) read(area.value);
      } catch (error) {
        text = t(error.key, error.values);
      }
      problem.textContent = text;
      area.setAttribute("aria-invalid", String(text !== ""));
      insert.hidden = area.value.trim() !== "";
    };
    const store = () => {
      this.#set(name, area.value);
      check();
    };
    area.value = this.settings[name];
    area.addEventListener("input", store);
    check();
    return h("div", { class: "field json" }, area, problem, insert);
  }

  #page() {
    const theme = (value) => {
      preferences.set("theme", value);
      window.dispatchEvent(new Event("qwench-theme"));
    };
    const speak = (value) => {
      preferences.set("language", value);
      setLanguage(value);
      this.page.languageChanged();
      this.body.querySelector(`input[name=language][value=${value}]`)?.focus();
    };
    const themes = ["auto", "light", "dark"].map((value) => [value, t(`theme.${value}`)]);
    const languages = [["auto", t("theme.auto")], ["en", "English"], ["zh", "中文"]];
    const key = h("input", { type: "password", id: "set-key", autocomplete: "off", spellcheck: "false" });
    const keep = h("input", { type: "checkbox", id: "set-keep" });
    key.value = apiKey.get();
    keep.checked = apiKey.kept;
    const store = () => {
      apiKey.set(key.value.trim(), keep.checked);
      this.page.keyChanged();
    };
    key.addEventListener("change", store);
    keep.addEventListener("change", store);
    return [
      choice("theme", t("page.theme"), themes, preferences.get("theme", "auto"), theme),
      choice("language", t("page.language"), languages, preferences.get("language", "auto"), speak),
      h("div", { class: "field" }, h("label", { for: "set-key" }, t("page.key")), key, h("p", { class: "hint" }, t("page.key.hint")),
        h("label", { class: "check" }, keep, t("page.key.keep"))),
    ];
  }
}

/** A row of choices, one of them taken (radio buttons, so the arrow keys work). */
function choice(name, label, options, value, change) {
  const buttons = options.map(([option, text]) =>
    h("label", {}, h("input", { type: "radio", name, value: option, checked: option === value, onchange: () => change(option) }), h("span", {}, text)));
  return h("fieldset", { class: "field" }, h("legend", {}, label), h("div", { class: "choice" }, ...buttons));
}
