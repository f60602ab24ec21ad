"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

// Which boxes are shown: by score and category; an object is missed where the detection that finds it is not shown.
function filter() {
  const least = Number(one("#score").value), category = one("#category").value;
  one("#score-shown").textContent = least.toFixed(2);
  for (const scene of all(".scene")) {
    const counts = { right: 0, wrong: 0, missed: 0 };
    for (const mark of all(".mark", scene)) {
      const is = (name) => mark.classList.contains(name);
      const isBelow = mark.dataset.score === "" || Number(mark.dataset.score) < least;
      const isOther = category !== "" && mark.dataset.category !== category;
      mark.classList.toggle("off", isOther || (is("found") && isBelow));
      if (is("object")) mark.classList.toggle("missed", isBelow);
      if (!is("off")) for (const name of Object.keys(counts)) counts[name] += is(name);
    }
    for (const [name, count] of Object.entries(counts)) scene.querySelector(`[data-count=${name}]`).textContent = count;
  }
}

if (one("#score")) {
  for (const id of ["#score", "#category"]) one(id).addEventListener("input", filter);
  for (const box of all("[data-hides]"))
    box.addEventListener("input", () => document.body.classList.toggle(box.dataset.hides, !box.checked));
  filter(); // a browser may have kept what was set before
}

for (const table of all("table.sortable"))
  all("th", table).forEach((head, column) => {
    let turn = -1;
    head.addEventListener("click", () => {
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true }) * turn;
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      turn = -turn;
    });
  });
