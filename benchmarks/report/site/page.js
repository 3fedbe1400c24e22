// Joins what the page holds to the libraries: all texts and numbers were made before.
const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);

// The table. DataTables' bundle is a module, so it is imported from the text that stands in the page.
const bytes = Uint8Array.from(atob(byId("table-script").textContent), (letter) => letter.charCodeAt(0));
const address = URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
const { default: DataTable, set_or_remove_dark_class: followTheme } = await import(address);
followTheme();
const table = new DataTable("#table", { order: [], pageLength: 25, lengthMenu: [25, 100, { label: "all", value: -1 }], autoWidth: false });
for (const select of document.querySelectorAll("#filters select")) {
  const filter = () => table.column(`${select.dataset.column}:name`).search(select.value, { exact: select.value !== "" });
  filter();
  select.addEventListener("change", () => filter().draw());
}
table.draw();

// The charts. Vega binds them to the controls, whose first values are the page's. It says errors alone (level 1): a chart
// may have nothing to draw for a task.
const { charts, datasets } = read("charts-data");
for (const element of document.querySelectorAll("[data-chart]")) {
  await vegaEmbed(element, { ...charts[element.dataset.chart], datasets }, { mode: "vega-lite", renderer: "svg", actions: false, logLevel: 1 });
}
const chartTask = byId("chart-task");
const ofTask = () => document.querySelectorAll(".of-task").forEach((each) => each.classList.toggle("chosen", each.dataset.task === chartTask.value));
chartTask?.addEventListener("change", ofTask);
if (chartTask) ofTask();

// The pictures of two rows.
const { tasks, rows, strips } = read("pictures-data");
const [task, precision, a, b] = ["task", "precision", "a", "b"].map((name) => byId(`pictures-${name}`));
const fill = (select, entries, usual) => {
  const kept = entries.find(([, text]) => text === select.selectedOptions[0]?.text) ?? entries[usual] ?? entries[0];
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value, false, value === kept[0])));
};
const choose = () => {
  fill(precision, Object.keys(tasks[task.value].precisions).map((each) => [each, each]), 0);
  const entries = tasks[task.value].precisions[precision.value].map((name) => [name, rows[name].label]);
  fill(a, entries, 0);
  fill(b, entries, 1);
  show();
};
const show = () => {
  const chosen = { a: rows[a.value], b: rows[b.value] };
  const prompts = tasks[task.value].prompts;
  byId("pictures-shown").innerHTML = '<span class="a"></span><span class="b"></span>';
  for (const [side, row] of Object.entries(chosen)) {
    byId("noises").style.setProperty(`--strip-${side}`, `url(data:image/webp;base64,${strips[row.strip]})`);
    byId("pictures-shown").querySelector(`.${side}`).textContent = `${side === "a" ? "First" : "Second"}: ${row.label}. `;
  }
  document.querySelectorAll(".noise").forEach((figure, index) => {
    const name = prompts[index] ?? `Noise ${index + 1}`;
    figure.hidden = index >= Math.min(chosen.a.count, chosen.b.count);
    figure.querySelector(".prompt").textContent = name;
    for (const [side, row] of Object.entries(chosen)) {
      const picture = figure.querySelector(`.picture.${side}`);
      picture.style.backgroundSize = `${100 * row.count}% 100%`;
      picture.style.backgroundPositionX = `${(100 * index) / Math.max(row.count - 1, 1)}%`;
      picture.setAttribute("aria-label", `${name}: ${row.label}`);
      figure.querySelector(`.distances .${side}`).textContent = row.distances[index] ?? "";
    }
  });
};
const flip = () => {
  const [first, second] = document.querySelectorAll("[name=shown]");
  (first.checked ? second : first).checked = true;
};
if (task) {
  fill(task, Object.keys(tasks).map((each) => [each, each]), 0);
  choose();
  for (const select of [task, precision]) select.addEventListener("change", choose);
  for (const select of [a, b]) select.addEventListener("change", show);
  byId("noises").addEventListener("click", flip);
  byId("pictures").addEventListener("keydown", (event) => event.key === "f" && event.target.tagName !== "SELECT" && flip());
}

// All that is known of a cell, under its name in the address.
const dialog = byId("cell");
const open = () => {
  const details = byId(`cell:${decodeURIComponent(location.hash.slice(1))}`);
  if (dialog.open) dialog.close();
  if (!details) return;
  byId("cell-body").replaceChildren(details.content.cloneNode(true));
  dialog.showModal();
};
addEventListener("hashchange", open);
dialog.addEventListener("close", () => byId(`cell:${decodeURIComponent(location.hash.slice(1))}`) && history.replaceState(null, "", "#"));
dialog.addEventListener("click", ({ target }) => {
  const name = target.dataset.row;
  if (!name) return;
  const [place, found] = Object.entries(tasks).find(([, each]) => Object.values(each.precisions).flat().includes(name));
  task.value = place;
  choose();
  precision.value = Object.keys(found.precisions).find((each) => found.precisions[each].includes(name));
  choose();
  b.value = name;
  show();
});
open();
document.documentElement.dataset.ready = "";
