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

const heading = ({ method, label }) => (label.startsWith(method) ? label : `${method}: ${label}`);
const shortened = (text, length) => (text.length > length ? `${text.slice(0, length)}…` : text);
