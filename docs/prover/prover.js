// The page: a question to the worker, and its answers drawn.
const at = (id) => document.getElementById(id);
const composer = new Composer(at("composer"), OFFERED.palette, (text) => { at("expression").value = text; at("stale").hidden = true; });
const MISSING = "Python for the browser is not here yet: run “python docs/prover/fetch.py SITE” (npm and pip bring 22 MB into SITE/prover/pyodide), then press again.";
let worker = null, waiting = new Map(), count = 0, slow = 0, began = 0;

function status(text) { at("status").textContent = text; }

function busy(on) {
  at("stop").disabled = !on;
  at("prove").disabled = on;
  at("check").disabled = on || at("answer").dataset.outcome !== "proved";
  clearTimeout(slow);
  if (on) slow = setTimeout(() => status("Still at work. Large blocks take long in a browser; Stop ends it."), 30000);
  else at("loading").hidden = true;
}

function begin() {
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => {
    if (data.progress) {
      at("loading").hidden = false;
      at("what").textContent = `${data.progress}: ${(data.loaded / 1e6).toFixed(1)} MB`;
      at("bar").value = Math.min(1, data.loaded / data.total);
      return;
    }
    at("loading").hidden = true;
    if (data.loaded) document.body.dataset.bytes = data.loaded;
    const done = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.fatal !== undefined) end(`Python in this page gave up: ${data.fatal}. The next press starts it anew; a smaller block may do.`);
    done?.(data.answer ?? null);
  };
  worker.onerror = (event) => { event.preventDefault(); end(`Python in this page gave up: ${event.message ?? "it could not be started"}.`); };
}

function end(why) {
  worker?.terminate();
  worker = null;
  for (const done of waiting.values()) done(null);
  waiting = new Map();
  busy(false);
  document.body.dataset.state = "ended";
  status(why);
}

function ask(kind, given = {}) {
  if (!worker) begin();
  const id = ++count;
  return new Promise((done) => { waiting.set(id, done); worker.postMessage({ id, kind, given }); });
}

async function there() {
  if (location.protocol === "file:") { status("This page needs a web server: python -m http.server --directory SITE, then http://localhost:8000/prover/index.html"); return false; }
  try {
    if (worker || (await fetch("pyodide/files.json")).ok) return true;
  } catch { /* no server, or none that answers */ }
  status(MISSING);
  return false;
}

function question() {
  return { text: at("expression").value, via: at("via").value, route: at("route").value, frozen: at("frozen").value, jointly: at("jointly").checked };
}

async function prove() {
  began = performance.now();
  document.body.dataset.state = "asked";
  at("answer").hidden = true;
  at("answer").dataset.outcome = "";
  busy(true);
  if (!(await there())) { busy(false); document.body.dataset.state = "missing"; return; }
  if (!worker) status("Loading Python …");
  else status("Proving …");
  const asked = question();
  const answer = await ask("prove", asked);
  if (!answer) return;
  const seconds = (performance.now() - began) / 1000;
  draw(answer);
  document.body.dataset.seconds ??= seconds.toFixed(2);
  status(`Answered in ${seconds.toFixed(1)} s.`);
  if (answer.outcome === "proved") await closed(await ask("form"));
  busy(false);
  document.body.dataset.state = "answered";
}

function draw(answer) {
  at("answer").hidden = false;
  at("answer").dataset.outcome = answer.outcome;
  const words = { proved: "A proof: for all states that fulfil the side conditions this patch is exact.", refused: "Refused: no proof was found. The smallest part in the way is named, and a change that was tried and has a proof.", error: "An error: nothing was proved." };
  at("verdict").replaceChildren(make("p", { className: answer.outcome, textContent: words[answer.outcome] }));
  at("text").textContent = answer.text;
  for (const part of ["form", "checks"]) at(part).hidden = true;
  at("remedies").replaceChildren(...(answer.remedies ?? []).map(remedy));
  graph(answer.page);
  if (answer.outline) { composer.show(answer.outline); at("stale").hidden = true; }
}

