// The diversity-quality plane, and what a point of it says.

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
  if (setting.mixed) add("source", "mixed");
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
