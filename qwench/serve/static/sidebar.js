/** The list of conversations: search, open, rename, delete with undo, export and import. */

import { exportText, importText, pathOf } from "./conversation.js";
import { h, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const DAY_MS = 86_400_000;
const SURE_MS = 4000;

export class Sidebar {
  /**
   * @param {{list: HTMLElement, search: HTMLInputElement, file: HTMLInputElement, deleteAll: HTMLElement, exportAll: HTMLElement}} elements
   * @param {import("./chat.js").Chat} chat
   * @param {{opened: () => void, toast: (text: string, action?: {label: string, run: () => void}) => void}} page
   */
  constructor(elements, chat, page) {
    Object.assign(this, elements);
    this.chat = chat;
    this.page = page;
    this.search.addEventListener("input", () => this.refresh());
    this.file.addEventListener("change", () => this.#import());
    this.exportAll.addEventListener("click", () => this.export([...chat.conversations.values()], "qwench-chats"));
    this.deleteAll.addEventListener("click", () => this.#deleteAll());
  }

  refresh() {
    const all = [...this.chat.conversations.values()].sort((a, b) => b.updated - a.updated);
    const wanted = this.search.value.trim().toLowerCase();
    const found = wanted ? all.filter((conversation) => matches(conversation, wanted)) : all;
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    const parts = [];
    let group = "";
    let list = null;
    for (const conversation of found) {
      const name = groupOf(conversation.updated);
      if (name !== group) {
        group = name;
        list = h("ul");
        parts.push(h("h2", {}, t(name)), list);
      }
      list.append(this.#row(conversation));
    }
    if (!found.length) parts.push(h("p", { class: "list-note" }, t(wanted ? "search.none" : "list.empty")));
    this.list.replaceChildren(...parts);
    if (focused) this.list.querySelector(`li[data-id="${focused}"] .open`)?.focus();
    this.exportAll.disabled = this.deleteAll.disabled = all.length === 0;
  }

  #row(conversation) {
    const current = conversation.id === this.chat.current.id;
    const title = conversation.title || t("untitled");
    const open = () => {
      this.chat.open(conversation.id);
      this.page.opened();
    };
    const button = h("button", { type: "button", class: "open", title, "aria-current": current ? "true" : null, onclick: open }, h("span", {}, title));
    if (this.chat.streaming(conversation)) button.append(h("i", { class: "pulse", role: "img", "aria-label": t("writing") }));
    const row = h("li", { "data-id": conversation.id, class: current ? "current" : null }, button,
      iconButton("edit", t("rename"), () => this.#rename(row, conversation), { class: "row-action rename" }),
      iconButton("trash", t("delete"), () => this.#delete(conversation), { class: "row-action delete" }));
    return row;
  }

  #rename(row, conversation) {
    const input = h("input", { type: "text", "aria-label": t("rename"), maxlength: 120 });
    input.value = conversation.title;
    let open = true;
    const close = (keep) => {
      if (!open) return;
      open = false;
      if (keep) this.chat.rename(conversation, input.value);
      else this.refresh();
      this.list.querySelector(`li[data-id="${conversation.id}"] .open`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229 || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      close(event.key === "Enter");
    });
    input.addEventListener("blur", () => close(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }

  #delete(conversation) {
    this.chat.remove(conversation);
    const undo = { label: t("undo"), run: () => (this.chat.add([conversation]), this.chat.open(conversation.id)) };
    this.page.toast(t("deleted", { title: conversation.title || t("untitled") }), undo);
  }

  #deleteAll() {
    const { deleteAll: button, chat } = this;
    if (!button.classList.contains("sure")) {
      const text = t("delete.sure", { n: chat.conversations.size });
      button.classList.add("sure");
      button.replaceChildren(icon("trash"), text);
      clearTimeout(this.back);
      this.back = setTimeout(() => this.resetDeleteAll(), SURE_MS);
      return;
    }
    this.resetDeleteAll();
    for (const conversation of [...chat.conversations.values()]) chat.remove(conversation);
  }

  resetDeleteAll() {
    this.deleteAll.classList.remove("sure");
    this.deleteAll.replaceChildren(icon("trash"), t("delete.all"));
  }

  /** Saves conversations as a JSON file. */
  export(conversations, name) {
    const url = URL.createObjectURL(new Blob([exportText(conversations)], { type: "application/json" }));
    const day = new Date().toISOString().slice(0, 10);
    h("a", { href: url, download: `${name}-${day}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async #import() {
    const [file] = this.file.files;
    this.file.value = "";
    if (!file) return;
    try {
      const conversations = importText(await file.text());
      this.chat.add(conversations);
      if (conversations.length) this.chat.open(conversations[0].id);
      this.page.toast(t("imported", { n: conversations.length }));
      this.page.opened();
    } catch (error) {
      this.page.toast(t("import.bad", { why: error.message }));
    }
  }
}

function matches(conversation, wanted) {
  if (conversation.title.toLowerCase().includes(wanted)) return true;
  return pathOf(conversation).some((node) => node.content.toLowerCase().includes(wanted));
}

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "today";
  if (time >= midnight - DAY_MS) return "yesterday";
  return time >= midnight - 6 * DAY_MS ? "week" : "earlier";
}
