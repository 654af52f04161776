"use strict";
// All code at once.
(function () {
  const button = document.getElementById("unfold"), folds = document.querySelectorAll("details.fold");
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(shown));
    button.textContent = shown ? "Hide all code" : "Show all code";
    folds.forEach((fold) => { fold.open = shown; });
  });
})();
