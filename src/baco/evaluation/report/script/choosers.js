// Which sub-space is drawn, and which methods stand out in it.

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
