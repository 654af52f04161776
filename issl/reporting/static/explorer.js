"use strict";
// The image explorer. EXPLORER: {side, columns, sprite, n, attributes: {name: [value…]}, index: […], methods: {NAME:
// {influence, stability_loss, grad_norm: […], nearest, taught: [[[place, value]…]…]}}}
(function () {
  const at = (id) => document.getElementById(id);
  const data = window.EXPLORER, step = 240;
  const methods = Object.keys(data.methods);
  const orders = { "influence, highest first": ["influence", -1], "influence, lowest first": ["influence", 1],
    "stability loss, highest first": ["stability_loss", -1], "gradient norm, highest first": ["grad_norm", -1] };
  const rows = Math.ceil(data.n / data.columns);
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
  function rank(method, place) {
    const all = data.methods[method].influence, own = all[place];
    return 1 + all.filter((v) => v > own).length;
  }
  function draw() {
    const chosen = at("attribute").value, value = at("value").value;
    const [column, sign] = orders[at("order").value], key = data.methods[at("method").value][column];
    places = [...Array(data.n).keys()].filter((p) => chosen === "none" || String(data.attributes[chosen][p]) === value);
    places.sort((a, b) => sign * (key[a] - key[b]));
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
    const facts = { image: data.index[place], influence: `${number(m.influence[place])} (rank ${rank(method, place)} of ${data.n})`,
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
  document.querySelector("form.controls").addEventListener("submit", (e) => e.preventDefault());
  at("detail").addEventListener("click", (e) => { if (e.target === at("detail")) at("detail").close(); });
  filters();
})();
