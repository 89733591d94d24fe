// The walk: pictures on the way from seed to seed through noise, as fast as the server makes them.

import { download, newestOnly, save, sheet } from "./api.js";
import { codeOf } from "./code.js";
import { byId, check, choices, codeBlock, element, Median, milliseconds, race, Rate, steps } from "./parts.js";
import { pictureOf, Stage } from "./stage.js";
import { COUNTS, MOST_STOPS, parseSeeds, place, randomSeeds, seedRanges, stopsOf } from "./state.js";

const STOPS_PER_S = 0.4;
const MOST_CHIPS = 12;
const DRAG_STARTS_AT = 6; // CSS pixels: less is a press
const THUMB = 64; // CSS pixels
const SAVED_SIDE = 768;
const FRAMES_PER_STOP = 24;
const ANIMATION_FPS = 20;

export class WalkView {
  #playing = false;
  #last = 0;
  #model = new Median();
  #total = new Median();
  #rate = new Rate();
  #raced = 0;
  #stopsShown = "";

  constructor(app) {
    this.app = app;
    this.stage = new Stage(byId("stage-walk"), (index) => this.#pick(index));
    this.ask = newestOnly(
      (state) => sheet("v1/walk", this.#body(state)),
      (answer, state) => this.#show(answer, state),
      (error) => app.failed(error),
    );
    this.askStops = newestOnly(
      (state) => sheet("v1/generate", this.#stopsBody(state)),
      (answer, state) => this.#showStops(answer.bitmap, state),
      (error) => app.failed(error),
    );
    this.#listen();
  }

  /** A new model: its classes, its speed. */
  enter() {
    const { facts } = this.app;
    byId("classes-walk").hidden = !facts.num_classes;
    this.#offerClasses("classes-walk", { value: "any", label: "each its own" }, (value) => this.#choose(value));
    this.#offerClasses("classes-to", { value: "none", label: "nothing" }, (value) => this.#morph(value));
    const most = facts.limits.images_per_request;
    const counts = COUNTS.filter((count) => count <= most).map((value) => ({ value, label: String(value) }));
    choices(byId("counts"), "count", counts, (count) => this.app.set({ count }));
    byId("lead").textContent = `Noise in, picture out, in ${steps(facts.steps)} of a neural network. Drag the picture or the slider to walk through the noise.`;
    this.#model = new Median();
    this.#total = new Median();
    this.#stopsShown = "";
    this.stage.laidOut = "";
  }

  render() {
    const { state } = this.app;
    byId("position").max = stopsOf(state).length;
    byId("position").value = state.at;
    byId("position").setAttribute("aria-valuetext", this.#where(state));
    byId("seeds").value = seedRanges(state.seeds).replaceAll(",", ", ");
    byId("seeds").removeAttribute("aria-invalid");
    check(byId("counts"), state.count);
    this.#chosen("classes-walk", state.classId ?? "any");
    this.#chosen("classes-to", state.otherId ?? "none");
    byId("classes-to").hidden = state.classId === null || !this.app.facts.mixes_classes;
    const near = Math.round(state.at) % stopsOf(state).length;
    byId("stops").querySelectorAll("button").forEach((stop, index) => stop.classList.toggle("here", index === near));
    this.code?.();
  }

  update() {
    const { state } = this.app;
    const stops = JSON.stringify([state.model, stopsOf(state)]);
    if (stops !== this.#stopsShown) {
      this.#stopsShown = stops;
      this.askStops(state);
    }
    return this.ask(state);
  }

  /** On opening: a few steps of the walk, unless the address names a place or the visitor wants no motion. */
  greet(wanted) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (!wanted || still || this.app.state.tab !== "walk") return;
    this.play();
    this.greeting = setTimeout(() => this.pause(), 2 * (1000 / STOPS_PER_S) * 0.9);
  }

  play() {
    this.#playing = true;
    this.#last = performance.now();
    byId("play").setAttribute("aria-pressed", "true");
    byId("play").setAttribute("aria-label", "Pause");
    requestAnimationFrame((now) => this.#frame(now));
  }

  pause() {
    clearTimeout(this.greeting);
    this.#playing = false;
    byId("play").setAttribute("aria-pressed", "false");
    byId("play").setAttribute("aria-label", "Play");
  }

  /** Space plays; arrows walk, where no control has them. */
  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === " " && !event.target.closest("button, select, textarea, input:not([type=range]), summary, a, pre")) {
      event.preventDefault();
      this.#toggle();
    }
    const step = { ArrowLeft: -0.05, ArrowRight: 0.05 }[event.key];
    if (step && !event.target.closest("input, select, button, textarea, pre")) {
      event.preventDefault();
      this.#goto(this.app.state.at + step);
    }
  }

  #frame(now) {
    if (!this.#playing) return;
    const moved = ((now - this.#last) / 1000) * STOPS_PER_S;
    this.#last = now;
    this.#goto(this.app.state.at + moved);
    requestAnimationFrame((next) => this.#frame(next));
  }

  #goto(at) {
    const stops = stopsOf(this.app.state).length;
    this.app.set({ at: Number((((at % stops) + stops) % stops).toFixed(4)) % stops }, "later");
  }

  #toggle() {
    clearTimeout(this.greeting);
    if (this.#playing) this.pause();
    else this.play();
  }

  #body(state) {
    const { from, to, rest } = place(state);
    const way = rest ? [from, to] : [from];
    return { ...this.app.modelField, seeds: way.map(({ seed }) => seed), positions: [rest], count: state.count, ...this.#classField(way) };
  }

  #stopsBody(state) {
    const stops = stopsOf(state);
    return { ...this.app.modelField, seeds: stops.map(({ seed }) => seed), ...this.#classField(stops), grid: true, format: "png" };
  }

  /** The classes of stops as a request's field: one where all have the same, nothing where each seed draws its own. */
  #classField(stops) {
    const classes = stops.map(({ classId }) => classId);
    if (classes[0] === null) return {};
    return { class_ids: classes.every((classId) => classId === classes[0]) ? [classes[0]] : classes };
  }

  #show({ bitmap, ms, classes }, state) {
    const { facts } = this.app;
    if (state.model !== this.app.state.model) return; // the visitor has gone on to another model
    const [, height, width] = facts.image_shape;
    const { from, to, rest } = place(state);
    const labels = Array.from({ length: state.count }, (_, index) => {
      const way = rest ? `between seeds ${from.seed + index} and ${to.seed + index}` : `seed ${from.seed + index}`;
      const name = classes ? `, ${this.app.mixName(classes[index])}` : "";
      return `Picture ${index + 1}, ${way}${name}: start from it`;
    });
    this.stage.show(bitmap, { count: state.count, width, height, labels });
    const names = new Set((classes ?? []).map((found) => this.app.mixName(found)));
    // Of several classes at once no line can tell: their labels do.
    byId("where").textContent = [...(names.size === 1 ? names : []), this.#where(state)].join(" · ");
    this.app.showed(state);
    this.#measure(ms, state.count);
    if (!this.#playing) this.app.announce(`${state.count === 1 ? "Picture" : `${state.count} pictures`} at ${byId("where").textContent}`);
  }

  #measure(ms, count) {
    const updates = this.#rate.tick();
    const model = this.#model.add(ms.model);
    const total = this.#total.add(ms.total);
    if (performance.now() - this.#raced < 250) return; // numbers that change faster cannot be read
    this.#raced = performance.now();
    byId("meter-model").textContent = milliseconds(model);
    byId("meter-total").textContent = milliseconds(total);
    byId("meter-updates").textContent = updates;
    byId("meter-images").textContent = Math.round((1000 * count) / model).toLocaleString("en");
    this.#race(model / count);
  }

  /** One picture of this model beside one of its teacher: as it was measured in Compare, else as its evaluations say. */
  #race(ms) {
    const { facts } = this.app;
    const own = { name: steps(facts.steps), detail: "this model, a picture", ms };
    const { teacher } = facts;
    if (!teacher || teacher.steps <= facts.steps) return race(byId("race"), [own]);
    const measured = facts.teacherMs;
    const detail = `its teacher, ${teacher.evaluations} evaluations`;
    return race(byId("race"), [own, { name: steps(teacher.steps), detail, ms: measured ?? teacher.evaluations * ms, guess: !measured }]);
  }

  #showStops(bitmap, state) {
    const [, height, width] = this.app.facts.image_shape;
    const across = bitmap.width / width;
    const buttons = stopsOf(state).map(({ seed, classId }, index) => {
      const canvas = element("canvas", { width, height });
      const factor = Math.max(1, Math.floor(THUMB / Math.max(width, height)));
      canvas.style.width = `${Math.min(THUMB, factor * width)}px`;
      canvas.getContext("2d").drawImage(bitmap, (index % across) * width, Math.floor(index / across) * height, width, height, 0, 0, width, height);
      const stop = element("button", { type: "button", className: "stop" }, canvas, element("span", { textContent: String(seed) }));
      stop.setAttribute("aria-label", `Stop ${index + 1}: seed ${seed}${classId === null ? "" : `, ${this.app.className(classId)}`}`);
      stop.addEventListener("click", () => {
        this.pause();
        this.app.set({ at: index });
      });
      return stop;
    });
    byId("stops").replaceChildren(...buttons);
    this.render();
  }

  #pick(index) {
    const { state } = this.app;
    this.pause();
    if (state.count > 1) return this.app.set({ seeds: state.seeds.map((seed) => seed + index), count: 1 });
    const { seed, classId } = stopsOf(state)[Math.round(state.at) % stopsOf(state).length];
    const [first, second] = classId === state.classId ? [state.classId, state.otherId] : [state.otherId, state.classId];
    return this.app.set({ seeds: [seed, ...randomSeeds(3)], at: 0, classId: first, otherId: second });
  }

  #choose(value) {
    this.app.set(value === "any" ? { classId: null, otherId: null } : { classId: Number(value) });
  }

