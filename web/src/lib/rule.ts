/** What a router does, in a sentence with its threshold. */

import type { RouterEntry } from "./api";
import { familyOf, thresholdOf } from "./dial";
import { KEPT, percent } from "./why";

function opening(rule: string, gamma: number): string | null {
  switch (rule) {
    case "P":
      return `Base speaks where it is unsure: where its best guess has less than ${percent(gamma)}.`;
    case "H":
      return `Base speaks where it sees many ways on: where its entropy is above ${gamma} nats.`;
    case "Gap":
      return (
        "Base speaks where alignment took diversity away: where its entropy is more than " +
        `${gamma} nats above the aligned model’s.`
      );
    case "Rand":
      return `Base speaks ${percent(gamma)} of the time, by chance, whatever the models think.`;
    case "Nudging":
      return `Aligned speaks where base is unsure: where base’s best guess has less than ${percent(gamma)}.`;
    default:
      return null;
  }
}

/** The router's rule for newcomers; the catalogue's sentence where the page knows no better. */
export function sentenceOf(router: string, entry: RouterEntry | undefined): string {
  const rules = familyOf(router).split("-");
  const gamma = thresholdOf(router);
  if (rules[0] === "Base") return "Only the base model speaks.";
  if (rules[0] === "Aligned") return "Only the aligned model speaks.";
  const locks = rules.flatMap((rule) => KEPT[rule]?.all ?? []);
  const logit = rules.filter((rule) => !(rule in KEPT));
  const open = logit.length === 1 && gamma !== null ? opening(logit[0]!, gamma) : null;
  const kept = locks.join(" and ");
  if (open) return kept ? `${open} Aligned keeps ${kept}.` : open;
  if (!logit.length) return `Base speaks, but aligned keeps ${kept}.`;
  return entry ? `${router}: ${entry.sentence}.` : `${router}: as the link spells it.`;
}
