/** Puts the page together: composer, keyboard, panels, model list and the watch on the server. */

import { ApiError, healthy, listModels } from "./api.js";
import { Chat } from "./chat.js";
import { readTools, waitingCalls } from "./conversation.js";
import { Drawer } from "./drawer.js";
import { h, icon } from "./dom.js";
import { setLanguage, t, translate } from "./i18n.js";
import { Log } from "./log.js";
import { Sidebar } from "./sidebar.js";
import { apiKey, preferences, Store } from "./store.js";
import { grow } from "./turns.js";

const LOOK_AGAIN_MS = 3000;
const TOAST_MS = 6000;
const NARROW = window.matchMedia("(max-width: 760px)");
const byId = (id) => document.getElementById(id);
const [composer, input, sendButton, modelPicker, banner] = ["composer", "input", "send", "model", "banner"].map(byId);
const panels = { sidebar: byId("sidebar"), drawer: byId("drawer") };

setLanguage(preferences.get("language", "auto"));
translate(document);

const chat = new Chat(await Store.open(), {
  turns: (conversation, finished) => {
    if (conversation !== chat.current) return;
    if (log.conversation !== conversation.id) {
      log.conversation = conversation.id;
      log.show();
      drawer.show();
    } else log.refresh();
    if (finished) announce(finished);
    showState();
  },
  node: (conversation, node) => conversation === chat.current && log.grow(node),
  list: () => sidebar.refresh(),
  state: (conversation, finished) => {
    if (finished?.error?.kind === "network") lookForServer();
    if (conversation === chat.current) showState();
  },
  storeError: (error) => toast(t("store.full", { why: error.message })),
});
const actions = {
  edit: (node, text) => (log.toEnd(), chat.edit(node, text)),
  regenerate: (node) => (log.toEnd(), chat.regenerate(node)),
  results: (node, results) => (log.toEnd(), chat.giveResults(node, results), input.focus()),
  turnTo: (node, step) => chat.turnTo(node, step),
  openSettings: (section) => (setPanel("drawer", true), drawer.focus(section)),
};
const log = new Log({ scroller: byId("log"), turns: byId("turns"), empty: byId("empty"), latest: byId("latest") }, chat, actions);
const drawer = new Drawer(byId("fields"), chat, { languageChanged, keyChanged: loadModels });
const lists = { list: byId("conversations"), search: byId("search"), file: byId("file"), deleteAll: byId("delete-all"), exportAll: byId("export-all") };
const sidebar = new Sidebar(lists, chat, { opened: () => NARROW.matches && setPanel("sidebar", false), toast });

// ------------------------------------------------------------------------------------------------------------ composer
function submit() {
  if (chat.streaming()) return;
  if (waitingCalls(chat.current).length) {
    toast(t("tool.waiting"));
    document.querySelector(".tool-card textarea")?.focus();
    return;
  }
  log.toEnd();
  if (!chat.send(input.value)) return;
  input.value = "";
  grow(input);
}

function showState() {
  const streaming = chat.streaming() !== null;
  composer.classList.toggle("streaming", streaming);
  sendButton.replaceChildren(icon(streaming ? "stop" : "send"));
  sendButton.setAttribute("aria-label", t(streaming ? "stop" : "send"));
  sendButton.title = t(streaming ? "stop" : "send");
  sendButton.disabled = !streaming && !input.value.trim();
  byId("export-one").disabled = !chat.conversations.has(chat.current.id);
  document.title = chat.current.title ? `${chat.current.title} · qwench` : t("app.title");
  showModel();
  showChips();
}

/** What differs from the defaults in this conversation, so that no setting acts unseen. */
function showChips() {
  const { system, sampling, stop, format, tools } = chat.current.settings;
  const chips = [];
  const chip = (section, text) => chips.push(h("button", { type: "button", class: "chip", onclick: () => actions.openSettings(section) }, text));
  if (system.trim()) chip("system", t("chip.system"));
  const count = Object.keys(sampling).length + (stop ? 1 : 0);
  if (count) chip("sampling", t("chip.sampling", { n: count }));
  if (format !== "text") chip("output", t("chip.json"));
  if (tools.trim()) {
    let n = "?";
    try {
      n = readTools(tools).length;
    } catch {
      // the drawer says what is wrong with them
    }
    chip("tools", t("tools.count", { n }));
  }
  byId("chips").replaceChildren(...chips);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (chat.streaming()) chat.stop();
  else submit();
});
input.addEventListener("input", () => {
  grow(input);
  sendButton.disabled = chat.streaming() === null && !input.value.trim();
});
input.addEventListener("keydown", (event) => {
  // an Enter that ends the composition of Chinese or Japanese text is not meant for the page; 229 is Safari's sign
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && input.value === "") {
    event.preventDefault();
    log.editLast();
  }
});
byId("tries").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  input.value = button.textContent;
  submit();
});

// ------------------------------------------------------------------------------------------------------------ keyboard
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if ((event.metaKey || event.ctrlKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape") {
    if (NARROW.matches && (isOpen("sidebar") || isOpen("drawer"))) closePanels();
    else if (chat.streaming()) chat.stop();
    else if (isOpen("drawer")) setPanel("drawer", false);
  }
});

