/** The list of turns: keeps one view a turn, draws growing answers once a frame, and follows the end of the text. */

import { pathOf, siblings, waitingCalls } from "./conversation.js";
import { AnswerTurn, UserTurn } from "./turns.js";

const NEAR_END_PX = 24;

export class Log {
  /**
   * @param {{scroller: HTMLElement, turns: HTMLElement, empty: HTMLElement, latest: HTMLElement}} elements
   * @param {import("./chat.js").Chat} chat
   * @param {import("./turns.js").Actions} actions
   */
  constructor(elements, chat, actions) {
    Object.assign(this, elements);
    this.chat = chat;
    this.actions = actions;
    this.views = new Map(); // node id -> its turn
    this.following = true;
    this.top = 0;
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.latest.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.#follow()).observe(this.scroller);
  }

  /** Shows another conversation, or this one in another language. */
  show() {
    this.views.clear();
    this.turns.replaceChildren();
    this.refresh();
    this.toEnd();
  }

  /** Brings the turns up to date with the conversation. */
  refresh() {
    const conversation = this.chat.current;
    const path = pathOf(conversation);
    const busy = this.chat.streaming() !== null;
    const waiting = waitingCalls(conversation).length > 0;
    this.empty.hidden = path.length > 0;
    const shown = path.filter((node) => node.role !== "tool");
    const elements = shown.map((node) => {
      const view = this.views.get(node.id) ?? new (node.role === "user" ? UserTurn : AnswerTurn)(node, this.actions);
      this.views.set(node.id, view);
      view.node = node;
      const versions = siblings(conversation, node);
      const results = node.tool_calls?.length ? resultsAfter(path, node) : [];
      const state = { versions: versions.length, index: versions.indexOf(node), busy, results, waiting: waiting && node === path.at(-1) };
      view.update(state);
      view.element.classList.toggle("last", node === shown.at(-1));
      return view.element;
    });
    for (const [i, element] of elements.entries()) {
      if (this.turns.children[i] !== element) this.turns.insertBefore(element, this.turns.children[i] ?? null);
    }
    while (this.turns.children.length > elements.length) this.turns.lastElementChild.remove();
    this.#follow();
  }

  /** Draws `node` with the next frame. */
  grow(node) {
    this.growing = node;
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const view = this.views.get(this.growing.id);
      if (!view?.element.isConnected) return;
      view.grow();
      this.#follow();
    });
  }

  tick() {
    const stream = this.chat.streaming();
    if (stream) this.views.get(stream.node.id)?.tick?.((performance.now() - stream.sent) / 1000);
  }

  editLast() {
    const last = pathOf(this.chat.current).findLast((node) => node.role === "user");
    if (last && !this.chat.streaming()) this.views.get(last.id)?.edit();
  }

  toEnd() {
    this.following = true;
    this.#follow();
  }

  #follow() {
    if (!this.following) return;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.top = this.scroller.scrollTop;
    this.latest.hidden = true;
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const left = scrollHeight - clientHeight - scrollTop;
    // going up stops following; at the very end a smaller page can move the top up, too
    if (scrollTop < this.top - 1 && left > 2) this.following = false;
    else if (left < NEAR_END_PX) this.following = true;
    this.top = scrollTop;
    this.latest.hidden = this.following || left < NEAR_END_PX;
  }
}

function resultsAfter(path, node) {
  const results = [];
  for (let i = path.indexOf(node) + 1; path[i]?.role === "tool"; i += 1) results.push(path[i]);
  return results;
}
