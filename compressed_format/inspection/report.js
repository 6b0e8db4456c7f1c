"use strict";
// The page's only program: the table that sorts and filters, and the plots in the colours of light or dark.
(() => {
  const table = document.getElementById("modules");

  function sortBy(column, heading) {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const number = { "inf": Infinity, "-inf": -Infinity };
    const keyed = Array.from(table.tBodies[0].rows, (row) => {
      const value = row.cells[column].dataset.value;
      return [value in number ? number[value] : Number(value), row];
    });
    // What has no value is last either way.
    keyed.sort(([a], [b]) => Number.isNaN(a) - Number.isNaN(b) || (a === b ? 0 : a < b !== descending ? -1 : 1));
    table.tBodies[0].append(...keyed.map(([, row]) => row));
  }

  if (table) {
    Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => sortBy(column, heading));
    });
    const filter = document.getElementById("filter");
    const shown = document.getElementById("shown");
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = table.tBodies[0].rows;
      let count = 0;
      for (const row of rows) {
        const text = [0, 1, 2].map((column) => row.cells[column].textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        count += !row.hidden;
      }
      shown.textContent = `${count} of ${rows.length}`;
    });
  }

  const figures = JSON.parse(document.getElementById("figures").textContent);

  // A figure with the page's own colours in place of their names, which only stand where plotly expects a colour.
  function coloured(value, key, style) {
    if (Array.isArray(value)) return value.map((item) => coloured(item, "", style));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, item]) => [k, coloured(item, k, style)]));
    }
    if (typeof value === "string" && value.startsWith("@") && key.endsWith("color")) {
      return value === "@clear" ? "rgba(0, 0, 0, 0)" : style.getPropertyValue(`--${value.slice(1)}`).trim();
    }
    return value;
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 45rem)");

  async function draw() {
    const style = getComputedStyle(document.documentElement);
    const family = getComputedStyle(document.body).fontFamily;
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = coloured(figure, "", style);
      layout.font.family = family;
      // Names that cannot turn out of each other's way would lie over each other; pointing at a bar shows them.
      if (narrow.matches && layout.xaxis.tickangle === 0) {
        layout.xaxis.ticktext = layout.xaxis.ticktext.map((text) => (/^\d+$/.test(text) ? text : ""));
      }
      await window.Plotly.react(id, data, layout, { displayModeBar: false, responsive: true });
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
    document.documentElement.dataset.width = narrow.matches ? "narrow" : "wide";
  }

  async function start() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const plotly = document.createElement("script");
    plotly.textContent = await new Response(inflated).text();
    document.head.append(plotly);
    await draw();
    for (const query of [dark, narrow]) query.addEventListener("change", draw);
  }

  start().catch((error) => {
    for (const id of Object.keys(figures)) document.getElementById(id).textContent = `The plot cannot be drawn: ${error}`;
    throw error;
  });
})();
