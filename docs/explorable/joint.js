"use strict";
/* One patch for many tokens: the least change of each matrix, and one norm scale for all. */

const TOLERANCE = 100 * Number.EPSILON; // a direction shorter than this part of a vector is rounding
const DEPENDENT = "two tokens arrive with dependent states, and no matrix can tell them apart";
const STAY = 0.01; // what keeps a channel alive that no token needs

/** Rows = L Q with orthonormal Q (Gram-Schmidt, twice): {basis, lower}. */
function factored(rows, told = DEPENDENT) {
  const basis = [],
    lower = [];
  rows.forEach((row, t) => {
    const shares = new Float64Array(rows.length),
      rest = Float64Array.from(row);
    for (let twice = 0; twice < 2; twice++) {
      for (let k = 0; k < t; k++) {
        const direction = basis[k],
          share = dot(direction, rest);
        shares[k] += share;
        for (let i = 0; i < rest.length; i++) rest[i] -= share * direction[i];
      }
    }
    shares[t] = length(rest);
    if (!(shares[t] > TOLERANCE * length(row))) throw new Refused(told);
    basis.push(multiply(rest, 1 / shares[t]));
    lower.push(shares);
  });
  return { basis, lower };
}

/** The least-norm change of a matrix that adds deltas[t] at rows[t], for every t. */
function leastNorm({ basis, lower }, deltas) {
  const left = [];
  deltas.forEach((delta, t) => {
    let rest = delta;
    for (let k = 0; k < t; k++) rest = rest.map((x, i) => x - lower[t][k] * left[k][i]);
    left.push(multiply(rest, 1 / lower[t][t]));
  });
  return left.map((row, k) => ({ left: row, right: basis[k] }));
}

/** x with (L L^T) x = b. */
function solved(lower, b) {
  const x = Float64Array.from(b),
    n = x.length;
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < i; k++) x[i] -= lower[i][k] * x[k];
    x[i] /= lower[i][i];
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let k = i + 1; k < n; k++) x[i] -= lower[k][i] * x[k];
    x[i] /= lower[i][i];
  }
  return x;
}

/** sigma > 0 with rows sigma = 1 and the least sum of price (1/sigma + STAY sigma): Newton on the dual, which is concave.
    Where there is none, {weights} that prove it (Farkas): the rows, so weighed, are nowhere negative and should sum to less than 0. */
function leastCost(rows, price) {
  const T = rows.length,
    d = price.length;
  let weights = new Float64Array(T);
  const slopes = (w) => {
    const s = multiply(price, STAY);
    rows.forEach((row, t) =>
      row.forEach((x, i) => {
        s[i] += w[t] * x;
      }),
    );
    return s;
  };
  const value = (w, s) => s.reduce((sum, x, i) => sum + 2 * Math.sqrt(price[i] * x), 0) - w.reduce((a, b) => a + b, 0);
  let slope = slopes(weights),
    best = value(weights, slope),
    sigma = null;
  for (let turn = 0; turn < 200; turn++) {
    sigma = slope.map((s, i) => Math.sqrt(price[i] / s));
    const over = Float64Array.from(rows, (row) => dot(row, sigma) - 1);
    const root = sigma.map((s, i) => Math.sqrt((s * s * s) / (2 * price[i])));
    const step = solved(
      factored(
        rows.map((row) => times(row, root)),
        "what two tokens ask of the norm scale depends on each other",
      ).lower,
      over,
    );
    const gain = dot(step, over); // twice what the step would gain if the dual were quadratic
    let part = 1;
    for (; part > 1e-12; part /= 2) {
      const next = weights.map((w, t) => w + part * step[t]),
        s = slopes(next);
      if (Math.min(...s) <= 0) continue;
      const now = value(next, s);
      if (now >= best + 0.1 * part * gain - 1e-14 * Math.abs(best)) {
        weights = next;
        slope = s;
        best = now;
        break;
      }
    }
    if (part <= 1e-12 || gain < 1e-22) break; // a full step from there is at the optimum to rounding
    const certificate = slope.map((s, i) => s - STAY * price[i]);
    if (Math.min(...certificate) >= 0 && weights.reduce((a, b) => a + b, 0) < 0) return { weights };
  }
  sigma = slope.map((s, i) => Math.sqrt(price[i] / s));
  return { sigma, missed: Math.max(...rows.map((row) => Math.abs(dot(row, sigma) - 1))) };
}

