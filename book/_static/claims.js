// Narrows the table of claims down to who claims it and to a verdict. Without it the whole table is there.
function narrowDown(form) {
  const lines = form.parentElement.querySelectorAll("tbody tr");

  function show() {
    const wanted = Array.from(form.querySelectorAll("select"), (select) => select.value).filter(Boolean);
    let shown = 0;
    for (const line of lines) {
      line.hidden = !wanted.every((name) => line.classList.contains(name));
      shown += line.hidden ? 0 : 1;
    }
    form.querySelector("output").textContent = `${shown} of ${lines.length} claims shown`;
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
}

// Jupyter Book loads every script of _static on every page, before the page is there.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("form.claims-filter").forEach(narrowDown);
});
