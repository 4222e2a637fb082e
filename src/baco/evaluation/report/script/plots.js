// What all plots share, and the plots of Coverage.

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
