"use strict";
(() => {
  const order = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.order ?? cell.textContent.trim();
  };

  // what is empty comes last, whichever way the rest is sorted
  const sort = (table, column, numbers, direction) => {
    const compare = numbers
      ? (a, b) => Number(a) - Number(b)
      : (a, b) => a.localeCompare(b, "en", { numeric: true });
    const rows = [...table.tBodies[0].rows].map((row) => [order(row, column), row]);
    rows.sort(([a], [b]) => (a === "") - (b === "") || (a === "" ? 0 : direction * compare(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };

  const makeSortable = (table) => {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const ascending = header.getAttribute("aria-sort") !== "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sort(table, column, header.classList.contains("number"), ascending ? 1 : -1);
      });
    });
  };

  const makeSearchable = (box) => {
    const input = box.querySelector("input");
    const status = box.querySelector("[role=status]");
    const rows = [...document.getElementById(input.id.replace(/-search$/, "")).tBodies[0].rows];
    const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
    const search = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every((word) => texts[i].includes(word));
        found += !row.hidden;
      });
      status.textContent = words.length ? `${found} of ${rows.length}` : `${rows.length}`;
    };
    box.hidden = false;
    input.addEventListener("input", search);
    search(); // a browser may have kept what was typed before
  };

  const openTarget = (hash) => {
    const target = document.getElementById(hash.slice(1));
    if (!(target instanceof HTMLDetailsElement)) return false;
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus();
    return true;
  };

  document.querySelectorAll("table").forEach(makeSortable);
  document.querySelectorAll(".search").forEach(makeSearchable);
  addEventListener("hashchange", () => openTarget(location.hash));
  // followed a second time, a link changes no hash, and would take the focus away
  addEventListener("click", (event) => {
    const link = event.target.closest("a[href]");
    if (link && openTarget(link.hash)) {
      event.preventDefault();
      history.pushState(null, "", link.hash);
    }
  });
  openTarget(location.hash);
})();
