"use strict";
// Figures, enlarged: choosing one opens it over the page; arrows lead to the others, Escape closes. The picture is the
// page's own, so nothing is requested. On a phone it opens at its own size: the page already shows it as wide as fits.
(function () {
  const at = (id) => document.getElementById(id), dialog = at("large"), sheet = at("sheet");
  const all = [...document.querySelectorAll("button.figure > img")].map((img) => img.parentElement);
  let place = 0;
  function size(own) {
    sheet.classList.toggle("own", own);
    at("zoom").setAttribute("aria-pressed", String(own));
    at("zoom").textContent = own ? "fit the window" : "own size";
  }
  function show(k) {
    place = (k + all.length) % all.length;
    const from = all[place].querySelector("img"), img = document.createElement("img");
    img.src = from.src; img.alt = from.alt;
    sheet.replaceChildren(img);
    at("caption").textContent = all[place].dataset.caption || "";
    at("which").textContent = `${place + 1} of ${all.length}`;
  }
  all.forEach((button, k) => button.addEventListener("click", () => { size(innerWidth < 700); show(k); dialog.showModal(); sheet.focus(); }));
  at("before").addEventListener("click", () => show(place - 1));
  at("after").addEventListener("click", () => show(place + 1));
  at("zoom").addEventListener("click", () => size(!sheet.classList.contains("own")));
  dialog.addEventListener("keydown", (e) => {
    const own = sheet.classList.contains("own") && e.target === sheet; // there, arrows move the picture
    if (e.key === "ArrowLeft" && !own) show(place - 1);
    if (e.key === "ArrowRight" && !own) show(place + 1);
  });
  dialog.addEventListener("click", (e) => { if (e.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => all[place].focus());
})();
