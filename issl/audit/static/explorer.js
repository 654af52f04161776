"use strict";
// The image explorer. EXPLORER: {side, columns, sprite, n, attributes: {name: [value…]}, index: […], methods: {NAME:
// {influence, stability_loss, grad_norm: […], nearest, taught: [[[place, value]…]…]}}}
(function () {
  const at = (id) => document.getElementById(id);
  const data = window.EXPLORER, step = 240;
  const methods = Object.keys(data.methods);
  const orders = { "influence, highest first": ["influence", -1], "influence, lowest first": ["influence", 1],
    "stability loss, highest first": ["stability_loss", -1], "gradient norm, highest first": ["grad_norm", -1] };
  const rows = Math.ceil(data.n / data.columns), beside = at("lists"), sizes = ["12", "24", "48"];
  // 1 for the highest influence; equal ones share the better rank
  const ranks = Object.fromEntries(methods.map((m) => {
    const sorted = [...data.methods[m].influence].sort((a, b) => b - a), first = new Map();
    sorted.forEach((v, k) => { if (!first.has(v)) first.set(v, k + 1); });
    return [m, data.methods[m].influence.map((v) => first.get(v))];
  }));
  let shown = step, places = [];

  function options(select, texts) {
    select.replaceChildren(...texts.map((text) => new Option(text, text)));
  }
  function tile(place, label) {
    const b = document.createElement("button");
    b.type = "button"; b.className = "t"; b.dataset.place = place;
    b.style.backgroundImage = `url("${data.sprite}")`;
    b.style.backgroundSize = `${data.columns * 100}% ${rows * 100}%`;
    const x = place % data.columns, y = Math.floor(place / data.columns);
    b.style.backgroundPosition = `${data.columns > 1 ? (100 * x) / (data.columns - 1) : 0}% ${rows > 1 ? (100 * y) / (rows - 1) : 0}%`;
    b.title = `${describe(place)}\n${numbers(place)}`;
    b.setAttribute("aria-label", label || describe(place));
    b.addEventListener("click", () => open(place));
    return b;
  }
  function describe(place) {
    const named = data.attributes.label_name ? ", " + data.attributes.label_name[place] : "";
    return `image ${data.index[place]}${named}`;
  }
  function number(v) {
    const plain = v === 0 || (Math.abs(v) >= 0.001 && Math.abs(v) < 1e7);
    return plain ? v.toLocaleString("en", { maximumSignificantDigits: 3 }) : v.toExponential(2);
  }
  function numbers(place) { // of one image, a line a method
    return methods.map((m) => `${m}: influence ${number(data.methods[m].influence[place])} (rank ${ranks[m][place]} of ${data.n}), stability loss ${number(data.methods[m].stability_loss[place])}`).join("\n");
  }
  function ordered(method) {
    const chosen = at("attribute").value, value = at("value").value;
    const [column, sign] = orders[at("order").value], key = data.methods[method][column];
    const found = [...Array(data.n).keys()].filter((p) => chosen === "none" || String(data.attributes[chosen][p]) === value);
    return found.sort((a, b) => sign * (key[a] - key[b]));
  }
  function listed(names) {
    return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  }
  function compare() { // the first images of each method; those that lead several lists are marked with how many
    const all = methods.map(ordered), k = Math.min(Number(at("each").value), all[0].length), tops = all.map((p) => p.slice(0, k));
    const inLists = (place) => methods.filter((_, j) => tops[j].includes(place));
    beside.replaceChildren(...methods.map((method, j) => {
      const box = document.createElement("section"), heading = document.createElement("h4"), grid = document.createElement("div");
      heading.textContent = method; grid.className = "grid";
      grid.append(...tops[j].map((place, rank) => {
        const others = inLists(place).filter((m) => m !== method);
        const also = others.length ? `; also in the list of ${listed(others)}` : "";
        const t = tile(place, `${rank + 1}: ${describe(place)}${also}`);
        t.title = `${rank + 1} by ${method}${also}\n${t.title}`;
        if (others.length) {
          const mark = document.createElement("span");
          mark.className = "mark"; mark.textContent = others.length + 1; mark.setAttribute("aria-hidden", "true");
          t.classList.add("shared"); t.append(mark);
        }
        return t;
      }));
      box.append(heading, grid);
      return box;
    }));
    const shared = (some) => tops[some[0]].filter((p) => some.every((j) => tops[j].includes(p))).length;
    const pairs = methods.flatMap((a, i) => methods.slice(i + 1).map((b, j) => `${a} and ${b} ${shared([i, i + 1 + j])}`));
    const three = methods.length > 2 ? `in every list ${shared(methods.map((_, j) => j))}; ` : "", n = all[0].length;
    at("agree").textContent = `Of ${k} images of each method (${at("order").value}): ${three}in common ${listed(pairs)}. Two random lists of ${k} of ${n} would have ${number((k * k) / n)} in common. A number on an image says how many lists it is in.`;
  }
  function highlight(event) { // the same image in the other lists
    const place = event.type === "mouseover" || event.type === "focusin" ? event.target.closest(".t")?.dataset.place : undefined;
    beside.querySelectorAll(".t").forEach((t) => t.classList.toggle("same", t.dataset.place === place));
  }
  function draw() {
    places = ordered(at("method").value);
    if (beside) compare();
    at("count").textContent = `${places.length} of ${data.n} images`;
    at("grid").replaceChildren(...places.slice(0, shown).map((p) => tile(p)));
    at("moreimages").hidden = shown >= places.length;
  }
  function filters() {
    const chosen = at("attribute").value;
    at("value").disabled = chosen === "none";
    options(at("value"), chosen === "none" ? ["–"] : [...new Set(data.attributes[chosen].map(String))].sort());
    draw();
  }
  function strip(title, entries, unit) {
    const heading = document.createElement("h3"), box = document.createElement("div");
    heading.textContent = title; box.className = "strip";
    for (const [place, value] of entries) {
      const f = document.createElement("figure"), c = document.createElement("figcaption");
      c.textContent = `#${data.index[place]}: ${unit} ${number(value)}`;
      f.append(tile(place), c); box.append(f);
    }
    return [heading, box];
  }
  function open(place) {
    const method = at("method").value, m = data.methods[method];
    const pair = document.createElement("div"), list = document.createElement("dl"), big = tile(place);
    pair.className = "pair"; big.disabled = true;
    const facts = { image: data.index[place], influence: `${number(m.influence[place])} (rank ${ranks[method][place]} of ${data.n})`,
      "stability loss": number(m.stability_loss[place]), "gradient norm": number(m.grad_norm[place]), method };
    for (const [name, values] of Object.entries(data.attributes)) if (String(values[place]) !== "") facts[name.replaceAll("_", " ")] = values[place];
    for (const [k, v] of Object.entries(facts)) {
      const t = document.createElement("dt"), d = document.createElement("dd");
      t.textContent = k; d.textContent = v; list.append(t, d);
    }
    pair.append(big, list);
    at("inside").replaceChildren(pair, ...strip("Nearest in feature space (cosine)", m.nearest[place], "cos"), ...strip("Highest influence on it", m.taught[place], "infl."));
    if (!at("detail").open) at("detail").showModal();
  }
  options(at("method"), methods); options(at("order"), Object.keys(orders)); options(at("attribute"), ["none", ...Object.keys(data.attributes)]);
  at("method").addEventListener("change", draw); at("order").addEventListener("change", draw);
  at("attribute").addEventListener("change", () => { shown = step; filters(); });
  at("value").addEventListener("change", () => { shown = step; draw(); });
  at("moreimages").addEventListener("click", () => { shown += step; draw(); });
  if (beside) {
    options(at("each"), sizes);
    at("each").addEventListener("change", compare);
    for (const kind of ["mouseover", "mouseleave", "focusin", "focusout"]) beside.addEventListener(kind, highlight);
  }
  document.querySelectorAll("form.controls").forEach((form) => form.addEventListener("submit", (e) => e.preventDefault()));
  at("detail").addEventListener("click", (e) => { if (e.target === at("detail")) at("detail").close(); });
  filters();
})();
