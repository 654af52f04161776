"use strict";
// All code at once, and figures at their own size: choosing one switches between the page's width and the figure's.
(function () {
  const button = document.getElementById("unfold"), folds = document.querySelectorAll("details.fold");
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(shown));
    button.textContent = shown ? "Hide all code" : "Show all code";
    folds.forEach((fold) => { fold.open = shown; });
  });
  document.querySelectorAll("button.figure").forEach((figure) => {
    figure.addEventListener("click", () => {
      figure.setAttribute("aria-pressed", String(figure.classList.toggle("large")));
    });
  });
})();
