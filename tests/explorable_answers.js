/* What the explorable computes for the cases of a test; runs behind the page's own scripts, in node or in a browser. */
function answers(data, cases) {
  const model = readModel(data),
    plain = (rows) => rows.map((row) => Array.from(row));
  const nodesOf = ({ nodes }) =>
    nodes.map((tokens) =>
      Object.fromEntries(Object.entries(tokens[tokens.length - 1]).map(([path, value]) => [path, Array.from(value)])),
    );
  return cases.map(({ context, question, others, route, via, layers, share }) => {
    const read = readTexts(data, context, question),
      start = read.context.length;
    if (read.problems.length) return { problems: read.problems };
    const target = run(model, [...read.context, ...read.question]),
      source = run(model, read.question, start);
    const out = {
      ids: [...read.context, ...read.question],
      logits: { target: plain(target.logits), source: plain(source.logits) },
      nodes: { target: nodesOf(target), source: nodesOf(source) },
    };
    try {
      const { patch, report, logits } = solveLast(model, read.question, start, target, { route, via });
      const patched = run(model, read.question, start, patch),
        part = run(model, read.question, start, partOf(patch, layers, share));
      Object.assign(out, { report, sizes: sizesOf(model, patch), spread: spreadOf(model, patch) });
      Object.assign(out.logits, {
        sweep: Array.from(logits[0]),
        patched: plain(patched.logits),
        part: plain(part.logits),
      });
      out.nodes.patched = nodesOf(patched);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      out.refused = { message: error.message, margin: error.margin };
    }
    if (others.length) {
      const asked = others.map((text) => readTexts(data, context, text).question);
      const { patch, tokens, sequences } = solveJointly(model, read.context, asked, { via });
      out.joint = {
        tokens,
        sizes: sizesOf(model, patch),
        scales: patch.map(({ scale }) => Array.from(scale)),
        logits: sequences.map(({ ids }) => Array.from(run(model, ids, 0, patch).logits[ids.length - 1])),
      };
    }
    return out;
  });
}
