/* The page's own script: draws the figures in the colours of the system, and leads from a cell to the text. */
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colours = { light: { ink: "#4b5260" }, dark: { ink: "#a9b1bf" } };
  const plots = [...document.querySelectorAll(".figure")];
  const root = document.querySelector(".probe-text");
  const text = root ? probeTextView(root) : null;

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
    place.on("plotly_click", (event) => {
      const point = event.points[0], cell = point.customdata;
      if (point.data.type === "heatmap" && cell && cell.length === 2) showExpert(point.y, Number(cell[1]), point.data.meta);
    });
  }

  /* From a cell to its tokens: the text at that layer, with the expert marked. */
  function showExpert(layer, expert, domain) {
    const at = text.layers.indexOf(Number(layer)), document_ = text.documents.findIndex((shown) => shown.domain === domain);
    if (at < 0) return;
    text.show(document_ < 0 ? { layer: at, focus: expert } : { layer: at, focus: expert, document: document_ });
    location.hash = "text";
    document.getElementById("text").scrollIntoView();
  }

  function paint(mode) {
    plots.forEach((place) => place.layout && Plotly.relayout(place, theme(mode, place.layout)));
  }

  plots.forEach(draw);
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
