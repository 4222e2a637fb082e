/** One press of the button: up to three methods on the same prompt and seed, as they stream in. */

import { measure, ServerError, stream, type Diversity, type Token } from "./api";
import { toRequest, type Settings } from "./settings";
import { join, type Piece } from "./words";

const METER_PAUSE = 700; // least milliseconds between two readings of the live meters
const METER_SHARE = 3; // readings that cost the server much are read less often

export type State = "writing" | "done" | "stopped" | "failed";

export class Answer {
  thinking = $state("");
  pieces = $state.raw<Piece[]>([]);
  finish = $state<string | null>(null);
  /** What the router saw, token by token: read when a word is looked at, so not reactive. */
  tokens: Token[] = [];
  baseShare = $state<number | null>(0);
  text = $derived(this.pieces.map((piece) => piece.text).join(""));
  /** The text but for how its white space runs: what makes answers distinct. */
  words = $derived(this.text.split(/\s+/).filter(Boolean).join(" "));
}

const METHODS = {
  base: { title: "Base alone", sentence: "diverse, careless" },
  aligned: { title: "Aligned alone", sentence: "well written, all alike" },
  baco: { title: "BACo", sentence: "both, word by word" },
} as const;

/** The n answers of one method, their meters, and how it goes. */
export class Column {
  readonly title: string;
  readonly sentence: string;
  answers: Answer[];
  state = $state<State>("writing");
  error = $state<ServerError | null>(null);
  diversity = $state.raw<Diversity | null>(null);
  /** Has it ended, the last reading of its meters included? */
  settled = $state(false);
  baseShare = $derived.by(() => this.#share());
  readonly #controller = new AbortController();
  #whole: Promise<void> | null = null;

  constructor(
    readonly kind: keyof typeof METHODS,
    readonly router: string,
    n: number,
    /** Is text forced where a schema allows no other? */
    readonly structured = false,
  ) {
    ({ title: this.title, sentence: this.sentence } = METHODS[kind]);
    this.answers = Array.from({ length: n }, () => new Answer());
  }

  /** Base share over all tokens of the answers; null where a combiner mixed both models. */
  #share(): number | null {
    let base = 0;
    let all = 0;
    for (const answer of this.answers) {
      if (answer.baseShare === null) return null;
      const count = answer.pieces.length ? answer.tokens.length || answer.text.length : 0;
      base += answer.baseShare * count;
      all += count;
    }
    return all ? base / all : 0;
  }

  /** Draw the answers, once; resolves when they are written, stopped or failed. */
  write(settings: Settings): Promise<void> {
    this.#whole ??= Promise.all([this.#write(settings), this.#meter()]).then(() => {
      this.settled = true;
    });
    return this.#whole;
  }

  stop(): void {
    this.#controller.abort();
  }

  async #write(settings: Settings): Promise<void> {
    const signal = this.#controller.signal;
    try {
      for await (const delta of stream(toRequest(settings, this.router), signal)) {
        const answer = this.answers[delta.index];
        if (!answer) continue;
        answer.thinking += delta.thinking;
        answer.tokens.push(...delta.tokens);
        if (delta.sources.length) answer.pieces = join(answer.pieces, delta.sources);
        answer.baseShare = delta.baseShare;
        answer.finish = delta.finish ?? answer.finish;
      }
      this.state = "done";
    } catch (error) {
      this.state = signal.aborted ? "stopped" : "failed";
      if (!signal.aborted) this.error = inWords(error);
    }
  }

  /** Read the meters while the answers grow, and once when they have ended. */
  async #meter(): Promise<void> {
    for (;;) {
      const state = this.state;
      const began = performance.now();
      const texts = this.answers.map((answer) => answer.text).filter(Boolean);
      try {
        if (texts.length) this.diversity = await measure(texts);
      } catch {
        // The meters are an extra: the answers' own errors are the ones to tell.
      }
      if (state !== "writing") return;
      const cost = performance.now() - began;
      await pause(Math.max(METER_PAUSE, METER_SHARE * cost), () => this.state !== "writing");
    }
  }
}

export class Run {
  columns: Column[];
  state = $derived.by(() => this.#state());

  /** `alone` are the single models' columns of an earlier run: same seed, same answers. */
  constructor(
    readonly settings: Settings,
    readonly number: number,
    alone: readonly Column[] = [],
  ) {
    const { n, router, compare } = settings;
    const structured = settings.schema.trim() !== "";
    const baco = new Column("baco", router, n, structured);
    this.columns = !compare
      ? [baco]
      : [
          alone[0] ?? new Column("base", "Base", n, structured),
          alone[1] ?? new Column("aligned", "Aligned", n, structured),
          baco,
        ];
  }

  get baco(): Column {
    return this.columns.at(-1)!;
  }

  get settled(): boolean {
    return this.columns.every(({ settled }) => settled);
  }

  /** Is there anything to show, or to come? */
  get promising(): boolean {
    return this.columns.some(
      ({ state, answers }) => state === "writing" || answers.some(({ text }) => text),
    );
  }

  /** What went wrong, and in which columns where it did not in all. */
  get trouble(): string | null {
    const failed = this.columns.filter(({ error }) => error);
    const message = failed.at(-1)?.error?.message;
    if (!message) return null;
    const titles = failed.map(({ title }) => title).join(", ");
    return failed.length < this.columns.length ? `${titles}: ${message}` : message;
  }

  /** May asking the same again mend it? */
  get passing(): boolean {
    return this.columns.some(({ error }) => error?.passing);
  }

  /** Does the server ask for an API key? */
  get refused(): boolean {
    return this.columns.some(({ error }) => error?.status === 401);
  }

  #state(): State {
    const states = this.columns.map((column) => column.state);
    return (["writing", "failed", "stopped"] as const).find((s) => states.includes(s)) ?? "done";
  }

  async start(): Promise<void> {
    await Promise.all(this.columns.map((column) => column.write(this.settings)));
  }

  stop(): void {
    for (const column of this.columns) column.stop();
  }

  /** Make room for a run with other settings; gives the columns that it may show as they are. */
  handOver(next: Settings): Column[] {
    const same = JSON.stringify({ ...this.settings, router: next.router });
    const kept = same === JSON.stringify(next) ? this.columns.slice(0, -1) : [];
    const usable = kept.every(({ state }) => state === "writing" || state === "done") ? kept : [];
    for (const column of this.columns) if (!usable.includes(column)) column.stop();
    return usable;
  }
}

function inWords(error: unknown): ServerError {
  if (error instanceof ServerError) return error;
  return new ServerError(`The page could not read the server’s answer (${String(error)}).`);
}

/** Wait, but no longer than until `over`. */
async function pause(milliseconds: number, over: () => boolean): Promise<void> {
  const end = performance.now() + milliseconds;
  while (performance.now() < end && !over()) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
