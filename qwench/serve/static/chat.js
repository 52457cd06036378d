/**
 * The conversations and the answers being written: sends, stops, regenerates, edits, and stores the result. Tells the
 * page what changed through `on`; touches no DOM. Several conversations can stream at once.
 */

import { ApiError, streamChat } from "./api.js";
import { addNode, defaultSettings, newConversation, pathOf, requestBody, ROOT, SettingsError, siblings, waitingCalls } from "./conversation.js";
import { t } from "./i18n.js";
import { apiKey } from "./store.js";

const SAVE_AFTER_MS = 700;

export class Chat {
  /**
   * @param {import("./store.js").Store} store
   * @param {{turns: Function, node: Function, list: Function, state: Function, storeError: Function}} on called with the
   *   conversation: its turns changed; a turn's content grew; titles or order changed; an answer began or ended
   */
  constructor(store, on) {
    this.store = store;
    this.on = on;
    this.conversations = new Map();
    this.current = newConversation();
    this.model = "";
    this.streams = new Map(); // conversation id -> {controller, node, sent}
    this.unsaved = new Map(); // conversation id -> timer
  }

  async load() {
    for (const conversation of await this.store.all()) {
      for (const node of Object.values(conversation.nodes)) {
        if (node.status !== "streaming") continue;
        Object.assign(node, { status: "error", error: { kind: "closed", detail: "" } });
      }
      this.conversations.set(conversation.id, conversation);
    }
    this.store.onChange((id) => this.#changedElsewhere(id));
  }

  async #changedElsewhere(id) {
    if (this.streams.has(id) || this.unsaved.has(id)) return;
    const conversation = await this.store.get(id);
    if (conversation) this.conversations.set(id, conversation);
    else this.conversations.delete(id);
    if (this.current.id === id && conversation) {
      this.current = conversation;
      this.on.turns(conversation);
    }
    this.on.list();
  }

  /** An empty conversation with the settings of the one before it. */
  start() {
    const { settings } = this.current;
    this.current = newConversation(settings);
    this.on.turns(this.current);
    this.on.list();
  }

  open(id) {
    const conversation = this.conversations.get(id);
    if (!conversation) return;
    this.current = conversation;
    this.on.turns(conversation);
    this.on.list();
  }

  rename(conversation, title) {
    conversation.title = title.trim() || conversation.title;
    conversation.named = true;
    this.save(conversation);
    this.on.list();
  }

  remove(conversation) {
    this.stop(conversation);
    clearTimeout(this.unsaved.get(conversation.id));
    this.unsaved.delete(conversation.id);
    this.conversations.delete(conversation.id);
    this.store.remove(conversation.id).catch(this.on.storeError);
    if (this.current.id === conversation.id) this.start();
    this.on.list();
  }

  /** Takes in conversations of a file, or one that was just removed. */
  add(conversations) {
    for (const conversation of conversations) {
      this.conversations.set(conversation.id, conversation);
      this.save(conversation);
    }
    this.on.list();
  }

  /** Settings of the current conversation changed. */
  settingsChanged() {
    if (this.conversations.has(this.current.id)) this.save(this.current);
    this.on.state(this.current);
  }

  resetSettings() {
    const { model, system, tools, tool_choice } = this.current.settings;
    this.current.settings = { ...defaultSettings(), model, system, tools, tool_choice };
    this.settingsChanged();
  }

  streaming(conversation = this.current) {
    return this.streams.get(conversation.id) ?? null;
  }

  send(text) {
    const conversation = this.current;
    if (this.streaming() || !text.trim()) return false;
    const parent = pathOf(conversation).at(-1)?.id ?? ROOT;
    this.conversations.set(conversation.id, conversation);
    this.#answer(conversation, addNode(conversation, parent, { role: "user", content: text }));
    return true;
  }

  /** A new version of a user's turn; the conversation goes on from it. */
  edit(node, text) {
    const conversation = this.current;
    if (this.streaming() || !text.trim()) return;
    const fresh = addNode(conversation, node.parent, { role: "user", content: text });
    if (node.parent === ROOT && !conversation.named) conversation.title = "";
    this.#answer(conversation, fresh);
  }

  /** A new version of an answer. */
  regenerate(node) {
    const conversation = this.current;
    if (this.streaming()) return;
    this.#answer(conversation, conversation.nodes[node.parent]);
  }