function remedy({ change, expression, options }) {
  const button = make("button", { type: "button", textContent: `Do it: ${change}` });
  button.onclick = () => { at("expression").value = expression; choose(options); prove(); };
  return make("p", {}, button);
}

function graph(page) {
  at("graph").hidden = !page;
  at("graph").querySelector("iframe")?.remove();
  if (!page) return;
  const show = () => {
    if (!at("graph").open || at("graph").querySelector("iframe")) return;
    const frame = make("iframe", { title: "the block as a graph", srcdoc: page });
    frame.setAttribute("sandbox", "");
    at("graph").append(frame);
  };
  at("graph").ontoggle = show;
  show();
}

function formula(latex) {
  if (typeof katex === "undefined") return make("pre", { textContent: latex, tabIndex: 0 });
  const line = make("div", { className: "formula", tabIndex: 0, role: "group", ariaLabel: "formula" });
  katex.render(latex, line, { displayMode: true, throwOnError: false, output: "htmlAndMathml" });
  return line;
}

async function closed(answer) {
  if (!answer) return;
  at("form").hidden = false;
  if (answer.outcome === "error") { at("formulas").replaceChildren(make("pre", { textContent: answer.text })); return; }
  const names = make("p", { className: "names" });
  for (const [symbol, name] of answer.names) {
    const sign = make("span");
    if (typeof katex === "undefined") sign.textContent = symbol;
    else katex.render(symbol, sign, { throwOnError: false });
    names.append(make("span", { className: "name" }, sign, " is ", make("code", { textContent: name })), " ");
  }
  const where = answer.meanings.length ? [make("p", { textContent: "where" }), ...answer.meanings.map(formula)] : [];
  const source = make("details", {}, make("summary", { textContent: "The whole theorem as a LaTeX document" }), make("pre", { textContent: answer.document, tabIndex: 0, className: "source" }));
  at("formulas").replaceChildren(...answer.changes.map(formula), ...where, names, source);
}

async function check() {
  busy(true);
  status("Checking: every rule and the whole block, by computer algebra …");
  document.body.dataset.state = "checking";
  const answer = await ask("check");
  if (!answer) return;
  at("checks").hidden = false;
  const error = answer.outcome === "error";
  at("said").textContent = error ? answer.text : answer.said;
  at("said").className = error ? "error" : answer.level === "symbolic" ? "proved" : "refused";
  at("rows").replaceChildren(...(answer.rows ?? []).map((row) => make("tr", {}, ...["rule", "status", "method"].map((key) => make("td", { textContent: row[key], className: key === "status" ? row[key] : "" })))));
  status(error ? "Not checked." : `Level: ${answer.level}.`);
  busy(false);
  document.body.dataset.state = "checked";
}

function choose(options) {
  at("via").value = options.via ?? "input-output";
  at("route").value = options.route ?? "auto";
  at("frozen").value = options.frozen ?? "";
  at("jointly").checked = options.jointly ?? false;
}

function example({ expression, options, outline }) {
  at("expression").value = expression;
  choose(options);
  at("stale").hidden = at("answer").hidden = true;
  if (outline) composer.show(outline);
}

for (const offer of OFFERED.examples) {
  const button = make("button", { type: "button", textContent: offer.title });
  button.onclick = () => example(offer);
  at("examples").append(button);
}
for (const route of OFFERED.routes) at("route").append(make("option", { value: route, textContent: route }));
at("expression").oninput = () => { at("stale").hidden = false; };
at("read").onclick = async () => {
  if (!(await there())) return;
  busy(true);
  const answer = await ask("outline", { text: at("expression").value });
  busy(false);
  if (answer?.outcome === "error") { draw(answer); document.body.dataset.state = "answered"; }
  else if (answer) composer.show(answer.outline), (at("stale").hidden = true);
};
at("prove").onclick = prove;
at("check").onclick = check;
at("stop").onclick = () => end("Stopped. The next press starts Python anew.");
example(OFFERED.examples[0]);
