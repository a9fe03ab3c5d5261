/* The page's own script: draws the figures in the colours of the system, and leads from a cell to the text. */
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colours = { light: { ink: "#4b5260" }, dark: { ink: "#a9b1bf" } };
  const plots = [...document.querySelectorAll(".figure")];
  const root = document.querySelector(".probe-text");
  const text = root ? probeTextView(root) : null;
  let drawn = false;
  /* A page on FP8 alone has no cards of experts, and its cells lead nowhere. */
  const place = document.querySelector(".card");
  const card = place && probeExpertCard(place, {
    heading: document.querySelector(".card-title"),
    view: text,
    selected: (layer, expert) => { if (drawn) mark(layer, expert); },
  });
  const markCurrent = () => { if (card) mark(card.current().layer, card.current().expert); };

  function theme(mode, layout) {
    const change = { "font.color": colours[mode].ink };
    if (layout.meta && layout.meta.colorscale) {
      const scale = layout.meta.colorscale[mode];
      change["coloraxis.colorscale"] = scale.map((colour, index) => [index / (scale.length - 1), colour]);
    }
    return change;
  }

  function draw(place) {
    const { data, layout } = JSON.parse(place.querySelector("script").textContent);
    place.replaceChildren();
    layout.autosize = true;
    const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], scrollZoom: false };
    Plotly.newPlot(place, data, layout, config).then(() => Plotly.relayout(place, theme(dark.matches ? "dark" : "light", layout)));
    place.on("plotly_buttonclicked", () => setTimeout(markCurrent));
    place.on("plotly_click", (event) => {
      const point = event.points[0], cell = point.customdata;
      if (point.data.type === "heatmap" && cell && cell.length === 2) showExpert(point.y, Number(cell[1]), point.data.meta);
    });
  }

  /* From a cell to the card of its expert, with text of the cell's domain first. */
  function showExpert(layer, expert, domain) {
    if (!card) return;
    const at = card.layers.indexOf(Number(layer));
    if (at < 0) return;
    card.show(at, expert, domain);
    document.getElementById("expert").scrollIntoView({ block: "nearest" });
  }

  /* Heatmaps of layers and experts: their cells hold a hover and an expert. */
  const isCard = (trace) => trace.type === "heatmap" && Array.isArray(trace.customdata) && Array.isArray(trace.customdata[0]) && trace.customdata[0][0]?.length === 2;

  /* A frame around the cell of the expert on the card, in every heatmap of layers and experts that is drawn. */
  function mark(layer, expert) {
    plots.forEach((place) => {
      const cells = (place.data || []).find((trace) => trace.visible !== false && isCard(trace) && trace.y.includes(layer));
      if (!cells) return;
      const row = cells.customdata[cells.y.indexOf(layer)];
      const column = row.findIndex((cell) => Number(cell[1]) === expert && cell[0] !== "");
      const x = cells.x[column], line = { color: dark.matches ? "#ffffff" : "#000000", width: 2 };
      const frame = { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: layer - 0.5, y1: layer + 0.5, line };
      const axes = place.data.filter((trace) => trace.visible !== false && isCard(trace)).map((trace) => ({ xref: trace.xaxis || "x", yref: trace.yaxis || "y" }));
      Plotly.relayout(place, { shapes: column < 0 ? [] : axes.map((axis) => ({ ...frame, ...axis })) });
    });
  }

  function paint(mode) {
    plots.forEach((place) => place.layout && Plotly.relayout(place, theme(mode, place.layout)));
  }

  plots.forEach(draw);
  drawn = true;
  markCurrent();
  document.querySelectorAll("button[data-expert]").forEach((button) => {
    button.addEventListener("click", () => showExpert(button.dataset.layer, Number(button.dataset.expert)));
  });
  dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((part) => { part.dataset.was = part.open; part.open = true; });
    paint("light");
  });
  window.addEventListener("afterprint", () => {
    document.querySelectorAll("details").forEach((part) => { part.open = part.dataset.was === "true"; });
    paint(dark.matches ? "dark" : "light");
  });
})();
