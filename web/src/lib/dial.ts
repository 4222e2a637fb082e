/** The dial of a router: diversity from 0 to 1, and the threshold γ behind it. */

import type { RouterEntry } from "./api";

type Points = readonly (readonly [number, number])[];

/** y at x on a line through points whose x rise or fall; the first place where x is reached. */
function interpolate(points: Points, x: number): number {
  const first = points[0]!;
  const falling = points.at(-1)![0] < first[0];
  const reached = (at: number): boolean => (falling ? at <= x : at >= x);
  let before = first;
  for (const point of points) {
    if (reached(point[0])) {
      const span = point[0] - before[0];
      return span === 0 ? point[1] : before[1] + ((x - before[0]) / span) * (point[1] - before[1]);
    }
    before = point;
  }
  return before[1];
}

/** γ at a position of the dial, rounded as routers are written. */
export function thresholdAt(dial: Points, diversity: number): number {
  return Number(interpolate(dial, diversity).toFixed(4));
}

/** The position of the dial at which a threshold lies. */
export function diversityAt(dial: Points, threshold: number): number {
  return interpolate(
    dial.map(([diversity, gamma]) => [gamma, diversity] as const),
    threshold,
  );
}

/** The name before the colon: P-Punc of P-Punc:0.4. */
export function familyOf(spelling: string): string {
  return spelling.split(":")[0]!.trim();
}

/** Does γ move while an answer is written, as in P:share=0.2? */
export function adapts(spelling: string): boolean {
  return /[:,]\s*(share|distinct|siblings)\s*=/i.test(spelling);
}

/** γ of a spelling, null where it gives none or none that stays. */
export function thresholdOf(spelling: string): number | null {
  if (adapts(spelling)) return null;
  for (const part of spelling.split(":")[1]?.split(",") ?? []) {
    const number = Number(part);
    if (part.trim() && !Number.isNaN(number)) return number;
  }
  return null;
}

/** A link's spelling with the router's name as it is listed, and with γ where it leaves that out. */
export function completed(spelling: string, routers: readonly RouterEntry[]): string {
  const family = familyOf(spelling);
  const entry = routers.find(({ name }) => name.toLowerCase() === family.toLowerCase());
  if (!entry) return spelling;
  const [, given] = spelling.split(/:(.*)/s);
  if (given === undefined) return entry.takes_threshold ? spellingOf(entry) : entry.name;
  return `${entry.name}:${given}`;
}

/** How a router is written when it is chosen: at the middle of its dial, or as its example says. */
export function spellingOf(entry: RouterEntry): string {
  return entry.takes_threshold && entry.default !== null
    ? `${entry.name}:${entry.default}`
    : entry.example;
}
