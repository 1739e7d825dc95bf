"use strict";
// A legend's button shows and hides the curves of its name in all panels of its figure.
for (const figure of document.querySelectorAll("figure")) {
  for (const button of figure.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const layer of figure.querySelectorAll(".layer")) {
        if (layer.dataset.series === button.dataset.series) layer.classList.toggle("off", !shown);
      }
    });
  }
}
// A column's button sorts the rows by it: upwards, and downwards when it is pressed again. What is no number comes last.
for (const table of document.querySelectorAll("table")) {
  const headers = [...table.querySelectorAll("th")];
  const body = table.tBodies[0];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
      const key = (row) => {
        const cell = row.cells[column];
        if (!numeric) return cell.textContent;
        return cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
      };
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!numeric) return up ? x.localeCompare(y) : y.localeCompare(x);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
