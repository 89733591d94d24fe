// The server's HTTP API, as the page uses it.

// This file is under PREFIX/ui/pages/: the prefix of a proxy need not be known.
export const base = new URL("../../", import.meta.url);

/** What went wrong, in the server's words or ours. */
export class Problem extends Error {}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, base), options);
  } catch {
    throw new Problem("The server does not answer. The pictures shown are from its last answer.");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // A proxy in between may answer with a page of its own; the status says enough.
  }
  throw new Problem(message);
}

const withModel = (path, model) => (model ? `${path}?model=${encodeURIComponent(model)}` : path);

/** Names of the models that are ready: one that could not be loaded has no pictures to show. */
export async function models() {
  const { data } = await (await answer("v1/models")).json();
  return data.filter(({ state }) => state === "ready").map(({ id }) => id);
}

export async function about(model) {
  return (await answer(withModel("v1/about", model))).json();
}

export const cardPicture = (model, name) => new URL(withModel(`v1/about/${name}`, model), base).href;

export const post = (path, body) =>
  answer(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** One sheet of pictures, with the milliseconds of each stage and of the round trip, and the classes of its pictures. */
export async function sheet(path, body) {
  const start = performance.now();
  const response = await post(path, body);
  const bitmap = await createImageBitmap(await response.blob());
  const ids = response.headers.get("X-Class-Ids");
  return {
    bitmap,
    ms: { ...stages(response.headers.get("Server-Timing") ?? ""), total: performance.now() - start },
    classes: ids ? ids.split(",").map(readClass) : null,
  };
}

export async function bitmapOfBase64(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/png" }));
}

export async function download(path, body, name) {
  save(await (await post(path, body)).blob(), name);
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function stages(header) {
  return Object.fromEntries([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, stage, ms]) => [stage, Number(ms)]));
}

/**
 * Calls `work` with the newest of what it is asked for, one call at a time: what comes while one runs replaces what waits.
 * `done(result, wanted)` and `failed(error, wanted)` get the outcome.
 */
export function newestOnly(work, done, failed) {
  let running = false;
  let waiting = null;
  return async (wanted) => {
    waiting = { wanted };
    if (running) return;
    running = true;
    while (waiting) {
      const { wanted: now } = waiting;
      waiting = null;
      try {
        done(await work(now), now);
      } catch (error) {
        failed(error, now);
      }
    }
    running = false;
  };
}

/** A class of the header X-Class-Ids: 3, or three quarters of the way from class 3 to class 5, 3-to-5-at-0.750. */
function readClass(text) {
  const mixed = /^(\d+)-to-(\d+)-at-([\d.]+)$/.exec(text);
  if (!mixed) return { id: Number(text), other: null, share: 0 };
  return { id: Number(mixed[1]), other: Number(mixed[2]), share: Number(mixed[3]) };
}
