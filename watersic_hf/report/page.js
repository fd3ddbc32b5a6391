"use strict";
const layers = JSON.parse(document.getElementById("layers").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// -- the plot of one layer: theoretical rates of its columns, entropies of their codes, and a
// histogram of these; values are in hundredths of a bit

const waterfilling = document.getElementById("waterfilling");
const chooser = document.getElementById("layer");

function steps(values, scale) {
  const width = (scale.right - scale.left) / values.length;
  return values.map((value, n) => [
    scale.left + n * width, scale.left + (n + 1) * width, scale.zero - scale.bit * value / 100]);
}

function outline(values, scale) {
  return "M" + steps(values, scale).map(([x0, x1, y]) => `${x0} ${y}H${x1}`).join("L");
}

function filled(values, scale) {
  const zero = scale.zero;
  return steps(values, scale).map(([x0, x1, y]) => `M${x0} ${zero}V${y}H${x1}V${zero}`).join("");
}

function bars(histogram, scale) {
  const most = Math.max(...histogram);
  const height = scale.bit / scale.bins;
  return histogram.map((count, n) => {
    const length = (scale.end - scale.side) * count / most;
    const y = scale.zero - n * height;
    return `M${scale.side} ${y}h${length}v${0.5 - height}h${-length}`;
  }).join("");
}

function choose(number) {
  const layer = layers[number];
  for (const row of all("#table tr.chosen")) row.classList.remove("chosen");
  for (const row of all(`#table tr[data-layer="${number}"]`)) row.classList.add("chosen");
  if (!waterfilling) return;
  chooser.value = number;
  document.getElementById("chosen-text").textContent = layer.text;
  const scale = Object.fromEntries(
    Object.entries(waterfilling.dataset).map(([name, value]) => [name, Number(value)]));
  const paths = !layer.histogram ? {} : {
    spent: filled(layer.waterfilling.map((v) => Math.max(v, 0)), scale),
    water: filled(layer.waterfilling.map((v) => Math.min(v, 0)), scale),
    theory: outline(layer.waterfilling, scale),
    cost: outline(layer.entropies, scale),
    bar: bars(layer.histogram, scale),
  };
  document.getElementById("chosen").innerHTML = Object.entries(paths)
    .map(([name, d]) => `<path class="${name}" d="${d}"/>`).join("");
}

if (waterfilling) {
  chooser.append(...layers.map((layer, number) => new Option(layer.name, number)));
  chooser.addEventListener("change", () => choose(Number(chooser.value)));
}

// -- points of layers: the nearest one to the pointer gets a tooltip, a click selects it

const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;

function pointsOf(plot) {
  return all("path.points", plot).flatMap((path) => {
    const numbers = path.dataset.layers.split(" ").map(Number);
    const starts = path.getAttribute("d").split("M").slice(1);
    return starts.map((start, n) => {
      const [x, y] = start.split("h")[0].split(" ").map(Number);
      return { x, y, layer: numbers[n], kind: path.parentNode };
    });
  });
}

function hover(plot) {
  const points = pointsOf(plot);
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("class", "near");
  ring.setAttribute("r", 6);
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const unit = plot.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * unit;
    const y = (event.clientY - box.top) * unit;
    let found = null, least = (16 * unit) ** 2;
    for (const point of points) {
      const distance = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (distance < least && !point.kind.classList.contains("off")) {
        found = point;
        least = distance;
      }
    }
    return found;
  };
  const show = (event) => {
    const point = nearest(event);
    tip.hidden = !point;
    ring.remove();
    if (!point) return;
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    plot.append(ring);
    tip.textContent = `${layers[point.layer].name}: ${layers[point.layer].text}`;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(event.pageX + 12, room))}px`;
    tip.style.top = `${event.pageY + 14}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerleave", () => { tip.hidden = true; ring.remove(); });
  plot.addEventListener("click", (event) => {
    show(event);
    const point = nearest(event);
    if (point) choose(point.layer);
  });
}

all("svg.plot").filter((plot) => plot.querySelector("path.points")).forEach(hover);

// -- the legend: toggles kinds of layers in the plots

for (const button of all(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const kind of all(`.kind[data-kind="${button.dataset.kind}"]`)) {
      kind.classList.toggle("off", !shown);
    }
  });
}

// -- the table: sorting, filter, selection

const body = document.querySelector("#table tbody");

function sortBy(column, descending) {
  const text = (row) => row.cells[column].textContent;
  const value = (row) => (column ? parseFloat(text(row)) : Number(row.dataset.layer));
  const rows = all("tr", body).sort((a, b) => value(a) - value(b));
  body.append(...(descending ? rows.reverse() : rows));
}

all("#table thead th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending" || (
      column > 0 && !head.hasAttribute("aria-sort"));
    for (const other of all("#table thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    sortBy(column, descending);
  });
});

document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const row of all("tr", body)) {
    row.hidden = !layers[row.dataset.layer].name.toLowerCase().includes(wanted);
  }
});

body.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (row) choose(Number(row.dataset.layer));
});

choose(waterfilling ? Number(chooser.dataset.first) : 0);
