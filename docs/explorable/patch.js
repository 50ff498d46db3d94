"use strict";
/* Context into weights: the package's rules for this block, Theorem 1 (or 1b), with the same formulas.
   A patch is an array with a change for each layer: {gate, up, down: [{left, right}, ...], scale: m' - m}. */

const ROUTES = ["auto", "balanced", "uniform", "secular", "scale", "ball"];
const MAPS = ["gate", "up", "down"];

/** What cannot be had, in a sentence. */
class Refused extends Error {}

/** The rank-1 change of a matrix that adds ``delta`` to its output at z: delta a^T with a.z = 1. */
function rankOne(z, delta, others) {
  if (!(largest(z) > 0))
    throw new Refused("the input of a matrix is zero: no change of the matrix can move its output");
  return [{ left: delta, right: rightVector(z, others) }];
}

/** The a with a.z = 1 that the other tokens feel least: mean_j (a.k_j)^2/|k_j|^2 + 0.1 |a|^2; without others z/|z|^2. */
function rightVector(z, others) {
  const size = largest(z),
    unit = multiply(z, 1 / size),
    weight = Math.sqrt(0.1 * (others.length || 1));
  const k = others.map((x) => multiply(x, 1 / length(x)));
  const { lower } = factored(k.map((x, j) => Float64Array.from([...x, ...k.map((_, i) => (i === j ? weight : 0))])));
  const shares = solved(
    lower,
    k.map((x) => dot(x, unit)),
  );
  const a = unit.map((x, i) => x - k.reduce((sum, row, j) => sum + shares[j] * row[i], 0));
  return multiply(a, 1 / (dot(a, unit) * size));
}

/** The patch that gives the last token of ``ids`` (a run without the context) what the last token of ``target`` had. */
function solveLast(model, ids, start, target, options = {}) {
  const pairs = [{ sequence: 0, at: ids.length - 1, target: target.nodes.map((nodes) => nodes[nodes.length - 1]) }];
  return sweep(model, [{ ids, start }], pairs, (layer, [pair]) => oneToken(model, layer, pair, options));
}

/** Layer by layer: the states that really arrive, a change solved from them, and on with the changed layer. */
function sweep(model, sequences, pairs, solve) {
  let states = sequences.map(({ ids }) => embed(model, ids));
  const patch = [],
    report = [];
  model.layers.forEach((layer, l) => {
    const arrived = states.map((rows, s) => attend(model, layer, rows, sequences[s].start));
    const given = pairs.map(({ sequence, at, target }) => ({
      v: arrived[sequence][at],
      wanted: target[l],
      others: arrived[sequence].filter((_, t) => t !== at),
    }));
    try {
      [patch[l], report[l]] = solve(layer, given);
    } catch (error) {
      if (error instanceof Refused) error.message = `in layer ${l + 1} ${error.message}`;
      throw error;
    }
    states = arrived.map((rows) => rows.map((v) => feedForward(model, layer, v, patch[l])[""]));
    const missed = pairs.map(({ sequence, at, target }) => apart(states[sequence][at], target[l][""]));
    report[l].residual = Math.max(...missed);
  });
  const logits = pairs.map(({ sequence, at }) => readOff(model, states[sequence][at]));
  return { patch, report, logits };
}

/** max |difference| / max |target|, the one measure of error. */
const apart = (found, wanted) => largest(subtract(found, wanted)) / largest(wanted);

/** A layer's change for one token: [change, what to report of it]. */
function oneToken(model, layer, { v, wanted, others }, { route = "auto", via = "input-output" }) {
  const change = {},
    margins = {},
    before = feedForward(model, layer, v);
  const steer = (names, path, deltas) => {
    const x = feedForward(model, layer, v, change)[path],
      beside = others.map((other) => feedForward(model, layer, other, change)[path]);
    names.forEach((name, i) => {
      margins[name] = largest(x);
      change[name] = rankOne(x, deltas[i], beside);
    });
  };
  const missing = (path) => subtract(wanted[path], before[path]);
  if (via === "input-output") {
    if (route === "scale") steer(["down"], "1-2", [missing("1-3")]);
    else steer(["gate", "up"], "1-1", [missing("1-2-0-0"), missing("1-2-1")]);
  }
  const node = feedForward(model, layer, v, change),
    G = subtract(wanted[""], v);
  const found = takeRoute(route, G, layer.m.post, node["1-3"], model.eps);
  if (route === "scale") margins.scale = node["1-4"].reduce((least, x) => Math.min(least, Math.abs(x)), Infinity);
  else steer(["down"], "1-2", [subtract(found.before, node["1-3"])]);
  if (route === "ball") margins.scale = found.room;
  else change.scale = subtract(found.scale, layer.m.post);
  return [
    change,
    {
      margins,
      route: route === "auto" ? "balanced" : route,
      amplification: route === "scale" ? null : amplification(found, G, node["1-3"], model.eps),
    },
  ];
}

