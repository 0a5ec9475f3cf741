// The Diffusion Transformer (DiT, arXiv 2212.09748) of dit.py, dit_block.py and time_emb.py.
//
// An array holds all numbers of a tensor, the last axis fastest; comments give its shape as in dit.py:
// B images of C channels, N tokens of width D, h heads.

class DiT {
  // config: of the checkpoint. weights: {name: {shape, data}}, by the names that PyTorch gives them.
  constructor(config, weights, plain = false) {
    const [H, W] = config.image_size, [height, width] = config.patch_size;
    Object.assign(this, { D: config.hidden_size, heads: config.num_heads, channels: config.channels, height, width,
                          rows: H / height, columns: W / width, nullLabel: config.num_classes });
    this.N = this.rows * this.columns;
    const layers = Object.keys(weights).filter(name => name.endsWith(".bias")).map(name => name.slice(0, -5));
    this.matrices = new Matrices(layers.map(name => weights[name + ".weight"].shape), plain);
    const linear = name => this.matrices.add(weights[name + ".weight"].data, weights[name + ".bias"].data);
    this.patchEmbedding = linear("patch_embedding.linear");
    this.positions = positions(this.rows, this.columns, this.D);
    this.frequencies = frequencies(weights["time_embedding.mlp.0.weight"].shape[1] / 2, config.time_spacing);
    this.timeEmbedding = [linear("time_embedding.mlp.0"), linear("time_embedding.mlp.2")];
    this.labelEmbedding = weights["label_embedding.weight"].data;
    this.blocks = Array.from({ length: config.depth }, (_, i) => ({
      modulation: linear(`blocks.${i}.modulation.1`),
      qkv: linear(`blocks.${i}.attention.qkv`), out: linear(`blocks.${i}.attention.out`),
      mlp: [linear(`blocks.${i}.mlp.0`), linear(`blocks.${i}.mlp.2`)] }));
    this.finalLayer = { modulation: linear("final_layer.modulation.1"), linear: linear("final_layer.linear") };
  }

  linear(layer, x) {
    return this.matrices.apply(layer, x);
  }

  // x (B, C, H, W) at the step t, for the labels y (a list of B) -> like x. A label is a number, or [a, b, share]: what
  // lies between the labels a and b. attention: a list that gets the weights (B, h, N, N) of each block.
  forward(x, t, y, attention = null) {
    x = this.embedPatches(x);                                                  // (B, N, D)
    const c = this.embedConditions(t, y).map(silu);                            // (B, D)
    for (const block of this.blocks) this.addBlock(block, x, c, attention);    // (B, N, D)
    const [shift, scale] = chunk(this.linear(this.finalLayer.modulation, c), 2, this.D);
    x = this.linear(this.finalLayer.linear, this.modulate(layerNorm(x, this.D), shift, scale));
    return this.unpatchify(x);                                                 // (B, C, H, W)
  }

  // Attention and MLP, each between a LayerNorm with a shift and a scale, and a gate: adaLN-Zero, figure 3.
  addBlock(block, x, c, attention) {
    const [shift1, scale1, gate1, shift2, scale2, gate2] = chunk(this.linear(block.modulation, c), 6, this.D);
    let update = this.attend(block, this.modulate(layerNorm(x, this.D), shift1, scale1), attention);
    this.addGated(x, gate1, update);
    update = this.linear(block.mlp[0], this.modulate(layerNorm(x, this.D), shift2, scale2));
    this.addGated(x, gate2, this.linear(block.mlp[1], update.map(gelu)));
  }

  // Multi-head self-attention (1706.03762, equation 1) over the tokens of an image. x (B, N, D) -> (B, N, D)
  attend(block, x, attention) {
    const { N, D, heads } = this, size = D / heads, B = x.length / (N * D);
    const qkv = this.linear(block.qkv, x);                                     // (B, N, 3, h, D/h)
    const weights = new Float32Array(B * heads * N * N), result = new Float32Array(x.length);
    for (let b = 0; b < B; b++) {
      for (let head = 0; head < heads; head++) {
        for (let i = 0; i < N; i++) {
          const q = (b * N + i) * 3 * D + head * size, row = ((b * heads + head) * N + i) * N;
          for (let j = 0; j < N; j++) {
            const k = (b * N + j) * 3 * D + D + head * size;
            let dot = 0;
            for (let d = 0; d < size; d++) dot += qkv[q + d] * qkv[k + d];
            weights[row + j] = dot / Math.sqrt(size);
          }
          softmax(weights.subarray(row, row + N));
          const to = (b * N + i) * D + head * size;
          for (let j = 0; j < N; j++) {
            const v = (b * N + j) * 3 * D + 2 * D + head * size, weight = weights[row + j];
            for (let d = 0; d < size; d++) result[to + d] += weight * qkv[v + d];
          }
        }
      }
    }
    attention?.push(weights);
    return this.linear(block.out, result);
  }

