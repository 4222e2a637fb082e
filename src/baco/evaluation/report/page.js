"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const specs = JSON.parse(document.getElementById("specs").textContent);
const told = document.getElementById("told");
const byId = (id) => document.getElementById(id);
const chosen = { view: 0, diversity: "", quality: "", lit: new Set(), prompt: 0 };
const darkScreen = matchMedia("(prefers-color-scheme: dark)");
let theme = null; // the reader's own choice; null follows the system

const isDark = () => (theme ? theme === "dark" : darkScreen.matches);
const view = () => data.views[chosen.view];
const colour = (method) => data.looks[method][isDark() ? "dark" : "light"];
const figure = (value) => (value === null ? "–" : value.toFixed(3).replace("-", "−"));

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, text]) => element("option", text, { value: key })));
  select.value = value;
}

// --- Answers with the source of every word -----------------------------------------------------

/** [first speaker, text, text, …]: turns change speaker; no speaker, no colour. */
function answer(coded) {
  const item = element("li");
  let base = coded[0] === "b";
  for (const text of coded.slice(1)) {
    if (!coded[0]) {
      item.append(text);
      continue;
    }
    // White space between words is not underlined.
    for (const part of text.split(/(\s+)/)) {
      if (part) item.append(/^\s/.test(part) ? part : element("span", part, { class: base ? "b" : "a" }));
    }
    base = !base;
  }
  return item;
}

function answers(setting, prompt, count) {
  const list = element("ol");
  const rows = view().answers[setting]?.[prompt] ?? [];
  list.append(...rows.slice(0, count).map(answer));
  return list;
}

// --- The diversity-quality plane -----------------------------------------------------------------

function space() {
  return view().spaces.find((s) => s.diversity === chosen.diversity && s.quality === chosen.quality);
}

function planeRows() {
  const { points, diversity, quality } = space();
  return points.map(([x, y, rawX, rawY, front], index) => {
    const setting = view().settings[index];
    const said = `${setting.method}, ${setting.label}: ${quality} ${figure(rawX)}, ${diversity} ${figure(rawY)}`;
    return {
      index, x, y, rawX, rawY, front: Boolean(front), said,
      method: setting.method,
      lit: chosen.lit.has(setting.method),
      colour: colour(setting.method),
      shape: data.looks[setting.method].shape,
    };
  });
}

/** The edge of what all points together dominate, from one axis to the other. */
function stairs(rows) {
  const ends = rows.filter((row) => row.front).sort((a, b) => a.x - b.x || a.y - b.y);
  if (!ends.length) return [];
  const corners = [{ x: 0, y: ends[0].y }, ...ends, { x: ends.at(-1).x, y: 0 }];
  return corners.map(({ x, y }, step) => ({ x, y, step }));
}

function config() {
  const style = getComputedStyle(document.body);
  const ink = style.color;
  const line = isDark() ? "#363c43" : "#e2e6ea";
  const soft = isDark() ? "#a3abb3" : "#57606a";
  return {
    background: null,
    font: style.fontFamily,
    view: { stroke: null },
    axis: {
      labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft, tickColor: soft,
      labelFontSize: 11.5, titleFontSize: 13, titleFontWeight: "normal",
    },
  };
}

async function embed(target, spec) {
  target.replaceChildren();
  const { view: drawn } = await vegaEmbed(target, spec, {
    actions: false, renderer: "svg", config: config(), tooltip: false, ast: true,
  });
  return drawn;
}

async function drawPlane() {
  if (!view().spaces.length) {
    byId("plane-plot").replaceChildren(element("p", "No diversity and quality metric are both scored: nothing to draw."));
    return;
  }
  const rows = planeRows().sort((a, b) => a.lit - b.lit);
  const title = (kind, name) => `${kind}: ${name}, normalised`;
  const spec = JSON.parse(
    JSON.stringify(specs.plane)
      .replaceAll("@quality", title("quality", chosen.quality))
      .replaceAll("@diversity", title("diversity", chosen.diversity)),
  );
  spec.datasets = { points: rows, front: stairs(rows) };
  const target = byId("plane-plot");
  const drawn = await embed(target, spec);
  drawn.addEventListener("pointermove", (event, item) => {
    if (item?.datum?.said) tell(item.datum, event.clientX, event.clientY);
    else hush();
  });
  drawn.addEventListener("pointerout", hush);
  drawn.addEventListener("click", (event, item) => {
    if (item?.datum?.said) tell(item.datum, event.clientX, event.clientY);
  });
  makeWalkable(target);
}

