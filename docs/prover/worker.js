// Python in a worker: loaded on demand, and asked through one function that takes and gives JSON.
let python, ask, sizes;
let loaded = 0, total = 0;
const plain = self.fetch.bind(self);
const tell = (what) => postMessage({ progress: what, loaded, total });

async function counted(given) {
  const answer = await plain(given);
  const url = String(given.url ?? given);
  if (!answer.ok) throw new Error(`${new URL(url, location.href).pathname.split("/").pop()}: ${answer.status} ${answer.statusText}`);
  const type = url.endsWith(".wasm") ? "application/wasm" : answer.headers.get("content-type") ?? "application/octet-stream";
  const count = new TransformStream({ transform(chunk, out) { loaded += chunk.length; tell("loading Python"); out.enqueue(chunk); } });
  return new Response(answer.body.pipeThrough(count), { headers: { "content-type": type } });
}
self.fetch = counted;

const bytes = async (url) => new Uint8Array(await (await counted(url)).arrayBuffer());

async function start() {
  sizes = await (await plain("pyodide/files.json")).json();
  const scripts = sizes["pyodide.mjs"] + sizes["pyodide.asm.mjs"];
  total = Object.values(sizes).reduce((a, b) => a + b) - sizes["sympy.zip"];
  const own = bytes("core.zip");
  const { loadPyodide } = await import("./pyodide/pyodide.mjs");
  python = await loadPyodide({ indexURL: new URL("pyodide/", location.href).href });
  loaded += scripts;
  tell("starting Python");
  python.FS.writeFile("/core.zip", await own);
  ask = python.runPython(`
import json, sys
sys.path.append("/core.zip")
from prover.answers import Prover
_prover = Prover()
lambda kind, given: json.dumps(getattr(_prover, kind)(**json.loads(given)))`);
}

async function algebra() {
  total = loaded + sizes["sympy.zip"];
  python.FS.writeFile("/sympy.zip", await bytes("pyodide/sympy.zip"));
  python.runPython(`sys.path.append("/sympy.zip")`);
}

const ready = {};
const once = (name, make) => (ready[name] ??= make());

onmessage = async ({ data: { id, kind, given } }) => {
  try {
    await once("start", start);
    if (kind === "form" || kind === "check") await once("algebra", algebra);
    let answer;
    try {
      answer = ask(kind, JSON.stringify(given));
    } catch (error) {
      if (!String(error).includes("No module named 'sympy'")) throw error;
      await once("algebra", algebra);
      answer = ask(kind, JSON.stringify(given));
    }
    postMessage({ id, answer: JSON.parse(answer), loaded });
  } catch (error) {
    const lines = String(error?.message ?? error).trim().split("\n");
    postMessage({ id, fatal: lines[lines.length - 1] || String(error) });
  }
};
