/** The server's side of the page: what it offers, what it streams, and its errors in words. */

import { EventSourceParserStream } from "eventsource-parser/stream";

export type Source = "base" | "aligned";

export interface RouterEntry {
  name: string;
  example: string;
  sentence: string;
  takes_threshold: boolean;
  low: number | null;
  high: number | null;
  /** γ at the middle of the dial. */
  default: number | null;
  /** The calibration: [diversity in 0…1, γ], diversity rising; null where none was made. */
  dial: [number, number][] | null;
  /** A sentence about a logit rule, with {gamma} or {percent} in it. */
  page: string | null;
  /** The quantity that a logit rule compares with γ, and where it lies when base speaks. */
  compares: ["max_base" | "entropy_base" | string, "below" | "above"] | null;
  /** What a content rule keeps for aligned: of one word, and of all. */
  keeps: [string, string] | null;
}

export interface Info {
  pair: string;
  version: string;
  default_router: string;
  examples: string[];
  limits: { n: number; max_tokens: number };
}

/** A token as the router saw it; probabilities in 0…1, entropy in nats. */
export interface Token {
  text: string;
  source: Source | null;
  base?: number | null;
  aligned?: number | null;
  max_base?: number | null;
  entropy_base?: number | null;
  predicted?: string | null;
  asked?: boolean | null;
  wanted?: Source | null;
}

export interface Diversity {
  distinct: number;
  distinct_2: number;
  embedding_distance: number | null;
  why_not: string | null;
}

/** What one chunk brings to one answer. */
export interface Delta {
  index: number;
  /** What the aligned model writes before the answer. */
  thinking: string;
  sources: [string, Source | null][];
  tokens: Token[];
  /** Null where a combiner mixed both models' rows. */
  baseShare: number | null;
  finish: string | null;
}

/** An error of the server, or of the way to it, in words for the reader. */
export class ServerError extends Error {
  constructor(
    message: string,
    readonly status = 0,
  ) {
    super(message);
  }

  /** May the same request do better later? */
  get passing(): boolean {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

let key = "";

/** The API key for every later request. */
export function useKey(given: string): void {
  key = given;
}

async function ask(path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached. Is “baco serve” still running?");
  }
  if (!response.ok) throw await inWords(response);
  return response;
}

async function inWords(response: Response): Promise<ServerError> {
  const told = (await response.json().catch(() => null)) as {
    error?: { message?: string };
  } | null;
  const message = sentence(told?.error?.message ?? `The server answered ${response.status}.`);
  const wait = response.headers.get("Retry-After");
  const mend = response.status === 429 && wait ? ` Try again in ${wait} s.` : "";
  return new ServerError(message + mend, response.status);
}

/** Messages are told for people and for programs: no capital, no full stop. */
function sentence(message: string): string {
  const whole = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?)]$/.test(whole) ? whole : `${whole}.`;
}

export async function getInfo(): Promise<Info> {
  return (await ask("/baco/info")).json();
}

export async function getRouters(): Promise<RouterEntry[]> {
  return (await ask("/baco/routers")).json();
}

export async function measure(texts: string[], signal?: AbortSignal): Promise<Diversity> {
  return (await ask("/baco/diversity", { texts }, signal)).json();
}

/** What is wrong with a JSON schema, in the server's words; null if nothing is. Whatever else fails is
 * left to the request for answers, which meets it too.
 */
export async function faultOf(schema: string): Promise<string | null> {
  try {
    await ask("/baco/schema", { json: schema });
  } catch (error) {
    if (error instanceof ServerError && error.status === 400) return error.message;
  }
  return null;
}

interface Choice {
  index: number;
  finish_reason: string | null;
  delta?: { reasoning_content?: string | null };
  baco?: {
    sources?: [string, Source | null][];
    base_share?: number | null;
    why?: Token[] | null;
  } | null;
}

/** Stream a chat completion, chunk by chunk.
 *
 * Throws ServerError where the server refuses or breaks off, AbortError where `signal` asks to stop.
 */
export async function* stream(request: object, signal: AbortSignal): AsyncGenerator<Delta> {
  const body = { model: "baco", stream: true, explain: true, ...request };
  const response = await ask("/v1/chat/completions", body, signal);
  const events = response
    .body!.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, BufferSource>)
    .pipeThrough(new EventSourceParserStream());
  const reader = events.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((error: unknown) => {
      if (signal.aborted) throw error;
      throw new ServerError("The connection broke off before the answers were whole.");
    });
    if (done) throw new ServerError("The server broke off before the answers were whole.");
    if (value.data === "[DONE]") return;
    const chunk = JSON.parse(value.data) as { choices?: Choice[]; error?: { message: string } };
    if (chunk.error) throw new ServerError(sentence(chunk.error.message));
    for (const choice of chunk.choices ?? []) {
      yield {
        index: choice.index,
        thinking: choice.delta?.reasoning_content ?? "",
        sources: choice.baco?.sources ?? [],
        tokens: choice.baco?.why ?? [],
        baseShare: choice.baco ? (choice.baco.base_share ?? null) : 0,
        finish: choice.finish_reason,
      };
    }
  }
}
