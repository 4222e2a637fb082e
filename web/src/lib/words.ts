/** An answer's text as words, each with its source and the tokens it is made of. */

import type { Source, Token } from "./api";

export interface Piece {
  text: string;
  /** Null where a combiner mixed both models' rows. */
  source: Source | null;
}

export interface Word extends Piece {
  /** Place of its first character in the answer's text. */
  start: number;
  /** Space is not a word: it takes no focus and no underline. */
  space: boolean;
}

// Knows where words end in scripts written without spaces, too.
const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });

/** Add text to pieces; neighbours of one source are one piece. */
export function join(pieces: readonly Piece[], added: readonly [string, Source | null][]): Piece[] {
  const joined = [...pieces];
  for (const [text, source] of added) {
    const last = joined.at(-1);
    if (last && last.source === source)
      joined[joined.length - 1] = { text: last.text + text, source };
    else if (text) joined.push({ text, source });
  }
  return joined;
}

export function split(pieces: readonly Piece[]): Word[] {
  const words: Word[] = [];
  let start = 0;
  for (const { text, source } of pieces) {
    for (const { segment, index } of segmenter.segment(text)) {
      words.push({ text: segment, source, start: start + index, space: !segment.trim() });
    }
    start += text.length;
  }
  return words;
}

/** The tokens that spell a word.
 *
 * Tokens spell the text but for the space before it and what was cut off its end.
 */
export function tokensOf(word: Word, text: string, tokens: readonly Token[]): Token[] {
  const spelled = tokens.map((token) => token.text).join("");
  const lead = spelled.startsWith(text) ? 0 : spelled.length - spelled.trimStart().length;
  const from = word.start + lead;
  const found: Token[] = [];
  let at = 0;
  for (const token of tokens) {
    const end = at + token.text.length;
    if (end > from && at < from + word.text.length) found.push(token);
    at = end;
  }
  return found;
}
