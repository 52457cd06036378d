/**
 * LaTeX as legible text: symbols become Unicode, fractions a slash, powers and indices raised and lowered text. It is
 * not a typesetter; what it does not know stays as written. Text in, nodes as in inline.js out. Touches no DOM.
 */

const SYMBOLS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ϵ", varepsilon: "ε", zeta: "ζ", eta: "η", theta: "θ",
  vartheta: "ϑ", iota: "ι", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π", rho: "ρ", sigma: "σ", tau: "τ",
  upsilon: "υ", phi: "ϕ", varphi: "φ", chi: "χ", psi: "ψ", omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ",
  Xi: "Ξ", Pi: "Π", Sigma: "Σ", Upsilon: "Υ", Phi: "Φ", Psi: "Ψ", Omega: "Ω", times: " × ", cdot: " · ", div: " ÷ ",
  pm: " ± ", mp: " ∓ ", ast: "∗", star: "⋆", circ: "∘", bullet: "•", oplus: " ⊕ ", otimes: " ⊗ ", odot: " ⊙ ", le: " ≤ ",
  leq: " ≤ ", ge: " ≥ ", geq: " ≥ ", ne: " ≠ ", neq: " ≠ ", approx: " ≈ ", equiv: " ≡ ", sim: " ∼ ", simeq: " ≃ ",
  cong: " ≅ ", propto: " ∝ ", ll: " ≪ ", gg: " ≫ ", to: " → ", rightarrow: " → ", leftarrow: " ← ", Rightarrow: " ⇒ ",
  Leftarrow: " ⇐ ", leftrightarrow: " ↔ ", Leftrightarrow: " ⇔ ", iff: " ⇔ ", implies: " ⟹ ", mapsto: " ↦ ", gets: " ← ",
  infty: "∞", partial: "∂", nabla: "∇", sum: "∑", prod: "∏", int: "∫", iint: "∬", oint: "∮", forall: "∀", exists: "∃",
  in: " ∈ ", notin: " ∉ ", ni: " ∋ ", subset: " ⊂ ", subseteq: " ⊆ ", supset: " ⊃ ", supseteq: " ⊇ ", cup: " ∪ ",
  cap: " ∩ ", setminus: " ∖ ", emptyset: "∅", varnothing: "∅", land: " ∧ ", wedge: " ∧ ", lor: " ∨ ", vee: " ∨ ", neg: "¬",
  lnot: "¬", mid: " | ", parallel: " ∥ ", perp: " ⊥ ", angle: "∠", triangle: "△", therefore: "∴", because: "∵", ldots: "…",
  dots: "…", cdots: "⋯", vdots: "⋮", ddots: "⋱", prime: "′", hbar: "ℏ", ell: "ℓ", Re: "ℜ", Im: "ℑ", aleph: "ℵ", deg: "°",
  langle: "⟨", rangle: "⟩", lfloor: "⌊", rfloor: "⌋", lceil: "⌈", rceil: "⌉", lvert: "|", rvert: "|", lVert: "‖", rVert: "‖",
  Vert: "‖", quad: "  ", qquad: "   ", degree: "°", checkmark: "✓", models: " ⊨ ", vdash: " ⊢ ", backslash: "\\",
};
const NAMES = new Set(["sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log",
  "ln", "lg", "exp", "lim", "limsup", "liminf", "max", "min", "sup", "inf", "arg", "det", "dim", "ker", "gcd", "deg", "mod",
  "Pr", "softmax", "argmax", "argmin"]);
const TEXT = new Set(["text", "mathrm", "textbf", "textit", "texttt", "mathbf", "mathit", "mathsf", "mathtt", "operatorname",
  "boldsymbol", "mathcal", "mathfrak", "bm", "mbox", "boxed", "displaystyle", "tag"]);
const ACCENTS = { hat: "\u0302", widehat: "\u0302", bar: "\u0304", overline: "\u0305", vec: "\u20d7", tilde: "\u0303",
  dot: "\u0307", ddot: "\u0308" };
