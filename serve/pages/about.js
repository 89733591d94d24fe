// The model card, and the facts of what is served.

import { cardPicture } from "./api.js";
import { cardElements } from "./card.js";
import { byId, element, steps } from "./parts.js";

const PICTURES = {
  "samples.png": "Samples, not chosen",
  "neighbours.png": "Samples, each above its nearest training images",
};

export class AboutView {
  constructor(app) {
    this.app = app;
  }

  enter() {
    const { facts, state } = this.app;
    const card = cardElements(facts.card);
    byId("card").replaceChildren(...(card.length ? card : [element("p", { textContent: "This model has no card." })]));
    const entries = this.#facts(facts).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]);
    byId("facts").replaceChildren(...entries);
    const figures = facts.pictures.map((name) => {
      const picture = element("img", { src: cardPicture(state.model, name), alt: PICTURES[name], loading: "lazy" });
      return element("figure", {}, picture, element("figcaption", { textContent: PICTURES[name] }));
    });
    byId("card-pictures").replaceChildren(...figures);
  }

  render() {}

  update() {
    this.app.showed(this.app.state);
  }

  #facts(facts) {
    const [channels, height, width] = facts.image_shape;
    const teacher = facts.teacher ? `${steps(facts.teacher.steps)}, ${facts.teacher.evaluations} evaluations` : null;
    const rows = [
      ["Model", facts.name],
      ["Pictures", `${width} × ${height}, ${channels === 1 ? "grey" : "colour"}`],
      ["Classes", facts.num_classes ? facts.class_names.join(", ") : "none"],
      ["Steps", String(facts.steps)],
      ["Teacher", teacher],
      ["Engine", `${facts.engine} on ${facts.device}`],
      ["Licence", facts.licence],
      ["Weights", `sha256 ${facts.weights_sha256.slice(0, 16)}…`],
    ];
    return rows.filter(([, value]) => value);
  }
}
