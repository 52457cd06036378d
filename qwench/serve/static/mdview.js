/**
 * Shows Markdown that may still grow. `update(source)` renders again only the last open block, and within it only what
 * changed: the last item of a list, the last row of a table, the last line of code. All text enters as text nodes.
 */

import { copyButton, h } from "./dom.js";
import { highlightLine, languageOf } from "./highlight.js";
import { t } from "./i18n.js";
import { parseInline } from "./inline.js";
import { parseBlocks, splitRow } from "./markdown.js";
import { parseMath } from "./math.js";

export class MarkdownView {
  constructor() {
    this.element = h("div", { class: "md" });
    this.#reset();
  }

  #reset() {
    this.element.replaceChildren();
    this.source = "";
    this.settled = 0; // characters of the source whose blocks can no longer change
    this.live = []; // views of the blocks after them
  }

  /** @param {string} source the whole text so far @param {boolean} open more may come */
  update(source, open = false) {
    if (!source.startsWith(this.source.slice(0, this.settled))) this.#reset();
    this.source = source;
    const lines = source.slice(this.settled).split("\n");
    const blocks = parseBlocks(lines, open);
    reconcile(this.element, this.live, blocks);
    // a block is settled once two complete lines follow it: no decision of the parser looks further
    let count = 0;
    while (count + 1 < blocks.length && blocks[count + 1].first + 1 < lines.length - 1) count += 1;
    if (count === 0) return;
    for (let i = 0; i < blocks[count].first; i += 1) this.settled += lines[i].length + 1;
    this.live.splice(0, count);
  }
}

/** Makes the views of `parent`'s last blocks show `blocks`, keeping every view whose source is the same. */
function reconcile(parent, views, blocks) {
  for (const [i, block] of blocks.entries()) {
    const view = views[i];
    if (view?.type === block.type && view.raw === block.raw) continue;
    if (view?.type === block.type && view.update(block)) {
      view.raw = block.raw;
      continue;
    }
    const fresh = VIEWS[block.type](block);
    fresh.type = block.type;
    fresh.raw = block.raw;
    if (view) view.element.replaceWith(fresh.element);
    else parent.append(fresh.element);
    views[i] = fresh;
  }
  for (const view of views.splice(blocks.length)) view.element.remove();
}

const VIEWS = {
  paragraph: (block) => textView(h("p"), block),
  heading: (block) => textView(h(`h${Math.min(block.level + 1, 6)}`, { class: `h${block.level}` }), block),
  rule: () => ({ element: h("hr"), update: () => true }),
  math: mathView,
  quote: quoteView,
  list: listView,
  table: tableView,
  code: codeView,
};

function textView(element, first) {
  const show = (block) => element.replaceChildren(...toNodes(parseInline(block.text)));
  show(first);
  const level = first.level;
  return { element, update: (block) => block.level === level && (show(block), true) };
}

function mathView(first) {
  const element = h("div", { class: "math block" });
  const show = (block) => {
    element.title = block.text;
    element.replaceChildren(...toNodes(parseMath(block.text)));
  };
  show(first);
  return { element, update: (block) => (show(block), true) };
}

function quoteView(first) {
  const element = h("blockquote");
  const views = [];
  const show = (block) => reconcile(element, views, parseBlocks(block.lines, false, block.depth));
  show(first);
  return { element, update: (block) => (show(block), true) };
}

function listView(first) {
  const element = h(first.ordered ? "ol" : "ul");
  if (first.ordered && first.start !== 1) element.setAttribute("start", first.start);
  const items = [];
  const show = (block) => {
    element.classList.toggle("loose", block.loose);
    for (const [i, item] of block.items.entries()) {
      const raw = item.lines.join("\n");
      items[i] ??= { element: element.appendChild(h("li")), body: null, views: [], raw: null, task: null };
      const shown = items[i];
      if (shown.raw === raw && shown.task === item.task) continue;
      if (shown.task !== item.task || !shown.body) startItem(shown, item.task);
      reconcile(shown.body, shown.views, parseBlocks(item.lines, false, block.depth));
      shown.raw = raw;
    }
    for (const item of items.splice(block.items.length)) item.element.remove();
  };
  show(first);
  const same = (block) => block.ordered === first.ordered && block.start === first.start;
  return { element, update: (block) => same(block) && (show(block), true) };
}

