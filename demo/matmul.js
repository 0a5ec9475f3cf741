// Matrix products: nearly all of the network's work. A tile of 4 rows by 8 columns is computed at a time, in registers,
// by WebAssembly with SIMD where the browser has it, else by JavaScript. Both do the same on the same memory.

const ROWS = 4, COLUMNS = 8, GROUP = 64;  // GROUP: rows that are multiplied in one go

// The tile y (4, 8) = bias + x w, all three at offsets (in floats) into `memory`. x (K, 4) holds its columns one after
// the other; w holds the bias (8), then its rows (K, 8).
function tileInJavaScript(memory) {
  return (x, w, y, K) => {
    for (let half = 0; half < COLUMNS; half += 4) {
      for (let row = 0; row < ROWS; row += 2) {
        let a0 = memory[w + half], a1 = memory[w + half + 1], a2 = memory[w + half + 2], a3 = memory[w + half + 3];
        let b0 = a0, b1 = a1, b2 = a2, b3 = a3;
        for (let k = 0, i = x + row, j = w + COLUMNS + half; k < K; k++, i += ROWS, j += COLUMNS) {
          const a = memory[i], b = memory[i + 1];
          const w0 = memory[j], w1 = memory[j + 1], w2 = memory[j + 2], w3 = memory[j + 3];
          a0 += a * w0; a1 += a * w1; a2 += a * w2; a3 += a * w3;
          b0 += b * w0; b1 += b * w1; b2 += b * w2; b3 += b * w3;
        }
        const to = y + row * COLUMNS + half;
        memory[to] = a0; memory[to + 1] = a1; memory[to + 2] = a2; memory[to + 3] = a3;
        memory[to + 8] = b0; memory[to + 9] = b1; memory[to + 10] = b2; memory[to + 11] = b3;
      }
    }
  };
}

// The same in WebAssembly, put together by hand: offsets in bytes, 8 sums of 4 floats each.
function tileInWebAssembly(memory) {
  const get = n => [0x20, n], set = n => [0x21, n], advance = (n, bytes) => [...get(n), 0x41, bytes, 0x6a, ...set(n)];
  const load = (pointer, offset) => [...get(pointer), 0xfd, 0x00, 4, offset];
  const splat = (pointer, offset) => [...get(pointer), 0xfd, 0x09, 2, offset];    // one float, four times
  const multiply = [0xfd, 0xe6, 0x01], add = [0xfd, 0xe4, 0x01];
  const [x, w, y, K, sums, w0, a] = [0, 1, 2, 3, 4, 12, 14];                      // 4 parameters, 11 vectors
  const tile = [...Array(8).keys()], rows = [0, 1, 2, 3], halves = [0, 1];
  const code = [
    1, 11, 0x7b,                                                                  // the vectors
    ...tile.flatMap(i => [...load(w, 16 * (i % 2)), ...set(sums + i)]),           // the bias
    0x03, 0x40,                                                                   // loop
    ...halves.flatMap(half => [...load(w, 32 + 16 * half), ...set(w0 + half)]),
    ...rows.flatMap(row => [
      ...splat(x, 4 * row), ...set(a),
      ...halves.flatMap(half => {
        const sum = sums + 2 * row + half;
        return [...get(sum), ...get(a), ...get(w0 + half), ...multiply, ...add, ...set(sum)];
      })]),
    ...advance(x, 16), ...advance(w, 32),
    ...get(K), 0x41, 1, 0x6b, 0x22, K, 0x0d, 0, 0x0b,                             // until --K is 0
    ...tile.flatMap(i => [...get(y), ...get(sums + i), 0xfd, 0x0b, 4, 16 * i]),   // store
    0x0b];
  const size = n => [n & 127 | 128, n >> 7], section = (id, body) => [id, ...size(body.length), ...body];
  const module = new WebAssembly.Module(new Uint8Array([
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, [1, 0x60, 4, 0x7f, 0x7f, 0x7f, 0x7f, 0]),                       // a function of 4 integers
    ...section(2, [1, 1, 0x6d, 1, 0x6d, 2, 0, 1]),                                // imports the memory
    ...section(3, [1, 0]),
    ...section(7, [1, 1, 0x66, 0, 0]),                                            // exports the function
    ...section(10, [1, ...size(code.length), ...code])]));
  const { f } = new WebAssembly.Instance(module, { m: { m: memory } }).exports;
  return (x, w, y, K) => f(4 * x, 4 * w, 4 * y, K);
}

// The layers y = x W^T + b of a network, laid out for the tiles. shapes: [out, in] of each.
class Matrices {
  constructor(shapes, plain = false) {
    const widest = Math.max(...shapes.map(([, K]) => K));
    this.x = 0;
    this.y = GROUP * widest;
    this.free = this.y + ROWS * COLUMNS;
    const floats = this.free + shapes.reduce((sum, [out, K]) => sum + Math.ceil(out / COLUMNS) * COLUMNS * (K + 1), 0);
    try {
      if (plain) throw new Error("asked for");
      const memory = new WebAssembly.Memory({ initial: Math.ceil(floats / 2 ** 14) });
      this.tile = tileInWebAssembly(memory);
      this.memory = new Float32Array(memory.buffer);
      this.kind = "WebAssembly";
    } catch {  // no WebAssembly, or none with SIMD
      this.memory = new Float32Array(floats);
      this.tile = tileInJavaScript(this.memory);
      this.kind = "JavaScript";
    }
  }

  // Lays out one layer, for `apply`. weight (out, in), bias (out,)
  add(weight, bias) {
    const out = bias.length, K = weight.length / out, start = this.free;
    for (let column = 0; column < out; column += COLUMNS) {
      for (let j = 0; j < COLUMNS && column + j < out; j++) {
        this.memory[this.free + j] = bias[column + j];
        for (let k = 0; k < K; k++) this.memory[this.free + COLUMNS * (k + 1) + j] = weight[(column + j) * K + k];
      }
      this.free += COLUMNS * (K + 1);
    }
    return { start, out, K };
  }

  // x (rows, in) -> (rows, out)
  apply(layer, x) {
    const { start, out, K } = layer, rows = x.length / K, result = new Float32Array(rows * out), memory = this.memory;
    for (let first = 0; first < rows; first += GROUP) {
      const count = Math.min(GROUP, rows - first);
      for (let row = 0; row < Math.ceil(count / ROWS) * ROWS; row++) {
        const to = this.x + (row - row % ROWS) * K + row % ROWS, from = (first + row) * K;
        for (let k = 0; k < K; k++) memory[to + ROWS * k] = row < count ? x[from + k] : 0;
      }
      for (let column = 0; column < out; column += COLUMNS) {
        const width = Math.min(COLUMNS, out - column);
        for (let row = 0; row < count; row += ROWS) {
          this.tile(this.x + row * K, start + column * (K + 1), this.y, K);
          for (let i = 0; i < ROWS && row + i < count; i++) {
            const to = (first + row + i) * out + column, from = this.y + i * COLUMNS;
            for (let j = 0; j < width; j++) result[to + j] = memory[from + j];
          }
        }
      }
    }
    return result;
  }
}
