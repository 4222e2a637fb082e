/** Taking answers along: as text, as JSON, as a link. */

import type { Info } from "./api";
import type { Column, Run } from "./run.svelte";

/** Numbered answers, under a heading for each method where there are several. */
export function asText(run: Run): string {
  return run.columns
    .map((column) => {
      const answers = column.answers.map((answer, index) => `${index + 1}. ${answer.text}`);
      const heading = run.columns.length > 1 ? `${column.title} (${column.router})\n\n` : "";
      return heading + answers.join("\n\n");
    })
    .join("\n\n");
}

/** Everything about a run: what was asked, every answer with its sources, the meters. */
export function asJson(run: Run, info: Info): string {
  const { pair, version } = info;
  const methods = run.columns.map(ofColumn);
  return JSON.stringify({ baco: version, pair, settings: run.settings, methods }, null, 1);
}

function ofColumn(column: Column): object {
  return {
    method: column.title,
    router: column.router,
    state: column.state,
    base_share: column.baseShare,
    diversity: column.diversity,
    answers: column.answers.map((answer, sample) => ({
      sample,
      text: answer.text,
      finish_reason: answer.finish,
      base_share: answer.baseShare,
      pieces: answer.pieces,
      tokens: answer.tokens,
    })),
  };
}

export function download(name: string, text: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** Copy to the clipboard; false where the browser will not. */
export async function copy(text: string): Promise<boolean> {
  // Over plain HTTP from another machine there is no clipboard API.
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