  /** Results of the calls of `node`, in their order; the model goes on with them. */
  giveResults(node, results) {
    const conversation = this.current;
    if (this.streaming()) return;
    let last = node;
    for (const [i, call] of node.tool_calls.entries()) {
      last = addNode(conversation, last.id, { role: "tool", tool_call_id: call.id, content: results[i] });
    }
    this.#answer(conversation, last);
  }

  /** Shows the version before (-1) or after (+1) of a turn. */
  turnTo(node, step) {
    const conversation = this.current;
    const versions = siblings(conversation, node);
    const other = versions[versions.indexOf(node) + step];
    if (!other || this.streaming()) return;
    conversation.active[node.parent] = other.id;
    this.save(conversation);
    this.on.turns(conversation);
  }

  stop(conversation = this.current) {
    this.streaming(conversation)?.controller.abort();
  }

  waiting() {
    return waitingCalls(this.current);
  }

  async #answer(conversation, parent) {
    const model = conversation.settings.model || this.model;
    const fields = { role: "assistant", tool_calls: [], status: "streaming", model, stats: {}, finish: "", error: null };
    const node = addNode(conversation, parent.id, fields);
    if (!conversation.title) conversation.title = pathOf(conversation)[0].content.trim().split("\n")[0].slice(0, 60);
    const stream = { controller: new AbortController(), node, sent: performance.now() };
    this.streams.set(conversation.id, stream);
    this.save(conversation);
    this.on.turns(conversation);
    this.on.state(conversation);
    this.on.list();
    const times = { chunks: 0, first: 0, last: 0 };
    try {
      const body = requestBody(conversation, parent, model);
      const onChunk = (chunk) => {
        if (take(node, chunk)) {
          times.last = performance.now();
          times.first ||= times.last;
          times.chunks += 1;
          node.stats.first_s = (times.first - stream.sent) / 1000;
          this.save(conversation);
        }
        this.on.node(conversation, node);
      };
      await streamChat(body, { key: apiKey.get(), signal: stream.controller.signal, onChunk });
      node.status = "done";
    } catch (error) {
      if (stream.controller.signal.aborted) node.status = "stopped";
      else Object.assign(node, { status: "error", error: describe(error) });
    }
    const { stats } = node;
    if (times.first) stats.write_s = (times.last - times.first) / 1000;
    if (stats.out === undefined && times.chunks) stats.chunks = times.chunks;
    stats.total_s = (performance.now() - stream.sent) / 1000;
    conversation.updated = Date.now();
    this.streams.delete(conversation.id);
    if (this.conversations.has(conversation.id)) this.saveNow(conversation);
    this.on.turns(conversation, node);
    this.on.state(conversation, node);
    this.on.list();
  }

  /** Stores soon, so that a long answer is not written once a token. */
  save(conversation) {
    if (this.unsaved.has(conversation.id)) return;
    this.unsaved.set(conversation.id, setTimeout(() => this.saveNow(conversation), SAVE_AFTER_MS));
  }

  saveNow(conversation) {
    clearTimeout(this.unsaved.get(conversation.id));
    this.unsaved.delete(conversation.id);
    return this.store.put(conversation).catch(this.on.storeError);
  }

  /** Stores what waits; the page calls it when it is hidden or closed. */
  flush() {
    for (const id of [...this.unsaved.keys()]) {
      const conversation = this.conversations.get(id);
      if (conversation) this.saveNow(conversation);
    }
  }
}

/** Adds a chunk of the stream to the answer; true if it brought text or a part of a call. */
function take(node, chunk) {
  if (chunk.usage) {
    const { prompt_tokens, completion_tokens, prompt_tokens_details } = chunk.usage;
    Object.assign(node.stats, { prompt: prompt_tokens, out: completion_tokens });
    if (prompt_tokens_details?.cached_tokens) node.stats.cached = prompt_tokens_details.cached_tokens;
  }
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) node.finish = choice.finish_reason;
  const { content, tool_calls: calls } = choice.delta ?? {};
  if (content) node.content += content;
  for (const part of calls ?? []) {
    const call = (node.tool_calls[part.index] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name += part.function.name;
    if (part.function?.arguments) call.arguments += part.function.arguments;
  }
  return Boolean(content || calls?.length);
}

function describe(error) {
  if (error instanceof SettingsError) return { kind: "settings", detail: t(error.key, error.values), section: error.section };
  if (error instanceof ApiError) return { kind: error.kind, detail: error.detail, status: error.status, retryAfter: error.retryAfter };
  return { kind: "broken", detail: String(error?.message ?? error) };
}
