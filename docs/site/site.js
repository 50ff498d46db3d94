// Mathematics is set by KaTeX, from this build; the browser keeps the chosen scheme.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    const tex = place.textContent.trim().replace(/^\\[(\[]|\\[)\]]$/g, "");
    katex.render(tex, place, { displayMode: place.tagName === "DIV", throwOnError: true });
  }
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  // a session is copied without its prompts and without what it printed
  for (const prompt of document.querySelectorAll(".highlight code > .gp:first-of-type")) {
    let typed = false;
    const isTyped = (line) => (typed = /^>>>( |$)/.test(line) || (typed && /^\.\.\.( |$)/.test(line)));
    const lines = prompt.parentElement.textContent.split("\n").filter(isTyped);
    prompt.parentElement.dataset.copy = lines.map((line) => line.slice(4)).join("\n");
  }
  // what scrolls sideways can be scrolled with the keyboard
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, div.arithmatex")) wide.tabIndex = 0;
});
