// Theme, events, and the first drawing.

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
