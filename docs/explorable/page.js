"use strict";
/* The page: what was written, what is shown, and what follows from it. */

const data = JSON.parse(byId("data").textContent);
const model = readModel(data);
const state = {
  read: null,
  runs: null,
  solved: null,
  other: {},
  shown: "target",
  seen: new Set(["target"]),
  node: "1-3",
  layer: 1,
  step: 0,
};
const SHOWN = 300; // tokens, of a text that is much too long

const layersOn = () => [...document.querySelectorAll("#layers input")].map((box) => box.checked);
const share = () => Number(byId("share").value);
const whole = () => share() === 1 && layersOn().every(Boolean);

/** The texts have changed: read them, run the model with and without the facts, and solve. */
function changedTexts() {
  const read = readTexts(data, byId("facts").value, byId("question").value),
    messages = read.problems.map((text) => make("p", { class: "problem" }, text));
  Object.assign(state, { read, runs: null, solved: null, other: {}, seen: new Set(["target", state.shown]) });
  suggest(read);
  if (!read.problems.length) {
    const target = run(model, [...read.context, ...read.question]),
      source = run(model, read.question, read.context.length);
    state.runs = { target, source };
    messages.push(...notesOf(read).map((text) => make("p", { class: "note" }, text)));
  }
  byId("messages").replaceChildren(...messages);
  document.body.classList.toggle("stopped", !state.runs);
  solve();
}

/** What is said beside an answer: what is unusual in the texts, and which of two contradictory facts the model takes. */
function notesOf(read) {
  const clash = contradictions(data, read.facts).map(({ name, values, question }) => {
    const ids = wordsOf(question).map((word) => data.vocabulary[word]);
    const room = read.context.length + ids.length <= data.config.max_position_embeddings;
    const said = room ? wordOf(data, best(run(model, [...read.context, ...ids]).logits.at(-1))) : null;
    return `The facts contradict each other about ${name}: ${values.join(" and ")}.${said ? ` Asked “${question}”, the model takes ${said}.` : ""} The patch reproduces what the model takes.`;
  });
  return [...read.notes, ...clash];
}

/** The choice of questions that the facts allow. */
function suggest({ facts, asked }) {
  const questions = questionsAbout(data, facts),
    now = asked.join(" ");
  const options = questions.map(({ text }) => make("option", { value: text, selected: text === now }, text));
  byId("suggested").replaceChildren(
    make("option", { value: "" }, questions.length ? "a question about these facts …" : "no question fits these facts"),
    ...options,
  );
}

/** The patch by a route and the theorem that is chosen, or the refusal. */
function solvedBy(route) {
  const { read, runs } = state;
  try {
    return solveLast(model, read.question, read.context.length, runs.target, { route, via: byId("via").value });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return error;
  }
}

/** The patch for the route and the theorem that are chosen; what it cannot be is said. */
function solve() {
  const asked = byId("route").value,
    found = state.runs ? solvedBy(asked) : null,
    refused = found instanceof Refused;
  state.solved = refused ? null : found;
  byId("refusal").replaceChildren(
    ...(refused
      ? [make("p", { class: "problem" }, `There is no patch by this route: ${found.message}. Choose another route.`)]
      : []),
  );
  if (state.runs) {
    const chosen = asked === "auto" ? "balanced" : asked;
    state.routes = {
      "no patch": spreadOf(
        model,
        model.layers.map(() => ({})),
      ),
    };
    for (const route of ROUTES.slice(1)) {
      const by = route === chosen ? found : solvedBy(route);
      state.routes[route] = by instanceof Refused ? by : spreadOf(model, by.patch);
    }
    drawRoutes(byId("routes"), state.routes, chosen);
  }
  state.other = { ticked: state.other.ticked };
  act();
}

/** The patch, or the part of it that is asked for, acts; everything is drawn. */
function act() {
  const { read, runs, solved, other } = state;
  if (other.kept) Object.assign(other, { kept: null, words: null });
  byId("share-now").textContent = share().toFixed(2);
  byId("share").setAttribute("aria-valuetext", `${Math.round(100 * share())} percent of the patch`);
  if (runs) {
    state.acting = solved && partOf(solved.patch, layersOn(), share());
    runs.patched = solved ? run(model, read.question, read.context.length, state.acting) : null;
    if (!solved && state.shown === "patched") {
      show("source");
      state.fallen = true;
    } else if (solved && state.fallen) show("patched");
  }
  document.querySelector("input[value=patched]").disabled = !solved;
  draw();
}

