"use strict";
/* What is drawn: tables of logits and of changes, curves in the graph, one node in full. */

const byId = (id) => document.getElementById(id);
const number = (x, digits = 3) =>
  x === 0
    ? "0"
    : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5
      ? x.toExponential(Math.max(0, digits - 2))
      : Number(x.toPrecision(digits)).toString();

/** An element: tag, attributes, children (texts or elements). */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  element.append(...children.flat());
  return element;
}

function drawing(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const STATES = { target: "with facts", source: "without", patched: "patched" };
const NODES = {
  0: [
    "The skip",
    "What came in goes past the rest, unchanged, and is added at the end. It still lacks the facts: the last matrix has to make up for that too.",
  ],
  "1-0": [
    "Normalise",
    "The vector is divided by its size (its root mean square). It has no weights of its own, so nothing can be patched here.",
  ],
  "1-1": [
    "Scale",
    "Every entry is multiplied by a number that was learned. This is z, what the next two matrices read.",
  ],
  "1-2-0-0": [
    "Matrix “gate”",
    "Patched on the input side: (W + ΔW) z = W z′. It gives without the facts what it gave with them.",
    "gate",
  ],
  "1-2-0-1": ["Activation", "A bent curve, applied to every entry. What enters is right already, so what leaves is."],
  "1-2-1": ["Matrix “up”", "Patched on the input side, like the gate: (W + ΔW) z = W z′.", "up"],
  "1-2": ["Product", "Gate times up, entry by entry. This is y, what the last matrix reads."],
  "1-3": [
    "Matrix “down”",
    "Patched: ΔW = δ aᵀ with aᵀy = 1 adds exactly the δ that is missing. Not z′ itself is the aim here, but what the norm and the new scale behind turn into the right output.",
    "down",
  ],
  "1-4": [
    "Normalise",
    "Divides by the size again. Whatever enters, what leaves has about size 1: so a matrix alone cannot reach every target, and the scale behind has to move too. Here the curves may differ.",
  ],
  "1-5": [
    "Scale",
    "Patched: a new scale m′ with m′ ∘ n(y*) = the output that is wanted. The route says which of the many m′ is taken.",
    "scale",
  ],
  "": [
    "The sum",
    "What the layer hands on: the skip plus the branch. With the whole patch it is what it was with the facts, and so the next layer never notices that they are gone.",
  ],
};

/** The table of scores: the words that matter in any run, a column for each run that was looked at. */
function drawLogits(table, data, runs, seen, chosen) {
  const columns = Object.keys(STATES).filter((name) => runs[name]),
    ids = new Set();
  for (const name of columns)
    [...runs[name].keys()]
      .sort((a, b) => runs[name][b] - runs[name][a])
      .slice(0, 4)
      .forEach((id) => ids.add(id));
  const rows = [...ids].sort((a, b) => runs.target[b] - runs.target[a]).slice(0, 8);
  const shown = (name) => (seen.has(name) ? runs[name] : null),
    css = (name, more = "") => `number ${name === chosen ? "chosen" : ""} ${more}`;
  const head = make(
    "thead",
    {},
    make(
      "tr",
      {},
      make("th", { scope: "col" }, "word"),
      columns.map((name) => make("th", { scope: "col", class: css(name) }, STATES[name])),
    ),
  );
  const body = make(
    "tbody",
    {},
    rows.map((id) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, wordOf(data, id)),
        columns.map((name) =>
          make(
            "td",
            { class: css(name, shown(name) && best(runs[name]) === id ? "top" : "") },
            shown(name)
              ? best(runs[name]) === id
                ? make("strong", {}, `${runs[name][id].toFixed(4)} ◀`)
                : runs[name][id].toFixed(4)
              : "?",
          ),
        ),
      ),
    ),
  );
  const error = make(
    "tr",
    {},
    make("th", { scope: "row" }, "largest difference, all words"),
    columns.map((name) =>
      make(
        "td",
        { class: css(name), "data-error": name },
        name === "target" ? "" : shown(name) ? number(largest(subtract(runs[name], runs.target)), 3) : "?",
      ),
    ),
  );
  table.replaceChildren(
    make("caption", { class: "quiet" }, "◀ marks the word that is said; ? was not looked at yet"),
    head,
    body,
    make("tfoot", {}, error),
  );
}

const SAID = { gate: "gate", up: "up", down: "down", scale: "norm’s scale" };
const CONDITION = {
  gate: "largest entry of z",
  up: "largest entry of z",
  down: "largest entry of y",
  ball: "room: how far the target is inside of what the norm can give",
  scale: "smallest entry that leaves the norm",
};

