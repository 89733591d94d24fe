// The page: one state, the views that show it, and the address that holds it.

import { about, models, Problem } from "./api.js";
import { AboutView } from "./about.js";
import { CompareView } from "./compare.js";
import { GridView } from "./grid.js";
import { WalkView } from "./walk.js";
import { byId, copied, element } from "./parts.js";
import { readState, TABS, writeState } from "./state.js";

class App {
  #facts = new Map();
  #addressTimer = 0;
  #statusTimer = 0;

  async start() {
    this.models = await models();
    const state = readState(location.search, this.models);
    byId("model").replaceChildren(...this.models.map((name) => element("option", { value: name, textContent: name })));
    document.querySelector(".model").hidden = this.models.length < 2;
    this.views = { walk: new WalkView(this), grid: new GridView(this), compare: new CompareView(this), about: new AboutView(this) };
    this.#listen();
    await this.#enter(state);
    byId("app").setAttribute("aria-busy", "false");
    this.views.walk.greet(!new URLSearchParams(location.search).has("at"));
  }

  get facts() {
    return this.#facts.get(this.state.model);
  }

  /** The model's name for requests: only where there are several does a request have to say which. */
  get modelField() {
    return this.models.length > 1 ? { model: this.state.model } : {};
  }

  className(id) {
    return this.facts.class_names[id] ?? String(id);
  }

  /** What a picture shows, from its `readClass`: a class by name, or how much of two. */
  mixName({ id, other, share }) {
    if (other === null) return this.className(id);
    const percent = Math.round(100 * share);
    return `${100 - percent} % ${this.className(id)}, ${percent} % ${this.className(other)}`;
  }

  /** The class as a request's field: nothing where each seed draws its own. */
  classField() {
    return this.state.classId === null ? {} : { class_ids: [this.state.classId] };
  }

  /**
   * Changes the state; controls, pictures and address follow. history: 'push' adds a step for the back button; 'replace' does
   * not; 'later' writes the address once nothing has changed for a moment, as browsers limit how often a page may.
   */
  set(changes, history = "push") {
    const before = this.state;
    this.state = { ...this.state, ...changes };
    clearTimeout(this.#addressTimer);
    if (history === "later") this.#addressTimer = setTimeout(() => this.#writeAddress("replace"), 400);
    else this.#writeAddress(history);
    if (this.state.model !== before.model) return this.#enter(this.state, before);
    return this.#show(before.tab !== this.state.tab);
  }

  /** Pictures of `state` are on the page now: what to return to where a later update fails. */
  showed(state) {
    this.shown = state;
    byId("problem").hidden = true;
  }

  /** An update failed: the last pictures stay, controls say again what they show, and the page says why. */
  failed(error) {
    if (!(error instanceof Problem)) console.error(error);
    this.say(error instanceof Problem ? error.message : "Something failed on this page; the browser's console shows the error.");
    if (this.shown && this.shown.model === this.state.model) {
      this.state = { ...this.shown, tab: this.state.tab };
      this.#writeAddress("replace");
      this.views.walk.pause();
      this.view.render();
    }
  }

  say(problem) {
    byId("problem").textContent = problem;
    byId("problem").hidden = false;
  }

  /** For screen readers, once things have come to rest. */
  announce(text) {
    clearTimeout(this.#statusTimer);
    this.#statusTimer = setTimeout(() => (byId("status").textContent = text), 600);
  }

  get view() {
    return this.views[this.state.tab];
  }

  async #enter(state, before = null) {
    try {
      if (!this.#facts.has(state.model)) this.#facts.set(state.model, await about(state.model));
    } catch (error) {
      if (before) this.state = before;
      this.say(error.message);
      if (before) this.#show(true);
      return;
    }
    const { num_classes: classes, mixes_classes: mixes } = this.#facts.get(state.model);
    const known = (id) => id !== null && id < classes;
    const classId = known(state.classId) ? state.classId : null;
    this.state = { ...state, classId, otherId: mixes && classId !== null && known(state.otherId) ? state.otherId : null };
    for (const view of Object.values(this.views)) view.enter();
    this.#show(true);
  }

  #show(tabChanged) {
    if (tabChanged) this.#showTab();
    document.title = `${this.state.model} · Uni-Instruct`;
    byId("model").value = this.state.model;
    this.view.render();
    return this.view.update();
  }

  #showTab() {
    this.views.walk.pause();
    byId("app").dataset.tab = this.state.tab;
    for (const tab of TABS) {
      const chosen = tab === this.state.tab;
      byId(`panel-${tab}`).hidden = !chosen;
      byId(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
      byId(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    }
  }

  #writeAddress(how) {
    const query = writeState(this.state);
    if (query !== location.search) history[how === "push" ? "pushState" : "replaceState"](null, "", query);
  }

  #listen() {
    byId("model").addEventListener("change", (event) => this.set({ model: event.target.value }));
    for (const tab of TABS) byId(`tab-${tab}`).addEventListener("click", () => this.set({ tab }));
    document.querySelector(".tabs").addEventListener("keydown", (event) => this.#moveTab(event));
    byId("share").addEventListener("click", () => this.#share());
    addEventListener("popstate", () => {
      const before = this.state;
      this.state = readState(location.search, this.models);
      if (this.state.model !== before.model) this.#enter(this.state);
      else this.#show(true);
    });
    document.addEventListener("visibilitychange", () => document.hidden && this.views.walk.pause());
    document.addEventListener("keydown", (event) => this.state.tab === "walk" && this.views.walk.key(event));
  }

  #moveTab(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const tab = TABS[(TABS.indexOf(this.state.tab) + step + TABS.length) % TABS.length];
    this.set({ tab });
    byId(`tab-${tab}`).focus();
  }

  async #share() {
    clearTimeout(this.#addressTimer);
    this.#writeAddress("replace");
    const done = await copied(location.href);
    byId("share").textContent = done ? "Link copied" : "Copy the address above";
    this.announce(done ? "Link copied" : "The link could not be copied");
    setTimeout(() => (byId("share").textContent = "Copy link"), 1800);
  }
}

// Gradio puts the page's markup into the document some time after this script has come.
function whenThere(id, then) {
  if (byId(id)) return then();
  const observer = new MutationObserver(() => {
    if (!byId(id)) return;
    observer.disconnect();
    then();
  });
  return observer.observe(document.documentElement, { childList: true, subtree: true });
}

whenThere("app", async () => {
  const app = new App();
  try {
    await app.start();
  } catch (error) {
    if (!(error instanceof Problem)) console.error(error);
    app.say(error.message);
  }
});
