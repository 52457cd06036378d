/**
 * Markdown blocks: lines in, a list of blocks out. CommonMark with tables, task lists and `$$` formulas, and lenient
 * where models are sloppy (two spaces nest under a numbered item). HTML is text. Touches no DOM.
 *
 * Decisions look at most one line ahead, so a block followed by two complete lines can no longer change; mdview.js
 * relies on that. Every block has `type`, `first` and `last` (line numbers) and `raw` (its source).
 */

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const SETEXT = /^ {0,3}(=+|-+)[ \t]*$/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const TASK = /^\[([ xX])\][ \t]+/;
const MATH = /^ {0,3}(\$\$|\\\[)/;
const MAX_DEPTH = 12; // deeper nesting than any answer needs; beyond it text stays a paragraph

const blank = (line) => line === undefined || /^[ \t]*$/.test(line);
const indentOf = (line) => line.length - line.trimStart().length;

/**
 * @param {string[]} lines
 * @param {boolean} open more lines may follow: a table's first line is then shown as a table at once
 * @param {number} depth nesting so far
 */
export function parseBlocks(lines, open = false, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, open, depth);
    block.first = at;
    block.raw = lines.slice(at, block.last + 1).join("\n");
    blocks.push(block);
    at = block.last + 1;
  }
  return blocks;
}

function readBlock(lines, at, open, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { type: "heading", level: heading[1].length, text: heading[2] ?? "", last: at };
  if (RULE.test(line)) return { type: "rule", last: at };
  const math = MATH.exec(line) && readMath(lines, at, open);
  if (math) return math;
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return readQuote(lines, at, depth);
    if (ITEM.test(line) && indentOf(line) < 4) return readList(lines, at, depth);
  }
  if (indentOf(line) >= 4 || line.startsWith("\t")) return readIndented(lines, at);
  if (startsTable(lines, at, open)) return readTable(lines, at);
  return readParagraph(lines, at, open);
}

