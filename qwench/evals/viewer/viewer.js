// The samples of an evaluation run, and of a second one beside it. Everything is in this page: texts lie in compressed
// blocks that are opened when they are looked at. Text of samples goes into text nodes only, never through HTML.
"use strict";

const PAGE = JSON.parse(document.getElementById("page-data").textContent);
const ROW = 30; // pixels, as in the style sheet
const CUT = 4000; // characters of a text that are shown at once
const DIFF_WORDS = 1200; // words up to which two texts are compared word by word
const two = PAGE.baseline !== null;
const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ------------------------------------------------------------------------------------------------------------- data
const opened = new Map(); // recently used blocks

async function unpack(id) {
  if (opened.has(id)) return opened.get(id);
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const value = JSON.parse(await new Response(stream).text());
  opened.set(id, value);
  if (opened.size > 64) opened.delete(opened.keys().next().value);
  return value;
}

const indexes = new Map(); // task -> rows

async function rowsOf(name) {
  if (!indexes.has(name)) {
    const index = await unpack(PAGE.tasks[name].index);
    indexes.set(name, index.map(([id, value, other, sameAnswer, title], place) => ({ task: name, place, id, value, other, sameAnswer, title })));
  }
  return indexes.get(name);
}

const sampleOf = async (row) => (await unpack(PAGE.tasks[row.task].blocks[Math.floor(row.place / PAGE.block)]))[row.place % PAGE.block];

const isMark = (value) => typeof value === "number" && value >= 0 && value <= 1;
const graded = (row) => PAGE.tasks[row.task].graded;
function sign(row) { // of what changed: 1 for the better
  if (typeof row.value !== "number" || typeof row.other !== "number" || row.value === row.other) return 0;
  return (row.value > row.other) === PAGE.tasks[row.task].higher ? 1 : -1;
}

const FILTERS = {
  all: ["all", () => true],
  right: ["right", (row) => graded(row) && row.value === 1],
  wrong: ["wrong", (row) => graded(row) && row.value === 0],
  partial: ["partly right", (row) => graded(row) && row.value > 0 && row.value < 1],
  unscored: ["without a score", (row) => row.value === null],
};
if (two) Object.assign(FILTERS, {
  changed: ["score changed", (row) => sign(row) !== 0],
  gained: ["better than baseline", (row) => sign(row) > 0],
  lost: ["worse than baseline", (row) => sign(row) < 0],
  answer: ["answer differs", (row) => row.sameAnswer === 0],
  here: ["only in this run", (row) => row.sameAnswer === 2],
  there: ["only in the baseline", (row) => row.sameAnswer === 3],
});

// ------------------------------------------------------------------------------------------------------------- list
const state = { task: null, filter: "all", search: "", sort: "order", rows: [], at: -1, turn: 0 };

function mark(task, value) {
  if (value === null || value === undefined) return el("span", { class: "mark quiet", title: "no score" }, "·");
  if (!PAGE.tasks[task].graded || !isMark(value)) return el("span", { class: "mark quiet", title: String(value) }, "•");
  if (value === 1) return el("span", { class: "mark good", title: "right" }, "✓");
  if (value === 0) return el("span", { class: "mark bad", title: "wrong" }, "✗");
  return el("span", { class: "mark", title: String(value) }, "½");
}

function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 10);
  const last = Math.min(state.rows.length, first + Math.ceil(list.clientHeight / ROW) + 20);
  const shown = [];
  for (let at = first; at < last; at++) {
    const row = state.rows[at];
    shown.push(el("div",
      { class: "row", role: "option", id: `row-${at}`, style: `top:${at * ROW}px`, "aria-selected": String(at === state.at), onclick: () => select(at) },
      el("span", { class: "marks" }, mark(row.task, row.value), two ? mark(row.task, row.other) : null),
      el("span", { class: "id" }, String(row.id)),
      el("span", { class: "title" }, state.task === null ? `${row.task}: ${row.title}` : row.title)));
  }
  $("space").style.height = `${state.rows.length * ROW}px`;
  $("space").replaceChildren(...shown);
}

async function refresh(keep) {
  const turn = ++state.turn, status = $("count");
  const names = state.task === null ? Object.keys(PAGE.tasks) : [state.task];
  let rows = (await Promise.all(names.map(rowsOf))).flat();
  if (turn !== state.turn) return;
  const total = rows.length;
  rows = rows.filter(FILTERS[state.filter][1]);
  const wanted = state.search.trim().toLowerCase();
  if (wanted) {
    const found = [];
    for (let at = 0; at < rows.length; at++) {
      if (at % 200 === 0) {
        status.textContent = `searching, ${Math.floor(100 * at / rows.length)} %`;
        await new Promise((go) => setTimeout(go));
        if (turn !== state.turn) return;
      }
      if (String(rows[at].id) === wanted || holds(await sampleOf(rows[at]), wanted)) found.push(rows[at]);
    }
    if (turn !== state.turn) return;
    rows = found;
  }
  if (state.sort !== "order") {
    const value = (row) => (typeof row.value === "number" ? row.value : NaN);
    const by = { low: value, high: (row) => -value(row), change: (row) => -Math.abs((row.value ?? 0) - (row.other ?? 0)) }[state.sort];
    rows = rows.map((row) => [by(row), row]).sort(([a], [b]) => (isNaN(a) ? 1 : isNaN(b) ? -1 : a - b)).map(([, row]) => row);
  }
  const before = keep || state.rows[state.at];
  state.rows = rows;
  state.at = before ? rows.findIndex((row) => row.task === before.task && row.place === before.place) : -1;
  status.textContent = rows.length === total ? `${total.toLocaleString("en")} samples` : `${rows.length.toLocaleString("en")} of ${total.toLocaleString("en")} samples`;
  $("list").scrollTop = Math.max(0, state.at * ROW - $("list").clientHeight / 2);
  drawRows();
  if (state.at < 0 && rows.length) await select(0);
  else if (state.at >= 0) await select(state.at);
  else $("detail").replaceChildren(el("p", { class: "quiet" }, "No sample matches."));
}

