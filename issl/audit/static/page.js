"use strict";
// A figure at its own size and back; all code of a notebook at once.
document.querySelectorAll("button.figure").forEach((figure) => {
  figure.addEventListener("click", () => {
    figure.setAttribute("aria-pressed", String(figure.classList.toggle("own")));
  });
});
const unfold = document.getElementById("unfold");
if (unfold) unfold.addEventListener("click", () => {
  const shown = unfold.getAttribute("aria-pressed") === "false";
  unfold.setAttribute("aria-pressed", String(shown));
  unfold.textContent = shown ? "Hide all code" : "Show all code";
  document.querySelectorAll("details.fold").forEach((fold) => { fold.open = shown; });
});