/** One stop of the tab key for the whole plot; arrows go from point to point. */
function makeWalkable(target) {
  const marks = [...target.querySelectorAll(".mark-symbol path")].filter((m) => m.__data__?.datum?.lit);
  const order = (m) => [m.__data__.datum.method, m.__data__.datum.x];
  marks.sort((a, b) => {
    const [one, other] = [order(a), order(b)];
    return one[0].localeCompare(other[0]) || one[1] - other[1];
  });
  marks.forEach((mark, place) => {
    mark.setAttribute("tabindex", place ? "-1" : "0");
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      tell(mark.__data__.datum, box.right, box.top);
    });
    mark.addEventListener("blur", hush);
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hush();
      if (!step) return;
      event.preventDefault();
      const next = marks[(place + step + marks.length) % marks.length];
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
}

function tell(datum, x, y) {
  const setting = view().settings[datum.index];
  const facts = element("dl");
  const add = (name, value) => facts.append(element("dt", name), element("dd", value));
  add(chosen.quality, figure(datum.rawX));
  add(chosen.diversity, figure(datum.rawY));
  if (setting.baseShare !== null) add("base share", `${Math.round(100 * setting.baseShare)}%`);
  if (datum.front) add("joint front", "on it");
  const prompt = view().prompts[chosen.prompt];
  told.replaceChildren(element("h4", heading(setting)), facts);
  if (prompt) {
    told.append(element("p", `“${shortened(prompt.text, 120)}”`, { class: "asked" }));
    told.append(answers(datum.index, chosen.prompt, 3));
  }
  told.hidden = false;
  const box = told.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
  told.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
  told.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - box.height - 8))}px`;
}

function hush() {
  told.hidden = true;
}

const heading = ({ method, label }) => (label.startsWith(method) ? label : `${method}: ${label}`);
const shortened = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);

// --- Choosers ------------------------------------------------------------------------------------

const SYMBOLS = {
  circle: "M-5,0a5,5,0,1,1,10,0a5,5,0,1,1,-10,0", square: "M-4.5,-4.5h9v9h-9z",
  "triangle-up": "M0,-5.2L5.4,4.6H-5.4z", "triangle-down": "M0,5.2L5.4,-4.6H-5.4z",
  "triangle-right": "M5.2,0L-4.6,5.4V-5.4z", diamond: "M0,-6L5,0L0,6L-5,0z",
  cross: "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
};

function swatch(method) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of [["width", 14], ["height", 14], ["viewBox", "-7 -7 14 14"], ["aria-hidden", "true"]]) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", SYMBOLS[data.looks[method].shape]);
  path.setAttribute("fill", colour(method));
  svg.append(path);
  return svg;
}

function listMethods() {
  const list = byId("method-list");
  list.replaceChildren(
    ...view().methods.map((method) => {
      const label = element("label");
      const box = element("input", undefined, { type: "checkbox", value: method });
      box.checked = chosen.lit.has(method);
      box.addEventListener("change", () => {
        chosen.lit[box.checked ? "add" : "delete"](method);
        drawPlane();
      });
      label.append(box, swatch(method), method);
      return label;
    }),
  );
}

function light(methods) {
  chosen.lit = new Set(methods);
  listMethods();
  drawPlane();
}

function listSpaces() {
  const names = (kind) => [...new Set(view().spaces.map((s) => s[kind]))];
  for (const kind of ["diversity", "quality"]) {
    const known = names(kind);
    if (!known.includes(chosen[kind])) chosen[kind] = known.includes(view()[kind]) ? view()[kind] : known[0];
    fill(byId(`choose-${kind}`), known.map((name) => [name, name]), chosen[kind]);
  }
}

function listPrompts() {
  const options = view().prompts.map((prompt, index) => [
    index, shortened((prompt.category ? `${prompt.category}: ` : "") + prompt.text.replace(/\s+/g, " "), 90),
  ]);
  chosen.prompt = Math.min(chosen.prompt, Math.max(0, options.length - 1));
  fill(byId("choose-prompt"), options, String(chosen.prompt));
}

function settingChooser(value) {
  const select = element("select");
  const groups = new Map();
  view().settings.forEach((setting, index) => {
    if (!view().answers[index]) return;
    if (!groups.has(setting.method)) groups.set(setting.method, element("optgroup", undefined, { label: setting.method }));
    groups.get(setting.method).append(element("option", setting.label, { value: index }));
  });
  select.append(...groups.values());
  select.value = String(value);
  return select;
}

function drawColumns() {
  byId("columns").replaceChildren(
    ...view().columns.map((setting, place) => {
      const column = element("section", undefined, { class: "column", "aria-label": `answers ${place + 1}` });
      const label = element("label", "method and setting");
      const select = settingChooser(setting);
      select.addEventListener("change", () => {
        view().columns[place] = Number(select.value);
        drawColumns();
        byId("columns").children[place].querySelector("select").focus();
      });
      label.append(select);
      column.append(label, answers(setting, chosen.prompt, 99));
      return column;
    }),
  );
  byId("prompt-text").textContent = view().prompts[chosen.prompt]?.text ?? "";
}

function stepPrompt(step) {
  const count = view().prompts.length;
  if (!count) return;
  chosen.prompt = (chosen.prompt + step + count) % count;
  byId("choose-prompt").value = String(chosen.prompt);
  drawColumns();
}

// --- Coverage plots, theme, start ----------------------------------------------------------------

async function drawCoverages() {
  for (const target of document.querySelectorAll("[data-coverage]")) {
    const spec = structuredClone(specs.coverages[target.dataset.coverage]);
    for (const panel of spec.hconcat) {
      for (const layer of [panel, ...panel.layer]) {
        for (const row of layer.data?.values ?? []) if (isDark()) row.colour = row.dark;
      }
    }
    await embed(target, spec);
  }
}

function drawAll() {
  listSpaces();
  listMethods();
  listPrompts();
  drawColumns();
  return Promise.all([drawPlane(), drawCoverages()]);
}

function setTheme(wanted) {
  theme = wanted;
  document.documentElement.style.colorScheme = wanted ?? "light dark";
  byId("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  drawAll();
}

function start() {
  fill(byId("choose-view"), data.views.map((v, index) => [index, v.name]), "0");
  byId("choose-view").closest("label").hidden = data.views.length < 2;
  byId("choose-view").addEventListener("change", (event) => {
    chosen.view = Number(event.target.value);
    chosen.lit = new Set(view().lit);
    drawAll();
  });
  for (const kind of ["diversity", "quality"]) {
    byId(`choose-${kind}`).addEventListener("change", (event) => {
      chosen[kind] = event.target.value;
      drawPlane();
    });
  }
  byId("choose-prompt").addEventListener("change", (event) => {
    chosen.prompt = Number(event.target.value);
    drawColumns();
  });
  byId("previous-prompt").addEventListener("click", () => stepPrompt(-1));
  byId("next-prompt").addEventListener("click", () => stepPrompt(1));
  byId("lit-main").addEventListener("click", () => light(view().lit));
  byId("lit-all").addEventListener("click", () => light(view().methods));
  byId("lit-none").addEventListener("click", () => light([]));
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  darkScreen.addEventListener("change", () => setTheme(theme));
  // Moving to a point by keyboard may scroll to it: what it says must stay.
  addEventListener("scroll", () => byId("plane-plot").contains(document.activeElement) || hush(), { passive: true });
  chosen.lit = new Set(view().lit);
  byId("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  drawAll().then(() => { document.documentElement.dataset.ready = "yes"; });
}

start();
