// Draws the figures of the page, and answers its controls. The data are in the page; see page.py.
"use strict";
(() => {
  const THEMES = JSON.parse(document.getElementById("themes").textContent);
  const VEGA = { mode: "vega-lite", actions: false, renderer: "svg" };
  const state = { abscissa: "step", theme: "auto" };
  const figures = new Map(); // element -> its data and what is hidden in it

  // ---- what is remembered from one opening of the page to the next; some browsers forbid it
  const remember = (key, value) => { try { localStorage.setItem(`dwm-${key}`, value); } catch { /* not allowed */ } };
  const recall = (key) => { try { return localStorage.getItem(`dwm-${key}`); } catch { return null; } };

  // ---- light and dark
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => (state.theme === "auto" ? (system.matches ? "dark" : "light") : state.theme);
  function showTheme() {
    document.documentElement.dataset.theme = theme();
    const button = document.getElementById("theme");
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[state.theme];
    const words = { auto: "as the system has them", light: "light", dark: "dark" }[state.theme];
    button.setAttribute("aria-label", `Colors: ${words}`);
    drawAgain();
  }

  // ---- data
  const columnsOf = (data) => Object.keys(data);
  function rowsOf(data) {
    const names = columnsOf(data);
    const count = names.length ? data[names[0]].length : 0;
    return Array.from({ length: count }, (_, i) => Object.fromEntries(names.map((name) => [name, data[name][i]])));
  }
  function parse(element) {
    const figure = JSON.parse(element.querySelector("script[type='application/json']").textContent);
    figure.rows = rowsOf(figure.data);
    figure.markRows = rowsOf(figure.marks);
    figure.hidden = new Set();
    figure.views = [];
    return figure;
  }

  // ---- drawing
  const label = (figure, name) => figure.columns.find((column) => column.name === name).label;
  const abscissaOf = (figure) => (figure.abscissas.includes(state.abscissa) ? state.abscissa : "step");

  // Replaces the column "step" of a chart by another abscissa, on the axis and in the tooltip.
  function over(chart, figure) {
    const chosen = abscissaOf(figure);
    if (!figure.abscissas.length || chosen === "step") return chart;
    const walk = (node) => {
      if (Array.isArray(node)) return node.map(walk);
      if (node === null || typeof node !== "object") return node;
      const copy = Object.fromEntries(Object.entries(node).map(([key, value]) => [key, walk(value)]));
      if (copy.field === "step") Object.assign(copy, { field: chosen, title: label(figure, chosen) });
      return copy;
    };
    return walk(chart);
  }
  const shown = (figure) => figure.rows.filter((row) => !figure.series || !figure.hidden.has(row[figure.series]));
  const datasets = (figure, rows) => ({ table: rows, marks: figure.markRows, one: [{}] });

  function drawPanel(figure, parent, rows, title) {
    const plot = document.createElement("div");
    plot.className = "plot";
    if (title !== null) {
      const heading = document.createElement("h4");
      heading.textContent = title;
      plot.append(heading);
    }
    const view = document.createElement("div");
    view.className = "view";
    plot.append(view);
    parent.append(plot);
    const spec = {
      ...over(figure.chart, figure), width: "container", height: title === null ? figure.height : 165,
      description: [figure.title, title].filter(Boolean).join(": "), datasets: datasets(figure, rows),
      autosize: { type: "fit-x", contains: "padding" },
    };
    return vegaEmbed(view, spec, { ...VEGA, config: THEMES[theme()] });
  }
  async function draw(element) {
    const figure = figures.get(element);
    const plots = element.querySelector(".plots");
    const turn = (figure.turn = (figure.turn || 0) + 1);
    figure.drawn = true;
    for (const done of figure.views.splice(0)) done.finalize();
    plots.style.minHeight = `${plots.offsetHeight}px`; // the page must not jump while it is empty
    plots.replaceChildren();
    const rows = shown(figure);
    const panels = figure.panels
      ? figure.panelNames.map((name) => [name, rows.filter((row) => row[figure.panels] === name)])
      : [[null, rows]];
    try {
      const made = await Promise.all(panels.map(([name, part]) => drawPanel(figure, plots, part, name)));
      if (turn === figure.turn) figure.views = made; else made.forEach((one) => one.finalize());
    } catch (error) {
      plots.textContent = `This plot could not be drawn: ${error.message}`;
      console.error(error);
    }
    plots.style.minHeight = "";
    element.dataset.drawn = String(turn);
  }
  function drawAgain() {
    for (const [element, figure] of figures) if (figure.drawn) draw(element);
  }

  // ---- the legend: a button for each line, which hides it and shows it again
  const SVG = "http://www.w3.org/2000/svg";
  function swatch(look) {
    const svg = document.createElementNS(SVG, "svg");
    for (const [key, value] of Object.entries({ width: 22, height: 8, "aria-hidden": "true" })) svg.setAttribute(key, value);
    const line = document.createElementNS(SVG, "line");
    const shape = { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 3, "stroke-dasharray": look.dash.join(" ") };
    for (const [key, value] of Object.entries(shape)) line.setAttribute(key, value);
    if (look.dash[1] === 0) line.removeAttribute("stroke-dasharray");
    line.style.stroke = `var(--series-${look.color})`;
    svg.append(line);
    return svg;
  }
  function makeLegend(element, figure) {
    if (!figure.series) return;
    const present = new Set(figure.data[figure.series]);
    if (figure.names.length < 2) return; // with one line of several names, say whose it is
    figure.names.forEach((name, number) => {
      if (!present.has(name)) return;
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(swatch(figure.swatches[number]), document.createTextNode(name));
      button.addEventListener("click", () => {
        const hide = !figure.hidden.has(name);
        if (hide) figure.hidden.add(name); else figure.hidden.delete(name);
        button.setAttribute("aria-pressed", String(!hide));
        draw(element);
      });
      element.querySelector(".legend").append(button);
    });
  }
  function seriesColors() {
    const rule = (name) => THEMES[name].range.category.map((color, i) => `--series-${i}:${color}`).join(";");
    const style = document.createElement("style");
    style.textContent = `:root{${rule("light")}} :root[data-theme="dark"]{${rule("dark")}}`;
    document.head.append(style);
  }

  // ---- PNG, CSV and the table of the data
  function save(name, url) {
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
  }
  async function savePng(figure) {
    const spec = { ...over(figure.paper, figure), datasets: datasets(figure, shown(figure)), padding: 12 };
    const config = { ...THEMES.light, background: "white" };
    const drawn = await vegaEmbed(document.createElement("div"), spec, { ...VEGA, config });
    save(`${figure.id}.png`, await drawn.view.toImageURL("png", 2));
    drawn.finalize();
  }
  // A cell that a spreadsheet would take for a formula gets an apostrophe, as OWASP advises.
  function csvCell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }
  function saveCsv(figure) {
    const lines = [figure.columns.map((column) => csvCell(column.label))];
    for (const row of figure.rows) lines.push(figure.columns.map((column) => csvCell(row[column.name])));
    const blob = new Blob([`${lines.map((line) => line.join(",")).join("\n")}\n`], { type: "text/csv" });
    const url = URL.createObjectURL(blob);
    save(`${figure.id}.csv`, url);
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }
  const MOST_ROWS = 500;
  function toggleTable(element, figure, button) {
    const place = element.querySelector(".data");
    place.hidden = !place.hidden;
    button.setAttribute("aria-expanded", String(!place.hidden));
    if (place.hidden || place.childElementCount) return;
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const column of figure.columns) head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: column.label }));
    const body = table.createTBody();
    for (const row of figure.rows.slice(0, MOST_ROWS)) {
      const line = body.insertRow();
      for (const column of figure.columns) line.insertCell().textContent = row[column.name] ?? "–";
    }
    place.append(table);
    const rest = figure.rows.length - MOST_ROWS;
    if (rest > 0) place.append(Object.assign(document.createElement("p"), { textContent: `${rest} more rows are in the CSV file.` }));
    place.tabIndex = 0;
  }
  function answerButtons(element, figure) {
    const actions = { png: () => savePng(figure), csv: () => saveCsv(figure), table: (button) => toggleTable(element, figure, button) };
    for (const button of element.querySelectorAll(".actions button")) button.addEventListener("click", () => actions[button.dataset.do](button));
  }

  // ---- start
  seriesColors();
  for (const element of document.querySelectorAll("figure.figure")) {
    const figure = parse(element);
    figures.set(element, figure);
    makeLegend(element, figure);
    answerButtons(element, figure);
    // What it will need, so that little moves when it is drawn.
    if (!figure.panels) element.querySelector(".plots").style.minHeight = `${figure.height + 45}px`;
  }
  // A figure is drawn when it is about to be seen: a page may have very many.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !figures.get(entry.target).drawn) draw(entry.target);
  }, { rootMargin: "600px" });
  for (const element of figures.keys()) watcher.observe(element);
  addEventListener("beforeprint", () => { for (const [element, figure] of figures) if (!figure.drawn) draw(element); });

  const radios = [...document.querySelectorAll("#abscissa input")];
  const available = new Set([...figures.values()].flatMap((figure) => figure.abscissas));
  function choose(value) {
    state.abscissa = value;
    for (const radio of radios) radio.checked = radio.value === value;
    remember("abscissa", value);
    for (const [element, figure] of figures) if (figure.drawn && figure.abscissas.length) draw(element);
  }
  for (const radio of radios) {
    radio.disabled = !available.has(radio.value);
    radio.addEventListener("change", () => choose(radio.value));
  }
  const before = recall("abscissa");
  if (before && available.has(before)) choose(before);

  state.theme = ["light", "dark"].includes(recall("theme")) ? recall("theme") : "auto";
  document.getElementById("theme").addEventListener("click", () => {
    state.theme = { auto: "light", light: "dark", dark: "auto" }[state.theme];
    remember("theme", state.theme);
    showTheme();
  });
  system.addEventListener("change", showTheme);
  showTheme();

  // The section that is being read is marked in the list of contents.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const reader = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-80px 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) reader.observe(section);

  // While a run is watched the page reads itself anew, unless nobody looks at it.
  const seconds = Number(document.body.dataset.reloadS);
  if (seconds) setInterval(() => { if (!document.hidden) location.reload(); }, seconds * 1000);
})();
