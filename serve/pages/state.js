// What the page shows, as one value. It is written to the address and read from it; every control and picture follows it.

export const TABS = ["walk", "grid", "compare", "about"];
export const COUNTS = [1, 4, 9, 16];
export const MOST_STOPS = 12;
// Beyond it JavaScript's numbers skip integers.
export const LARGEST_SEED = Number.MAX_SAFE_INTEGER - 1000;
const RANDOM_SEEDS = 1_000_000;
// One small picture alone on a large stage is all pixels; of several the eye sees what they are.
const FIRST_COUNT = 4;
const FIRST_WALK = [3, 58, 21, 94];

export const randomSeed = () => Math.floor(Math.random() * RANDOM_SEEDS);
export const randomSeeds = (count) => Array.from({ length: count }, randomSeed);

/** The state in an address's query; what is missing or makes no sense is the default. */
export function readState(query, models) {
  const given = new URLSearchParams(query);
  const seeds = parseSeeds(given.get("seeds") ?? "");
  const classOf = (name) => (/^\d{1,6}$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
  const at = Number(given.get("at") ?? 0);
  const count = Number(given.get("n"));
  const state = {
    model: models.includes(given.get("model")) ? given.get("model") : models[0],
    tab: TABS.includes(given.get("tab")) ? given.get("tab") : TABS[0],
    seeds: seeds.length ? seeds : FIRST_WALK,
    count: COUNTS.includes(count) ? count : FIRST_COUNT,
    classId: classOf("class"),
    otherId: classOf("class") === null ? null : classOf("to"),
    row: /^\d{1,6}$/.test(given.get("row") ?? "") ? Number(given.get("row")) : 0,
    other: given.get("other") ?? "",
  };
  return { ...state, at: Number.isFinite(at) && at >= 0 ? at % stopsOf(state).length : 0 };
}

/** The same as a query, without what is the default. */
export function writeState(state) {
  const query = new URLSearchParams({ model: state.model, tab: state.tab, seeds: seedRanges(state.seeds) });
  if (state.at) query.set("at", Number(state.at.toFixed(4)));
  if (state.count !== FIRST_COUNT) query.set("n", state.count);
  if (state.classId !== null) query.set("class", state.classId);
  if (state.otherId !== null) query.set("to", state.otherId);
  if (state.row) query.set("row", state.row);
  if (state.other) query.set("other", state.other);
  return `?${query}`.replaceAll("%2C", ",");
}

/** Seeds from '7, 21, 40-43'. An empty list for what cannot be read, or is too many or too large. */
export function parseSeeds(text) {
  const seeds = [];
  for (const part of text.split(",").map((piece) => piece.trim())) {
    const found = /^(\d{1,16})(?:\s*-\s*(\d{1,16}))?$/.exec(part);
    if (!found) return [];
    const first = Number(found[1]);
    const last = Number(found[2] ?? found[1]);
    if (last < first || last > LARGEST_SEED || seeds.length + last - first >= MOST_STOPS) return [];
    for (let seed = first; seed <= last; seed += 1) seeds.push(seed);
  }
  return seeds;
}

/** Seeds as '7,21,40-43', which parseSeeds reads back. */
export function seedRanges(seeds) {
  const parts = [];
  for (const seed of seeds) {
    const last = parts.at(-1);
    if (last && seed === last[1] + 1) last[1] = seed;
    else parts.push([seed, seed]);
  }
  return parts.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(",");
}

/**
 * The stops of the walk: [{seed, classId}]. Two classes take turns, so that between any two stops one morphs into the other; of
 * a single seed there is then a stop of each, and the class alone changes on the way.
 */
export function stopsOf({ seeds, classId, otherId }) {
  const count = otherId === null ? seeds.length : Math.max(2, seeds.length);
  const classes = otherId === null ? [classId] : [classId, otherId];
  return Array.from({ length: count }, (_, index) => ({ seed: seeds[index % seeds.length], classId: classes[index % classes.length] }));
}

/** Where on the walk a state is: the two stops around the place, and how far it is from the first to the second. */
export function place(state) {
  const stops = stopsOf(state);
  const at = state.at % stops.length;
  const index = Math.floor(at);
  // Rounded, so that the address, the lines of code and the picture say the same place.
  return { from: stops[index], to: stops[(index + 1) % stops.length], rest: Number((at - index).toFixed(4)) % 1 };
}
