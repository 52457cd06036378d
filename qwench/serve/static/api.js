/** The server's OpenAI routes as the page uses them: models, health, and a streamed chat answer. Touches no DOM. */

/**
 * What went wrong, as the page tells it apart.
 * `kind`: network (no answer), auth (401, 403), busy (429, 503), context (prompt too long), bad (other 4xx), server
 * (5xx), broken (the stream stopped before its end).
 */
export class ApiError extends Error {
  constructor(kind, detail = "", { status = 0, retryAfter = null } = {}) {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const TYPES = { invalid_request_error: "bad", authentication_error: "auth", rate_limit_error: "busy" };

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

function kindOf(status, code) {
  if (code === "context_length_exceeded") return "context";
  if (status === 401 || status === 403) return "auth";
  if (status === 429 || status === 503) return "busy";
  return status >= 500 ? "server" : "bad";
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("network", "");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const detail = body?.error?.message ?? `${response.status} ${response.statusText}`;
  const seconds = parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retryAfter = Number.isFinite(seconds) ? seconds : null;
  throw new ApiError(kindOf(response.status, body?.error?.code), String(detail), { status: response.status, retryAfter });
}

/** @returns {Promise<{id: string, max_model_len?: number}[]>} */
export async function listModels(key) {
  const response = await request("/v1/models", { headers: headers(key) });
  return (await response.json()).data ?? [];
}

/** True if the server answers at all and is ready. */
export async function healthy() {
  try {
    return (await fetch("/health", { cache: "no-store", credentials: "omit" })).ok;
  } catch {
    return false;
  }
}

/** The `data` of server-sent events, whole whatever the network's cuts; ends with the stream. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Sends a chat request and hands every chunk to `onChunk`. Resolves when the server says [DONE]; rejects with ApiError,
 * or with AbortError after `signal`.
 *
 * @param {object} body of POST /v1/chat/completions; must ask for a stream
 * @param {{key: string, signal: AbortSignal, onChunk: (chunk: object) => void}} options
 */
export async function streamChat(body, { key, signal, onChunk }) {
  const response = await request("/v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      // the status was sent long ago, so the error's type has to say it
      if (chunk.error) throw new ApiError(TYPES[chunk.error.type] ?? "server", String(chunk.error.message ?? ""));
      onChunk(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("broken", "");
  }
  throw new ApiError("broken", "");
}
