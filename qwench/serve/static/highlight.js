/**
 * Colours code line by line. A line's colouring needs only the state left by the line before it, so a streamed block
 * colours each line once. Touches no DOM: `highlightLine` returns pieces `[class, text]` whose texts join to the line.
 *
 * Classes: k keyword, t type, l literal, s string, n number, c comment, f function, v variable or key, m decorator or
 * directive, a added, d deleted, and "" for plain text.
 */

const words = (text) => new Set(text.split(" "));
const C_STRINGS = [{ open: '"', close: '"' }, { open: "'", close: "'" }];
const C_COMMENTS = { line: "//", block: ["/*", "*/"] };

const LANGUAGES = {
  python: {
    line: "#",
    strings: [{ open: '(?:[rRbBfFuU]{0,2})"""', close: '"""', multi: true }, { open: "(?:[rRbBfFuU]{0,2})'''", close: "'''", multi: true },
      { open: '[rRbBfFuU]{0,2}"', close: '"' }, { open: "[rRbBfFuU]{0,2}'", close: "'" }],
    keywords: words("and as assert async await break class continue def del elif else except finally for from global if import in is lambda match case nonlocal not or pass raise return try while with yield"),
    literals: words("True False None self cls"),
    types: words("int float str bool bytes list dict set tuple object type range print len enumerate zip map filter sorted open super isinstance sum min max abs any all"),
    meta: /@[\w.]+/y, names: words("def class"),
  },
  javascript: {
    ...C_COMMENTS, strings: [...C_STRINGS, { open: "`", close: "`", multi: true }], regex: true, capitals: true,
    keywords: words("abstract as async await break case catch class const continue debugger declare default delete do else enum export extends finally for from function get if implements import in instanceof interface is keyof let namespace new of private protected public readonly return satisfies set static super switch this throw try type typeof var void while with yield"),
    literals: words("true false null undefined NaN Infinity"),
    types: words("string number boolean any unknown never object symbol bigint"), meta: /@\w+/y, names: words("function class interface"),
  },
  json: { strings: [{ open: '"', close: '"' }], key: /"(?:\\.|[^"\\])*"(?=\s*:)/y, literals: words("true false null"), ...C_COMMENTS },
  bash: {
    line: "#", lineAfterSpace: true, strings: [{ open: '"', close: '"', multi: true }, { open: "\\$?'", close: "'", multi: true, raw: true }],
    keywords: words("if then else elif fi for while until do done case esac in function select return break continue local export declare readonly set unset shift source alias exit trap"),
    types: words("echo printf cd ls cat grep sed awk find xargs curl wget git pip python python3 node npm docker sudo rm cp mv mkdir chmod tar make test read sort head tail wc kill ssh"),
    variable: /\$(?:\w+|\{[^}]*\}|[@#?$!*-])|^\w+(?==)/y, ident: /[A-Za-z_][\w]*/y, meta: /--?[A-Za-z][\w-]*/y, metaAfterSpace: true,
  },
  c: {
    ...C_COMMENTS, strings: C_STRINGS, meta: /^\s*#\s*\w+|\[\[[\w:]+\]\]/y,
    keywords: words("alignas alignof asm auto break case catch class co_await co_return co_yield concept const consteval constexpr constinit const_cast continue decltype default delete do dynamic_cast else enum explicit export extern final for friend goto if inline mutable namespace new noexcept operator override private protected public register reinterpret_cast requires return sizeof static static_assert static_cast struct switch template this thread_local throw try typedef typeid typename union using virtual volatile while __global__ __device__ __shared__ __host__"),
    types: words("void bool char short int long float double signed unsigned size_t ssize_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t string vector map set pair unique_ptr shared_ptr std FILE wchar_t"),
    literals: words("true false nullptr NULL"),
  },
  rust: {
    ...C_COMMENTS, strings: [{ open: '[br]{0,2}#?"', close: '"#?', multi: true }, { open: "b?'(?=(?:\\\\.[^']*|[^'\\\\])')", close: "'" }], capitals: true,
    meta: /#!?\[[^\]]*\]|'[a-z_]\w*\b|\w+!(?=[\s([{])/y,
    keywords: words("as async await break const continue crate dyn else enum extern fn for if impl in let loop match mod move mut pub ref return static struct super trait type union unsafe use where while"),
    types: words("i8 i16 i32 i64 i128 isize u8 u16 u32 u64 u128 usize f32 f64 bool char str"), literals: words("true false self Self"), names: words("fn"),
  },
  go: {
    ...C_COMMENTS, strings: [...C_STRINGS, { open: "`", close: "`", multi: true, raw: true }],
    keywords: words("break case chan const continue default defer else fallthrough for func go goto if import interface map package range return select struct switch type var"),
    types: words("bool byte complex64 complex128 error float32 float64 int int8 int16 int32 int64 rune string uint uint8 uint16 uint32 uint64 uintptr any make len cap append new panic recover copy delete close"),
    literals: words("true false nil iota"), names: words("func type"),
  },
  java: {
    ...C_COMMENTS, strings: [{ open: '"""', close: '"""', multi: true }, ...C_STRINGS], capitals: true, meta: /@\w+/y,
    keywords: words("abstract as assert base break case catch class const continue data default do else enum event extends final finally for foreach fun get goto if implements import in inner instanceof interface internal is lateinit let native namespace new object open operator out override package private protected public record ref return sealed set static strictfp struct super suspend switch synchronized this throw throws transient try typealias using val var virtual volatile when where while yield async await func guard defer extension protocol init"),
    types: words("boolean bool byte char double float int long short void string decimal Int String Bool Double"), literals: words("true false null nil"),
  },
  sql: {
    line: "--", block: ["/*", "*/"], strings: [{ open: "'", close: "'", raw: true, multi: true }, { open: '"', close: '"' }], ignoreCase: true,
    keywords: words("add all alter and as asc begin between by cascade case check column commit constraint create cross database default delete desc distinct drop else end except exists explain foreign from full group having if in index inner insert intersect into is join key left like limit not null offset on or order outer over partition primary references replace returning right rollback select set table then transaction union unique update using values view when where window with"),
    types: words("bigint blob boolean char date datetime decimal double float int integer json jsonb numeric real serial smallint text time timestamp uuid varchar"), literals: words("true false"),
  },
  css: {
    block: ["/*", "*/"], line: "//", strings: C_STRINGS, ident: /[-_a-zA-Z][\w-]*/y, key: /(?:--)?[a-zA-Z-]+(?=\s*:\s)/y,
    meta: /@[\w-]+|![a-z]+/y, variable: /[.#][a-zA-Z_][\w-]*|--[\w-]+|::?[a-z-]+/y, number: /#[0-9a-fA-F]{3,8}\b|-?\d*\.?\d+(?:%|[a-z]+)?/y,
  },
  yaml: { line: "#", lineAfterSpace: true, strings: C_STRINGS, key: /(?:^|(?<=^\s*(?:- +)*))[\w./-]+(?=\s*:(?:\s|$))/y,
    literals: words("true false null yes no on off"), meta: /^---|^\.\.\.|[&*][\w-]+/y },
  toml: { line: "#", strings: [{ open: '"""', close: '"""', multi: true }, ...C_STRINGS], key: /(?:^|(?<=^\s*))[\w.-]+(?=\s*=)/y, meta: /^\s*\[+[^\]]+\]+/y,
    literals: words("true false") },
};