/** How much a rounding error before the norm is magnified in the output. */
function amplification({ scale, before }, G, y, eps) {
  return (largest(scale) * (largest(y) + largest(before))) / Math.sqrt(meanSquare(before) + eps) / largest(G);
}

/** A scale m' and what must enter the norm, y*, with m' n(y*) = G. */
function takeRoute(route, G, m, y, eps) {
  const r2 = Math.max(meanSquare(y), eps * (meanSquare(y) < eps)),
    q = r2 / (r2 + eps);
  if (route === "scale") return { scale: G.map((g, i) => g / (y[i] / Math.sqrt(meanSquare(y) + eps))), before: y };
  if (route === "ball") return ball(G, m, eps);
  const scale = { auto: balanced, balanced, uniform, secular }[route](G, m, q);
  return { scale, before: G.map((g, i) => (g / scale[i]) * Math.sqrt(r2 + eps)) };
}

/** m'^2 in proportion to m^2 + |G| mean(m^2)/RMS(G). */
function balanced(G, m, q) {
  const usual = meanSquare(m) / Math.sqrt(meanSquare(G));
  const weight = m.map((x, i) => x * x + Math.abs(G[i]) * usual);
  const kappa = Math.sqrt(weight.reduce((sum, w, i) => sum + (G[i] * G[i]) / w, 0) / G.length / q);
  return m.map((x, i) => kappa * Math.sqrt(weight[i]) * Math.sign(x));
}

/** m' = c m. */
function uniform(G, m, q) {
  return multiply(m, Math.sqrt(meanSquare(G.map((g, i) => g / m[i])) / q));
}

/** m' = m - mu/m, mu the root of mean((G m/(m^2 - mu))^2) = q: Newton on phi^(-1/2), from below. */
function secular(G, m, q) {
  const squares = times(m, m),
    lowest = Math.min(...squares),
    deltas = squares.map((x) => x - lowest);
  const a = G.map((g, i) => (g * m[i]) ** 2),
    d = G.length;
  let t = Math.max(0, ...a.map((x, i) => Math.sqrt(x / (d * q)) - deltas[i]));
  for (let turn = 0; turn < 100; turn++) {
    const weights = a.map((x, i) => x / (deltas[i] + t) ** 2);
    const phi = weights.reduce((s, w) => s + w, 0) / d;
    const slope = weights.reduce((s, w, i) => s + w / (deltas[i] + t), 0) / d;
    const step = Math.max(0, (phi * (Math.sqrt(phi / q) - 1)) / slope);
    t += step;
    if (step <= 4 * Number.EPSILON * t) break;
  }
  return deltas.map((x, i) => (x + t) / m[i]);
}

/** The scale as it is: only where mean((G/m)^2) < 1, because the norm never gives more. */
function ball(G, m, eps) {
  const unit = G.map((g, i) => g / m[i]),
    room = 1 - meanSquare(unit);
  if (!(room > 0)) {
    const refused = new Refused(
      `route ball leaves the scale alone, and then the norm can give only so much: the target is outside by ${(-room).toPrecision(3)}`,
    );
    refused.margin = room;
    throw refused;
  }
  return { scale: m, before: multiply(unit, Math.sqrt(eps / room)), room };
}

/** The change that really acts: of the layers in ``on``, ``share`` (0 to 1) of it. */
function partOf(patch, on, share) {
  const less = (factors) => factors && factors.map(({ left, right }) => ({ left: multiply(left, share), right }));
  return patch.map((change, l) =>
    on[l]
      ? {
          gate: less(change.gate),
          up: less(change.up),
          down: less(change.down),
          scale: change.scale && multiply(change.scale, share),
        }
      : {},
  );
}

/** The mean of m'^2 of each layer: what an error in what leaves the norm is multiplied by (its square). */
const spreadOf = (model, patch) =>
  patch.map(({ scale }, l) => meanSquare(scale ? add(model.layers[l].m.post, scale) : model.layers[l].m.post));

/** The Frobenius norm of a change in factors. */
function normOf(factors) {
  let sum = 0;
  for (const a of factors) for (const b of factors) sum += dot(a.left, b.left) * dot(a.right, b.right);
  return Math.sqrt(Math.max(0, sum));
}

/** For each layer and what moves in it: the size of the change, and that relative to the weights (max |change|/|m| of the scale). */
function sizesOf(model, patch) {
  return patch.map((change, l) => {
    const layer = model.layers[l],
      found = {};
    for (const name of MAPS) {
      const norm = change[name] ? normOf(change[name]) : 0;
      found[name] = { norm, relative: norm / length(layer[name].data) };
    }
    const scale = change.scale || new Float64Array(layer.m.post.length);
    found.scale = { norm: length(scale), relative: largest(scale.map((x, i) => x / layer.m.post[i])) };
    return found;
  });
}
