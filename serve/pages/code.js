// The same request in curl, Python and JavaScript, with seeds in a row written as a range.

import { base } from "./api.js";

/** body: fields of the request; path: such as v1/walk; file: where curl and Python put the answer; needsKey: of the server. */
export function codeOf(path, body, file, needsKey) {
  const url = new URL(path, base).href;
  return { curl: curl(url, body, file, needsKey), Python: python(url, body, file, needsKey), JavaScript: script(url, body, needsKey) };
}

function curl(url, body, file, needsKey) {
  const range = rangeOf(body.seeds);
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $UNI_INSTRUCT_API_KEY"` : "";
  let data = quoted(JSON.stringify(body));
  // The shell counts: "seeds":[$(seq -s, 0 63)].
  if (range) data = data.replace(JSON.stringify(body.seeds), `['"$(seq -s, ${range[0]} ${range[1]})"']`);
  return `curl ${url} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${data} -o ${file}`;
}

function python(url, body, file, needsKey) {
  const range = rangeOf(body.seeds);
  const fields = Object.entries(body).map(([name, value]) => {
    const written = name === "seeds" && range ? `list(range(${range[0]}, ${range[1] + 1}))` : pythonValue(value);
    return `    "${name}": ${written},\n`;
  });
  const key = needsKey ? `,\n    headers={"Authorization": f"Bearer {os.environ['UNI_INSTRUCT_API_KEY']}"}` : "";
  return `${needsKey ? "import os\n" : ""}from pathlib import Path

import httpx

body = {
${fields.join("")}}
answer = httpx.post("${url}", json=body, timeout=60${key})
answer.raise_for_status()
Path("${file}").write_bytes(answer.content)`;
}

function script(url, body, needsKey) {
  const range = rangeOf(body.seeds);
  const seeds = range ? `Array.from({ length: ${range[1] - range[0] + 1} }, (_, i) => ${range[0]} + i)` : JSON.stringify(body.seeds);
  const rest = Object.entries(body).filter(([name]) => name !== "seeds");
  const fields = rest.map(([name, value]) => `, ${name}: ${JSON.stringify(value)}`).join("");
  const key = needsKey ? `, Authorization: \`Bearer \${process.env.UNI_INSTRUCT_API_KEY}\`` : "";
  return `const body = { seeds: ${seeds}${fields} };
const answer = await fetch("${url}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(body),
});
if (!answer.ok) throw new Error((await answer.json()).error.message);
const picture = URL.createObjectURL(await answer.blob());`;
}

/** First and last of seeds in a row, of more than two. */
function rangeOf(seeds) {
  const inRow = seeds.length > 2 && seeds.every((seed, index) => seed === seeds[0] + index);
  return inRow ? [seeds[0], seeds.at(-1)] : null;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const pythonValue = (value) => ({ true: "True", false: "False" })[String(value)] ?? JSON.stringify(value);
