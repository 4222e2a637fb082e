/** What is asked, and its spelling in the page's address.
 *
 * Settings stand behind the #: browsers never send that part, so no prompt ends up in a log.
 */

export interface Settings {
  prompt: string;
  router: string;
  n: number;
  seed: number;
  compare: boolean;
  /** The JSON schema of the answers, as it was typed; blank for none. */
  schema: string;
  /** null: as the pair has it. */
  temperature: number | null;
  min_p: number | null;
  max_tokens: number | null;
}

export const OPTIONAL = ["temperature", "min_p", "max_tokens"] as const;

export function defaults(): Settings {
  return {
    prompt: "",
    router: "",
    n: 6,
    seed: 1,
    compare: true,
    schema: "",
    temperature: null,
    min_p: null,
    max_tokens: null,
  };
}

export function toHash(settings: Settings): string {
  const told = new URLSearchParams({
    prompt: settings.prompt,
    router: settings.router,
    n: String(settings.n),
    seed: String(settings.seed),
    compare: settings.compare ? "1" : "0",
  });
  for (const name of OPTIONAL) {
    const value = settings[name];
    if (value !== null) told.set(name, String(value));
  }
  if (settings.schema.trim()) told.set("schema", settings.schema);
  return `#${told}`;
}

/** What a link asks for, null where it asks for nothing. What it leaves out stays as it is. */
export function fromHash(hash: string, before: Settings): Settings | null {
  const told = new URLSearchParams(hash.replace(/^#/, ""));
  const prompt = told.get("prompt");
  if (!prompt) return null;
  const settings = { ...before, prompt };
  settings.router = told.get("router") || before.router;
  settings.schema = told.get("schema") ?? before.schema;
  if (told.has("compare")) settings.compare = told.get("compare") !== "0";
  for (const name of ["n", "seed", ...OPTIONAL] as const) {
    const text = told.get(name);
    if (text !== null && text !== "") settings[name] = Number(text);
  }
  return settings;
}

/** The body of a request, for one router. */
export function toRequest(settings: Settings, router: string): object {
  const request: Record<string, unknown> = {
    messages: [{ role: "user", content: settings.prompt }],
    router,
    n: settings.n,
    seed: settings.seed,
  };
  if (settings.schema.trim()) request.structured_outputs = { json: settings.schema };
  for (const name of OPTIONAL) {
    if (settings[name] !== null) request[name] = settings[name];
  }
  return request;
}

/** What is wrong with settings before they are sent, in a sentence; the server checks the rest. */
export function problem(settings: Settings, limits: { n: number }): string | null {
  const { prompt, n, seed } = settings;
  if (!prompt.trim()) return "The prompt is empty: type one, or choose an example.";
  if (!Number.isInteger(n) || n < 1 || n > limits.n) {
    return `Answers: a whole number from 1 to ${limits.n}, please.`;
  }
  if (!Number.isSafeInteger(seed) || seed < 0) {
    return `Seed: a whole number from 0 to ${Number.MAX_SAFE_INTEGER}, please.`;
  }
  for (const name of OPTIONAL) {
    if (Number.isNaN(settings[name])) return `${name.replace("_", " ")} is no number.`;
  }
  return null;
}
