"use strict";
/* The guided tour: five steps, each with a state of the page. */

const TOUR = [
  [
    "Facts and a question.",
    "The answer stands in the facts and nowhere else. Change a fact, or take new ones: the answer follows. Inside, every word is a list of numbers, a vector, that is changed from layer to layer. Only one part of a layer, attention, looks at other words; the rest works on one vector at a time.",
    "texts",
    "target",
  ],
  [
    "Remove the context.",
    "Now the model gets the question alone. Its weights know the language, and not your facts: the answer breaks, and every score is different.",
    "answer",
    "source",
  ],
  [
    "Apply the patch.",
    "Still the question alone, but three layers have slightly different weights. They were not trained: each change is a formula, worked out from what the last word’s vector was with the facts (z′) and without (z). All scores return, to the last digits that the computer keeps.",
    "answer",
    "patched",
  ],
  [
    "Look inside.",
    "Switch layers off, or go only part of the way, and watch the answer break again. In the graph the two curves of each box, with the facts and now, lie on each other wherever the patch has done its work. A side condition says when the formula works: what a matrix reads must not be zero.",
    "patch",
    "patched",
  ],
  [
    "One patch, one question; or several at once.",
    "Keep the patch and ask about somebody else: it fails, because it was made for one word’s vector. Then let one patch be solved for several questions together: it is exact on all of them, and says nothing about others.",
    "merge",
    "patched",
  ],
];

/** A step of the tour: says it, puts the page into its state, and goes to its section. */
function tour(step, move = true) {
  state.step = step;
  const [title, words, section, shown] = TOUR[step],
    box = byId("tour"),
    pressed = document.activeElement;
  byId("step").replaceChildren(
    make("p", {}, make("strong", {}, `Step ${step + 1} of ${TOUR.length}: ${title}`)),
    make("p", {}, words),
  );
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
