"use strict";
/* The page: what was written, what is shown, and what follows from it. */

const data = JSON.parse(byId("data").textContent);
const model = readModel(data);
const state = { read: null, runs: null, solved: null, other: {}, shown: "target", seen: new Set(["target"]), node: "1-3", layer: 1, step: 0 };
const MOST = 4; // questions for one patch: more would need sizes to move

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const layersOn = () => [...document.querySelectorAll("#layers input")].map((box) => box.checked);
const share = () => Number(byId("share").value);
const whole = () => share() === 1 && layersOn().every(Boolean);

/** The texts have changed: read them, run the model with and without the facts, and solve. */
function changedTexts() {
  const read = readTexts(data, byId("facts").value, byId("question").value), messages = read.problems.map((text) => make("p", { class: "problem" }, text));
  Object.assign(state, { read, runs: null, solved: null, other: {}, seen: new Set(["target", state.shown]) });
  suggest(read);
  if (!read.problems.length) {
    const target = run(model, [...read.context, ...read.question]), source = run(model, read.question, read.context.length);
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
  const questions = questionsAbout(data, facts), now = asked.join(" ");
  const options = questions.map(({ text }) => make("option", { value: text, selected: text === now }, text));
  byId("suggested").replaceChildren(make("option", { value: "" }, questions.length ? "a question about these facts …" : "no question fits these facts"), ...options);
}

/** The patch for the route and the theorem that are chosen; what it cannot be is said. */
function solve() {
  const { read, runs } = state;
  state.solved = null;
  byId("refusal").replaceChildren();
  if (runs) {
    try {
      state.solved = solveLast(model, read.question, read.context.length, runs.target, { route: byId("route").value, via: byId("via").value });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      byId("refusal").replaceChildren(make("p", { class: "problem" }, `There is no patch by this route: ${error.message}. Choose another route.`));
    }
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
    if (!solved && state.shown === "patched") show("source");
  }
  document.querySelector("input[value=patched]").disabled = !solved;
  draw();
}

/** One of the three states is looked at. */
function show(name) {
  state.shown = name;
  state.seen.add(name);
  document.querySelector(`input[name=state][value=${name}]`).checked = true;
}

function draw() {
  const { read, runs, solved, shown } = state, gone = shown !== "target";
  const token = (word, css) => make("span", { class: css }, word);
  const facts = [token("<bos>", gone ? "gone" : null), ...read.words.map((word) => token(word, gone ? "gone" : null))];
  byId("tokens").replaceChildren(...facts, ...read.asked.map((word) => token(word, "asked")));
  for (const id of ["logits", "sizes", "others", "node", "merged", "said", "size-words"]) if (!runs) byId(id).replaceChildren();
  for (const id of ["keep", "jointly"]) byId(id).disabled = !runs || (id === "keep" && !solved);
  if (!runs) {
    document.querySelectorAll(".curves").forEach((old) => old.remove());
    document.querySelectorAll("a.moved").forEach((link) => link.classList.remove("moved"));
    byId("said").replaceChildren(make("p", {}, "The model has nothing to answer yet: see the message in section 1."));
    return;
  }
  drawSaid();
  drawLogits(byId("logits"), data, mapped(runs, (one) => one.logits.at(-1)), state.seen, shown);
  if (solved) drawSizes(byId("sizes"), sizesOf(model, solved.patch), solved.report, layersOn());
  else byId("sizes").replaceChildren();
  byId("size-words").textContent = solved ? sizeWords(solved) : "";
  drawInside();
  drawOthers();
}

const mapped = (runs, how) => Object.fromEntries(Object.entries(runs).filter(([, one]) => one).map(([name, one]) => [name, how(one)]));

/** The answer in words, and what it shows. */
function drawSaid() {
  const { runs, shown } = state, logits = runs[shown].logits.at(-1), wanted = runs.target.logits.at(-1), word = wordOf(data, best(logits));
  const same = best(logits) === best(wanted), error = largest(subtract(logits, wanted));
  const words = {
    target: "It reads the facts, so it knows.",
    source: same ? "A lucky guess: the scores are quite different, see below." : "Without the facts it can only guess.",
    patched: whole() ? `The answer is back, and not only the answer: no score of any word differs by more than ${number(error)}, which is rounding.`
      : `This is a part of the patch. The promise is for the whole: all layers, all the way. Largest difference now: ${number(error)}.`,
  }[shown];
  const kind = shown === "target" ? "" : same ? "right" : "wrong";
  byId("said").replaceChildren(make("p", {}, make("span", { class: `word ${kind}`, id: "word" }, word), make("span", {}, shown === "target" ? "" : same ? "(as with the facts)" : "(not what it says with the facts)")), make("p", {}, words));
}

function sizeWords({ patch, report }) {
  const { layers } = model, count = (change) => MAPS.flatMap((name) => change[name] || []).reduce((sum, { left, right }) => sum + left.length + right.length, change.scale ? change.scale.length : 0);
  const numbers = patch.reduce((sum, change) => sum + count(change), 0), dense = layers.reduce((sum, layer) => sum + MAPS.reduce((all, name) => all + layer[name].data.length, layer.m.post.length), 0);
  const noise = report[0].amplification === null ? "" : ` A rounding error of the last matrix is magnified ${report.map(({ amplification }) => number(amplification, 2)).join(", ")} times on its way out of layers 1, 2, 3.`;
  return `Bars grow with the square root, so that small changes are seen; of a norm’s scale it is the largest change of an entry beside that entry. The whole patch is ${numbers.toLocaleString("en")} numbers; the weights it changes are ${dense.toLocaleString("en")}.${noise}`;
}

function drawInside() {
  const { runs, layer, shown, node } = state, at = (one) => runs[one].nodes[layer].at(-1);
  drawGraph(document.querySelector(".canvas svg"), at("target"), at(shown), state.solved && state.solved.patch[layer]);
  drawNode(byId("node"), node, at("target")[node], at("source")[node], at(shown)[node], state.solved && state.solved.patch[layer]);
  document.querySelectorAll("a.node").forEach((link) => link.setAttribute("aria-current", String(link.getAttribute("href").replace(/^#node-?/, "") === node)));
}

/** The questions that the facts allow, one for each fact, and the one that was asked. */
function otherQuestions() {
  const { read } = state, now = read.asked.join(" ");
  const all = questionsAbout(data, read.facts), first = all.filter(({ text }, i) => text === now || i % 2 === 0);
  const asked = first.filter(({ name, relation, text }) => text === now || !all.some((one) => one.text === now && one.name === name && one.relation === relation));
  return asked.some(({ text }) => text === now) ? asked : [{ text: now }, ...asked];
}

function drawOthers() {
  const { read, other } = state, now = read.asked.join(" "), questions = otherQuestions();
  const ticked = other.ticked || new Set(questions.slice(0, 3).map(({ text }) => text));
  other.ticked = new Set(questions.map(({ text }) => text).filter((text) => ticked.has(text)));
  const cell = (answers, text) => {
    const found = answers && answers[text];
    return make("td", {}, found ? make("span", { class: found.same ? "right" : "wrong" }, `${found.same ? "✓" : "✗"} ${found.word}`) : "");
  };
  const head = ["one patch for", "question", "with the facts", "kept patch", "one patch for the ticked"].map((text) => make("th", { scope: "col" }, text));
  const rows = questions.map(({ text }, i) => make("tr", {},
    make("td", {}, make("input", { type: "checkbox", "aria-label": `include: ${text}`, value: text, checked: other.ticked.has(text), id: `tick-${i}` })),
    make("th", { scope: "row" }, text, text === now ? make("span", { class: "quiet" }, " (the patch is for this one)") : ""),
    make("td", {}, other.wanted && other.wanted[text] ? other.wanted[text] : ""), cell(other.kept, text), cell(other.joint, text)));
  byId("others").replaceChildren(make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows));
  byId("merged").replaceChildren(...(other.words || []).map((text) => make("p", { class: other.bad ? "problem" : null }, text)));
}

const idsOf = (text) => wordsOf(text).map((word) => data.vocabulary[word]);
const room = (text) => state.read.context.length + idsOf(text).length <= data.config.max_position_embeddings;

/** What the model says with the facts to each of the questions: {text: logits}. */
function wantedFor(questions) {
  const wanted = Object.fromEntries(questions.filter(room).map((text) => [text, run(model, [...state.read.context, ...idsOf(text)]).logits.at(-1)]));
  state.other.wanted = { ...state.other.wanted, ...mapped(wanted, (logits) => wordOf(data, best(logits))) };
  return wanted;
}

const answered = (logits, wanted) => ({ word: wordOf(data, best(logits)), same: best(logits) === best(wanted), error: apart(logits, wanted) });

/** The patch for one question stays, and every question is asked without the facts. */
function keep() {
  const { read, other } = state, wanted = wantedFor(otherQuestions().map(({ text }) => text));
  const patched = (text) => run(model, idsOf(text), read.context.length, state.acting).logits.at(-1);
  other.kept = Object.fromEntries(Object.entries(wanted).map(([text, logits]) => [text, answered(patched(text), logits)]));
  const right = Object.values(other.kept).filter(({ same }) => same).length;
  Object.assign(other, { bad: false, words: [`With the kept patch ${right} of ${Object.keys(wanted).length} answers are as with the facts. One patch, one question: elsewhere it promises nothing, and mostly repeats the answer it was made for.`] });
  draw();
}

/** One patch for the ticked questions. */
function jointly() {
  const { read, other } = state, texts = [...other.ticked];
  const told = (bad, ...words) => { Object.assign(other, { bad, words }); draw(); };
  if (!texts.length) return told(true, "No question is ticked: tick two or three.");
  if (texts.length > MOST) return told(true, `${texts.length} questions are ticked, and this page solves for at most ${MOST} at once: each of their tokens asks something of the same norm scale, and for more the sizes before the norm would have to move.`);
  if (!texts.every(room)) return told(true, "Facts and question are longer than the model has room for: shorten the facts.");
  try {
    const found = solveJointly(model, read.context, texts.map(idsOf), { via: byId("via").value }), wanted = wantedFor(texts);
    other.joint = Object.fromEntries(texts.map((text, i) => [text, answered(run(model, found.sequences[i].ids, 0, found.patch).logits.at(-1), wanted[text])]));
    const worst = Math.max(...Object.values(other.joint).map(({ error }) => error)), ranks = found.patch.map(({ down }) => down.length);
    told(false, `One set of weights for ${texts.length === 1 ? "one question" : `${texts.length} questions`}, exact at all ${found.tokens} tokens that tell them apart: the scores are off by at most ${number(worst)}, relative to the largest, which is rounding.`,
      `Each matrix changes by ${ranks[0]} products of a column and a row instead of one (of all changes that do it, the least), and one norm scale serves all tokens. A question is asked here behind the first token <bos>, from the start.`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    other.joint = null;
    told(true, `There is no such patch: ${error.message}.`);
  }
}

const TOUR = [
  ["Facts and a question.", "The answer stands in the facts and nowhere else. Change a fact, or take new ones: the answer follows. In a model like this only one part, attention, looks at other words; everything else works on one word at a time.", "texts", "target"],
  ["Remove the context.", "Now the model gets the question alone. Its weights know the language, and not your facts: the answer breaks, and every score is different.", "answer", "source"],
  ["Apply the patch.", "Still the question alone, but three layers have slightly different weights. They were not trained: each change is a formula, worked out from what the word’s vector was with the facts (z′) and without (z). All scores return, to the last digits that the computer keeps.", "answer", "patched"],
  ["Look inside.", "Switch layers off, or go only part of the way, and watch the answer break again. In the graph the two curves of each box, with the facts and now, lie on each other wherever the patch has done its work. A side condition says when the formula works: what a matrix reads must not be zero.", "patch", "patched"],
  ["One patch, one question; or several at once.", "Keep the patch and ask about somebody else: it fails, because it was made for one word’s vector. Then let one patch be solved for several questions together: it is exact on all of them, and says nothing about others.", "merge", "patched"],
];

/** A step of the tour: says it, puts the page into its state, and goes to its section. */
function tour(step, move = true) {
  state.step = step;
  const [title, words, section, shown] = TOUR[step], box = byId("tour"), pressed = document.activeElement;
  byId("step").replaceChildren(make("p", {}, make("strong", {}, `Step ${step + 1} of ${TOUR.length}: ${title}`)), make("p", {}, words));
  byId("back").disabled = step === 0;
  byId("next").disabled = step === TOUR.length - 1;
  if (!move) return;
  byId(section).before(box); // it goes along with what it speaks of
  (pressed.disabled ? byId(pressed.id === "next" ? "back" : "next") : pressed).focus({ preventScroll: true });
  if (state.runs && (shown !== "patched" || state.solved)) show(shown);
  draw();
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  box.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
}

/** What belongs to the model, once: its layers and its words. */
function furnish() {
  byId("layers").append(...model.layers.map((_, l) => make("label", {}, make("input", { type: "checkbox", checked: true, value: l }), ` layer ${l + 1}`)));
  byId("layer").append(...model.layers.map((_, l) => make("label", {}, make("input", { type: "radio", name: "layer", value: l, checked: l === state.layer }), ` layer ${l + 1}`)));
  const kinds = Object.entries(data.relations).map(([kind, { statement, questions, values }]) => make("p", {}, make("strong", {}, `${kind}: `), [statement, ...questions].map((text) => text.replace("{name}", "Mia").replace("{value}", values[0])).join("  "), make("br"), values.join(", ")));
  byId("words").append(make("p", {}, make("strong", {}, "names: "), data.names.join(", ")), ...kinds);
}

function listen() {
  let waiting = 0;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(changedTexts, 200); };
  byId("facts").addEventListener("input", soon);
  byId("question").addEventListener("input", soon);
  byId("suggested").addEventListener("change", ({ target }) => { if (target.value) { byId("question").value = target.value; changedTexts(); } });
  byId("random").addEventListener("click", () => {
    byId("facts").value = randomFacts(data, Number(byId("count").value));
    const questions = questionsAbout(data, factsIn(data, wordsOf(byId("facts").value)));
    byId("question").value = questions[Math.floor(Math.random() * questions.length)].text;
    changedTexts();
  });
  document.querySelectorAll("input[name=state]").forEach((button) => button.addEventListener("change", () => { show(button.value); draw(); }));
  document.querySelectorAll("input[name=layer]").forEach((button) => button.addEventListener("change", () => { state.layer = Number(button.value); draw(); }));
  const seen = (then) => () => { show("patched"); then(); };
  document.querySelectorAll("#layers input").forEach((box) => box.addEventListener("change", seen(act)));
  byId("share").addEventListener("input", seen(act));
  for (const id of ["route", "via"]) byId(id).addEventListener("change", solve);
  for (const link of document.querySelectorAll("a.node")) {
    link.addEventListener("click", (event) => { event.preventDefault(); state.node = link.getAttribute("href").replace(/^#node-?/, ""); if (state.runs) drawInside(); });
  }
  byId("others").addEventListener("change", ({ target }) => { state.other.ticked[target.checked ? "add" : "delete"](target.value); });
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
