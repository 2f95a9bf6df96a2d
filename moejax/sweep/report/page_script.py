"""The script of the report page: tables that one can sort and filter. Without scripts the tables are as they are written."""

TABLE_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const rows = [...body.rows], chosen = heads.map(() => "");
  let words = [];
  const key = (row, column) => {
    const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent.replaceAll(",", "");
    const number = value.trim() === "" ? NaN : Number(value);
    return Number.isNaN(number) ? value : number;
  };
  const compare = (one, other) => {
    if (typeof one === "number" && typeof other === "number") return one - other;
    if (typeof one === "number") return -1;
    if (typeof other === "number") return 1;
    return one.localeCompare(other);
  };
  const count = document.createElement("span");
  const show = () => {
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const visible = words.every(word => text.includes(word)) &&
        chosen.every((value, column) => value === "" || row.cells[column].textContent === value);
      row.hidden = !visible;
      shown += visible;
    }
    count.textContent = shown + " of " + rows.length + " rows";
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.title = "sort by " + head.textContent;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = [...rows].sort((a, b) => (down ? -1 : 1) * compare(key(a, column), key(b, column)));
      body.append(...sorted);
    };
    head.addEventListener("click", event => { if (event.target === head) sort(); });
    head.addEventListener("keydown", event => { if (event.target === head && event.key === "Enter") sort(); });
    if (!head.classList.contains("text")) return;
    const values = [...new Set(rows.map(row => row.cells[column].textContent))];
    if (values.length < 2 || values.length > 100) return;
    const select = document.createElement("select");
    select.setAttribute("aria-label", "rows with one value of " + head.textContent);
    select.append(new Option("all", ""), ...values.map(value => new Option(value, value)));
    select.addEventListener("change", () => { chosen[column] = select.value; show(); });
    head.append(document.createElement("br"), select);
  });
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "words that a row has";
  box.addEventListener("input", () => { words = box.value.toLowerCase().split(/\\s+/).filter(Boolean); show(); });
  const bar = document.createElement("p");
  bar.className = "bar";
  bar.append(box, " ", count);
  table.parentElement.before(bar);
  show();
}
"""