function readFence(lines, at, [, indent, marks, info]) {
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \\t]*$`);
  const strip = new RegExp(`^ {0,${indent.length}}`);
  const code = [];
  let last = at;
  let closed = false;
  for (let i = at + 1; i < lines.length && !closed; i += 1) {
    last = i;
    closed = closing.test(lines[i]);
    if (!closed) code.push(indent ? lines[i].replace(strip, "") : lines[i]);
  }
  if (!closed && code.at(-1) === "") code.pop(); // the line that is about to be written
  const lang = (info.trim().split(/[\s{,]/)[0] ?? "").toLowerCase();
  return { type: "code", lang, code, closed, last };
}

function readMath(lines, at, open) {
  const [marker] = MATH.exec(lines[at]);
  const end = marker.endsWith("$$") ? "$$" : "\\]";
  let text = lines[at].slice(marker.length);
  for (let i = at; i < lines.length; i += 1) {
    if (i > at) text += `\n${lines[i]}`;
    const trimmed = text.trimEnd();
    if (trimmed.endsWith(end) && (i > at || trimmed.length >= end.length)) {
      return { type: "math", text: trimmed.slice(0, -end.length).trim(), last: i };
    }
    // a formula has no empty line and nothing after its end
    if ((i > at && blank(lines[i])) || text.includes(end)) return null;
  }
  return open ? { type: "math", text: text.trim(), last: lines.length - 1 } : null;
}

/** True where a paragraph ends before this line. */
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  if (MATH.test(line)) return true;
  const item = ITEM.exec(line);
  return item !== null && item[1].length < 4 && item[4] !== "" && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
}

function readQuote(lines, at, depth) {
  const inner = [];
  let last = at;
  for (let i = at; i < lines.length; i += 1) {
    if (QUOTE.test(lines[i])) inner.push(lines[i].replace(QUOTE, ""));
    else if (!blank(lines[i]) && !interrupts(lines[i]) && !blank(inner.at(-1))) inner.push(lines[i]);
    else break;
    last = i;
  }
  return { type: "quote", lines: inner, depth: depth + 1, last };
}

function readList(lines, at, depth) {
  const start = ITEM.exec(lines[at]);
  const ordered = /\d/.test(start[2]);
  const base = start[1].length;
  const items = [];
  let last = at;
  let loose = false;
  let i = at;
  while (i < lines.length) {
    const marker = ITEM.exec(lines[i]);
    if (!marker || /\d/.test(marker[2]) !== ordered || marker[1].length > base + 1 || RULE.test(lines[i])) break;
    const width = marker[1].length + marker[2].length + (marker[3].length > 4 || !marker[4] ? 1 : marker[3].length);
    const nested = marker[1].length + 2; // CommonMark wants `width`; models often write two spaces under "1."
    const inner = [marker[4]];
    const task = TASK.exec(marker[4]);
    if (task) inner[0] = marker[4].slice(task[0].length);
    let fence = null;
    let end = i;
    for (i += 1; i < lines.length; i += 1) {
      const line = lines[i];
      if (blank(line)) {
        inner.push("");
        continue;
      }
      const indent = indentOf(line);
      if (indent < nested) {
        const lazy = i === end + 1 && !fence && !interrupts(line) && !ITEM.test(line) && !blank(inner.at(-1));
        if (!lazy) break;
      }
      inner.push(line.slice(Math.min(indent, width)));
      const mark = FENCE.exec(inner.at(-1));
      if (mark) fence = fence ? (mark[2].startsWith(fence) ? null : fence) : mark[2];
      end = i;
    }
    const gap = i > end + 1; // empty lines after the item
    while (inner.length > 1 && inner.at(-1) === "") inner.pop();
    items.push({ lines: inner, task: task ? task[1] !== " " : null });
    loose ||= inner.some((text, n) => text === "" && n > 0);
    last = end;
    const follower = gap && i < lines.length ? ITEM.exec(lines[i]) : null;
    if (follower && /\d/.test(follower[2]) === ordered && follower[1].length <= base + 1) loose = true;
  }
  return { type: "list", ordered, start: ordered ? parseInt(start[2], 10) : 1, items, loose, depth: depth + 1, last };
}

function readIndented(lines, at) {
  const code = [];
  let last = at;
  for (let i = at; i < lines.length; i += 1) {
    if (!blank(lines[i]) && indentOf(lines[i]) < 4 && !lines[i].startsWith("\t")) break;
    code.push(lines[i].replace(/^(?: {1,4}|\t)/, ""));
    if (!blank(lines[i])) last = i;
  }
  return { type: "code", lang: "", code: code.slice(0, last - at + 1), closed: true, last };
}

/** Cells of a row; `\|` is a bar inside a cell, and so is a bar inside a code span. */
export function splitRow(line) {
  const cells = [];
  let cell = "";
  let ticks = 0;
  const row = line.trim().replace(/^\|/, "");
  for (let i = 0; i < row.length; i += 1) {
    if (row[i] === "\\" && row[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (row[i] === "|" && ticks % 2 === 0) {
      cells.push(cell.trim());
      cell = "";
    } else {
      if (row[i] === "`") ticks += row.indexOf("`", i + 1) > 0 || ticks % 2 ? 1 : 0;
      cell += row[i];
    }
  }
  if (cell.trim() || !row.endsWith("|")) cells.push(cell.trim());
  return cells;
}

function startsTable(lines, at, open) {
  const line = lines[at];
  if (!line.includes("|")) return false;
  const below = lines[at + 1];
  if (open && /^ {0,3}\|.*\|/.test(line)) {
    // the rest of the delimiter row is still being written
    if (below === undefined || (at + 1 === lines.length - 1 && /^[ |:-]*$/.test(below))) return true;
  }
  return below !== undefined && DELIMITER.test(below) && splitRow(line).length === splitRow(below).length;
}

function readTable(lines, at) {
  const align = splitRow(lines[at + 1] ?? "").map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "";
  });
  const rows = [];
  let last = Math.min(at + 1, lines.length - 1);
  for (let i = at + 2; i < lines.length && !blank(lines[i]) && !interrupts(lines[i]); i += 1) {
    rows.push(lines[i]);
    last = i;
  }
  return { type: "table", head: lines[at], align, rows, last };
}

function readParagraph(lines, at, open) {
  let last = at;
  for (let i = at + 1; i < lines.length && !blank(lines[i]); i += 1) {
    const setext = SETEXT.exec(lines[i]);
    if (setext) {
      const text = lines.slice(at, i).join("\n").trim();
      return { type: "heading", level: setext[1][0] === "=" ? 1 : 2, text, last: i };
    }
    if (interrupts(lines[i]) || startsTable(lines, i, open)) break;
    last = i;
  }
  const text = lines.slice(at, last + 1).map((line) => line.trimStart()).join("\n").trimEnd();
  return { type: "paragraph", text, last };
}
