// Mathematics is set by KaTeX, from this build; the browser keeps the chosen scheme.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    const tex = place.textContent.trim().replace(/^\\[(\[]|\\[)\]]$/g, "");
    katex.render(tex, place, { displayMode: place.tagName === "DIV", throwOnError: true });
  }
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  // what scrolls sideways can be scrolled with the keyboard
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, div.arithmatex")) wide.tabIndex = 0;
});
