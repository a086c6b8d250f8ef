"use strict";
function value(row, column) {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.toLowerCase();
}
function compare(a, b) {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a < b ? -1 : a > b ? 1 : 0;
}
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const first = table.tBodies[0].rows[0];
    if (first && first.cells[column].classList.contains("number")) head.classList.add("number");
    head.firstChild.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const falling = now === "none" ? head.classList.contains("number") : now === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(value(a, column), value(b, column)) * (falling ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}
for (const field of document.querySelectorAll("input.filter")) {
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase();
    for (const row of field.parentElement.querySelectorAll("tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(words);
  });
}
function choose(gallery, tag) {
  let shown = 0;
  for (const picture of gallery.querySelectorAll(".pictures figure")) {
    picture.hidden = tag !== "" && !picture.dataset.tags.split(" ").includes(tag);
    shown += picture.hidden ? 0 : 1;
  }
  for (const button of gallery.querySelectorAll(".filters button")) button.classList.toggle("on", button.dataset.tag === tag);
  gallery.querySelector(".none").hidden = shown > 0;
}
for (const gallery of document.querySelectorAll(".gallery")) {
  for (const button of gallery.querySelectorAll(".filters button")) button.addEventListener("click", () => choose(gallery, button.dataset.tag));
}
function pick(row) {
  for (const gallery of document.querySelectorAll(".gallery.picked")) {
    choose(gallery, row.dataset.pick);
    gallery.scrollIntoView({ block: "start" });
  }
}
for (const row of document.querySelectorAll("tr.pick")) {
  row.addEventListener("click", () => pick(row));
  row.addEventListener("keydown", (event) => { if (event.key === "Enter") pick(row); });
}
const large = document.getElementById("large");
for (const image of document.querySelectorAll(".pictures img")) {
  image.addEventListener("click", () => {
    large.querySelector("img").src = image.src;
    large.querySelector("p").textContent = image.alt;
    large.showModal();
  });
}
large.addEventListener("click", (event) => { if (event.target !== large.querySelector("p")) large.close(); });
