/**
 * A conversation as a tree of turns, and what of it is sent to the server. Editing or regenerating a turn adds a
 * sibling, so no text is ever lost; `active` says which child of each turn is shown. Touches neither DOM nor network.
 *
 * conversation: {id, title, named, created, updated, settings, nodes: {id: node}, active: {parent id: child id}}
 * node: {id, parent, role: "user" | "assistant" | "tool", content, created, and for
 *   assistant: tool_calls [{id, name, arguments}], status "streaming" | "done" | "stopped" | "error", finish, error, stats, model
 *   tool: tool_call_id}
 */

export const ROOT = "root";
const FORMAT = "qwench-chat";
const VERSION = 1;
const TITLE_CHARS = 60;

/** Fields of the request with their ranges, as the server has them; `step` also tells integers apart. */
export const SAMPLING = [
  { name: "temperature", min: 0, max: 2, step: 0.05, slider: true },
  { name: "top_p", min: 0.01, max: 1, step: 0.01, slider: true },
  { name: "top_k", min: 0, max: 1000000, step: 1 },
  { name: "min_p", min: 0, max: 1, step: 0.01, slider: true },
  { name: "repetition_penalty", min: 0.5, max: 2, step: 0.01, slider: true },
  { name: "presence_penalty", min: -2, max: 2, step: 0.1, slider: true },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.1, slider: true },
  { name: "max_tokens", min: 1, max: 10000000, step: 1 },
  { name: "seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];

/** A setting that cannot be sent; `section` is where the drawer shows it, `key` and `values` its text in i18n.js. */
export class SettingsError extends Error {
  constructor(section, key, values = {}) {
    super(key);
    Object.assign(this, { section, key, values });
  }
}

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export const defaultSettings = () => ({ model: "", system: "", sampling: {}, stop: "", format: "text", schema: "", tools: "", tool_choice: "auto" });

export function newConversation(settings = defaultSettings()) {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, settings: structuredClone(settings), nodes: {}, active: {} };
}

/** Adds a turn under `parent` and shows it. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, content: "", created: Date.now(), ...fields };
  conversation.nodes[node.id] = node;
  conversation.active[parent] = node.id;
  if (!conversation.named && node.role === "user" && !conversation.title) conversation.title = titleFrom(node.content);
  conversation.updated = Date.now();
  return node;
}

export function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  const characters = Array.from(line);
  return characters.length > TITLE_CHARS ? `${characters.slice(0, TITLE_CHARS).join("")}…` : line;
}

/** The turns that are shown, first to last. */
export function pathOf(conversation) {
  const path = [];
  const seen = new Set();
  for (let at = conversation.active[ROOT]; at && conversation.nodes[at] && !seen.has(at); at = conversation.active[at]) {
    seen.add(at);
    path.push(conversation.nodes[at]);
  }
  return path;
}

/** Versions of a turn, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent && other.role === node.role);
}

/** Calls of the last answer that still wait for a result; [] if none do. */
export function waitingCalls(conversation) {
  const last = pathOf(conversation).at(-1);
  return last?.role === "assistant" && isWhole(last) ? (last.tool_calls ?? []) : [];
}

/** False for an answer that was cut off: its tool calls may be half written. */
const isWhole = (node) => node.status === "done" && node.finish !== "length";

/** The turns down to `node` as OpenAI messages. Calls of an unfinished answer are left out. */
export function messagesTo(conversation, node) {
  const turns = [];
  for (let at = node; at; at = conversation.nodes[at.parent]) turns.unshift(at);
  const messages = [];
  if (conversation.settings.system.trim()) messages.push({ role: "system", content: conversation.settings.system });
  for (const turn of turns) {
    if (turn.role === "tool") messages.push({ role: "tool", tool_call_id: turn.tool_call_id, content: turn.content });
    else if (turn.role === "user") messages.push({ role: "user", content: turn.content });
    else {
      const message = { role: "assistant", content: turn.content };
      if (turn.tool_calls?.length && isWhole(turn)) {
        message.tool_calls = turn.tool_calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
      }
      messages.push(message);
    }
  }
  return messages;
}

/** Reads pasted tools: OpenAI's list, one tool, or bare functions. Throws SettingsError. */
export function readTools(text) {
  if (!text.trim()) return [];
  const value = readJson(text, "tools");
  const list = Array.isArray(value) ? value : [value];
  return list.map((item) => {
    const tool = item?.function ? item : { type: "function", function: item };
    if (typeof tool.function?.name !== "string") throw new SettingsError("tools", "bad.tools");
    return { type: "function", ...tool };
  });
}

/** Reads the pasted JSON schema. Throws SettingsError. */
export function readSchema(text) {
  const value = readJson(text || "", "output");
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new SettingsError("output", "bad.schema");
  return value;
}

function readJson(text, section) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SettingsError(section, "bad.json", { why: error.message });
  }
}

