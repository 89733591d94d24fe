// Parts that several views share: groups of choices, code to copy, the race between one step and many, numbers.

export const byId = (id) => document.getElementById(id);

/** Fills a fieldset with radio buttons, [{value, label}]; `choose(value)` is called when one is chosen. */
export function choices(fieldset, name, options, choose) {
  fieldset.querySelectorAll(".chip").forEach((chip) => chip.remove());
  for (const { value, label } of options) {
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value: String(value) });
    input.addEventListener("change", () => choose(value));
    const caption = Object.assign(document.createElement("span"), { textContent: label });
    const chip = Object.assign(document.createElement("label"), { className: "chip" });
    chip.append(input, caption);
    fieldset.append(chip);
  }
}

export function check(fieldset, value) {
  for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === String(value);
}

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const milliseconds = (ms) => (ms === undefined ? "–" : `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);

export const steps = (count) => (count === 1 ? "1 step" : `${count} steps`);

/** Bars as long as their times: [{name, detail, ms, guess}]. */
export function race(place, runners) {
  const slowest = Math.max(...runners.map((runner) => runner.ms));
  place.replaceChildren(
    ...runners.map(({ name, detail, ms, guess }) => {
      const bar = element("div", { className: "bar" }, element("i"));
      bar.firstChild.style.width = `${Math.max(0.6, (100 * ms) / slowest)}%`;
      const time = element("b", { textContent: `${guess ? "≈ " : ""}${milliseconds(ms)}` });
      const line = element("p", {}, element("strong", { textContent: name }), ` ${detail} `, time);
      return element("div", { className: "runner" }, line, bar);
    }),
  );
}

/** Median of the last few numbers: one slow answer does not make the display jump. */
export class Median {
  #last = [];

  add(value) {
    this.#last = [...this.#last.slice(-14), value];
    return this.value;
  }

  get value() {
    const sorted = [...this.#last].sort((a, b) => a - b);
    return sorted[Math.floor(sorted.length / 2)];
  }
}

/** How many updates there were in the last second. */
export class Rate {
  #times = [];

  tick(now = performance.now()) {
    this.#times.push(now);
    this.#times = this.#times.filter((time) => now - time <= 1000);
    return this.#times.length;
  }
}

/** The lines that fetch the same pictures, one language at a time, with a button that copies them. `lines()` makes them. */
export function codeBlock(details, lines) {
  const name = `language-${details.id}`;
  const languages = element("fieldset", { className: "chips small" }, element("legend", { textContent: "Language" }));
  const code = element("code");
  const block = element("pre", { tabIndex: 0, role: "group", ariaLabel: "Code" }, code);
  const copy = element("button", { type: "button", className: "plain", textContent: "Copy" });
  let language = "curl";
  const update = () => {
    if (details.open) code.textContent = lines()[language];
    check(languages, language);
  };
  const options = ["curl", "Python", "JavaScript"].map((value) => ({ value, label: value }));
  choices(languages, name, options, (value) => {
    language = value;
    update();
  });
  copy.addEventListener("click", async () => {
    copy.textContent = (await copied(code.textContent)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  details.append(languages, block, copy);
  details.addEventListener("toggle", update);
  return update;
}

/** Puts text on the clipboard; false where the browser does not let a page do that. */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that came over plain HTTP from elsewhere have no clipboard, but may copy what is selected.
    const field = element("textarea", { value: text, readOnly: true, className: "unseen" });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
