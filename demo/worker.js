// Draws what the page asks for, step by step, in a thread of its own: `new Worker` of this very text. Where a browser
// has no such threads, the page calls `engine` itself, which then works in slices between two of the page's own.

// data: {config, weights: [[name, shape], ...], numbers: all weights in half precision, base64, reference}
// reply(message) gets the answers. Returns a function that takes the requests:
//   {kind: "draw", slot, id, images, steps, sampler, guidance}   see `draw`
//   {kind: "look", slot, id, x, t, label, guidance}              the network's guess, and where it attends
//   {kind: "check", slot, id}                                    the difference to PyTorch
// A request makes the earlier ones of its slot stop.
function engine(data, reply) {
  const { config } = data, path = buildPath(config), newest = {};
  const weights = unpack(data.weights, data.numbers), model = new DiT(config, weights);
  const size = config.channels * config.image_size[0] * config.image_size[1];
  const pause = makePause();

  // images: for each {label, seed, place, draw}; also {to: {place, draw}, share} for noise between two draws. Of a
  // picture: {picture, strength} to change it, {picture, hidden} to complete it.
  async function* draw({ images, steps: count, sampler, guidance }) {
    const network = denoiser(model, config, path, images.map(({ label }) => label), guidance);
    const each = images.length * (guidance === 0 || guidance === 1 ? 1 : 2);
    let calls = 0, seconds = 0;
    const denoise = (x, t) => { calls += each; return network(x, t); };
    const { picture, strength, hidden } = images[0], way = hidden ? inpaint : picture ? edit : fromNoise;
    const states = way(path, SAMPLERS[sampler], denoise, noiseSource(images), count, picture, hidden ?? strength);
    const steps = descendingSteps(path, count, strength);
    for (let step = 0; step <= steps.length; step++) {
      await pause();
      const before = performance.now(), x = states.next().value;
      seconds += (performance.now() - before) / 1000;
      yield { x, step, t: steps[step]?.t ?? -1, steps: steps.length, calls, seconds };
    }
  }

  // Fresh noise at each call, one random stream for each image.
  function noiseSource(images) {
    const streams = images.map(({ seed, place, draw }) => normals(seed, place, draw));
    const first = images.map(({ seed, to, share }, i) => {
      const noise = take(streams[i], size);
      return [to ? between(noise, take(normals(seed, to.place, to.draw), size), share) : noise];
    });
    return () => join(streams.map((stream, i) => first[i].pop() ?? take(stream, size)));
  }

  async function* look({ x, t, label, guidance }) {
    const attention = [], guess = denoiser(model, config, path, [label], guidance, attention)(x, t);
    const own = config.num_heads * model.N ** 2;  // that of the label comes first, then that of no label
    yield { guess, attention: attention.map(weights => weights.slice(0, own)) };
  }

  // The largest difference to what PyTorch computed with the same weights and the same noise, for each kernel.
  async function* check() {
    const { noise, label, t, guidance, output, samples } = data.reference, found = {};
    const x = floats(noise);
    for (const network of [model, new DiT(config, weights, true)]) {
      const kind = network.matrices.kind;
      found[`${kind}: network`] = difference(network.forward(x.slice(0, size), t, [label]), floats(output));
      await pause();
      for (const [sampler, { steps, image }] of Object.entries(samples)) {
        const noises = [...Array(x.length / size).keys()].map(i => x.slice(i * size, (i + 1) * size));
        const states = SAMPLERS[sampler](denoiser(network, config, path, [label], guidance), noises.shift(),
                                         descendingSteps(path, steps), () => noises.shift());
        found[`${kind}: ${sampler}`] = difference([...states].pop(), floats(image));
        await pause();
      }
    }
    yield { found };
  }

  return async request => {
    const { kind, slot, id } = request;
    newest[slot] = id;
    try {
      for await (const answer of { draw, look, check }[kind](request)) {
        if (newest[slot] !== id) return;
        reply({ slot, id, kernel: model.matrices.kind, ...answer });
      }
    } catch (error) {
      reply({ slot, id, error: String(error) });
    }
  };
}

// A function that lets whatever waits have its turn.
function makePause() {
  const { port1, port2 } = new MessageChannel(), waiting = [];
  port1.onmessage = () => waiting.shift()();
  return () => new Promise(resolve => { waiting.push(resolve); port2.postMessage(0); });
}

function bytes(base64) {
  const text = atob(base64), result = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) result[i] = text.charCodeAt(i);
  return result;
}

function floats(base64) {
  return new Float32Array(bytes(base64).buffer);
}

// The weights by their names, from half precision: sign, 5 bits of exponent, 10 of fraction.
function unpack(names, base64) {
  const halves = new Uint16Array(bytes(base64).buffer), weights = {};
  const table = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
    const exponent = bits >> 10 & 31, fraction = bits & 1023;
    return (bits >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  });
  let start = 0;
  for (const [name, shape] of names) {
    const end = start + shape.reduce((product, n) => product * n, 1);
    weights[name] = { shape, data: new Float32Array(halves.subarray(start, end)).map(bits => table[bits]) };
    start = end;
  }
  return weights;
}

// The largest, between two arrays; of NaN, NaN.
function difference(a, b) {
  return a.reduce((largest, value, i) => Math.max(largest, Math.abs(value - b[i])), 0);
}

if (typeof document === "undefined" && typeof onmessage !== "undefined") {
  let handle = null;
  onmessage = ({ data }) => { handle ? handle(data) : handle = engine(data, postMessage); };
}
