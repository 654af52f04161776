"use strict";
// Light or dark: as the system has it, until the reader says otherwise.
(function () {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch (error) { chosen = null; } // a page from a file may have no storage
  const show = (dark) => { root.dataset.theme = dark ? "dark" : "light"; };
  show(chosen ? chosen === "dark" : system.matches);
  system.addEventListener("change", (e) => { if (!chosen) show(e.matches); });
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    show(chosen === "dark");
    try { localStorage.setItem("theme", chosen); } catch (error) { /* for this page alone, then */ }
  });
})();
