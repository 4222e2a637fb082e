/** An answer's text as words, each with its source and the tokens it is made of. */

import type { Source, Token } from "./api";

export interface Piece {
  text: string;
  /** Null where a combiner mixed both models' rows. */
  source: Source | null;
}

/** A character of the text that is shown; the answer may spell it otherwise, as JSON does. */
export interface Char extends Piece {
  /** Where its spelling begins and ends in the answer's text. */
  start: number;
  end: number;
}

export interface Word extends Char {
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

/** The characters of an answer, by UTF-16 units. */
export function charsOf(pieces: readonly Piece[]): Char[] {
  let start = 0;
  return pieces.flatMap(({ text, source }) =>
    text.split("").map((char) => ({ text: char, source, start, end: (start += 1) })),
  );
}

export function wordsOf(chars: readonly Char[]): Word[] {
  const words: Word[] = [];
  for (let from = 0, to = 0; from < chars.length; from = to) {
    const { source } = chars[from]!;
    while (chars[to]?.source === source) to += 1;
    const text = chars.slice(from, to).map((char) => char.text);
    for (const { segment, index } of segmenter.segment(text.join(""))) {
      const first = from + index;
      const { start } = chars[first]!;
      const { end } = chars[first + segment.length - 1]!;
      words.push({ text: segment, source, start, end, space: !segment.trim() });
    }
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
    if (end > from && at < word.end + lead) found.push(token);
    at = end;
  }
  return found;
}