function holds(value, wanted) {
  if (typeof value === "string") return value.toLowerCase().includes(wanted);
  if (typeof value === "number") return String(value) === wanted;
  return value !== null && typeof value === "object" && Object.values(value).some((inner) => holds(inner, wanted));
}

async function select(at) {
  if (at < 0 || at >= state.rows.length) return;
  state.at = at;
  const list = $("list"), row = state.rows[at];
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  list.setAttribute("aria-activedescendant", `row-${at}`);
  drawRows();
  const sample = await sampleOf(row);
  if (state.rows[state.at] !== row) return;
  $("detail").replaceChildren(...detail(row, sample));
  $("detail").scrollTop = 0;
  settings(row.task);
  history.replaceState(null, "", "#" + new URLSearchParams({ task: row.task, id: row.id, ...(row.sameAnswer === 3 ? { side: "baseline" } : {}) }));
}

// ----------------------------------------------------------------------------------------------------------- detail
function pieces(text) { // nothing but text, long ones cut in the middle
  if (text.length <= CUT * 1.25) return [text];
  const cut = el("button", { onclick: () => cut.parentNode.replaceChildren(text) }, `show all ${text.length.toLocaleString("en")} characters`);
  return [text.slice(0, CUT * 0.75), "\n", cut, "\n", text.slice(-CUT * 0.25)];
}

function textBox(value) {
  if (value === null || value === undefined) return el("div", { class: "text none" }, "nothing");
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 1);
  return text === "" ? el("div", { class: "text none" }, "empty") : el("div", { class: "text" }, ...pieces(text));
}

const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];

function differences(before, after) { // [kind, text] with kind 0 same, -1 only before, 1 only after; null if too long
  const a = words(before), b = words(after);
  if (a.length > DIFF_WORDS || b.length > DIFF_WORDS) return null;
  const width = b.length + 1, lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    lengths[i * width + j] = a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
  const found = [], add = (kind, text) => (found.length && found[found.length - 1][0] === kind ? (found[found.length - 1][1] += text) : found.push([kind, text]));
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { add(0, a[i]); i++; j++; }
    else if (j >= b.length || (i < a.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) add(-1, a[i++]);
    else add(1, b[j++]);
  }
  return found;
}

function beside(title, here, there, box = textBox) { // one value of both runs; a difference of texts is marked
  if (!there) return [el("h3", {}, title), box(here.value)];
  if (typeof here.value === "string" && typeof there.value === "string" && here.value !== there.value) {
    const changes = differences(there.value, here.value);
    if (changes) {
      const side = (kind, tag) => el("div", { class: "text" }, ...changes.filter(([k]) => k === 0 || k === kind).map(([k, text]) => (k === 0 ? text : el(tag, {}, text))));
      return [sides(title, side(1, "ins"), side(-1, "del"))];
    }
  }
  return [sides(title, box(here.value), box(there.value))];
}

function sides(title, here, there) {
  return el("div", { class: "sides two" },
    el("div", {}, el("h3", {}, title, " ", el("small", {}, PAGE.run.name)), here),
    el("div", {}, el("h3", {}, title, " ", el("small", {}, PAGE.baseline.name)), there));
}

function choiceTable(choices, target) {
  if (!choices) return textBox(null);
  const best = choices.reduce((top, choice, at) => (choice.logprob > choices[top].logprob ? at : top), 0);
  const top = choices[best].logprob, sum = choices.reduce((total, choice) => total + Math.exp(choice.logprob - top), 0);
  return el("table", { class: "choices" },
    el("tr", {}, el("th", {}, "choice"), el("th", { class: "n" }, "log-probability"), el("th", {}, "share of these")),
    ...choices.map((choice, at) => {
      const share = Math.exp(choice.logprob - top) / sum;
      const right = target === at || target === choice.text || (typeof target === "string" && target.trim() === choice.text.trim());
      return el("tr", { class: at === best ? "taken" : null },
        el("td", { class: "what" }, ...pieces(choice.text), right ? el("span", { class: "good" }, "  ← target") : null, choice.context ? el("div", { class: "quiet" }, ...pieces(choice.context)) : null),
        el("td", { class: "n" }, choice.logprob.toFixed(3)),
        el("td", {}, el("span", { class: "bar", style: `width:${(6 * share).toFixed(2)}rem` }), ` ${(100 * share).toFixed(1)} %`));
    }));
}

