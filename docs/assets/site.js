// Typesets the formulas of a page with KaTeX 0.19.1, of which docs/assets/katex has the files that these pages use.
document.addEventListener("DOMContentLoaded", () => {
  for (const node of document.querySelectorAll(".arithmatex")) {
    const formula = node.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "");
    katex.render(formula, node, { displayMode: node.tagName === "DIV" });
  }
});
