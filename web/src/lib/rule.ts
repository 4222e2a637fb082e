/** What a router does, in a sentence with its threshold. The server knows the rules. */

import type { RouterEntry } from "./api";
import { familyOf, thresholdOf } from "./dial";

const rules = new Map<string, RouterEntry>();

/** Take the server's rules in. */
export function setRules(entries: readonly RouterEntry[]): void {
  for (const entry of entries) rules.set(entry.name, entry);
}

/** The rules of a spelling: the logit rule, if it has one, and the content rules. */
export function rulesOf(router: string): { logit: RouterEntry | null; contents: RouterEntry[] } {
  const named = familyOf(router)
    .split("-")
    .flatMap((name) => rules.get(name) ?? []);
  return {
    logit: named.find((rule) => !rule.keeps) ?? null,
    contents: named.filter((rule) => rule.keeps),
  };
}

export function percent(share: number): string {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "under 0.1%";
  const digits = value < 10 || value > 99 ? 1 : 0; // near the ends, tenths tell apart
  return `${Number(value.toFixed(digits))}%`;
}

/** A logit rule's sentence; its entry in the catalogue where it has none of its own. */
export function opening(rule: RouterEntry, gamma: number | null): string {
  if (!rule.page || gamma === null) return `${rule.name}: ${rule.sentence}.`;
  return rule.page.replaceAll("{percent}", percent(gamma)).replaceAll("{gamma}", String(gamma));
}

/** The router's rule for newcomers. */
export function sentenceOf(router: string): string {
  const family = familyOf(router);
  if (family === "Base") return "Only the base model speaks.";
  if (family === "Aligned") return "Only the aligned model speaks.";
  const { logit, contents } = rulesOf(router);
  const kept = contents.map((rule) => rule.keeps![1]).join(" and ");
  if (logit) {
    const open = opening(logit, thresholdOf(router));
    return kept ? `${open} Aligned keeps ${kept}.` : open;
  }
  return kept ? `Base speaks, but aligned keeps ${kept}.` : `${router}: as the link spells it.`;
}
