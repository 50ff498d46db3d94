"use strict";
/* The package's own trained model, a Gemma 3 of 345k parameters, computed in float64.
   A vector is a Float64Array; the states of a text are an array of them, one a token. */

/** The tensors of a safetensors file (float32) as {name: {shape, data: Float64Array}}. */
function readTensors(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = {};
  delete header.__metadata__;
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [from, to],
    },
  ] of Object.entries(header)) {
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}, and this page reads float32`);
    tensors[name] = {
      shape,
      data: Float64Array.from(new Float32Array(bytes.slice(8 + length + from, 8 + length + to).buffer)),
    };
  }
  return tensors;
}

/** The model of a built page's data: config, weights, and the rotary frequencies as float32 rounds them. */
function readModel(data) {
  const tensors = readTensors(data.weights);
  const matrix = (name) => tensors[`model.${name}.weight`];
  const scale = (name) => matrix(name).data.map((w) => 1 + w); // Gemma stores m - 1
  const layers = data.config.layer_types.map((type, l) => {
    const inside = (name) => `layers.${l}.${name}`;
    const maps = {
      q: "self_attn.q_proj",
      k: "self_attn.k_proj",
      v: "self_attn.v_proj",
      o: "self_attn.o_proj",
      gate: "mlp.gate_proj",
      up: "mlp.up_proj",
      down: "mlp.down_proj",
    };
    const scales = {
      first: "input_layernorm",
      query: "self_attn.q_norm",
      key: "self_attn.k_norm",
      mixed: "post_attention_layernorm",
      pre: "pre_feedforward_layernorm",
      post: "post_feedforward_layernorm",
    };
    const read = (names, how) =>
      Object.fromEntries(Object.entries(names).map(([key, name]) => [key, how(inside(name))]));
    return {
      ...read(maps, matrix),
      m: read(scales, scale),
      window: type === "sliding_attention" ? data.config.sliding_window : Infinity,
      frequencies: data.frequencies[type],
    };
  });
  return {
    config: data.config,
    eps: data.config.rms_norm_eps,
    embedding: matrix("embed_tokens"),
    layers,
    last: scale("norm"),
  };
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

const add = (a, b) => a.map((x, i) => x + b[i]);
const subtract = (a, b) => a.map((x, i) => x - b[i]);
const times = (a, b) => a.map((x, i) => x * b[i]);
const multiply = (a, c) => a.map((x) => x * c);
const length = (a) => Math.sqrt(dot(a, a));
const largest = (a) => a.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
const meanSquare = (a) => dot(a, a) / a.length;

/** W x for a matrix {shape: [rows, columns], data}. */
function apply(W, x) {
  const [rows, columns] = W.shape;
  const y = new Float64Array(rows);
  for (let r = 0; r < rows; r++) {
    let sum = 0;
    for (let c = 0, at = r * columns; c < columns; c++, at++) sum += W.data[at] * x[c];
    y[r] = sum;
  }
  return y;
}

const normalised = (x, eps) => multiply(x, 1 / Math.sqrt(meanSquare(x) + eps));
const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));

/** The attention half of a layer: states in, states out; the token of index i stands at position start + i. */
function attend(model, layer, states, start) {
  const {
    head_dim: size,
    num_attention_heads: heads,
    num_key_value_heads: shared,
    query_pre_attn_scalar: scalar,
  } = model.config;
  const turn = (x, m, at) => turned(times(normalised(x, model.eps), m), at, layer.frequencies);
  const part = (x, h) => x.subarray(h * size, (h + 1) * size);
  const read = states.map((x) => times(normalised(x, model.eps), layer.m.first));
  const keys = read.map((x, t) => {
    const k = apply(layer.k, x);
    return range(shared).map((h) => turn(part(k, h), layer.m.key, start + t));
  });
  const values = read.map((x) => apply(layer.v, x));
  return states.map((state, t) => {
    const q = apply(layer.q, read[t]),
      mixed = new Float64Array(heads * size);
    const first = Math.max(0, t - layer.window + 1);
    for (let h = 0; h < heads; h++) {
      const from = Math.floor(h / (heads / shared)),
        query = turn(part(q, h), layer.m.query, start + t);
      const scores = new Float64Array(t + 1 - first);
      for (let j = 0; j < scores.length; j++) scores[j] = dot(query, keys[first + j][from]) / Math.sqrt(scalar);
      const shares = softmax(scores);
      for (let j = 0; j < shares.length; j++) {
        const value = values[first + j];
        for (let i = 0; i < size; i++) mixed[h * size + i] += shares[j] * value[from * size + i];
      }
    }
    return add(state, times(normalised(apply(layer.o, mixed), model.eps), layer.m.mixed));
  });
}

const range = (n) => Array.from({ length: n }, (_, i) => i);

function softmax(scores) {
  const most = Math.max(...scores),
    parts = scores.map((x) => Math.exp(x - most));
  const sum = parts.reduce((a, b) => a + b, 0);
  return parts.map((x) => x / sum);
}

/** Rotary positions: entries i and i + half are turned by the angle position * frequency_i. */
function turned(x, position, frequencies) {
  const half = x.length / 2,
    y = new Float64Array(x.length);
  for (let i = 0; i < half; i++) {
    const cos = Math.cos(position * frequencies[i]),
      sin = Math.sin(position * frequencies[i]);
    y[i] = x[i] * cos - x[i + half] * sin;
    y[i + half] = x[i + half] * cos + x[i] * sin;
  }
  return y;
}

/** W x + (patch) x, the patch in factors: the sum of left_k (right_k . x). */
function changed(W, change, x) {
  const y = apply(W, x);
  for (const { left, right } of change || []) {
    const share = dot(right, x);
    for (let i = 0; i < y.length; i++) y[i] += left[i] * share;
  }
  return y;
}

/** The feed-forward half at one token: the value of every node, by its path in the package's expression of the block. */
function feedForward(model, layer, v, patch = {}) {
  const node = { 0: v };
  node["1-0"] = normalised(v, model.eps);
  node["1-1"] = times(node["1-0"], layer.m.pre);
  node["1-2-0-0"] = changed(layer.gate, patch.gate, node["1-1"]);
  node["1-2-0-1"] = node["1-2-0-0"].map(gelu);
  node["1-2-1"] = changed(layer.up, patch.up, node["1-1"]);
  node["1-2"] = times(node["1-2-0-1"], node["1-2-1"]);
  node["1-3"] = changed(layer.down, patch.down, node["1-2"]);
  node["1-4"] = normalised(node["1-3"], model.eps);
  node["1-5"] = times(node["1-4"], patch.scale ? add(layer.m.post, patch.scale) : layer.m.post);
  node[""] = add(v, node["1-5"]);
  return node;
}

/** The states that a text enters the first layer with. */
function embed(model, ids) {
  const d = model.config.hidden_size;
  return ids.map((id) => multiply(model.embedding.data.slice(id * d, (id + 1) * d), Math.sqrt(d)));
}

const readOff = (model, state) => apply(model.embedding, times(normalised(state, model.eps), model.last));

/** A run: {nodes: [layer][token], logits: [token]}; ``patch`` holds a change for each layer. */
function run(model, ids, start = 0, patch = []) {
  let states = embed(model, ids);
  const nodes = model.layers.map((layer, l) => {
    const here = attend(model, layer, states, start).map((v) => feedForward(model, layer, v, patch[l]));
    states = here.map((node) => node[""]);
    return here;
  });
  return { nodes, logits: states.map((state) => readOff(model, state)) };
}
