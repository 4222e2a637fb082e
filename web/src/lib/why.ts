/** Why a word came from where it came from, in a sentence. */

import type { RouterEntry, Source, Token } from "./api";
import { familyOf, thresholdOf } from "./dial";
import { opening, percent, rulesOf } from "./rule";

export interface Why {
  /** Probability of the word under each model: the product over its tokens; null if not told. */
  base: number | null;
  aligned: number | null;
  reason: string;
  signals: string;
}

/** How a guess reads in a sentence: white space and end of text have no letters of their own. */
function quoted(text: string | null | undefined): string {
  if (!text) return "the end of text";
  if (text.includes("\n")) return "a line break";
  return text.trim() ? `“${text.trim()}”` : "a space";
}

/** How the tokens of an answer came about. */
interface Origin {
  router: string;
  /** Is text forced where a schema allows no other? */
  structured: boolean;
}

export function explain(tokens: readonly Token[], source: Source | null, origin: Origin): Why {
  const first = tokens[0];
  const known = tokens.length > 0 && tokens.every((t) => t.base != null && t.aligned != null);
  const product = (half: Source): number | null =>
    known ? tokens.reduce((p, token) => p * token[half]!, 1) : null;
  return {
    base: product("base"),
    aligned: product("aligned"),
    reason: reasonOf(first, source, origin),
    signals:
      first?.max_base != null && first.entropy_base != null
        ? `The base model’s best guess here: ${quoted(first.predicted)} at ` +
          `${percent(first.max_base)}; its entropy: ${first.entropy_base.toFixed(2)} nats.`
        : "",
  };
}

function reasonOf(token: Token | undefined, source: Source | null, origin: Origin): string {
  const { router, structured } = origin;
  if (source === null) return `Drawn from both models’ distributions at once, by ${router}.`;
  const family = familyOf(router);
  if (family === "Base" || family === "Aligned") {
    return `This column is the ${source} model alone: there is nothing to choose.`;
  }
  if (token?.max_base == null) return "The server did not say why.";
  if (!token.asked) {
    const or = structured ? " Or the schema allows nothing else here." : "";
    return `Inside a word: a model speaks whole words, so ${source} went on without the router.${or}`;
  }
  const predicted = router.includes("predict=")
    ? "the predicted token"
    : `the base model’s best guess, ${quoted(token.predicted)},`;
  return `${ruleOf(token, router, predicted)} So ${token.wanted} speaks.`;
}

/** The rule that decided: a lock where the logit rule alone would have let base speak. */
function ruleOf(token: Token, router: string, predicted: string): string {
  const { logit, contents } = rulesOf(router);
  const gamma = thresholdOf(router);
  if (token.wanted === "aligned" && contents.length && opens(token, logit, gamma)) {
    return locked(contents, predicted);
  }
  if (logit?.compares && gamma !== null) return comparison(token, logit.compares[0], gamma);
  if (logit) {
    const lock = contents.map((rule) => rule.name).join("-");
    const or = lock && token.wanted === "aligned" ? ` Or ${lock} locks this word.` : "";
    return opening(logit, gamma) + or;
  }
  if (contents.length) return `No rule keeps ${predicted} for aligned.`;
  return `The rule ${familyOf(router)} named ${token.wanted}.`;
}

function comparison(token: Token, quantity: string, gamma: number): string {
  if (quantity === "max_base") {
    const sure = token.max_base! >= gamma;
    return (
      `The base model is ${sure ? "sure" : "unsure"}: its best guess has ` +
      `${percent(token.max_base!)}, ${sure ? "not below" : "below"} γ = ${percent(gamma)}.`
    );
  }
  const above = token.entropy_base! > gamma;
  return (
    `The base model ${above ? "sees many ways on" : "sees few ways on"}: its entropy is ` +
    `${token.entropy_base!.toFixed(2)} nats, ${above ? "above" : "not above"} γ = ${gamma}.`
  );
}

/** Would the logit rule alone surely have let base speak? */
function opens(token: Token, logit: RouterEntry | null, gamma: number | null): boolean {
  if (!logit) return true;
  if (!logit.compares || gamma === null) return false;
  const [quantity, side] = logit.compares;
  const value = quantity === "max_base" ? token.max_base! : token.entropy_base!;
  return side === "below" ? value < gamma : value >= gamma;
}

function locked(locks: readonly RouterEntry[], predicted: string): string {
  const kinds = locks.map((lock) => lock.keeps![0]).join(" or ");
  const verb = locks.length > 1 ? "lock" : "locks";
  const names = locks.map((lock) => lock.name).join(" and ");
  return `${names} ${verb} this word to aligned: ${predicted} is ${kinds}.`;
}