/** One of the three states is looked at. */
function show(name) {
  state.shown = name;
  state.fallen = false; // from "patched", because there was no patch: it returns with the next one
  state.seen.add(name);
  document.querySelector(`input[name=state][value=${name}]`).checked = true;
}

function draw() {
  const { read, runs, solved, shown } = state,
    gone = shown !== "target";
  const tokens = (words, css) => words.slice(0, SHOWN).map((word) => make("span", { class: css }, brief(word)));
  const more = read.words.length > SHOWN ? [`… and ${read.words.length - SHOWN} more`] : [];
  byId("tokens").replaceChildren(
    ...tokens(["<bos>", ...read.words], gone ? "gone" : null),
    ...more,
    ...tokens(read.asked, "asked"),
  );
  for (const id of ["logits", "sizes", "routes", "others", "node", "merged", "said", "size-words"])
    if (!runs) byId(id).replaceChildren();
  for (const id of ["keep", "jointly"]) byId(id).disabled = !runs || (id === "keep" && !solved);
  if (!runs) {
    document.querySelectorAll(".curves").forEach((old) => old.remove());
    document.querySelectorAll("a.moved").forEach((link) => link.classList.remove("moved"));
    byId("said").replaceChildren(make("p", {}, "The model has nothing to answer yet: see the message in section 1."));
    byId("size-words").textContent = "There is no patch yet: see the message in section 1.";
    return;
  }
  drawSaid();
  drawLogits(
    byId("logits"),
    data,
    mapped(runs, (one) => one.logits.at(-1)),
    state.seen,
    shown,
  );
  if (solved) drawSizes(byId("sizes"), sizesOf(model, solved.patch), solved.report, layersOn());
  else byId("sizes").replaceChildren();
  byId("size-words").textContent = solved
    ? sizeWords(solved)
    : "The table of sizes is empty, because there is no patch: the message above says why.";
  drawInside();
  drawOthers();
}

const mapped = (runs, how) =>
  Object.fromEntries(
    Object.entries(runs)
      .filter(([, one]) => one)
      .map(([name, one]) => [name, how(one)]),
  );

/** The answer in words, and what it shows. */
function drawSaid() {
  const { runs, shown } = state,
    logits = runs[shown].logits.at(-1),
    wanted = runs.target.logits.at(-1),
    word = wordOf(data, best(logits));
  const same = best(logits) === best(wanted),
    error = largest(subtract(logits, wanted));
  const about = questionsAbout(data, state.read.facts).find(({ text }) => text === state.read.asked.join(" "));
  const knows = about && about.values.includes(wordOf(data, best(wanted)));
  const words = {
    target: knows ? "It reads the facts, so it knows." : "This is what the model says with the facts, right or wrong.",
    source: same
      ? `${knows ? "A lucky guess" : "The same word"}: the scores are quite different, see below.`
      : "Without the facts it can only guess.",
    patched: whole()
      ? `${knows ? "The answer is back, and not only the answer" : "It says what it says with the facts, right or wrong, and not only the word"}: no score of any word differs by more than ${number(error)}, which is rounding.`
      : `This is a part of the patch. The promise is for the whole: all layers, all the way. Largest difference now: ${number(error)}.`,
  }[shown];
  const kind = shown === "target" ? "" : same ? "right" : "wrong";
  byId("said").replaceChildren(
    make(
      "p",
      {},
      make("span", { class: `word ${kind}`, id: "word" }, word),
      make("span", {}, shown === "target" ? "" : same ? "(as with the facts)" : "(not what it says with the facts)"),
    ),
    make("p", {}, words),
  );
}

