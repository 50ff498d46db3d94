/* A walk through the states of the explorable: what it shows, whether it overflows, what went wrong. */
(async () => {
  const out = { wide: [], words: {}, bad: {} },
    wait = (time) => new Promise((done) => setTimeout(done, time));
  const change = (id, value, kind = "change") => {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event(kind, { bubbles: true }));
  };
  const text = (id) => byId(id).textContent.trim(),
    word = () => (byId("word") ? byId("word").textContent : null);
  const look = (name) => {
    out.words[name] = word();
    out.wide.push([name, document.documentElement.scrollWidth - innerWidth]);
  };
  const difference = (name) => document.querySelector(`#logits td[data-error=${name}]`).textContent;
  const write = async (facts, question) => {
    change("facts", facts, "input");
    change("question", question, "input");
    await wait(250);
  };
  const start = ["Mia lives in Oslo . Leo lives in Rome . Zoe has a dog . Ben has a cat .", "Where does Leo live ?"];
  try {
    look("start");
    out.unseen = difference("patched");
    byId("next").focus();
    byId("next").click();
    look("without");
    out.without = difference("source");
    byId("next").click();
    look("patched");
    out.patched = difference("patched");
    out.kept = document.activeElement.id; // the tour box has moved, and the focus with it
    out.step = text("step");
    out.gone = document.querySelectorAll("#tokens .gone").length;
    out.rows = document.querySelectorAll("#sizes tbody tr").length;
    change("share", "0", "input");
    look("no part");
    change("share", "0.5", "input");
    look("half");
    out.half = difference("patched");
    change("share", "1", "input");
    document.querySelectorAll("#layers input")[2].click();
    look("two layers");
    out.two = difference("patched");
    document.querySelectorAll("#layers input")[2].click();
    out.routes = {};
    for (const via of ["input-output", "output"])
      for (const route of ROUTES) {
        change("via", via);
        change("route", route);
        const moved = [...document.querySelectorAll("a.moved")]
          .map((link) => link.getAttribute("href"))
          .sort()
          .join(" ");
        out.routes[`${route} ${via}`] = byId("refusal").textContent || [difference("patched"), moved];
      }
    look("refused");
    out.empty = text("size-words");
    out.means = Object.fromEntries(
      [...document.querySelectorAll("#routes tbody tr")].map((row) => [
        row.cells[0].textContent,
        [...row.cells].slice(1).map((cell) => cell.textContent),
      ]),
    );
    out.bold = [...document.querySelectorAll("#routes tr.best")].map((row) => row.cells[0].textContent);
    out.after = document.querySelector("input[value=patched]").disabled;
    out.fallen = document.querySelector("input[name=state]:checked").value;
    await write("Mia lives in Oslo .", start[1]); // still no patch by this route
    out.stays = document.querySelector("input[name=state]:checked").value;
    byId("route").value = "auto"; // not by the control: the texts alone bring a patch back
    await write(...start);
    out.returned = document.querySelector("input[name=state]:checked").value;
    out.shown = {};
    for (const [id, value] of [
      ["via", "input-output"],
      ["route", "uniform"],
      ["route", "auto"],
      ["share", "1"],
    ]) {
      document.querySelector("input[value=target]").click();
      change(id, value, id === "share" ? "input" : "change");
      out.shown[`${id} ${value}`] = document.querySelector("input[name=state]:checked").value;
    }
    document
      .querySelector("a[href='#node-1-2-0-0']")
      .dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
    out.node = text("node");
    document.querySelectorAll("#layer input")[0].click();
    out.moved = text("node") !== out.node;
    look("node");
    out.curves = document.querySelectorAll(".curve.with").length;
    byId("keep").click();
    look("kept");
    const column = (n) =>
      [...document.querySelectorAll(`#others tbody td:nth-child(${n})`)].map((cell) => cell.textContent);
    out.keptMarks = column(4);
    out.keptWords = text("merged");
    byId("jointly").click();
    look("joint");
    out.jointMarks = column(5);
    out.jointWords = text("merged");
    out.wanted = column(3);
    document.querySelectorAll("#others input:checked").forEach((box) => box.click());
    byId("jointly").click();
    out.none = text("merged");
    await write(
      "Mia lives in Oslo . Leo lives in Rome . Zoe lives in Lima . Ben lives in Bern . Ana lives in Riga .",
      "Where does Leo live ?",
    );
    document.querySelectorAll("#others input:not(:checked)").forEach((box) => box.click());
    byId("jointly").click();
    out.many = text("merged");
    for (const [name, facts, question] of BAD) {
      await write(facts, question);
      out.bad[name] = [text("messages"), text("said"), document.querySelectorAll("table tr, .curve").length];
      look(name);
    }
    document.querySelector("input[value=target]").click();
    await write("Mia lives in Oslo .", "Where does Leo live ?");
    document.querySelector("input[value=patched]").click();
    look("stranger");
    out.stranger = text("said");
    document.querySelector("input[value=target]").click();
    await write("Leo lives in Rome . Leo lives in Oslo .", "Where does Leo live ?");
    look("clash");
    out.clash = text("messages");
    await write(...start);
    look("again");
    for (let i = 0; i < 4; i++) {
      change("count", "4");
      byId("random").click();
      document.querySelector("input[value=patched]").click();
      look(`random ${i}`);
      out.words[`with ${i}`] = text("messages") || difference("patched");
    }
    const controls = [...document.querySelectorAll("button, input, select, textarea, a.node, summary, [tabindex]")];
    out.unreached = controls.filter((each) => each.tabIndex < 0).length;
    out.nameless = controls
      .filter(
        (each) => !(each.labels && each.labels.length) && !each.getAttribute("aria-label") && !each.textContent.trim(),
      )
      .map((each) => each.outerHTML.slice(0, 80));
    out.headings = [...document.querySelectorAll("h1, h2, h3")].map((each) => Number(each.tagName[1]));
  } catch (error) {
    window.trouble.push(String(error.stack));
  }
  out.trouble = window.trouble;
  out.requests = performance
    .getEntriesByType("resource")
    .map((each) => each.name)
    .filter((name) => !name.startsWith("data:"));
  out.back = getComputedStyle(document.body).backgroundColor;
  out.moves = getComputedStyle(document.querySelector(".bar")).transitionDuration;
  (window.parent === window ? document : window.parent.document).body.dataset.out = JSON.stringify(out);
})();
