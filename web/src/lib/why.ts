/** Why a word came from where it came from, in a sentence. */

import type { Source, Token } from "./api";
import { familyOf, thresholdOf } from "./dial";

export interface Why {
  /** Probability of the word under each model: the product over its tokens; null if not told. */
  base: number | null;
  aligned: number | null;
  reason: string;
  signals: string;
}

/** What the content rules keep for the aligned model: of one word, and of all. */
export const KEPT: Record<string, { one: string; all: string }> = {
  Punc: {
    one: "punctuation, format or end of text",
    all: "punctuation, line breaks and the end of text",
  },
  FC: { one: "a function word", all: "function words (the, of, and, …)" },
  Role: { one: "of a role that Role keeps for aligned", all: "the roles that the table gives it" },
};

export function percent(share: number): string {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "under 0.1%";
  const digits = value < 10 || value > 99 ? 1 : 0; // near the ends, tenths tell apart
  return `${Number(value.toFixed(digits))}%`;
}

/** How a guess reads in a sentence: white space and end of text have no letters of their own. */
function quoted(text: string | null | undefined): string {
  if (!text) return "the end of text";
  if (text.includes("\n")) return "a line break";
  return text.trim() ? `“${text.trim()}”` : "a space";
}

export function explain(tokens: readonly Token[], source: Source, router: string): Why {
  const first = tokens[0];
  const known = tokens.length > 0 && tokens.every((t) => t.base != null && t.aligned != null);
  const product = (half: Source): number | null =>
    known ? tokens.reduce((p, token) => p * token[half]!, 1) : null;
  return {
    base: product("base"),
    aligned: product("aligned"),
    reason: reasonOf(first, source, router),
    signals:
      first?.max_base != null && first.entropy_base != null
        ? `The base model’s best guess here: ${quoted(first.predicted)} at ` +
          `${percent(first.max_base)}; its entropy: ${first.entropy_base.toFixed(2)} nats.`
        : "",
  };
}

function reasonOf(token: Token | undefined, source: Source, router: string): string {
  const family = familyOf(router);
  if (family === "Base" || family === "Aligned") {
    return `This column is the ${source} model alone: there is nothing to choose.`;
  }
  if (token?.max_base == null) return "The server did not say why.";
  if (!token.asked) {
    return `Inside a word: a model speaks whole words, so ${source} went on without the router.`;
  }
  const chosen = `So ${token.wanted} speaks.`;
  if (family === "Rand") {
    return `Rand draws: base with probability ${thresholdOf(router)}. ${chosen}`;
  }
  if (family === "Nudging") {
    return `${confidence(token, thresholdOf(router)!)} Nudging lets the aligned model help where base is unsure. ${chosen}`;
  }
  const predicted = router.includes("predict=")
    ? "the predicted token"
    : `the base model’s best guess, ${quoted(token.predicted)},`;
  return `${ruleOf(token, family.split("-"), thresholdOf(router), predicted)} ${chosen}`;
}

function confidence(token: Token, gamma: number): string {
  const sure = token.max_base! >= gamma;
  return (
    `The base model is ${sure ? "sure" : "unsure"}: its best guess has ` +
    `${percent(token.max_base!)}, ${sure ? "not below" : "below"} γ = ${percent(gamma)}.`
  );
}

/** The rule that decided: a lock where the logit rule alone would have let base speak. */
function ruleOf(token: Token, rules: string[], gamma: number | null, predicted: string): string {
  const locks = rules.filter((rule) => rule in KEPT);
  const open = opens(token, rules, gamma);
  if (open && token.wanted === "aligned" && locks.length) return locked(locks, predicted);
  if (rules.includes("P")) return confidence(token, gamma!);
  if (rules.includes("H")) {
    const above = token.entropy_base! > gamma!;
    return (
      `The base model ${above ? "sees many ways on" : "sees few ways on"}: its entropy is ` +
      `${token.entropy_base!.toFixed(2)} nats, ${above ? "above" : "not above"} γ = ${gamma}.`
    );
  }
  if (rules.includes("Gap")) {
    if (token.wanted === "base") {
      return `The base model’s entropy is more than γ = ${gamma} nats above the aligned model’s.`;
    }
    const lock = locks.length ? `, or ${locks.join("-")} locks this word` : "";
    return `The base model’s entropy is not γ = ${gamma} nats above the aligned model’s${lock}.`;
  }
  if (locks.length) return `No rule keeps ${predicted} for aligned.`;
  return `The rule ${rules.join("-")} named ${token.wanted}.`;
}

/** Would the logit rule alone have let base speak? */
function opens(token: Token, rules: string[], gamma: number | null): boolean {
  if (rules.includes("P")) return token.max_base! < gamma!;
  if (rules.includes("H")) return token.entropy_base! > gamma!;
  return !rules.includes("Gap");
}

function locked(locks: string[], predicted: string): string {
  const kinds = locks.map((lock) => KEPT[lock]!.one).join(" or ");
  const verb = locks.length > 1 ? "lock" : "locks";
  return `${locks.join(" and ")} ${verb} this word to aligned: ${predicted} is ${kinds}.`;
}
