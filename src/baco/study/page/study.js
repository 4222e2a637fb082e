// The script of a study's pages: saves every answer at once, measures time, and reads keys.
"use strict";

(() => {
  const form = document.getElementById("item");
  if (form) item(form);
  else document.addEventListener("keydown", (event) => {
    // On the other pages Enter is the main button, unless something else has the focus.
    const next = document.getElementById("next");
    if (next && event.key === "Enter" && document.activeElement === document.body) next.click();
  });

  function item(form) {
    const rows = [...form.querySelectorAll(".row")];
    const next = document.getElementById("next");
    const back = document.getElementById("back");
    const state = document.getElementById("state");
    const feedback = document.getElementById("feedback");
    const shortcuts = document.getElementById("shortcuts");
    const { plan, link, position, training } = form.dataset;
    const isTraining = training === "yes";
    let checked = false; // the training item was checked

    // Time: only while the page is visible.
    let seconds = Number(form.dataset.seconds);
    let since = document.hidden ? null : performance.now();
    document.addEventListener("visibilitychange", () => {
      seconds = elapsed();
      since = document.hidden ? null : performance.now();
    });
    const elapsed = () => seconds + (since === null ? 0 : (performance.now() - since) / 1000);

    function responses() {
      const found = {};
      for (const row of rows) {
        const chosen = row.querySelector("input:checked");
        const { question, side } = row.dataset;
        if (side === undefined) {
          if (chosen) found[question] = chosen.value;
        } else {
          (found[question] ??= [null, null])[side === "left" ? 0 : 1] = chosen && Number(chosen.value);
        }
      }
      // A rating counts once both sides have one.
      return Object.fromEntries(
        Object.entries(found).filter(([, value]) => !Array.isArray(value) || !value.includes(null)),
      );
    }

    const complete = () => rows.every((row) => row.querySelector("input:checked"));

    // Saving: one request at a time; the last state wins, and is sent until it is acknowledged.
    let unsaved = 0; // changes so far
    let acknowledged = 0;
    let sending = null;
    let wait = 500;
    let reply = {};

    function save() {
      unsaved += 1;
      sending ??= send().finally(() => (sending = null));
      return sending;
    }

    async function send() {
      while (acknowledged < unsaved) {
        const change = unsaved;
        state.textContent = "Saving…";
        try {
          const answer = await fetch(`${link}/answer`, {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify({
              plan,
              position: Number(position),
              responses: responses(),
              seconds: elapsed(),
            }),
          });
          if (answer.status === 409 || answer.status === 404) {
            location.assign(link);
            return;
          }
          if (!answer.ok) throw new Error((await answer.json()).reason);
          reply = await answer.json();
          acknowledged = change;
          wait = 500;
          state.textContent = "Saved";
          state.classList.remove("trouble");
        } catch {
          state.textContent = "Not saved yet. Trying again…";
          state.classList.add("trouble");
          await new Promise((done) => setTimeout(done, wait));
          wait = Math.min(2 * wait, 5000);
        }
      }
    }

    async function proceed() {
      if (isTraining && !checked) {
        if (!complete()) return remind();
        await save();
        checked = true;
        feedback.hidden = false;
        feedback.classList.toggle("right", reply.right);
        feedback.textContent = `${reply.right ? "Right." : "Not quite."} ${reply.feedback}`;
        next.textContent = "Next";
        form.querySelectorAll("input").forEach((input) => (input.disabled = true));
        mark(null);
        feedback.scrollIntoView({ block: "nearest" });
        next.focus({ preventScroll: true });
        return;
      }
      if (!complete()) return remind();
      if (!isTraining) await save();
      location.assign(form.dataset.next);
    }

    function remind() {
      const open = rows.find((row) => !row.querySelector("input:checked"));
      state.textContent = "Answer the marked row first.";
      mark(open, true);
    }

    // The marked row is where the keys act.
    let marked = null;
    function mark(row, show) {
      marked?.classList.remove("marked");
      marked = row;
      row?.classList.add("marked");
      if (show) row?.scrollIntoView({ block: "nearest", behavior: "smooth" });
    }
    const firstOpen = () => rows.find((row) => !row.querySelector("input:checked")) ?? null;

    function settle() {
      next.setAttribute("aria-disabled", String(!complete()));
    }

    form.addEventListener("change", (event) => {
      const row = event.target.closest(".row");
      if (!row) return;
      mark(firstOpen() ?? row);
      settle();
      if (!isTraining) save();
    });
    form.addEventListener("focusin", (event) => {
      const row = event.target.closest(".row");
      if (row) mark(row);
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      proceed();
    });
    back?.addEventListener("click", async (event) => {
      event.preventDefault();
      if (Object.keys(responses()).length) await save();
      location.assign(back.href);
    });

    const stored = (value) => {
      try {
        if (value !== undefined) localStorage.setItem("shortcuts", value);
        return localStorage.getItem("shortcuts");
      } catch {
        return null;
      }
    };
    shortcuts.checked = stored() !== "off";
    const showKeys = () => document.body.classList.toggle("keys", shortcuts.checked);
    shortcuts.addEventListener("change", () => {
      stored(shortcuts.checked ? "on" : "off");
      showKeys();
    });
    showKeys();

    document.addEventListener("keydown", (event) => {
      if (!shortcuts.checked || event.ctrlKey || event.metaKey || event.altKey) return;
      const target = event.target;
      const own = target.matches("a, summary, button, #shortcuts");
      if (event.key === "Enter" && !own) {
        event.preventDefault();
        proceed();
      } else if (event.key === "Backspace" && back) {
        event.preventDefault();
        back.click();
      } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        // A radio button that has the focus keeps its own arrow keys.
        if (checked || target.matches("input[type=radio]") || own) return;
        event.preventDefault();
        const at = rows.indexOf(marked) + (event.key === "ArrowDown" ? 1 : -1);
        if (rows[at]) mark(rows[at], true);
      } else if (marked && !checked) {
        const value = choice(event.key.toLowerCase(), marked.dataset.side !== undefined);
        const input = value && marked.querySelector(`input[value="${value}"]`);
        if (!input) return;
        event.preventDefault();
        input.checked = true;
        if (document.activeElement?.matches("input[type=radio]")) document.activeElement.blur();
        input.dispatchEvent(new Event("change", { bubbles: true }));
        mark(firstOpen() ?? marked, true);
      }
    });

    function choice(key, rates) {
      if (rates) return /^[1-5]$/.test(key) ? key : null;
      return { a: "left", n: "tie", b: "right" }[key] ?? null;
    }

    mark(firstOpen());
    settle();
    form.dataset.ready = "yes";
  }
})();