  // x (B, N, D) * (1 + scale) + shift, both (B, D); in place
  modulate(x, shift, scale) {
    const { N, D } = this;
    for (let i = 0; i < x.length; i++) {
      const c = Math.floor(i / (N * D)) * D + i % D;
      x[i] = x[i] * (1 + scale[c]) + shift[c];
    }
    return x;
  }

  // x (B, N, D) + gate (B, D) * update; in place
  addGated(x, gate, update) {
    const { N, D } = this;
    for (let i = 0; i < x.length; i++) x[i] += gate[Math.floor(i / (N * D)) * D + i % D] * update[i];
  }

  // Each patch of x (B, C, H, W) as a token that knows its place -> (B, N, D)
  embedPatches(x) {
    const patches = new Float32Array(x.length);
    this.eachPixel(x.length, (pixel, place) => { patches[place] = x[pixel]; });
    const tokens = this.linear(this.patchEmbedding, patches);
    for (let i = 0; i < tokens.length; i++) tokens[i] += this.positions[i % this.positions.length];
    return tokens;
  }

  unpatchify(patches) {
    const x = new Float32Array(patches.length);
    this.eachPixel(x.length, (pixel, place) => { x[pixel] = patches[place]; });
    return x;
  }

  // Calls `move(pixel, place)` with the index of each value in x (B, C, H, W) and in its patches
  // (B, H/p, W/p, p, p, C).
  eachPixel(length, move) {
    const { channels, height, width, rows, columns } = this, H = rows * height, W = columns * width;
    for (let pixel = 0; pixel < length; pixel++) {
      const column = pixel % W, row = Math.floor(pixel / W) % H, channel = Math.floor(pixel / (W * H)) % channels;
      const b = Math.floor(pixel / (W * H * channels));
      const patch = (b * rows + Math.floor(row / height)) * columns + Math.floor(column / width);
      move(pixel, ((patch * height + row % height) * width + column % width) * channels + channel);
    }
  }

  // The step t and the labels y as one vector c for each image (B, D).
  embedConditions(t, y) {
    const { D } = this, angles = this.frequencies.map(frequency => Math.fround(t) * frequency);
    const waves = new Float32Array([...angles.map(Math.sin), ...angles.map(Math.cos)]);
    const time = this.linear(this.timeEmbedding[1], this.linear(this.timeEmbedding[0], waves).map(silu));   // (D,)
    const c = new Float32Array(y.length * D);
    y.forEach((label, b) => {
      const [first, second, share] = Array.isArray(label) ? label : [label, label, 0];
      for (let d = 0; d < D; d++) {
        const one = this.labelEmbedding[first * D + d], other = this.labelEmbedding[second * D + d];
        c[b * D + d] = time[d] + one + share * (other - one);
      }
    });
    return c;
  }
}

const silu = x => x / (1 + Math.exp(-x));

const gelu = x => x / 2 * (1 + erf(x / Math.SQRT2));

// Abramowitz and Stegun, 7.1.26: right to 1.5e-7
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - tail * Math.exp(-x * x));
}

function softmax(x) {
  const largest = Math.max(...x);
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
}

// Each row of x (..., D) with mean 0 and variance 1.
function layerNorm(x, D) {
  const result = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += D) {
    let mean = 0, variance = 0;
    for (let d = 0; d < D; d++) mean += x[row + d] / D;
    for (let d = 0; d < D; d++) variance += (x[row + d] - mean) ** 2 / D;
    const scale = 1 / Math.sqrt(variance + 1e-6);
    for (let d = 0; d < D; d++) result[row + d] = (x[row + d] - mean) * scale;
  }
  return result;
}

// x (B, count D) -> a list of `count` arrays (B, D)
function chunk(x, count, D) {
  return Array.from({ length: count }, (_, part) => {
    const result = new Float32Array(x.length / count);
    for (let i = 0; i < result.length; i++) result[i] = x[(Math.floor(i / D) * count + part) * D + i % D];
    return result;
  });
}

// Fixed positions of a grid's patches (N, D): half of D for the column, half for the row.
function positions(rows, columns, D) {
  const quarter = D / 4, result = new Float32Array(rows * columns * D);
  for (let patch = 0; patch < rows * columns; patch++) {
    [patch % columns, Math.floor(patch / columns)].forEach((place, axis) => {
      for (let i = 0; i < quarter; i++) {
        const angle = place * 10000 ** (-i / quarter), to = patch * D + 2 * axis * quarter + i;
        result[to] = Math.sin(angle);
        result[to + quarter] = Math.cos(angle);
      }
    });
  }
  return result;
}

// Of the sinusoids that embed the time, falling geometrically from 1 to about 1/10000.
function frequencies(half, spacing) {
  const gap = Math.fround(Math.log(10000) / (spacing === "article" ? half - 1 : half));
  return Array.from({ length: half }, (_, i) => Math.fround(Math.exp(Math.fround(-gap * i))));
}
