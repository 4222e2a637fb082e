// Answers with the source of every word, side by side.

/** [first speaker, text, text, …]: turns change speaker; no speaker, no colour; "m" is both at once. */
function answer(coded) {
  const item = element("li");
  let base = coded[0] === "b";
  for (const text of coded.slice(1)) {
    if (coded[0] === "m") item.append(element("em", "mixed: "));
    if (!coded[0] || coded[0] === "m") {
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
