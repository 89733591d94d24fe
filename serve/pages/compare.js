// The same noise through two engines, or through the student and its teacher, side by side with their difference.

import { bitmapOfBase64, newestOnly, post } from "./api.js";
import { byId, check, choices, element, milliseconds, race, steps } from "./parts.js";
import { Stage } from "./stage.js";
import { randomSeed } from "./state.js";

const PICTURES = 4;
const TEACHER = "teacher";

export class CompareView {
  constructor(app) {
    this.app = app;
    this.stages = ["first", "second", "difference"].map((name) => new Stage(byId(`stage-${name}`)));
    this.ask = newestOnly(
      (state) => this.#fetch(state),
      (answer, state) => this.#show(answer, state),
      (error) => {
        document.querySelector(".trio").classList.remove("waiting");
        app.failed(error);
      },
    );
    byId("compare-again").addEventListener("click", () => {
      const { seeds } = app.state;
      app.set({ seeds: [randomSeed(), ...seeds.slice(1)] });
    });
  }

  enter() {
    const others = this.app.facts.compare;
    choices(byId("others"), "other", others.map(({ id, label }) => ({ value: id, label })), (other) => this.app.set({ other }));
    const none = !others.length;
    byId("others").hidden = none;
    document.querySelector(".trio").hidden = none;
    byId("compare-again").hidden = none;
    byId("race-compare").replaceChildren();
    for (const stage of this.stages) stage.laidOut = "";
  }

  render() {
    const { facts } = this.app;
    byId("compare-lead").replaceChildren(...this.#lead(facts));
    if (facts.compare.length) check(byId("others"), this.#other(this.app.state));
  }

  update() {
    if (!this.app.facts.compare.length) return null;
    return this.ask(this.app.state);
  }

  #lead(facts) {
    if (facts.compare.length) return [`Both sides get the same noise. This page's engine is ${facts.engine}.`];
    const { teacher } = facts;
    const cost = teacher ? ` Its teacher needs ${steps(teacher.steps)} (${teacher.evaluations} evaluations of its network) for a picture; this model needs ${steps(facts.steps)}.` : "";
    const command = element("code", { textContent: "uni-instruct export MODEL --to openvino" });
    return [`There is nothing to compare with: this server has one engine for this model, ${facts.engine}, and no teacher.${cost} To build another engine, run `, command, ". A teacher is used if it is in a folder “teacher” in the bundle or beside it."];
  }

  #other(state) {
    const ids = this.app.facts.compare.map(({ id }) => id);
    return ids.includes(state.other) ? state.other : ids[0];
  }

  async #fetch(state) {
    document.querySelector(".trio").classList.add("waiting");
    const seeds = Array.from({ length: PICTURES }, (_, index) => state.seeds[0] + index);
    const body = { ...this.app.modelField, other: this.#other(state), seeds, ...this.app.classField() };
    const answer = await (await post("v1/compare", body)).json();
    const sheets = [...answer.sides, answer.difference].map((side) => bitmapOfBase64(side.b64_png));
    return { ...answer, bitmaps: await Promise.all(sheets) };
  }

  #show({ sides, difference, bitmaps }, state) {
    document.querySelector(".trio").classList.remove("waiting");
    if (state.model !== this.app.state.model) return;
    const { facts } = this.app;
    const [, height, width] = facts.image_shape;
    this.stages.forEach((stage, index) => stage.show(bitmaps[index], { count: PICTURES, width, height, labels: [] }));
    const [own, other] = sides;
    byId("caption-first").textContent = this.#caption(own);
    byId("caption-second").textContent = this.#caption(other);
    const equal = (100 * difference.equal_share).toFixed(difference.equal_share > 0.99 ? 3 : 1);
    const gain = difference.gain > 1 ? `, shown ${difference.gain} times as strong` : "";
    byId("caption-difference").textContent = `Difference: at most ${difference.largest_levels} of 255 levels, ${equal} % of values equal${gain}`;
    if (other.id === TEACHER) facts.teacherMs = other.model_ms / PICTURES;
    const runner = (side) => ({ name: steps(side.steps), detail: `${side.id === TEACHER ? "the teacher" : side.id}, a picture in`, ms: side.model_ms / PICTURES });
    race(byId("race-compare"), sides.map(runner));
    this.app.showed(state);
    this.app.announce(byId("caption-difference").textContent);
  }

  #caption(side) {
    const name = side.id === TEACHER ? "Teacher" : side.id;
    const passes = side.evaluations > 1 ? `, ${side.evaluations} evaluations` : "";
    return `${name} on ${side.device}: ${steps(side.steps)}${passes}, ${milliseconds(side.model_ms)} for ${PICTURES} pictures`;
  }
}
