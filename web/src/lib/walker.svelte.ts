/** Walking through the words of an answer: Tab comes to one of them, arrow keys move on from it. */

import type { Pointed } from "./pointed.svelte";
import type { Answer, Column } from "./run.svelte";
import type { Word } from "./words";

export class Walker {
  #at = $state(0);
  readonly #words: () => readonly Word[];
  readonly #answer: () => [Pointed, Answer, Column];
  readonly #stops: number[] = $derived.by(() =>
    this.#words().flatMap((word, index) => (word.space ? [] : [index])),
  );
  /** Which word Tab comes to. */
  readonly current: number | undefined = $derived.by(() =>
    this.#stops.includes(this.#at) ? this.#at : this.#stops[0],
  );

  /** `words` are those of the element whose events come here, each in an element with its index in
   * `data-word`.
   */
  constructor(words: () => readonly Word[], answer: () => [Pointed, Answer, Column]) {
    this.#words = words;
    this.#answer = answer;
  }

  enter = (event: Event): void => {
    const element = (event.target as HTMLElement).closest<HTMLElement>("[data-word]");
    const word = element && this.#words()[Number(element.dataset.word)];
    if (!element || !word) return;
    if (event.type === "focusin") this.#at = Number(element.dataset.word);
    const [pointed, answer, column] = this.#answer();
    pointed.at(element, word, answer, column);
  };

  leave = (): void => this.#answer()[0].leave();

  walk = (event: KeyboardEvent): void => {
    const at = this.#stops.indexOf(this.current ?? 0);
    const places: Record<string, number> = {
      ArrowRight: at + 1,
      ArrowLeft: at - 1,
      Home: 0,
      End: this.#stops.length - 1,
    };
    if (event.key === "Escape") this.leave();
    const next = this.#stops[places[event.key] ?? -1];
    if (next === undefined) return;
    event.preventDefault();
    const around = event.currentTarget as HTMLElement;
    around.querySelector<HTMLElement>(`[data-word="${next}"]`)?.focus();
  };
}
