import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig, type Plugin } from "vite";

const NO_SOURCES = ["node_modules", "README.md"];

/** SHA-256 over path and content of everything that the page is made from. */
function fingerprint(root: string): string {
  const digest = createHash("sha256");
  const paths = readdirSync(root, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) =>
      join(entry.parentPath, entry.name)
        .slice(root.length + 1)
        .replaceAll("\\", "/"),
    )
    .filter((path) => !NO_SOURCES.includes(path.split("/")[0]!))
    .sort();
  for (const path of paths) {
    digest
      .update(`${path}\0`)
      .update(readFileSync(join(root, path)))
      .update("\0");
  }
  return digest.digest("hex");
}

/** The committed page names its sources, so that a test can tell when it was not made anew. */
function sources(): Plugin {
  return {
    name: "sources",
    transformIndexHtml: () => [
      {
        tag: "meta",
        attrs: { name: "sources", content: fingerprint(import.meta.dirname) },
        injectTo: "head",
      },
    ],
  };
}

/** Nothing but this server: no prompt, answer or mistake can make the page ask anybody else. */
function policy(): Plugin {
  return {
    name: "policy",
    apply: "build", // while developing, Vite puts scripts and styles into the page
    transformIndexHtml: () => [
      {
        tag: "meta",
        attrs: { "http-equiv": "Content-Security-Policy", content: "default-src 'self'" },
        injectTo: "head-prepend",
      },
    ],
  };
}

const server = process.env.BACO_SERVER ?? "http://127.0.0.1:8000";

export default defineConfig({
  base: "/page/",
  plugins: [svelte(), sources(), policy()],
  build: {
    outDir: "../src/baco/serve/page",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
  },
  server: { proxy: { "/baco": server, "/v1": server } },
});
