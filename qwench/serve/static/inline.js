/**
 * Markdown inside a block: text in, a list of nodes out (strings, or objects with `tag`). Touches no DOM. HTML tags are
 * text, except `<br>`; images are links, so nothing is loaded; links lead to http, https and mailto only.
 */

const PLAIN = /(?:(?![\\`*_~[\]!<&$\n]|https?:\/\/)[\s\S])+/y;
const URL_TEXT = /https?:\/\/[^\s<>"'`|，。；：！？、（）《》「」]+/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]*|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)>/y;
const BREAK = /<br[ \t]*\/?>/iy;
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|(\w{2,8}));/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", mdash: "—", ndash: "–",
  hellip: "…", times: "×", rarr: "→", larr: "←", le: "≤", ge: "≥", ne: "≠", deg: "°", middot: "·", bull: "•" };
const DESTINATION = /[ \t\n]*(?:<([^<>\n]*)>|((?:\\.|[^\s()\\]|\((?:\\.|[^\s()\\])*\))*))(?:[ \t\n]+(?:"[^"]*"|'[^']*'|\([^()]*\)))?[ \t\n]*\)/y;
const WORD = /[\p{L}\p{N}]/u;
// characters looked through for the end of a construct, so that "[[[[…" and the like take linear time
const MAX_LINK_TEXT = 1000;
const MAX_ADDRESS = 4000;
const MAX_FORMULA = 4000;

/** The address if a click may follow it, else null. */
export function safeHref(address) {
  let url;
  try {
    url = new URL(address.trim());
  } catch {
    return null; // relative addresses too: they would point into this server
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

/** @param {string} text @returns {(string | {tag: string, children?: unknown[], text?: string, href?: string})[]} */
export function parseInline(text, depth = 0) {
  const out = [];
  const missing = new Set(); // lengths of backtick runs known to have no partner
  let at = 0;
  const literal = (value) => {
    if (typeof out.at(-1) === "string") out[out.length - 1] += value;
    else out.push(value);
  };
  const match = (regex) => {
    regex.lastIndex = at;
    return regex.exec(text);
  };
  while (at < text.length) {
    const plain = match(PLAIN);
    if (plain) {
      literal(plain[0]);
      at += plain[0].length;
      continue;
    }
    const found = readSpecial(text, at, depth, match, missing);
    if (found) {
      if (typeof found.node === "string") literal(found.node);
      else out.push(found.node);
      at = found.end;
    } else {
      literal(text[at]);
      at += 1;
    }
  }
  return emphasise(out);
}

function readSpecial(text, at, depth, match, missing) {
  const char = text[at];
  if (char === "\\") return readEscape(text, at);
  if (char === "`") return readCode(text, at, missing);
  if (char === "*" || char === "_" || char === "~") return readDelimiter(text, at, char);
  if (char === "$") return readDollar(text, at);
  if (char === "\n") return { node: { tag: "br" }, end: at + 1 };
  if (char === "&") {
    const entity = match(ENTITY);
    if (!entity) return null;
    const code = entity[1] ? parseInt(entity[1], 10) : entity[2] ? parseInt(entity[2], 16) : null;
    const value = code === null ? ENTITIES[entity[3]] : code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
    return value === undefined ? null : { node: value, end: at + entity[0].length };
  }
  if (char === "<") {
    const line = match(BREAK);
    if (line) return { node: { tag: "br" }, end: at + line[0].length };
    const angle = match(ANGLE);
    if (!angle) return null;
    const href = safeHref(angle[1].includes(":") ? angle[1] : `mailto:${angle[1]}`);
    return href && { node: { tag: "a", href, children: [angle[1]] }, end: at + angle[0].length };
  }
  if (char === "h") return readUrl(text, at, match);
  if (depth < 4 && (char === "[" || (char === "!" && text[at + 1] === "["))) return readLink(text, at, char, depth);
  return null;
}

function readEscape(text, at) {
  const next = text[at + 1];
  if (next === "(" || next === "[") {
    const end = text.indexOf(next === "(" ? "\\)" : "\\]", at + 2);
    if (end > 0) return { node: { tag: "math", text: text.slice(at + 2, end).trim() }, end: end + 2 };
  }
  if (next === "\n") return { node: { tag: "br" }, end: at + 2 };
  if (next !== undefined && /[!-/:-@[-`{-~]/.test(next)) return { node: next, end: at + 2 };
  return null;
}

function readCode(text, at, missing) {
  let size = 1;
  while (text[at + size] === "`") size += 1;
  if (!missing.has(size)) {
    for (let i = text.indexOf("`", at + size); i >= 0; ) {
      let run = 1;
      while (text[i + run] === "`") run += 1;
      if (run === size) {
        let code = text.slice(at + size, i).replaceAll("\n", " ");
        if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
        return { node: { tag: "code", text: code }, end: i + size };
      }
      i = text.indexOf("`", i + run);
    }
    missing.add(size);
  }
  return { node: "`".repeat(size), end: at + size };
}

function readDelimiter(text, at, char) {
  let size = 1;
  while (text[at + size] === char) size += 1;
  const before = text[at - 1] ?? " ";
  const after = text[at + size] ?? " ";
  // CommonMark also looks at punctuation, which breaks "**重点：**后" where no spaces part words
  let opens = !/\s/.test(after);
  let closes = !/\s/.test(before);
  if (char === "_") {
    opens &&= !WORD.test(before);
    closes &&= !WORD.test(after);
  }
  if ((!opens && !closes) || (char === "~" && size !== 2)) return { node: char.repeat(size), end: at + size };
  return { node: { tag: "delimiter", char, size, opens, closes }, end: at + size };
}

function readDollar(text, at) {
  const double = text[at + 1] === "$";
  const open = at + (double ? 2 : 1);
  if (!double && /\s/.test(text[open] ?? " ")) return null;
  const limit = Math.min(text.length, open + MAX_FORMULA);
  for (let i = open; i < limit; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "$" && i > open) {
      if (double && text[i + 1] !== "$") continue;
      // "$5 and $10" is money: a formula ends with a non-space and no digit follows it
      if (!double && (/\s/.test(text[i - 1]) || /\d/.test(text[i + 1] ?? ""))) return null;
      return { node: { tag: "math", text: text.slice(open, i).trim() }, end: i + (double ? 2 : 1) };
    } else if (text[i] === "`") return null;
  }
  return null;
}

function readUrl(text, at, match) {
  const found = match(URL_TEXT);
  if (!found || WORD.test(text[at - 1] ?? " ")) return null;
  let address = found[0].replace(/[.,;:!?*_~]+$/, "");
  while (address.endsWith(")") && address.split(")").length > address.split("(").length) address = address.slice(0, -1);
  address = address.replace(/[.,;:!?*_~\]]+$/, "");
  const href = safeHref(address);
  return href && { node: { tag: "a", href, children: [address] }, end: at + address.length };
}

function readLink(text, at, char, depth) {
  const open = char === "!" ? at + 1 : at;
  const limit = Math.min(text.length, open + MAX_LINK_TEXT);
  let nesting = 0;
  for (let i = open; i < limit; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "[") nesting += 1;
    else if (text[i] === "]") {
      nesting -= 1;
      if (nesting > 0) continue;
      if (text[i + 1] !== "(") return null;
      DESTINATION.lastIndex = 0;
      const target = DESTINATION.exec(text.slice(i + 2, i + 2 + MAX_ADDRESS));
      if (!target) return null;
      const href = safeHref((target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
      const children = parseInline(text.slice(open + 1, i), depth + 1);
      if (!children.length) children.push(href ?? "");
      const node = href ? { tag: "a", href, children } : { tag: "span", children };
      return { node, end: i + 2 + target[0].length };
    }
  }
  return null;
}

/** Turns pairs of delimiter runs into em, strong and del; those without a partner become text. */
function emphasise(nodes) {
  const done = []; // nodes so far; delimiter runs in it can still open
  const bottom = { "*": 0, _: 0, "~": 0 }; // no opener of this sign below this index
  for (const node of nodes) {
    if (node.tag !== "delimiter") {
      done.push(node);
      continue;
    }
    const run = { ...node };
    while (run.closes && run.size > 0) {
      let i = done.length - 1;
      const end = Math.min(bottom[run.char], done.length);
      while (i >= end && !(done[i].tag === "delimiter" && done[i].char === run.char)) i -= 1;
      if (i < end) {
        bottom[run.char] = done.length;
        break;
      }
      const opener = done[i];
      const used = run.char === "~" ? 2 : Math.min(opener.size, run.size) >= 2 ? 2 : 1;
      const children = done.splice(i + 1).map((child) => (child.tag === "delimiter" ? child.char.repeat(child.size) : child));
      opener.size -= used;
      run.size -= used;
      if (opener.size === 0) done.pop();
      done.push({ tag: run.char === "~" ? "del" : used === 2 ? "strong" : "em", children });
    }
    if (run.size > 0) done.push(run.opens ? run : run.char.repeat(run.size));
  }
  return done.map((node) => (node.tag === "delimiter" ? node.char.repeat(node.size) : node));
}
