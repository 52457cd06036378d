/** One turn on the page: a user's bubble that can be edited, or an answer with its tool cards, figures and errors. */

import { copyButton, h, icon, iconButton } from "./dom.js";
import { number, t } from "./i18n.js";
import { codeView, MarkdownView } from "./mdview.js";

const LEAST_WRITE_S = 0.02; // a shorter answer came in one piece of the network, whose time says nothing about speed

/** @typedef {{edit: Function, regenerate: Function, results: Function, turnTo: Function, openSettings: Function}} Actions */

/** A user's turn. Its text is shown as it was typed. */
export class UserTurn {
  /** @param {object} node @param {Actions} actions */
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.body = h("div", { class: "bubble", dir: "auto" }, node.content);
    this.footer = h("div", { class: "turn-foot" });
    this.element = h("article", { class: "turn user", "aria-label": t("you") }, this.body, this.footer);
  }

  update({ versions, index, busy }) {
    if (this.editing) return;
    this.footer.replaceChildren(
      ...versionButtons(this.node, versions, index, busy, this.actions),
      copyButton(t("copy"), t("copied"), () => this.node.content),
      iconButton("edit", t("edit"), () => this.edit(), { class: "edit", disabled: busy }),
    );
  }

  edit() {
    if (this.editing) return;
    const area = h("textarea", { "aria-label": t("edit.label"), rows: 1, dir: "auto" });
    area.value = this.node.content;
    const close = () => {
      this.editing = false;
      form.replaceWith(this.body);
      this.element.classList.remove("editing");
      this.element.querySelector(".edit")?.focus();
    };
    const submit = () => {
      if (!area.value.trim()) return;
      close();
      this.actions.edit(this.node, area.value);
    };
    const onkeydown = (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey) submit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    area.addEventListener("keydown", onkeydown);
    area.addEventListener("input", () => grow(area));
    const buttons = h("div", { class: "row" }, h("button", { type: "button", class: "quiet", onclick: close }, t("cancel")),
      h("button", { type: "submit", class: "primary" }, t("save")));
    const form = h("form", { class: "edit-form", onsubmit: (event) => (event.preventDefault(), submit()) }, area, buttons);
    this.editing = true;
    this.body.replaceWith(form);
    this.element.classList.add("editing");
    grow(area);
    area.focus();
  }
}

/** An answer of the model. */
export class AnswerTurn {
  /** @param {object} node @param {Actions} actions */
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.text = new MarkdownView();
    this.text.element.dir = "auto";
    this.tools = h("div", { class: "tools" });
    this.cards = [];
    this.notice = h("div", { class: "notice-box" });
    this.footer = h("div", { class: "turn-foot" });
    this.element = h("article", { class: "turn answer", "aria-label": t("assistant") }, this.text.element, this.tools, this.notice, this.footer);
  }

  /** Text and calls as far as they have come; called for every frame of a stream. */
  grow() {
    const streaming = this.node.status === "streaming";
    if (this.shown !== this.node.content || this.wasStreaming !== streaming) this.text.update(this.node.content, streaming);
    this.shown = this.node.content;
    this.wasStreaming = streaming;
    for (const [i, call] of (this.node.tool_calls ?? []).entries()) {
      if (!call) continue;
      this.cards[i] ??= new ToolCard(this.tools);
      this.cards[i].update(call);
    }
  }

  /** @param {{versions: object[], index: number, busy: boolean, results: object[], waiting: boolean}} state */
  update({ versions, index, busy, results, waiting }) {
    this.grow();
    const { node } = this;
    const streaming = node.status === "streaming";
    this.element.classList.toggle("streaming", streaming);
    this.element.setAttribute("aria-busy", String(streaming));
    for (const [i, card] of this.cards.entries()) card?.result(results.find((result) => result.tool_call_id === node.tool_calls[i].id) ?? null, waiting);
    this.#sendResults(waiting);
    this.notice.replaceChildren(...this.#notices(busy));
    if (streaming) {
      this.clock = h("span", { class: "stats" });
      this.footer.replaceChildren(h("span", { class: "dots", role: "img", "aria-label": t("writing") }, h("i"), h("i"), h("i")), this.clock);
      return;
    }
    const empty = !node.content && !node.tool_calls?.length;
    this.footer.replaceChildren(
      ...versionButtons(node, versions, index, busy, this.actions),
      empty ? "" : copyButton(t("copy"), t("copied"), () => node.content || JSON.stringify(node.tool_calls)),
      iconButton("again", t("regenerate"), () => this.actions.regenerate(node), { class: "regenerate", disabled: busy }),
      h("span", { class: "stats" }, ...figures(node)),
    );
  }

  /** Seconds since the request, while nothing better is known. */
  tick(seconds) {
    if (!this.clock) return;
    const first = this.node.stats?.first_s;
    this.clock.textContent = (first ? `${t("stat.first", { s: number(first, 2) })} · ` : "") + t("stat.time", { s: number(seconds, 1) });
  }

  #sendResults(waiting) {
    if (!waiting) {
      this.send?.remove();
      this.send = null;
      return;
    }
    if (this.send) return;
    const onclick = () => this.actions.results(this.node, this.cards.map((card) => card.input.value));
    this.send = h("button", { type: "button", class: "primary send-results", onclick }, t("tool.send"));
    this.tools.append(this.send);
  }

  #notices(busy) {
    const { node } = this;
    if (node.status === "stopped") return [h("p", { class: "note" }, t("stopped"))];
    if (node.status === "done" && node.finish === "length") return [h("p", { class: "note" }, t("cut.length"))];
    if (node.status !== "error") return [];
    const { kind, detail, retryAfter, section } = node.error ?? {};
    const help = kind === "busy" && retryAfter ? t("err.busy.after", { s: retryAfter }) : known(`err.${kind}.help`);
    const buttons = h("div", { class: "row" }, h("button", { type: "button", class: "retry", disabled: busy, onclick: () => this.actions.regenerate(node) }, icon("again"), t("retry")));
    if (kind === "auth") buttons.prepend(h("button", { type: "button", class: "primary", onclick: () => this.actions.openSettings("page") }, t("err.auth.do")));
    if (kind === "settings") buttons.prepend(h("button", { type: "button", class: "primary", onclick: () => this.actions.openSettings(section) }, t("err.settings.do")));
    const lines = [h("strong", {}, known(`err.${kind}`) || t("err.server"))];
    if (help) lines.push(h("p", {}, help));
    if (detail) lines.push(h("p", { class: "detail" }, detail));
    return [h("div", { class: `error error-${kind}`, role: "alert" }, icon("alert"), h("div", {}, ...lines, buttons))];
  }
}

