/** Answers under a schema of an object, field by field. */

import { charsOf, wordsOf, type Char, type Piece, type Word } from "./words";

export const EXAMPLE = `{
  "type": "object",
  "properties": {
    "tip": { "type": "string", "pattern": "^Go to [A-Z][a-z]+, the [a-z]+ of [A-Z][a-z]+[.]$" },
    "days": { "type": "integer", "minimum": 1, "maximum": 14 },
    "kind": { "enum": ["beach", "city", "mountains"] }
  },
  "required": ["tip", "days", "kind"],
  "additionalProperties": false
}`;

export interface Field {
  name: string;
  words: Word[];
}

/** The properties that a schema of an object names; null for a schema of anything else. */
export function propertiesOf(schema: string): string[] | null {
  let root: unknown;
  try {
    root = JSON.parse(schema);
  } catch {
    return null;
  }
  const top = resolved(root, root);
  if (top === null || (top.type !== undefined && top.type !== "object")) return null;
  if (top.type === undefined && top.properties === undefined) return null;
  return Object.keys((top.properties as object | undefined) ?? {});
}

/** A schema as an object, after a reference at its top was followed. */
function resolved(schema: unknown, root: unknown): Record<string, unknown> | null {
  if (typeof schema !== "object" || schema === null) return null;
  const { $ref: reference } = schema as { $ref?: unknown };
  if (typeof reference !== "string") return schema as Record<string, unknown>;
  let part: unknown = root;
  for (const name of reference.replace(/^#\/?/, "").split("/")) {
    part = (part as Record<string, unknown> | undefined)?.[name];
  }
  return part === schema ? null : resolved(part, root);
}

/** The fields of an answer, as far as it is written. A text is shown without quotes and escapes. */
export function fieldsOf(pieces: readonly Piece[]): Field[] {
  const chars = charsOf(pieces);
  const text = chars.map((char) => char.text).join("");
  return members(text).map(({ name, from, to }) => {
    const value = chars.slice(from, to);
    return { name, words: wordsOf(text[from] === '"' ? unquoted(value) : value) };
  });
}

/** Where the values of a JSON object begin and end; the object may be cut anywhere. */
function members(text: string): { name: string; from: number; to: number }[] {
  const found = [];
  const key = /[\s{,]*("(?:[^"\\]|\\.)*")\s*:\s*/y;
  for (let match = key.exec(text); match; match = key.exec(text)) {
    const from = key.lastIndex;
    const to = endOfValue(text, from);
    found.push({ name: JSON.parse(match[1]!) as string, from, to });
    key.lastIndex = to;
  }
  return found;
}

function endOfValue(text: string, from: number): number {
  const part = /"(?:[^"\\]|\\.)*"?|[^]/y;
  part.lastIndex = from;
  let depth = 0;
  for (let at = from; at < text.length; at = part.lastIndex) {
    const found = part.exec(text)![0];
    if (depth === 0 && (found === "," || found === "}")) return at;
    if (found === "{" || found === "[") depth += 1;
    if (found === "}" || found === "]") depth -= 1;
  }
  return text.length;
}

/** The characters that a JSON text stands for. */
function unquoted(written: readonly Char[]): Char[] {
  const text = written.map((char) => char.text).join("");
  const part = /\\u[0-9a-fA-F]{4}|\\[^u]|[^"\\]/y;
  const chars = [];
  part.lastIndex = 1;
  for (let at = 1, match = part.exec(text); match; at = part.lastIndex, match = part.exec(text)) {
    const { source, start } = written[at]!;
    const shown = match[0].startsWith("\\") ? (JSON.parse(`"${match[0]}"`) as string) : match[0];
    chars.push({ text: shown, source, start, end: start + match[0].length });
  }
  return chars;
}
