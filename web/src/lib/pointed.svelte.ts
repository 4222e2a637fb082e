/** The word that is looked at, with mouse, finger or keyboard: one card serves all answers. */

import { explain, type Why } from "./why";
import type { Answer, Column } from "./run.svelte";
import { tokensOf, type Word } from "./words";

export class Pointed {
  word = $state.raw<Word | null>(null);
  why = $state.raw<Why | null>(null);
  element = $state.raw<HTMLElement | null>(null);

  at(element: HTMLElement, word: Word, answer: Answer, column: Column): void {
    this.element = element;
    this.word = word;
    this.why = explain(tokensOf(word, answer.text, answer.tokens), word.source, column);
  }

  leave(): void {
    this.element = this.word = this.why = null;
  }
}