const ALIASES = { py: "python", python3: "python", pycon: "python", js: "javascript", jsx: "javascript", mjs: "javascript", ts: "javascript", tsx: "javascript",
  typescript: "javascript", node: "javascript", jsonc: "json", json5: "json", jsonl: "json", sh: "bash", shell: "bash", zsh: "bash", console: "bash", dockerfile: "bash",
  makefile: "bash", h: "c", cpp: "c", "c++": "c", cc: "c", cxx: "c", hpp: "c", cuda: "c", cu: "c", rs: "rust", golang: "go", kotlin: "java", kt: "java", csharp: "java",
  cs: "java", "c#": "java", swift: "java", scala: "java", dart: "java", scss: "css", less: "css", yml: "yaml", ini: "toml", cfg: "toml", conf: "toml", mysql: "sql",
  postgresql: "sql", sqlite: "sql", html: "markup", xml: "markup", svg: "markup", vue: "markup", patch: "diff" };

const NUMBER = /0[xX][\da-fA-F_]+|0[bB][01_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?[a-zA-Z\d]*/y;
const IDENT = /[\p{L}_$][\p{L}\p{N}_$]*/uy;
const REGEX = /\/(?![*/])(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\[])+\/[a-z]*/y;
const SPACE = /\s+/y;
const MAX_LINE = 5000; // characters; a longer line (minified code) stays plain

/** The language's own name if it is coloured, else null. */
export function languageOf(label) {
  const name = Object.hasOwn(ALIASES, label) ? ALIASES[label] : label;
  return name === "markup" || name === "diff" || Object.hasOwn(LANGUAGES, name) ? name : null;
}

/**
 * @param {string | null} language from languageOf
 * @param {string} line without its line end
 * @param {object | null} state what the line before returned; null at the start
 * @returns {{pieces: [string, string][], state: object | null}}
 */
export function highlightLine(language, line, state) {
  if (!language || line.length > MAX_LINE) return { pieces: [["", line]], state };
  if (language === "diff") return { pieces: [[diffClass(line), line]], state: null };
  const pieces = [];
  const add = (kind, text) => {
    if (!text) return;
    if (pieces.length && pieces.at(-1)[0] === kind) pieces.at(-1)[1] += text;
    else pieces.push([kind, text]);
  };
  const next = language === "markup" ? markupLine(line, state, add) : codeLine(LANGUAGES[language], line, state, add);
  return { pieces, state: next };
}

function diffClass(line) {
  if (/^(?:\+\+\+|---|diff |index )/.test(line)) return "c";
  return { "+": "a", "-": "d", "@": "m" }[line[0]] ?? "";
}

const sticky = (regex, line, at) => {
  regex.lastIndex = at;
  return regex.exec(line)?.[0];
};

/** Where a construct that is open at `from` ends on this line (just behind its end mark), or -1. */
function endOf(line, from, { close, raw }) {
  const end = new RegExp(close, "y");
  for (let i = from; i < line.length; i += 1) {
    if (line[i] === "\\" && !raw) i += 1;
    else if ((end.lastIndex = i, end.test(line))) return end.lastIndex;
  }
  return -1;
}

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

function codeLine(spec, line, state, add) {
  let at = 0;
  let before = ""; // the last word or sign, to tell a regular expression from a division and a name after `def`
  if (state) {
    at = endOf(line, 0, state);
    add(state.kind, at < 0 ? line : line.slice(0, at));
    if (at < 0) return state;
  }
  while (at < line.length) {
    const space = sticky(SPACE, line, at);
    if (space) {
      add("", space);
      at += space.length;
      continue;
    }
    const fresh = at === 0 || /[\s;(]/.test(line[at - 1]);
    if (spec.line && line.startsWith(spec.line, at) && (!spec.lineAfterSpace || fresh) && !(spec.line === "//" && line[at - 1] === ":")) {
      add("c", line.slice(at));
      return null;
    }
    const opened = openConstruct(spec, line, at);
    const key = spec.key && sticky(spec.key, line, at);
    if (opened && !key) {
      const end = endOf(line, at + opened.length, opened);
      add(opened.kind, end < 0 ? line.slice(at) : line.slice(at, end));
      if (end < 0) return opened.multi ? opened : null;
      at = end;
      before = "";
      continue;
    }
    const [kind, text] = key ? ["v", key] : readToken(spec, line, at, before, fresh);
    add(kind, text);
    before = text;
    at += text.length;
  }
  return null;
}

function openConstruct(spec, line, at) {
  if (spec.block && line.startsWith(spec.block[0], at)) {
    return { kind: "c", close: escaped(spec.block[1]), raw: true, multi: true, length: spec.block[0].length };
  }
  for (const string of spec.strings ?? []) {
    string.regex ??= new RegExp(string.open, "y");
    const open = sticky(string.regex, line, at);
    if (open && (open.length === 1 || !/\w/.test(line[at - 1] ?? ""))) return { ...string, kind: "s", length: open.length };
  }
  return null;
}

function readToken(spec, line, at, before, fresh) {
  const meta = spec.meta && (!spec.metaAfterSpace || fresh) && sticky(spec.meta, line, at);
  if (meta) return ["m", meta];
  const number = /[\d#.-]/.test(line[at]) && sticky(spec.number ?? NUMBER, line, at);
  if (number) return ["n", number];
  const variable = spec.variable && sticky(spec.variable, line, at);
  if (variable) return ["v", variable];
  if (spec.regex && line[at] === "/" && /^$|[=(,:[!&|?{};]$|^(?:return|typeof|case)$/.test(before)) {
    const regex = sticky(REGEX, line, at);
    if (regex) return ["s", regex];
  }
  const word = sticky(spec.ident ?? IDENT, line, at);
  if (!word) return ["", line[at]];
  const known = spec.ignoreCase ? word.toLowerCase() : word;
  if (before !== "." || spec.ident) {
    if (spec.keywords?.has(known)) return ["k", word];
    if (spec.literals?.has(known)) return ["l", word];
    if (spec.types?.has(known)) return ["t", word];
  }
  if (spec.names?.has(before) || line[at + word.length] === "(") return ["f", word];
  return [spec.capitals && /^[A-Z][a-z]/.test(word) ? "t" : "", word];
}

const TAG_PART = /\s+|"[^"]*"?|'[^']*'?|\/?>|[^\s"'>=/]+|[=/]/y;

function markupLine(line, state, add) {
  let at = 0;
  let mode = state?.mode ?? "text";
  while (at < line.length) {
    if (mode === "comment") {
      const end = line.indexOf("-->", at);
      add("c", end < 0 ? line.slice(at) : line.slice(at, end + 3));
      if (end < 0) return { mode };
      at = end + 3;
      mode = "text";
    } else if (mode === "tag") {
      const part = sticky(TAG_PART, line, at);
      if (!part) return { mode };
      add(part.endsWith(">") ? "k" : /^["']/.test(part) ? "s" : /^[=/\s]/.test(part) ? "" : "v", part);
      at += part.length;
      if (part === ">" || part === "/>") mode = "text";
    } else {
      const open = line.indexOf("<", at);
      add("", open < 0 ? line.slice(at) : line.slice(at, open));
      if (open < 0) return null;
      at = open;
      const tag = /<[/!?]?[A-Za-z][\w:-]*/y;
      const name = sticky(tag, line, at);
      if (line.startsWith("<!--", at)) mode = "comment";
      else if (name) {
        add("k", name);
        at += name.length;
        mode = "tag";
      } else {
        add("", "<");
        at += 1;
      }
    }
  }
  return mode === "text" ? null : { mode };
}