/** One scale m' with mean((G_t/m')^2) = q_t for every token, and what must enter the norm: y*_t = G_t/m' sqrt(r_t^2 + eps). */
function jointScale(G, m, squares, eps) {
  const d = m.length,
    q = squares.map((r2) => r2 / (r2 + eps));
  const typical = m.reduce((sum, x) => sum + Math.abs(x), 0) / d;
  const usual = m.map((x) => Math.max(Math.abs(x), 1e-6 * typical));
  const rows = G.map((row, t) => row.map((g, i) => (g / usual[i]) ** 2 / d / q[t]));
  const { sigma, missed } = leastCost(rows, usual);
  if (!sigma)
    throw new Refused(
      `no norm scale serves all ${G.length} tokens with their sizes kept (the package would let the sizes move, at a price in rounding): ask fewer questions at once`,
    );
  if (!(missed < 1e-9))
    throw new Refused(
      `the search for a norm scale that serves all ${G.length} tokens did not end: ask fewer questions at once`,
    );
  const scale = m.map((x, i) => ((x < 0 ? -1 : 1) * usual[i]) / Math.sqrt(sigma[i]));
  const before = G.map((row, t) => {
    const unit = row.map((g, i) => g / scale[i]),
      left = 1 - meanSquare(unit);
    return multiply(unit, left > 16 * Number.EPSILON ? Math.sqrt(eps / left) : Math.sqrt(squares[t] + eps));
  });
  return { scale, before };
}

/** A layer's change for many tokens at once. */
function manyTokens(model, layer, given, { via = "input-output" }) {
  const change = {},
    before = given.map(({ v }) => feedForward(model, layer, v));
  if (via === "input-output") {
    const span = factored(before.map((node) => node["1-1"]));
    for (const [name, path] of [
      ["gate", "1-2-0-0"],
      ["up", "1-2-1"],
    ]) {
      change[name] = leastNorm(
        span,
        given.map(({ wanted }, t) => subtract(wanted[path], before[t][path])),
      );
    }
  }
  const node = given.map(({ v }) => feedForward(model, layer, v, change));
  const G = given.map(({ v, wanted }) => subtract(wanted[""], v));
  const found = jointScale(
    G,
    layer.m.post,
    node.map((n) => meanSquare(n["1-3"])),
    model.eps,
  );
  change.down = leastNorm(
    factored(node.map((n) => n["1-2"])),
    found.before.map((y, t) => subtract(y, node[t]["1-3"])),
  );
  change.scale = subtract(found.scale, layer.m.post);
  return [change, { route: "kept rms", margins: {} }];
}

/** One patch for several questions about one context: exact at every token of every one of them.
    A question is asked behind the context's first token (<bos>), from position 0. */
function solveJointly(model, context, questions, options = {}) {
  const sequences = questions.map((ids) => ({ ids: [context[0], ...ids], start: 0 }));
  const targets = questions.map((ids) => run(model, [...context, ...ids]));
  const seen = new Set(),
    pairs = [];
  sequences.forEach(({ ids }, sequence) =>
    ids.forEach((_, at) => {
      const prefix = ids.slice(0, at + 1).join(" ");
      if (seen.has(prefix)) return; // questions that begin alike share these states
      seen.add(prefix);
      pairs.push({ sequence, at, target: targets[sequence].nodes.map((rows) => rows[at && context.length - 1 + at]) });
    }),
  );
  const found = sweep(model, sequences, pairs, (layer, rows) => manyTokens(model, layer, rows, options));
  return { ...found, tokens: pairs.length, sequences, targets };
}
