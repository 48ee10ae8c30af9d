"use strict";
// Figures come without colours; they are painted here, anew whenever the theme changes.
// The line colours are Okabe and Ito's, which differ for every kind of colour vision; the dark ones are lightened.
const LINES = {
  light: ["#0b6bb0", "#d55e00", "#00795a", "#b0508a", "#8a6d00", "#4a4a4a"],
  dark: ["#6cb8f0", "#f0965a", "#4fc9a4", "#e0a0c8", "#e6c34d", "#c8c8c8"],
};
const HEAT = {
  light: [[0, "#ffffff"], [0.02, "#dcebf7"], [0.3, "#7db5de"], [1, "#084a7d"]],
  dark: [[0, "#18202a"], [0.02, "#1f3347"], [0.3, "#3377ab"], [1, "#d3ebff"]],
};
const figures = JSON.parse(document.getElementById("figures").textContent);
const system = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = ["light", "dark"].find((name) => location.hash === "#" + name) || null;

function painted(trace, theme) {
  const meta = trace.meta || {};
  const colour = LINES[theme][(meta.colour || 0) % LINES[theme].length];
  if (meta.role === "heat") return { ...trace, colorscale: HEAT[theme] };
  if (meta.role === "band") return { ...trace, fillcolor: colour + (theme === "dark" ? "38" : "2b") };
  if (meta.role === "line") {
    return { ...trace, line: { ...trace.line, color: colour }, marker: { ...trace.marker, color: colour } };
  }
  return trace;
}

function layoutOf(figure) {
  const style = getComputedStyle(document.documentElement);
  const [ink, quiet, line, card] = ["--ink", "--quiet", "--line", "--card"].map((name) => style.getPropertyValue(name));
  const axis = { gridcolor: line, linecolor: line, tickcolor: line, tickfont: { color: quiet } };
  return {
    ...figure.layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink } },
    xaxis: { ...figure.layout.xaxis, ...axis },
    yaxis: { ...figure.layout.yaxis, ...axis },
  };
}

function draw() {
  const theme = chosen || (system.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  figures.forEach((figure, index) => {
    const data = figure.data.map((trace) => painted(trace, theme));
    Plotly.react("plot-" + index, data, layoutOf(figure), { responsive: true, displayModeBar: false });
  });
}

document.getElementById("theme").addEventListener("click", () => {
  chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  draw();
});
system.addEventListener("change", draw);
draw();
