// A model card's Markdown as elements: headings, paragraphs, lists, tables, code, links. Text stays text: nothing in a card runs.

import { element } from "./parts.js";

export function cardElements(markdown) {
  const lines = markdown.split("\n");
  const made = [];
  while (lines.length) made.push(...block(lines));
  return made;
}

function block(lines) {
  const line = lines.shift();
  const heading = /^(#{1,4}) (.*)$/.exec(line);
  if (heading) return [element(`h${Math.min(6, heading[1].length + 1)}`, {}, ...inline(heading[2]))];
  if (line.startsWith("```")) return [code(lines)];
  if (line.startsWith("|")) return [table([line, ...taken(lines, (next) => next.startsWith("|"))])];
  if (/^[-*] /.test(line)) return [list([line, ...taken(lines, (next) => /^[-*] /.test(next))])];
  const details = /^<details><summary>(.*)<\/summary>/.exec(line);
  if (details) return [folded(details[1], lines)];
  if (!line.trim() || /^!\[/.test(line)) return []; // the card's pictures are shown beside it
  const paragraph = [line, ...taken(lines, (next) => next.trim() && !/^(#|```|\||[-*] |<|!\[)/.test(next))];
  return [element("p", {}, ...inline(paragraph.join(" ")))];
}

function code(lines) {
  const text = taken(lines, (next) => !next.startsWith("```")).join("\n");
  lines.shift();
  return element("pre", { tabIndex: 0, role: "group", ariaLabel: "Code" }, element("code", { textContent: text }));
}

function folded(summary, lines) {
  const inside = taken(lines, (next) => next.trim() !== "</details>");
  lines.shift();
  return element("details", {}, element("summary", { textContent: summary }), ...cardElements(inside.join("\n")));
}

function list(items) {
  return element("ul", {}, ...items.map((item) => element("li", {}, ...inline(item.slice(2)))));
}

function table(lines) {
  const cells = lines.map((line) => line.replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim()));
  const [head, , ...rows] = cells;
  const row = (values, tag) => element("tr", {}, ...values.map((value) => element(tag, {}, ...inline(value))));
  const body = rows.map((values) => row(values, "td"));
  const made = element("table", {}, element("thead", {}, row(head, "th")), element("tbody", {}, ...body));
  return element("div", { className: "wide", tabIndex: 0, role: "group", ariaLabel: "Table" }, made);
}

/** Code, bold and links; a link only where it leads to a page. */
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*|\[[^\]]+\]\(https?:[^)\s]+\))/).filter(Boolean).map((piece) => {
    if (piece.startsWith("`")) return element("code", { textContent: piece.slice(1, -1) });
    if (piece.startsWith("**")) return element("strong", { textContent: piece.slice(2, -2) });
    const link = /^\[([^\]]+)\]\((https?:[^)\s]+)\)$/.exec(piece);
    return link ? element("a", { textContent: link[1], href: link[2], rel: "noreferrer" }) : piece;
  });
}

function taken(lines, wanted) {
  let count = 0;
  while (count < lines.length && wanted(lines[count])) count += 1;
  return lines.splice(0, count);
}