function detail(row, sample) {
  const task = PAGE.tasks[row.task], other = sample.base || null, only = row.sameAnswer === 3;
  const parts = [el("div", { class: "head" },
    mark(row.task, row.value), two ? mark(row.task, row.other) : null,
    el("b", {}, ` ${row.task} `), `sample ${row.id}`, only ? " (only in the baseline)" : row.sameAnswer === 2 ? " (only in this run)" : "")];
  const response = (record) => (Array.isArray(record.response) ? record.response.join("\n\n— next answer —\n\n") : record.response);
  if (sample.choices) parts.push(...beside("Choices", { value: sample.choices }, other && { value: other.choices }, (value) => choiceTable(value, sample.target)));
  if ("response" in sample) parts.push(...beside("Answer", { value: response(sample) }, other && { value: response(other) }));
  if ("logprob" in sample) parts.push(...beside("Log-probability", { value: sample.logprob }, other && { value: other.logprob }));
  if ("extracted" in sample) parts.push(...beside("What was read from it", { value: sample.extracted }, other && { value: other.extracted }));
  if (!sample.choices || sample.choices.every((choice) => choice.text !== sample.target)) parts.push(el("h3", {}, "Target"), textBox(sample.target));
  parts.push(...beside("Scores", { value: sample.metrics }, other && { value: other.metrics }));
  if (other && "prompt" in other) parts.push(...beside("Prompt (they differ)", { value: sample.prompt }, { value: other.prompt }));
  else {
    parts.push(el("h3", {}, "Prompt ", el("small", {}, task.opening && !sample.whole ? "after the beginning that all share" : "")));
    if (task.opening && !sample.whole) parts.push(el("details", {}, el("summary", {}, `the beginning (${task.opening.length.toLocaleString("en")} characters)`), textBox(task.opening)));
    parts.push(textBox(sample.prompt));
  }
  parts.push(el("details", {}, el("summary", {}, "The document"), textBox(sample.doc)));
  return parts;
}

// --------------------------------------------------------------------------------------------------------- settings
function settings(name) {
  const node = $("settings");
  if (node.dataset.task === name) return;
  node.dataset.task = name;
  const { here, there } = PAGE.tasks[name].setting;
  const keys = [...new Set([...Object.keys(here), ...Object.keys(there || {})])];
  const say = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value === "string") return value;
    const short = JSON.stringify(value);
    return short.length <= 80 ? short : JSON.stringify(value, null, 1);
  };
  const cells = keys.flatMap((key) => {
    const one = say(here[key]), differs = there && say(there[key]) !== one;
    return [el("dt", {}, key), el("dd", { class: differs ? "other" : null }, ...pieces(one)), there ? el("dd", { class: differs ? "other" : null }, ...pieces(say(there[key]))) : null];
  });
  const heads = there ? [el("dt", {}, ""), el("dd", {}, el("b", {}, PAGE.run.name)), el("dd", {}, el("b", {}, PAGE.baseline.name))] : [];
  node.replaceChildren(el("p", { class: "quiet" }, `of ${name}`), el("dl", { class: there ? "facts two" : "facts" }, ...heads, ...cells));
}

// --------------------------------------------------------------------------------------------------------- controls
function choose(name) {
  state.task = name;
  $("task").value = name === null ? "" : name;
}

async function follow() { // what the address names
  const wanted = new URLSearchParams(location.hash.slice(1)), name = wanted.get("task");
  if (!name || !(name in PAGE.tasks)) return false;
  choose(name);
  state.filter = $("filter").value = "all";
  state.search = $("search").value = "";
  const rows = await rowsOf(name);
  const side = wanted.get("side") === "baseline";
  await refresh(rows.find((row) => String(row.id) === wanted.get("id") && (row.sameAnswer === 3) === side) || rows[0]);
  return true;
}

async function start() {
  $("task").append(el("option", { value: "" }, "all tasks"), ...Object.keys(PAGE.tasks).map((name) => el("option", { value: name }, name)));
  $("filter").append(...Object.entries(FILTERS).map(([name, [title]]) => el("option", { value: name }, title)));
  if (!two) $("sort").querySelector("[value=change]").remove();
  $("task").addEventListener("change", () => { choose($("task").value || null); state.rows = []; refresh(); });
  $("filter").addEventListener("change", () => { state.filter = $("filter").value; refresh(); });
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; refresh(); });
  let waiting;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { state.search = $("search").value; refresh(); }, 250); });
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  $("list").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 20, PageUp: -20, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    select(Math.min(Math.max(state.at + step, 0), state.rows.length - 1));
  });
  addEventListener("resize", drawRows);
  addEventListener("hashchange", follow);
  if (!(await follow())) { choose(Object.keys(PAGE.tasks)[0] ?? null); await refresh(); }
  document.body.dataset.ready = "yes";
}

start();