/** The body of the chat request that answers `node`. Throws SettingsError for settings that cannot be sent. */
export function requestBody(conversation, node, model) {
  const { sampling, stop, format, schema, tools, tool_choice } = conversation.settings;
  const body = { model, messages: messagesTo(conversation, node), stream: true, stream_options: { include_usage: true } };
  for (const { name, min, max, step } of SAMPLING) {
    const value = sampling[name];
    if (value === undefined || value === null) continue;
    if (!(value >= min && value <= max) || (step === 1 && !Number.isInteger(value))) throw new SettingsError("sampling", "bad.number", { name, min, max });
    body[name] = value;
  }
  const stops = stop.split("\n").filter((line) => line !== "").map((line) => line.replaceAll("\\n", "\n"));
  if (stops.length) body.stop = stops;
  if (format === "json_object") body.response_format = { type: "json_object" };
  if (format === "json_schema") {
    const given = readSchema(schema);
    const named = typeof given.name === "string" && given.schema ? given : { name: "answer", schema: given };
    body.response_format = { type: "json_schema", json_schema: named };
  }
  const list = readTools(tools);
  if (list.length) Object.assign(body, { tools: list, tool_choice });
  return body;
}

/** Conversations as the text of an export file. */
export const exportText = (conversations) => JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 1);

/** Reads an export, or OpenAI messages (`{messages: [...]}`, a list of those, or one a line). Throws Error with a reason. */
export function importText(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const lines = text.split("\n").filter((line) => line.trim());
    if (lines.length < 2) throw error;
    value = lines.map((line) => JSON.parse(line));
  }
  if (value?.format === FORMAT) {
    if (value.version !== VERSION) throw new Error(`version ${value.version}`);
    return value.conversations.map(checked);
  }
  const list = Array.isArray(value) ? value : [value];
  return list.map((item) => fromMessages(Array.isArray(item) ? item : item?.messages));
}

const text = (value) => (typeof value === "string" ? value : "");

/** A conversation of a file with a fresh id and fields of the right types only. */
function checked(from) {
  const conversation = newConversation({ ...defaultSettings(), ...pick(from.settings, defaultSettings()) });
  const { settings } = conversation;
  settings.sampling = Object.fromEntries(SAMPLING.map(({ name }) => [name, settings.sampling[name]]).filter(([, value]) => Number.isFinite(value)));
  if (!["text", "json_object", "json_schema"].includes(settings.format)) settings.format = "text";
  if (!["auto", "none", "required"].includes(settings.tool_choice)) settings.tool_choice = "auto";
  conversation.title = text(from.title);
  conversation.named = from.named === true;
  for (const name of ["created", "updated"]) if (Number.isFinite(from[name])) conversation[name] = from[name];
  for (const [id, node] of Object.entries(from.nodes ?? {})) {
    if (!["user", "assistant", "tool"].includes(node.role)) throw new Error(`role ${node.role}`);
    if (!/^[0-9a-f]{1,64}$/.test(id)) throw new Error(`id ${id}`);
    const kept = { id, parent: text(node.parent), role: node.role, content: text(node.content), created: Number(node.created) || Date.now() };
    if (node.role === "tool") kept.tool_call_id = text(node.tool_call_id);
    if (node.role === "assistant") Object.assign(kept, assistantFields(node));
    conversation.nodes[id] = kept;
  }
  for (const [parent, child] of Object.entries(from.active ?? {})) if (conversation.nodes[child]) conversation.active[parent] = text(child);
  return conversation;
}

function assistantFields(node) {
  const calls = (node.tool_calls ?? []).map((call) => ({
    id: text(call.id), name: text(call.name ?? call.function?.name), arguments: text(call.arguments ?? call.function?.arguments),
  }));
  const stats = Object.fromEntries(Object.entries(node.stats ?? {}).filter(([, value]) => Number.isFinite(value)));
  const status = ["done", "stopped", "error"].includes(node.status) ? node.status : "done";
  const error = node.error ? { kind: text(node.error.kind), detail: text(node.error.detail) } : null;
  return { status, finish: text(node.finish), model: text(node.model), tool_calls: calls, stats, error };
}

function pick(from, like) {
  const fields = Object.entries(from ?? {}).filter(([name, value]) => name in like && typeof value === typeof like[name] && value !== null);
  return Object.fromEntries(fields);
}

function fromMessages(messages) {
  if (!Array.isArray(messages)) throw new Error("messages");
  const conversation = newConversation();
  let parent = ROOT;
  for (const message of messages) {
    const content = Array.isArray(message.content) ? message.content.map((part) => text(part.text)).join("") : text(message.content);
    if (message.role === "system" || message.role === "developer") conversation.settings.system = content;
    else if (["user", "assistant", "tool"].includes(message.role)) {
      const more = message.role === "assistant" ? assistantFields(message) : message.role === "tool" ? { tool_call_id: text(message.tool_call_id) } : {};
      parent = addNode(conversation, parent, { role: message.role, content, ...more }).id;
    } else throw new Error(`role ${message.role}`);
  }
  return conversation;
}
