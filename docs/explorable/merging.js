"use strict";
/* One patch that stays: other questions are asked of it, and one is solved for several at once. */

const MOST = 4; // questions for one patch: more would need sizes to move

/** The questions that the facts allow, one for each fact, and the one that was asked. */
function otherQuestions() {
  const { read } = state,
    now = read.asked.join(" ");
  const all = questionsAbout(data, read.facts),
    first = all.filter(({ text }, i) => text === now || i % 2 === 0);
  const asked = first.filter(
    ({ name, relation, text }) =>
      text === now || !all.some((one) => one.text === now && one.name === name && one.relation === relation),
  );
  return asked.some(({ text }) => text === now) ? asked : [{ text: now }, ...asked];
}

function drawOthers() {
  const { read, other } = state,
    now = read.asked.join(" "),
    questions = otherQuestions();
  const ticked = other.ticked || new Set(questions.slice(0, 3).map(({ text }) => text));
  other.ticked = new Set(questions.map(({ text }) => text).filter((text) => ticked.has(text)));
  const cell = (answers, text) => {
    const found = answers && answers[text];
    return make(
      "td",
      {},
      found ? make("span", { class: found.same ? "right" : "wrong" }, `${found.same ? "✓" : "✗"} ${found.word}`) : "",
    );
  };
  const head = ["one patch for", "question", "with the facts", "kept patch", "one patch for the ticked"].map((text) =>
    make("th", { scope: "col" }, text),
  );
  const rows = questions.map(({ text }, i) =>
    make(
      "tr",
      {},
      make(
        "td",
        {},
        make("input", {
          type: "checkbox",
          "aria-label": `include: ${text}`,
          value: text,
          checked: other.ticked.has(text),
          id: `tick-${i}`,
        }),
      ),
      make(
        "th",
        { scope: "row" },
        text,
        text === now ? make("span", { class: "quiet" }, " (the patch is for this one)") : "",
      ),
      make("td", {}, other.wanted && other.wanted[text] ? other.wanted[text] : ""),
      cell(other.kept, text),
      cell(other.joint, text),
    ),
  );
  byId("others").replaceChildren(make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows));
  byId("merged").replaceChildren(
    ...(other.words || []).map((text) => make("p", { class: other.bad ? "problem" : null }, text)),
  );
}

const idsOf = (text) => wordsOf(text).map((word) => data.vocabulary[word]);
const room = (text) => state.read.context.length + idsOf(text).length <= data.config.max_position_embeddings;

/** What the model says with the facts to each of the questions: {text: logits}. */
function wantedFor(questions) {
  const wanted = Object.fromEntries(
    questions.filter(room).map((text) => [text, run(model, [...state.read.context, ...idsOf(text)]).logits.at(-1)]),
  );
  state.other.wanted = { ...state.other.wanted, ...mapped(wanted, (logits) => wordOf(data, best(logits))) };
  return wanted;
}

const answered = (logits, wanted) => ({
  word: wordOf(data, best(logits)),
  same: best(logits) === best(wanted),
  error: apart(logits, wanted),
});

/** The patch for one question stays, and every question is asked without the facts. */
function keep() {
  const { read, other } = state,
    wanted = wantedFor(otherQuestions().map(({ text }) => text));
  const patched = (text) => run(model, idsOf(text), read.context.length, state.acting).logits.at(-1);
  other.kept = Object.fromEntries(
    Object.entries(wanted).map(([text, logits]) => [text, answered(patched(text), logits)]),
  );
  const right = Object.values(other.kept).filter(({ same }) => same).length;
  Object.assign(other, {
    bad: false,
    words: [
      `With the kept patch ${right} of ${Object.keys(wanted).length} answers are as with the facts. One patch, one question: elsewhere it promises nothing.`,
    ],
  });
  draw();
}

/** One patch for the ticked questions. */
function jointly() {
  const { read, other } = state,
    texts = [...other.ticked];
  const told = (bad, ...words) => {
    Object.assign(other, { bad, words });
    draw();
  };
  if (!texts.length) return told(true, "No question is ticked: tick two or three.");
  if (texts.length > MOST)
    return told(
      true,
      `${texts.length} questions are ticked, and this page solves for at most ${MOST} at once: each of their tokens asks something of the same norm scale, and for more the sizes before the norm would have to move.`,
    );
  if (!texts.every(room))
    return told(true, "Facts and question are longer than the model has room for: shorten the facts.");
  try {
    const found = solveJointly(model, read.context, texts.map(idsOf), { via: byId("via").value }),
      wanted = wantedFor(texts);
    other.joint = Object.fromEntries(
      texts.map((text, i) => [
        text,
        answered(run(model, found.sequences[i].ids, 0, found.patch).logits.at(-1), wanted[text]),
      ]),
    );
    const worst = Math.max(...Object.values(other.joint).map(({ error }) => error)),
      ranks = found.patch.map(({ down }) => down.length);
    told(
      false,
      `One set of weights for ${texts.length === 1 ? "one question" : `${texts.length} questions`}, exact at all ${found.tokens} tokens that tell them apart: the scores are off by at most ${number(worst)}, relative to the largest, which is rounding.`,
      `Each matrix changes by ${ranks[0]} products of a column and a row instead of one (of all changes that do it, the least), and one norm scale serves all tokens. A question is asked here behind the first token <bos>, from the start.`,
    );
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    other.joint = null;
    told(true, `There is no such patch: ${error.message}.`);
  }
}