function startItem(shown, task) {
  shown.task = task;
  shown.views = [];
  shown.body = task === null ? shown.element : h("div");
  shown.element.classList.toggle("task", task !== null);
  shown.element.replaceChildren();
  if (task === null) return;
  const box = h("input", { type: "checkbox", disabled: true, checked: task, "aria-label": t(task ? "task.done" : "task.open") });
  shown.element.append(box, shown.body);
}

function tableView(first) {
  const head = h("tr");
  const body = h("tbody");
  const element = h("div", { class: "table", tabindex: "0" }, h("table", {}, h("thead", {}, head), body));
  let rows = [];
  let titles = "";
  let align = "";
  const fill = (row, line, tag, columns, aligned) => {
    const cells = splitRow(line);
    const shown = Array.from({ length: columns }, (_, i) =>
      h(tag, { class: aligned[i] || null }, ...toNodes(parseInline(cells[i] ?? ""))));
    row.replaceChildren(...shown);
  };
  const show = (block) => {
    const columns = splitRow(block.head).length;
    if (titles !== block.head || align !== block.align.join()) {
      titles = block.head;
      align = block.align.join();
      fill(head, block.head, "th", columns, block.align);
      body.replaceChildren();
      rows = [];
    }
    for (const [i, line] of block.rows.entries()) {
      if (rows[i]?.line === line) continue;
      rows[i] ??= { row: body.appendChild(h("tr")) };
      rows[i].line = line;
      fill(rows[i].row, line, "td", columns, block.align);
    }
    for (const { row } of rows.splice(block.rows.length)) row.remove();
  };
  show(first);
  return { element, update: (block) => (show(block), true) };
}

/** A block of code with its language and a copy button; JSON of tool calls is shown with it, too. */
export function codeView(first) {
  const code = h("code");
  const language = languageOf(first.lang);
  let lines = first.code;
  const copy = copyButton(t("copy.code"), t("copied"), () => lines.join("\n"));
  const label = h("span", { class: "lang" }, first.lang || t("code"));
  const element = h("div", { class: "code" }, h("div", { class: "code-head" }, label, copy), h("pre", { tabindex: "0" }, code));
  const shown = []; // per line: its text, its element, and the state that the highlighter left
  const show = (block) => {
    lines = block.code;
    let same = 0;
    while (same < shown.length && shown[same].text === lines[same]) same += 1;
    for (const { element: line } of shown.splice(same)) line.remove();
    for (let i = same; i < lines.length; i += 1) {
      const { pieces, state } = highlightLine(language, lines[i], shown[i - 1]?.state ?? null);
      const line = h("span", { class: "line" });
      for (const [kind, text] of pieces) line.append(kind ? h("span", { class: `hl-${kind}` }, text) : text);
      line.append("\n");
      code.append(line);
      shown.push({ text: lines[i], element: line, state });
    }
  };
  show(first);
  return { element, update: (block) => block.lang === first.lang && (show(block), true) };
}

/** Inline nodes as DOM nodes. */
export function toNodes(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return document.createTextNode(node);
    if (node.tag === "code") return h("code", {}, node.text);
    if (node.tag === "math") return h("span", { class: "math", title: node.text }, ...toNodes(parseMath(node.text)));
    if (node.tag === "a") {
      const safe = { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow" };
      return h("a", safe, ...toNodes(node.children));
    }
    return h(node.tag, {}, ...toNodes(node.children ?? [])); // br, em, strong, del, span, sup, sub: no other is made
  });
}
