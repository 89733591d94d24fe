// Classes by seeds: what one seed's noise is as each of the classes.

import { download, newestOnly, save, sheet } from "./api.js";
import { codeOf } from "./code.js";
import { byId, codeBlock, milliseconds } from "./parts.js";
import { headWidth, HEAD_HEIGHT, pictureOf, Stage } from "./stage.js";
import { LARGEST_SEED, randomSeed, randomSeeds } from "./state.js";

const MOST_ROWS = 10;
const MOST_COLUMNS = 8;
const SMALLEST = 44; // CSS pixels of a picture that a thumb can press
const SMALL_PICTURE = 32; // pixels: up to this size each is shown as two by two at least
const SAVED_SIDE = 1024;

export class GridView {
  constructor(app) {
    this.app = app;
    this.stage = new Stage(byId("stage-grid"), (index) => this.#pick(index));
    this.ask = newestOnly(
      (state) => sheet("v1/generate", { ...this.#body(state), format: "png", grid: true }),
      (answer, state) => this.#show(answer, state),
      (error) => app.failed(error),
    );
    this.#listen();
  }

  enter() {
    this.stage.laidOut = "";
  }

  render() {
    byId("first-seed").value = this.app.state.seeds[0];
    byId("grid-back").disabled = this.app.state.seeds[0] === 0;
    const { rows, classes } = this.#layout(this.app.state);
    byId("grid-classes").hidden = rows.length >= classes;
    this.code?.();
  }

  update() {
    return this.ask(this.app.state);
  }

  /**
   * Which pictures: columns are seeds, rows classes from `state.row` on; without classes, seeds go on from row to row. As many
   * as the stage has room for.
   */
  #layout(state) {
    const { facts } = this.app;
    const classes = facts.num_classes;
    const most = facts.limits.images_per_request;
    const size = Math.max(...facts.image_shape.slice(1));
    const cell = Math.max(SMALLEST, size <= SMALL_PICTURE ? 2 * size : size) + 3;
    const side = this.stage.element.clientWidth;
    const columns = Math.max(1, Math.min(MOST_COLUMNS, most, Math.floor((side - (classes ? headWidth(side) : 0)) / cell)));
    const room = Math.floor((side - HEAD_HEIGHT) / cell);
    const count = Math.max(1, Math.min(classes || room, room, MOST_ROWS, Math.floor(most / columns)));
    const first = Math.min(state.row, Math.max(0, classes - count));
    const rows = Array.from({ length: count }, (_, index) => first + index);
    return { columns, rows, classes };
  }

  #body(state) {
    const { columns, rows, classes } = this.#layout(state);
    const start = state.seeds[0];
    const seeds = rows.flatMap((_, row) => Array.from({ length: columns }, (_, column) => start + column + (classes ? 0 : row * columns)));
    const ids = classes ? { class_ids: rows.flatMap((id) => Array(columns).fill(id)) } : {};
    return { ...this.app.modelField, seeds, ...ids };
  }

  #show({ bitmap, ms }, state) {
    if (state.model !== this.app.state.model) return;
    const { facts } = this.app;
    const [, height, width] = facts.image_shape;
    const { columns, rows, classes } = this.#layout(state);
    const { seeds, class_ids: ids } = this.#body(state);
    const labels = seeds.map((seed, index) => `Seed ${seed}${ids ? `, ${this.app.className(ids[index])}` : ""}: start a walk from it`);
    const heads = classes ? seeds.slice(0, columns).map(String) : null;
    const names = classes ? rows.map((id) => this.app.className(id)) : null;
    this.stage.show(bitmap, { count: seeds.length, width, height, labels, columns, rows: names, heads });
    this.app.showed(state);
    byId("grid-model").textContent = milliseconds(ms.model);
    byId("grid-total").textContent = milliseconds(ms.total);
    byId("grid-count").textContent = seeds.length;
    byId("grid-images").textContent = Math.round((1000 * seeds.length) / ms.model).toLocaleString("en");
    this.app.announce(`${seeds.length} pictures, from seed ${seeds[0]} on`);
  }

  #pick(index) {
    const { seeds, class_ids: ids } = this.#body(this.app.state);
    this.app.set({ tab: "walk", seeds: [seeds[index], ...randomSeeds(3)], at: 0, count: 1, classId: ids ? ids[index] : null, otherId: null });
  }

  #goto(seed) {
    const { seeds } = this.app.state;
    this.app.set({ seeds: [Math.max(0, Math.min(LARGEST_SEED, seed)), ...seeds.slice(1)] });
  }

  #listen() {
    const { app } = this;
    const shift = (columns) => this.#goto(app.state.seeds[0] + columns);
    byId("grid-back").addEventListener("click", () => shift(-this.#layout(app.state).columns));
    byId("grid-on").addEventListener("click", () => shift(this.#layout(app.state).columns));
    byId("grid-classes").addEventListener("click", () => {
      const { rows, classes } = this.#layout(app.state);
      app.set({ row: rows.at(-1) + 1 < classes ? rows.at(-1) + 1 : 0 });
    });
    byId("grid-dice").addEventListener("click", () => this.#goto(randomSeed()));
    byId("first-seed").addEventListener("change", (event) => {
      const text = event.target.value.trim();
      if (/^\d{1,16}$/.test(text) && Number(text) <= LARGEST_SEED) return this.#goto(Number(text));
      app.say(`“${text.slice(0, 40)}” is no seed; write an integer from 0 to ${LARGEST_SEED}.`);
      return this.render();
    });
    byId("grid-save").addEventListener("click", () => {
      const scale = Math.max(1, Math.floor(SAVED_SIDE / (this.stage.width * this.stage.columns)));
      pictureOf(this.stage, scale).toBlob((blob) => save(blob, `${app.state.model}-grid-${app.state.seeds[0]}.png`));
    });
    byId("grid-zip").addEventListener("click", async () => {
      try {
        await download("v1/generate", { ...this.#body(app.state), format: "zip" }, `${app.state.model}-grid-${app.state.seeds[0]}.zip`);
      } catch (error) {
        app.failed(error);
      }
    });
    this.code = codeBlock(byId("code-grid"), () => codeOf("v1/generate", { ...this.#body(app.state), format: "zip" }, "grid.zip", app.facts.needs_key));
  }
}