function sizeWords({ patch, report }) {
  const { layers } = model,
    count = (change) =>
      MAPS.flatMap((name) => change[name] || []).reduce(
        (sum, { left, right }) => sum + left.length + right.length,
        change.scale ? change.scale.length : 0,
      );
  const numbers = patch.reduce((sum, change) => sum + count(change), 0),
    dense = layers.reduce(
      (sum, layer) => sum + MAPS.reduce((all, name) => all + layer[name].data.length, layer.m.post.length),
      0,
    );
  const noise =
    report[0].amplification === null
      ? ""
      : ` A rounding error of the last matrix is magnified ${report.map(({ amplification }) => number(amplification, 2)).join(", ")} times on its way out of layers 1, 2, 3.`;
  return `The margin is how far a side condition is from failing. Bars grow with the square root, so that small changes are seen; of a norm’s scale it is the largest change of an entry beside that entry. The whole patch is ${numbers.toLocaleString("en")} numbers; the weights it changes are ${dense.toLocaleString("en")}.${noise}`;
}

function drawInside() {
  const { runs, layer, shown, node } = state,
    at = (one) => runs[one].nodes[layer].at(-1);
  drawGraph(document.querySelector(".canvas svg"), at("target"), at(shown), state.solved && state.solved.patch[layer]);
  drawNode(
    byId("node"),
    node,
    at("target")[node],
    at("source")[node],
    at(shown)[node],
    state.solved && state.solved.patch[layer],
  );
  document
    .querySelectorAll("a.node")
    .forEach((link) =>
      link.setAttribute("aria-current", String(link.getAttribute("href").replace(/^#node-?/, "") === node)),
    );
}

/** What belongs to the model, once: its layers and its words. */
function furnish() {
  byId("layers").append(
    ...model.layers.map((_, l) =>
      make("label", {}, make("input", { type: "checkbox", checked: true, value: l }), ` layer ${l + 1}`),
    ),
  );
  byId("layer").append(
    ...model.layers.map((_, l) =>
      make(
        "label",
        {},
        make("input", { type: "radio", name: "layer", value: l, checked: l === state.layer }),
        ` layer ${l + 1}`,
      ),
    ),
  );
  const kinds = Object.entries(data.relations).map(([kind, { statement, questions, values }]) =>
    make(
      "p",
      {},
      make("strong", {}, `${kind}: `),
      [statement, ...questions].map((text) => text.replace("{name}", "Mia").replace("{value}", values[0])).join("  "),
      make("br"),
      values.join(", "),
    ),
  );
  byId("words").append(make("p", {}, make("strong", {}, "names: "), data.names.join(", ")), ...kinds);
}

function listen() {
  let waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(changedTexts, 200);
  };
  byId("facts").addEventListener("input", soon);
  byId("question").addEventListener("input", soon);
  byId("suggested").addEventListener("change", ({ target }) => {
    if (target.value) {
      byId("question").value = target.value;
      changedTexts();
    }
  });
  byId("random").addEventListener("click", () => {
    byId("facts").value = randomFacts(data, Number(byId("count").value));
    const questions = questionsAbout(data, factsIn(data, wordsOf(byId("facts").value)));
    byId("question").value = questions[Math.floor(Math.random() * questions.length)].text;
    changedTexts();
  });
  document.querySelectorAll("input[name=state]").forEach((button) =>
    button.addEventListener("change", () => {
      show(button.value);
      draw();
    }),
  );
  document.querySelectorAll("input[name=layer]").forEach((button) =>
    button.addEventListener("change", () => {
      state.layer = Number(button.value);
      draw();
    }),
  );
  const seen = (then) => () => {
    show("patched");
    then();
  };
  document.querySelectorAll("#layers input").forEach((box) => box.addEventListener("change", seen(act)));
  byId("share").addEventListener("input", seen(act));
  for (const id of ["route", "via"]) byId(id).addEventListener("change", seen(solve));
  for (const link of document.querySelectorAll("a.node")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      state.node = link.getAttribute("href").replace(/^#node-?/, "");
      if (state.runs) drawInside();
    });
  }
  byId("others").addEventListener("change", ({ target }) => {
    state.other.ticked[target.checked ? "add" : "delete"](target.value);
  });
  byId("keep").addEventListener("click", keep);
  byId("jointly").addEventListener("click", jointly);
  byId("back").addEventListener("click", () => tour(state.step - 1));
  byId("next").addEventListener("click", () => tour(state.step + 1));
}

furnish();
listen();
byId("facts").value = "Mia lives in Oslo . Leo lives in Rome . Zoe has a dog . Ben has a cat .";
byId("question").value = "Where does Leo live ?";
changedTexts();
tour(0, false);
