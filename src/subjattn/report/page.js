// Sorts the tables of facts, and stacks a figure's panels where the window is narrow.
document.querySelectorAll("table.facts").forEach(table => table.querySelectorAll("th").forEach((head, column) => {
  head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true }) * (down ? -1 : 1);
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  });
}));

const drawn = [...document.querySelectorAll(".plotly-graph-div")].map(div => ({
  div, layout: JSON.parse(JSON.stringify(div.layout)), stacked: 0,
}));

function size(div, { width, height }) {
  div.parentElement.style.width = width + "px";
  div.parentElement.style.height = height + "px";
}

function arrange({ div, layout }, room) {
  const axes = Object.keys(layout).filter(name => /^xaxis\d*$/.test(name));
  const domain = axis => layout[axis]?.domain ?? [0, 1];
  const columns = Math.max(1, new Set(axes.map(name => domain(name).join())).size);
  const across = Math.max(1, Math.min(columns, Math.floor((room - 130) / 190))), lines = Math.ceil(columns / across);
  const rows = Math.ceil(axes.length / columns) * lines, each = axes.length > 1 ? 300 : layout.height - 110, gap = 110;
  const plot = rows * each + (rows - 1) * gap, change = { width: room, height: plot + 60 + layout.margin.b };
  const annotations = JSON.parse(JSON.stringify(layout.annotations ?? []));
  axes.forEach((name, i) => {
    const y = name.replace("x", "y"), at = i % columns;
    const row = Math.floor(i / columns) * lines + Math.floor(at / across), column = at % across;
    const left = column / across, right = (column + 1) / across - (across > 1 ? 0.03 : 0);
    const top = 1 - row * (each + gap) / plot, bottom = top - each / plot;
    const old = { x: (domain(name)[0] + domain(name)[1]) / 2, top: domain(y)[1] };
    (layout.annotations ?? []).forEach((note, n) => {
      if (note.name !== "note" && Math.abs(note.x - old.x) < 1e-6 && Math.abs(note.y - old.top) < 1e-6) {
        annotations[n].x = (left + right) / 2;
        annotations[n].y = top;
      }
    });
    change[name + ".domain"] = [left, right];
    change[y + ".domain"] = [Math.max(0, bottom), top];
    change[y + ".showticklabels"] = column === 0;
    change[y + ".tickfont.size"] = 11;
  });
  change.annotations = annotations;
  change["margin.t"] = axes.length > 1 ? layout.margin.t : 110;
  change.height += change["margin.t"] - 60;
  if (axes.length === 1) change["xaxis.title.font.size"] = 10;
  change["margin.l"] = 50;
  change["margin.r"] = 10;
  size(div, change);
  Plotly.relayout(div, change);
}

function fit() {
  for (const one of drawn) {
    const room = Math.floor(one.div.closest(".scroll").clientWidth);
    const narrow = window.innerWidth <= 900 && room < one.layout.width;
    if (narrow ? one.stacked !== room : one.stacked) {
      if (narrow) arrange(one, room);
      else {
        size(one.div, one.layout);
        Plotly.react(one.div, one.div.data, JSON.parse(JSON.stringify(one.layout)));
      }
      one.stacked = narrow ? room : 0;
    }
  }
}
fit();
window.addEventListener("resize", fit);