/** A call with its arguments, and its result: given, or to be typed. */
class ToolCard {
  constructor(parent) {
    this.name = h("span", { class: "tool-name" });
    this.state = h("span", { class: "tool-state" });
    this.args = h("div");
    this.answer = h("div", { class: "tool-answer" });
    this.element = h("section", { class: "tool-card", "aria-label": t("tool.call") },
      h("header", {}, icon("tool"), this.name, this.state), this.args, this.answer);
    const button = parent.querySelector(".send-results");
    parent.insertBefore(this.element, button);
  }

  update(call) {
    this.name.textContent = call.name;
    const text = pretty(call.arguments);
    if (text === this.shown) return;
    this.shown = text;
    const block = { lang: "json", code: text.split("\n") };
    if (this.view) this.view.update(block);
    else this.args.replaceChildren((this.view = labelled(codeView(block), t("tool.args"))).element);
  }

  result(node, waiting) {
    const mode = node ? node.id : waiting ? "typing" : "none";
    if (mode === this.mode) return;
    this.mode = mode;
    this.input = null;
    this.state.replaceChildren(...(node ? [icon("check")] : []));
    if (node) {
      const text = pretty(node.content);
      const block = { lang: text !== node.content || /^[[{]/.test(text) ? "json" : "", code: text.split("\n") };
      this.answer.replaceChildren(labelled(codeView(block), t("tool.result")).element);
    } else if (waiting) {
      this.input = h("textarea", { rows: 2, placeholder: t("tool.enter"), "aria-label": `${t("tool.result")}: ${this.name.textContent}` });
      this.input.addEventListener("input", () => grow(this.input));
      this.answer.replaceChildren(this.input);
    } else this.answer.replaceChildren();
  }
}

function labelled(view, text) {
  view.element.querySelector(".lang").textContent = text;
  return view;
}

function pretty(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null ? JSON.stringify(value, null, 2) : text;
  } catch {
    return text;
  }
}

/** A text of i18n.js if there is one. */
function known(key) {
  const text = t(key);
  return text === key ? "" : text;
}

function versionButtons(node, versions, index, busy, actions) {
  if (versions < 2) return [];
  const of = t("version.of", { i: index + 1, n: versions });
  return [h("span", { class: "versions", role: "group", "aria-label": of },
    iconButton("left", t("version.prev"), () => actions.turnTo(node, -1), { disabled: busy || index === 0 }),
    h("span", {}, `${index + 1}/${versions}`),
    iconButton("right", t("version.next"), () => actions.turnTo(node, 1), { disabled: busy || index === versions - 1 }))];
}

/** Tokens a second and the like. Without usage from the server (a stopped answer), pieces stand for tokens: "≈". */
function figures({ stats = {} }) {
  const tokens = stats.out ?? stats.chunks;
  const about = stats.out === undefined ? "≈ " : "";
  const texts = [];
  if (tokens > 1 && stats.write_s >= LEAST_WRITE_S) texts.push(about + t("stat.speed", { n: number((tokens - 1) / stats.write_s, tokens / stats.write_s < 100 ? 1 : 0) }));
  if (stats.first_s !== undefined) texts.push(t("stat.first", { s: number(stats.first_s, 2) }));
  if (tokens !== undefined) texts.push(about + t("stat.out", { n: number(tokens) }));
  if (stats.prompt !== undefined) texts.push(t("stat.prompt", { n: number(stats.prompt) }) + (stats.cached ? ` (${t("stat.cached", { n: number(stats.cached) })})` : ""));
  return texts.map((text) => h("span", {}, text));
}

/** Makes a text area as high as its text, up to the limit in style.css. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