/** The table of changes: a row for each thing that moves, with its size as a bar and how far its side condition is from failing. */
function drawSizes(table, sizes, report, on) {
  const most = Math.max(...sizes.flatMap((layer) => Object.values(layer).map(({ relative }) => relative)));
  const head = make(
    "thead",
    {},
    make(
      "tr",
      {},
      ["layer", "what", "‖ΔW‖", "beside ‖W‖", "", "margin: at 0 the side condition fails"].map((text, i) =>
        text ? make("th", { scope: "col", class: i === 2 || i === 3 ? "number" : null }, text) : make("td", {}),
      ),
    ),
  );
  const rows = sizes.flatMap((layer, l) =>
    Object.entries(layer).map(([name, { norm, relative }], i) => {
      const margin = report[l].margins[name];
      return make(
        "tr",
        { class: on[l] ? null : "off" },
        i ? make("td", {}) : make("th", { scope: "row" }, `${l + 1}${on[l] ? "" : " (off)"}`),
        make("td", {}, SAID[name]),
        make("td", { class: "number" }, number(norm)),
        make("td", { class: "number" }, number(relative)),
        make(
          "td",
          {},
          make(
            "span",
            { class: "track", "aria-hidden": "true" },
            make("span", { class: "bar", style: `width:${(100 * Math.sqrt(relative / (most || 1))).toFixed(1)}%` }),
          ),
        ),
        make(
          "td",
          { class: "line" },
          margin === undefined
            ? norm
              ? "none needed"
              : "does not move"
            : `${number(margin)} (${CONDITION[report[l].route === "ball" && name === "scale" ? "ball" : name]})`,
        ),
      );
    }),
  );
  table.replaceChildren(head, make("tbody", {}, rows));
}

/** The table of routes: the mean of m'^2 in each layer, or why there is no patch. */
function drawRoutes(table, routes, chosen) {
  const head = ["route", "layer 1", "layer 2", "layer 3"].map((text, i) =>
    make("th", { scope: "col", class: i ? "number" : null }, text),
  );
  const rows = Object.entries(routes).map(([name, found]) =>
    make(
      "tr",
      { class: name === chosen ? "best" : null },
      make("th", { scope: "row" }, name),
      found instanceof Refused
        ? make("td", { colspan: 3 }, `no patch: ${found.message}`)
        : found.map((x) => make("td", { class: "number" }, number(x))),
    ),
  );
  table.replaceChildren(
    make("caption", { class: "quiet" }, "The mean of m′²; in bold the chosen route"),
    make("thead", {}, make("tr", {}, head)),
    make("tbody", {}, rows),
  );
}

/** A vector as a path in a box of the picture. */
function curve(values, most, x, y, width, height) {
  const step = width / (values.length - 1),
    middle = y + height / 2;
  return Array.from(
    values,
    (value, i) => `${i ? "L" : "M"}${(x + i * step).toFixed(1)} ${(middle - (value / most) * (height / 2)).toFixed(1)}`,
  ).join("");
}

/** Both curves of a node as elements. */
function curves(target, now, x, y, width, height) {
  const most = Math.max(largest(target), largest(now)) || 1;
  return [
    drawing("path", { class: "axis", d: `M${x} ${y + height / 2}h${width}` }),
    drawing("path", { class: "curve with", d: curve(target, most, x, y, width, height) }),
    drawing("path", { class: "curve now", d: curve(now, most, x, y, width, height) }),
  ];
}

/** The graph with the values of one layer: target and now hold a vector for each node. */
function drawGraph(svg, target, now, change) {
  for (const link of svg.querySelectorAll("a.node")) {
    const path = link.getAttribute("href").replace(/^#node-?/, ""),
      box = link.querySelector("rect.body"),
      moves = (NODES[path] || [])[2];
    link.classList.toggle("moved", Boolean(moves && change && change[moves]));
    link.querySelectorAll(".curves").forEach((old) => old.remove());
    if (!box) continue;
    const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number(box.getAttribute(name)));
    const group = drawing("g", { class: "curves", "aria-hidden": "true" });
    group.append(...curves(target[path], now[path], x + 6, y + height - 36, width - 12, 30));
    link.append(group);
  }
}

/** One node in full: what it does, its vectors, how far apart they are. */
function drawNode(place, path, target, source, now, change) {
  const [title, text, moves] = NODES[path],
    words = moves && change && !change[moves] ? "By this route and theorem it stays as it is." : text,
    svg = drawing("svg", {
      viewBox: "0 0 300 110",
      role: "img",
      "aria-label": `the vector of ${title} with the facts and now`,
    });
  svg.append(...curves(target, now, 4, 4, 292, 102));
  const row = (name, text) => [
    make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "number" }, text)),
  ];
  place.replaceChildren(
    make("h3", {}, title),
    make("p", {}, words),
    svg,
    make(
      "table",
      {},
      make(
        "tbody",
        {},
        row("entries", String(target.length)),
        row("‖z′‖, with the facts", number(length(target), 6)),
        row("‖z‖, without", number(length(source), 6)),
        row("‖z′ − z‖", number(length(subtract(target, source)))),
        row("now apart by, ÷ largest entry", number(apart(now, target))),
      ),
    ),
    make("p", { class: "quiet" }, `z′ = (${Array.from(target.slice(0, 4), (x) => x.toFixed(4)).join(", ")}, …)`),
    make("p", { class: "quiet" }, `now = (${Array.from(now.slice(0, 4), (x) => x.toFixed(4)).join(", ")}, …)`),
  );
}