function newChat() {
  chat.start();
  if (NARROW.matches) closePanels();
  input.focus();
}

// -------------------------------------------------------------------------------------------------------------- panels
const isOpen = (name) => document.body.classList.contains(`${name}-open`);

function setPanel(name, open) {
  const inside = panels[name].contains(document.activeElement);
  document.body.classList.toggle(`${name}-open`, open);
  panels[name].inert = !open;
  byId(`${name}-toggle`).setAttribute("aria-expanded", String(open));
  const covered = NARROW.matches && (isOpen("sidebar") || isOpen("drawer"));
  document.querySelector("main").inert = covered;
  if (name === "sidebar" && !NARROW.matches) preferences.set("sidebar", open);
  if (open && NARROW.matches) panels[name].querySelector("button")?.focus();
  if (!open && inside) byId(`${name}-toggle`).focus();
}

const closePanels = () => ["sidebar", "drawer"].forEach((name) => setPanel(name, false));

function layOut() {
  setPanel("drawer", false);
  setPanel("sidebar", !NARROW.matches && preferences.get("sidebar", true));
}

byId("sidebar-toggle").addEventListener("click", () => setPanel("sidebar", !isOpen("sidebar")));
byId("drawer-toggle").addEventListener("click", () => setPanel("drawer", !isOpen("drawer")));
byId("sidebar-close").addEventListener("click", () => setPanel("sidebar", false));
byId("drawer-close").addEventListener("click", () => setPanel("drawer", false));
byId("scrim").addEventListener("click", closePanels);
byId("new").addEventListener("click", newChat);
byId("new-small").addEventListener("click", newChat);
byId("import").addEventListener("click", () => lists.file.click());
byId("export-one").addEventListener("click", () => sidebar.export([chat.current], "qwench-chat"));
NARROW.addEventListener("change", layOut);

// -------------------------------------------------------------------------------------------------- server and models
let looking = 0;

/** Asks for the server again and again until it is there; only while the page is seen. */
function lookForServer() {
  if (looking) return;
  showBanner(t("err.network"));
  looking = setInterval(async () => {
    if (document.hidden || !(await healthy())) return;
    clearInterval(looking);
    looking = 0;
    showBanner("");
    toast(t("err.back"));
    loadModels();
  }, LOOK_AGAIN_MS);
}

async function loadModels() {
  let models = [];
  try {
    models = await listModels(apiKey.get());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.kind === "network") lookForServer();
    else if (error.kind === "auth") showBanner(t("err.auth"), { label: t("err.auth.do"), run: () => actions.openSettings("page") });
    return;
  }
  if (!looking) showBanner("");
  chat.model = models[0]?.id ?? "";
  drawer.defaults = models[0]?.sampling_defaults ?? {};
  if (!byId("fields").contains(document.activeElement)) drawer.show();
  modelPicker.replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)));
  showModel();
}

function showModel() {
  const known = [...modelPicker.options].map((option) => option.value);
  const wanted = chat.current.settings.model;
  if (!known.length) {
    modelPicker.replaceChildren(h("option", { value: "" }, t("model.none")));
    return;
  }
  if (wanted && !known.includes(wanted)) chat.current.settings.model = "";
  modelPicker.value = chat.current.settings.model || chat.model;
}

modelPicker.addEventListener("change", () => {
  chat.current.settings.model = modelPicker.value;
  chat.settingsChanged();
});

// ------------------------------------------------------------------------------------------------------------- notices
function showBanner(text, action = null) {
  banner.hidden = text === "";
  banner.replaceChildren(icon("alert"), h("span", {}, text));
  if (action) banner.append(h("button", { type: "button", class: "quiet", onclick: action.run }, action.label));
}

let toastTimer = 0;

function toast(text, action = null) {
  const box = byId("toast");
  const hide = () => (box.hidden = true);
  box.replaceChildren(h("span", {}, text));
  if (action) box.append(h("button", { type: "button", onclick: () => (hide(), action.run()) }, action.label));
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, TOAST_MS);
}

/** Tells screen readers how the answer ended; its words are in the log. */
function announce({ status, error }) {
  const what = error ? t(`err.${error.kind}`) : "";
  byId("live").textContent = { done: t("live.done"), stopped: t("live.stopped"), error: t("live.error", { what }) }[status] ?? "";
}

function languageChanged() {
  translate(document);
  sidebar.resetDeleteAll();
  sidebar.refresh();
  drawer.show();
  log.show();
  showState();
}

// --------------------------------------------------------------------------------------------------------------- start
layOut();
sidebar.resetDeleteAll();
await chat.load();
log.conversation = chat.current.id;
const last = preferences.get("open", "");
if (chat.conversations.has(last)) chat.open(last);
else {
  drawer.show();
  log.show();
  showState();
}
sidebar.refresh();
loadModels();
if (!chat.store.persistent) toast(t("store.memory"));
setInterval(() => log.tick(), 100);
const leave = () => {
  chat.flush();
  preferences.set("open", chat.current.id);
};
window.addEventListener("pagehide", leave);
document.addEventListener("visibilitychange", () => document.hidden && leave());
document.body.classList.add("ready");
if (!NARROW.matches) input.focus();
