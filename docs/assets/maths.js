// Formulas come from pymdownx.arithmatex as text between \( \) or \[ \]; KaTeX 0.19.1 in katex/ (MIT) draws them
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim();
    if (/^\\[([]/.test(formula)) {
      katex.render(formula.slice(2, -2), element, { displayMode: formula.startsWith("\\["), throwOnError: false });
    }
  }
});