const DOUBLE = { A: "𝔸", B: "𝔹", C: "ℂ", E: "𝔼", F: "𝔽", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ", 1: "𝟙" };
const DROPPED = new Set(["left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "limits", "nolimits",
  "displaystyle", "textstyle", "scriptstyle", "rm", "bf", "it", "nonumber", "middle"]);
const TOKEN = /\\([a-zA-Z]+)\*?|\\([^a-zA-Z])|([{}^_&~])|(\s+)|([^\\{}^_&~\s]+)/y;
const MAX_DEPTH = 20;

/** @param {string} source @returns {(string | {tag: string, children?: unknown[]})[]} */
export function parseMath(source) {
  const tokens = [];
  TOKEN.lastIndex = 0;
  for (let m = TOKEN.exec(source); m; m = TOKEN.exec(source)) tokens.push(m);
  const reader = { tokens, at: 0 };
  const out = [];
  while (reader.at < tokens.length) {
    out.push(...sequence(reader, 0));
    reader.at += 1; // a stray closing brace
  }
  return tidy(out);
}

function sequence(reader, depth) {
  const out = [];
  while (reader.at < reader.tokens.length && reader.tokens[reader.at][3] !== "}") out.push(...atom(reader, depth));
  return out;
}

/** One argument: a group in braces, one command, or one character. */
function argument(reader, depth) {
  while (reader.tokens[reader.at]?.[4]) reader.at += 1;
  const token = reader.tokens[reader.at];
  if (!token) return [];
  if (token[5]?.length > 1) {
    const [first, ...rest] = token[5];
    reader.tokens[reader.at] = Object.assign([...token], { 5: rest.join("") });
    return [first];
  }
  return atom(reader, depth);
}

function atom(reader, depth) {
  const token = reader.tokens[reader.at];
  reader.at += 1;
  if (!token) return [];
  const [, command, escaped, special, space, text] = token;
  if (depth > MAX_DEPTH) return [token[0]];
  if (text) return [text];
  if (space) return [" "];
  if (special === "{") {
    const inner = sequence(reader, depth + 1);
    reader.at += 1;
    return inner;
  }
  if (special === "^" || special === "_") return [{ tag: special === "^" ? "sup" : "sub", children: tidy(argument(reader, depth + 1)) }];
  if (special) return [special === "}" ? "" : " "];
  if (escaped) {
    if (escaped === "\\") return [{ tag: "br" }];
    return [",;:! ".includes(escaped) ? (escaped === "!" ? "" : " ") : escaped === "|" ? "‖" : escaped];
  }
  return named(reader, command, depth);
}

function named(reader, command, depth) {
  const next = () => argument(reader, depth + 1);
  if (/^[dtc]?frac$/.test(command)) return [...grouped(next()), "/", ...grouped(next())];
  if (command === "sqrt") {
    const root = reader.tokens[reader.at]?.[5]?.startsWith("[") ? reader.tokens[reader.at++][5].replace(/[[\]]/g, "") : "";
    return [{ 3: "∛", 4: "∜" }[root] ?? "√", ...grouped(next())];
  }
  if (command === "binom") return ["C(", ...next(), ", ", ...next(), ")"];
  if (command === "mathbb") return next().map((node) => (typeof node === "string" ? node.replace(/./g, (c) => DOUBLE[c] ?? c) : node));
  if (command === "begin" || command === "end") {
    next();
    return command === "begin" ? [] : [" "];
  }
  if (command === "not") return next().map((node) => (typeof node === "string" ? `${node.trim()}\u0338` : node));
  if (command in ACCENTS) {
    const inner = next();
    return inner.length === 1 && typeof inner[0] === "string" && inner[0].length === 1 ? [inner[0] + ACCENTS[command]] : inner;
  }
  if (DROPPED.has(command)) return reader.tokens[reader.at]?.[5] === "." ? ((reader.at += 1), []) : [];
  if (TEXT.has(command)) return [{ tag: "span", children: next() }];
  if (NAMES.has(command)) {
    while (reader.tokens[reader.at]?.[4]) reader.at += 1;
    const after = reader.tokens[reader.at]?.[0][0];
    return [{ tag: "span", children: [command] }, /[\p{L}\p{N}\\]/u.test(after ?? "") ? "\u2009" : ""];
  }
  return [Object.hasOwn(SYMBOLS, command) ? SYMBOLS[command] : `\\${command} `];
}

/** Brackets around what is more than one symbol: \frac{a+b}{2} becomes (a+b)/2. */
function grouped(nodes) {
  const plain = nodes.length === 1 && typeof nodes[0] === "string" && /^[\p{L}\p{N}.∞]+$/u.test(nodes[0].trim());
  return plain ? nodes : ["(", ...nodes, ")"];
}

/** Joins neighbouring strings and repeated spaces. */
function tidy(nodes) {
  const out = [];
  for (const node of nodes) {
    if (typeof node === "string" && typeof out.at(-1) === "string") out[out.length - 1] += node;
    else out.push(node);
  }
  return out.map((node) => (typeof node === "string" ? node.replace(/ {2,}/g, " ").replace(/-/g, "−") : node));
}