  #morph(value) {
    this.app.set({ otherId: value === "none" ? null : Number(value) });
  }

  /** Chips for a few classes, a list for many; `first` comes before them. */
  #offerClasses(id, first, choose) {
    const fieldset = byId(id);
    const options = [first, ...this.app.facts.class_names.map((label, value) => ({ value, label }))];
    fieldset.querySelector("select")?.remove();
    if (options.length <= MOST_CHIPS + 1) return choices(fieldset, id, options, choose);
    choices(fieldset, id, [], choose);
    const ariaLabel = fieldset.querySelector("legend").textContent;
    const list = element("select", { ariaLabel }, ...options.map(({ value, label }) => element("option", { value, textContent: label })));
    list.addEventListener("change", () => choose(list.value));
    return fieldset.append(list);
  }

  #chosen(id, value) {
    const list = byId(id).querySelector("select");
    if (list) list.value = value;
    else check(byId(id), value);
  }

  #where(state) {
    const { from, to, rest } = place(state);
    if (!rest || from.seed === to.seed) return `seed ${from.seed}`;
    return `${Math.round(100 * rest)} % of the way from seed ${from.seed} to ${to.seed}`;
  }

  #name(ending) {
    return `${this.app.state.model}-${seedRanges(this.app.state.seeds).replaceAll(",", "_")}.${ending}`;
  }

  #savePicture() {
    const [, height, width] = this.app.facts.image_shape;
    const scale = Math.max(1, Math.floor(SAVED_SIDE / (Math.max(width, height) * this.stage.columns)));
    pictureOf(this.stage, scale).toBlob((blob) => save(blob, this.#name("png")));
  }

  /** The whole way round, back to the first stop: it can be looped without a jump. */
  #animation() {
    const { state, facts } = this.app;
    const round = [...stopsOf(state), stopsOf(state)[0]];
    const stops = round.length - 1;
    const [, height, width] = facts.image_shape;
    // The server makes at most 256 frames of 512 pixels a side.
    const most = Math.min(256, Math.floor(facts.limits.images_per_request / state.count));
    const frames = stops === 1 ? 1 : Math.min(most, FRAMES_PER_STOP * stops);
    const positions = Array.from({ length: frames }, (_, index) => Number(((index * stops) / frames).toFixed(4)));
    const side = Math.max(width, height) * Math.ceil(Math.sqrt(state.count));
    const scale = Math.max(1, Math.min(64, Math.floor(512 / side)));
    const seeds = round.map(({ seed }) => seed);
    return { ...this.app.modelField, seeds, positions, count: state.count, ...this.#classField(round), format: "webp", animated: true, fps: ANIMATION_FPS, scale };
  }

  async #busy(button, work) {
    button.disabled = true;
    try {
      await work();
    } catch (error) {
      this.app.failed(error);
    } finally {
      button.disabled = false;
    }
  }

  #listen() {
    const { app } = this;
    const position = byId("position");
    position.addEventListener("input", () => {
      this.pause();
      this.#goto(Number(position.value));
    });
    byId("play").addEventListener("click", () => this.#toggle());
    byId("dice").addEventListener("click", () => app.set({ seeds: randomSeeds(app.state.seeds.length), at: 0 }));
    byId("seeds").addEventListener("change", (event) => this.#typed(event.target));
    byId("save-picture").addEventListener("click", () => this.#savePicture());
    const saveAll = byId("save-all");
    saveAll.addEventListener("click", () => this.#busy(saveAll, () => download("v1/walk", { ...this.#body(app.state), format: "zip" }, this.#name("zip"))));
    const saveWalk = byId("save-walk");
    saveWalk.addEventListener("click", () => this.#busy(saveWalk, () => download("v1/walk", this.#animation(), this.#name("webp"))));
    this.code = codeBlock(byId("code-walk"), () => codeOf("v1/walk", this.#body(app.state), "walk.png", app.facts.needs_key));
    this.#drag(byId("stage-walk"));
  }

  #typed(field) {
    const seeds = parseSeeds(field.value);
    if (seeds.length) return this.app.set({ seeds, at: 0 });
    this.app.say(`“${field.value.slice(0, 40)}” are no seeds; write 1 to ${MOST_STOPS}, as 7, 21 or 40-43.`);
    return this.render(); // the pictures have not changed: nor does the field
  }

  /** Across the stage is one stop. */
  #drag(stage) {
    let start = null;
    stage.addEventListener("pointerdown", (event) => {
      if (event.button === 0) start = { x: event.clientX, at: this.app.state.at, moving: false };
    });
    stage.addEventListener("pointermove", (event) => {
      if (!start) return;
      const moved = event.clientX - start.x;
      if (!start.moving && Math.abs(moved) < DRAG_STARTS_AT) return;
      if (!start.moving) {
        start.moving = true;
        this.pause();
        stage.setPointerCapture(event.pointerId); // also keeps the release from being a press
      }
      this.#goto(start.at + moved / stage.clientWidth);
    });
    for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (start = null));
  }
}
