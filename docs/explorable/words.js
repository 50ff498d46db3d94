"use strict";
/* What people write, as tokens of the model, and what is wrong with it in a sentence. */

const SPECIMEN = "Mia lives in Oslo . Leo lives in Rome .";
const TRAINED = 8; // facts in a text that the model was trained on, at most

/** The words of a text: full stops and question marks stand alone. */
const wordsOf = (text) =>
  text
    .replace(/([.?])/g, " $1 ")
    .split(/\s+/)
    .filter(Boolean);

/** The facts that follow the model's own patterns: {name, relation, value}. */
function factsIn(data, words) {
  const facts = [];
  for (const sentence of words
    .join(" ")
    .split(".")
    .map((part) => `${part.trim()} .`)) {
    for (const [relation, { statement, values }] of Object.entries(data.relations)) {
      const shape = new RegExp(
        `^${statement.replace(".", "\\.").replace("{name}", "(\\S+)").replace("{value}", "(\\S+)")}$`,
      );
      const found = shape.exec(sentence);
      if (found && data.names.includes(found[1]) && values.includes(found[2]))
        facts.push({ name: found[1], relation, value: found[2] });
    }
  }
  return facts;
}

/** The questions that can be asked about the facts, each once: {text, name, relation, values}. */
function questionsAbout(data, facts) {
  const found = new Map();
  for (const { name, relation, value } of facts) {
    for (const question of data.relations[relation].questions) {
      const text = question.replace("{name}", name);
      const known = found.get(text) || { text, name, relation, values: [] };
      if (!known.values.includes(value)) known.values.push(value);
      found.set(text, known);
    }
  }
  return [...found.values()];
}

/** The tokens of a context (with the first token) and a question; ``problems`` stop, ``notes`` do not. */
function readTexts(data, factsText, questionText) {
  const words = wordsOf(factsText),
    asked = wordsOf(questionText),
    problems = [],
    notes = [];
  const ids = (list) => list.map((word) => data.vocabulary[word]);
  const facts = factsIn(data, words),
    limit = data.config.max_position_embeddings;
  if (!words.length) problems.push(`There are no facts yet. Write some, for example: ${SPECIMEN}`);
  if (!asked.length) problems.push("There is no question yet. Write one, for example: Where does Mia live ?");
  problems.push(...unknownWords(data, words, "facts"), ...unknownWords(data, asked, "question"));
  const about = asked.filter((word) => data.names.includes(word));
  if (asked.length && !about.length)
    problems.push(
      `The question names nobody. Ask about one person, for example: ${(questionsAbout(data, facts)[0] || { text: "Where does Mia live ?" }).text}`,
    );
  const total = 1 + words.length + asked.length;
  if (total > limit)
    problems.push(
      `Facts and question are ${total} tokens, and this model has room for ${limit}. Take away ${total - limit} or more.`,
    );
  const sentences = words.filter((word) => word === ".").length;
  if (sentences > TRAINED && total <= limit)
    notes.push(
      `These are ${sentences} facts. The model was trained on at most ${TRAINED} at once: it may answer wrongly, and the patch will then reproduce its wrong answer.`,
    );
  const known = new Set(about.flatMap((name) => (words.includes(name) ? [] : [name])));
  if (words.length && known.size)
    notes.push(
      `The facts say nothing about ${[...known].join(" and ")}: the model can only guess, and the patch will reproduce its guess.`,
    );
  if (
    about.length &&
    !problems.length &&
    !shapesOf(data).has(asked.map((word) => (data.names.includes(word) ? "{name}" : word)).join(" "))
  ) {
    notes.push(
      "This is not one of the eight ways of asking that the model was trained on. It may answer anything; what it answers with the facts, it answers from the patch.",
    );
  }
  return { context: [data.first, ...ids(words)], question: ids(asked), words, asked, facts, problems, notes };
}

const shapesOf = (data) => new Set(Object.values(data.relations).flatMap(({ questions }) => questions));

const brief = (word) => (word.length > 24 ? `${word.slice(0, 24)}…` : word);

/** A sentence about the words that the model does not know, or nothing. */
function unknownWords(data, words, where) {
  const unknown = [...new Set(words.filter((word) => !Object.hasOwn(data.vocabulary, word)))];
  if (!unknown.length) return [];
  const shown = unknown.slice(0, 5).map((word) => {
    const meant = Object.keys(data.vocabulary).find((known) => known.toLowerCase() === word.toLowerCase());
    return meant ? `“${brief(word)}” (did you mean “${meant}”?)` : `“${brief(word)}”`;
  });
  const more = unknown.length > 5 ? ` and ${unknown.length - 5} more` : "";
  const count = Object.keys(data.vocabulary).length;
  return [
    `The model knows ${count} words, and in the ${where} it does not know ${shown.join(", ")}${more}. The list “Words the model knows” has all of them.`,
  ];
}

/** Different facts about the same thing: {name, relation, values, question}. */
function contradictions(data, facts) {
  const found = new Map();
  for (const fact of facts) {
    const key = `${fact.name} ${fact.relation}`;
    found.set(key, [...(found.get(key) || []), fact]);
  }
  return [...found.values()].flatMap((same) => {
    const values = [...new Set(same.map(({ value }) => value))],
      { name, relation } = same[0];
    return values.length < 2
      ? []
      : [{ name, relation, values, question: data.relations[relation].questions[0].replace("{name}", name) }];
  });
}

/** As many random facts about different people, of one or two kinds, as a text. */
function randomFacts(data, count, random = Math.random) {
  const draw = (list) => list.splice(Math.floor(random() * list.length), 1)[0];
  const kinds = Object.keys(data.relations),
    names = [...data.names];
  const chosen = [draw(kinds), draw(kinds)].slice(0, random() < 0.4 ? 1 : 2);
  return range(count)
    .map(() => {
      const { statement, values } = data.relations[chosen[Math.floor(random() * chosen.length)]];
      return statement.replace("{name}", draw(names)).replace("{value}", values[Math.floor(random() * values.length)]);
    })
    .join(" ");
}

const wordOf = (data, id) => Object.keys(data.vocabulary).find((word) => data.vocabulary[word] === id) || "(none)";
const best = (logits) => logits.indexOf(Math.max(...logits));
