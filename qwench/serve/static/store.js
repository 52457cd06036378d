/**
 * What the browser keeps: conversations in IndexedDB, small preferences in localStorage, the API key in sessionStorage
 * unless asked to keep it. Where storage is refused (private windows), everything works from memory and `persistent`
 * is false. Nothing here talks to the network.
 */

const DATABASE = "qwench-chat";
const TABLE = "conversations";
const PREFIX = "qwench.";

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class Store {
  #database = null;
  #channel = "BroadcastChannel" in window ? new BroadcastChannel(DATABASE) : null;

  /** Opens the database. Never fails: without one, `persistent` stays false. */
  static async open() {
    const store = new Store();
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      store.#database = await done(request);
    } catch {
      store.#database = null;
    }
    return store;
  }

  get persistent() {
    return this.#database !== null;
  }

  #table(mode) {
    return this.#database.transaction(TABLE, mode).objectStore(TABLE);
  }

  async all() {
    return this.#database ? done(this.#table("readonly").getAll()) : [];
  }

  async get(id) {
    return this.#database ? done(this.#table("readonly").get(id)) : undefined;
  }

  /** Stores a conversation whole. Rejects when the browser's quota is used up. */
  async put(conversation) {
    if (!this.#database) return;
    await done(this.#table("readwrite").put(conversation));
    this.#channel?.postMessage(conversation.id);
  }

  async remove(id) {
    if (!this.#database) return;
    await done(this.#table("readwrite").delete(id));
    this.#channel?.postMessage(id);
  }

  /** Calls `listener(id)` when another tab stored or removed a conversation. */
  onChange(listener) {
    if (this.#channel) this.#channel.onmessage = (event) => listener(event.data);
  }
}

export const preferences = {
  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(PREFIX + name, JSON.stringify(value));
    } catch {
      // storage refused: the choice lasts until the page is closed
    }
  },
};

let keyInMemory = "";

export const apiKey = {
  get() {
    try {
      return sessionStorage.getItem(`${PREFIX}key`) ?? localStorage.getItem(`${PREFIX}key`) ?? keyInMemory;
    } catch {
      return keyInMemory;
    }
  },
  get kept() {
    try {
      return localStorage.getItem(`${PREFIX}key`) !== null;
    } catch {
      return false;
    }
  },
  set(value, keep) {
    keyInMemory = value;
    try {
      localStorage.removeItem(`${PREFIX}key`);
      sessionStorage.removeItem(`${PREFIX}key`);
      if (value) (keep ? localStorage : sessionStorage).setItem(`${PREFIX}key`, value);
    } catch {
      // storage refused: the key lasts until the page is closed
    }
  },
};
