/** How a run goes, in a sentence for people who hear the page. */

import type { Column, Run } from "./run.svelte";
import { percent } from "./rule";

export function summary(run: Run): string {
  const n = run.settings.n;
  switch (run.state) {
    case "writing":
      return `Writing ${n} ${n === 1 ? "answer" : "answers"} by ${run.columns.length === 1 ? "BACo" : "base, aligned and BACo"}.`;
    case "stopped":
      return "Stopped. What was written so far stays.";
    case "failed":
      return "";
    case "done":
      return run.settled ? `Done. ${run.columns.map(ofColumn).join(" ")}` : "";
  }
}

function ofColumn(column: Column): string {
  const distinct = column.diversity ? `${distinctOf(column)} distinct answers, ` : "";
  const share = column.baseShare === null ? MIXED : `base share ${percent(column.baseShare)}`;
  return `${column.title}: ${distinct}${share}.`;
}

/** Where a combiner mixed both models' rows, no token has a source. */
export const MIXED = "mixed";

export function shareOf(share: number | null): string {
  return share === null ? MIXED : `base ${percent(share)}`;
}

export function distinctOf(column: Column): string {
  return `${column.diversity?.distinct ?? "–"} of ${column.answers.length}`;
}
