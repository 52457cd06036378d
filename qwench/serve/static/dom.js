/**
 * Builds DOM nodes, and copies text. Text always goes in as a text node: no HTML is ever parsed, so text of a model or
 * of a user cannot become an element.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, unknown>} attributes `class`, `on<event>` (a function), booleans, anything setAttribute takes
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child || child === "") element.append(child);
  return element;
}

/** The symbol `i-<name>` of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon alone; `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, more = {}) {
  const { class: further = "", ...rest } = more;
  const attributes = { type: "button", class: `icon-button ${further}`.trim(), "aria-label": label, title: label };
  return h("button", { ...attributes, onclick, ...rest }, icon(name));
}

/** Copies to the clipboard; also where the page has no secure context (plain http from another machine). */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // no permission: try the older way
    }
  }
  const area = h("textarea", { class: "sr-only", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  const before = document.activeElement;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return done;
}

/** A copy button that turns into a tick for a moment. `text` is called when it is pressed. */
export function copyButton(label, copied, text) {
  const button = iconButton("copy", label, async () => {
    if (!(await copyText(text()))) return;
    button.replaceChildren(icon("check"));
    button.setAttribute("aria-label", copied);
    clearTimeout(button.back);
    button.back = setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  }, { class: "copy" });
  return button;
}
