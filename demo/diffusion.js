// The processes and samplers of diffusion.py: how noise becomes an image. Arrays as in dit.js.

// The path x_t = signal x_0 + noise eps: [signal, noise] of each step 0..T-1.
function buildPath({ process, T, beta_start, beta_end, shift }) {
  let product = 1;
  return Array.from({ length: T }, (_, t) => {
    if (process === "flow") {  // a straight line from image to noise (2209.03003)
      const odds = (t + 1) / (T - t) * shift, tau = odds / (1 + odds);
      return [1 - tau, tau];
    }
    product *= 1 - beta_start - (beta_end - beta_start) * t / (T - 1);  // alphas_cumprod (2006.11239, equation 4)
    return [Math.sqrt(product), Math.sqrt(1 - product)];
  });
}

// `count` of the first `from` steps, evenly spaced, for the samplers: a list of {t, at: [signal, noise] at t, after:
// [signal, noise] at the step after it}, of which the last leads to the clean image.
function descendingSteps(path, count, from = path.length) {
  count = Math.min(count, from);
  const steps = Array.from({ length: count }, (_, i) => roundHalfEven(from - i * from / count) - 1);
  return steps.map((t, i) => ({ t, at: path[t], after: i + 1 < count ? path[steps[i + 1]] : [1, 0] }));
}

// As Python rounds.
function roundHalfEven(x) {
  return Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

// denoise(x, t): the clean images that the network sees in x at the step t, for the labels y (see DiT.forward).
// guidance: 0 ignores the labels, 1 follows them, above 1 exaggerates them (2207.12598).
function denoiser(model, config, path, y, guidance, attention = null) {
  const none = y.map(() => model.nullLabel);
  return (x, t) => {
    let output;
    if (guidance === 0 || guidance === 1) {
      output = model.forward(x, t, guidance ? y : none, attention);
    } else {
      const both = model.forward(join([x, x]), t, [...y, ...none], attention), n = x.length;
      output = x.map((_, i) => both[n + i] + guidance * (both[i] - both[n + i]));
    }
    const [signal, noise] = path[t];
    return output.map((value, i) => clamp(config.process === "flow" ? value : (x[i] - noise * value) / signal));
  };
}

const clamp = value => Math.min(1, Math.max(-1, value));

// The samplers share one signature and yield x after each step. noise(): fresh noise like x
const SAMPLERS = {
  // Ancestral sampling (DDPM, 2006.11239, algorithm 2), over any subset of the steps.
  *ddpm(denoise, x, steps, noise) {
    for (const { t, at: [a, s], after: [aAfter, sAfter] } of steps) {
      const beta = s ** 2 - (a / aAfter * sAfter) ** 2;  // the variance that the one long step adds on the way to t
      const deviation = Math.sqrt(beta) * sAfter / s, x0 = denoise(x, t);
      x = x.map((value, i) => (aAfter * beta * x0[i] + a / aAfter * sAfter ** 2 * value) / s ** 2);
      if (deviation) {
        const fresh = noise();
        x = x.map((value, i) => value + deviation * fresh[i]);
      }
      yield x;
    }
  },

  // DDIM (2010.02502, equation 12) with eta = 0: deterministic. On a straight path this is Euler's method.
  *ddim(denoise, x, steps) {
    for (const { t, at: [a, s], after: [aAfter, sAfter] } of steps) {
      const x0 = denoise(x, t);
      x = x.map((value, i) => aAfter * x0[i] + sAfter * (value - a * x0[i]) / s);
      yield x;
    }
  },

  // DPM-Solver++ 2M (2211.01095, algorithm 2): second order, deterministic, one network call a step.
  *dpm(denoise, x, steps) {
    let last = null, hLast;
    for (const { t, at: [a, s], after: [aAfter, sAfter] } of steps) {
      const x0 = denoise(x, t);
      if (!sAfter) {  // the clean image
        yield x0;
        return;
      }
      const h = Math.log(aAfter / sAfter) - Math.log(a / s);  // the step in log signal-to-noise
      const D = last ? x0.map((value, i) => value + h / (2 * hLast) * (value - last[i])) : x0;
      x = x.map((value, i) => sAfter / s * value - aAfter * Math.expm1(-h) * D[i]);
      [last, hLast] = [x0, h];
      yield x;
    }
  },
};

// SDEdit (2108.01073): the image x0 with as much noise as the first of `steps` has, to be denoised from there.
function noised(x0, noise, steps) {
  const [signal, share] = steps[0].at;
  return noise.map((value, i) => signal * x0[i] + share * value);
}

// Inpainting: a denoiser that knows the image wherever `hidden` is 0. Started from `noised(known, ...)`, the known part
// of x is the known image and its noise at every step, and at the end that image itself.
function inpainter(denoise, known, hidden) {
  return (x, t) => denoise(x, t).map((value, i) => hidden[i] ? value : known[i]);
}

// RePaint (2201.09865): a sampler for `inpainter` that takes each step `times` times, with noise put back in between, so
// that what is known and what is drawn come to fit.
function* repaint(denoise, x, steps, noise, times = 5) {
  for (const step of steps) {
    const { at: [a, s], after: [aAfter, sAfter] } = step, signal = a / aAfter;
    const deviation = Math.sqrt(s ** 2 - (signal * sAfter) ** 2);
    x = SAMPLERS.ddpm(denoise, x, [step], noise).next().value;
    for (let i = 1; i < times && sAfter; i++) {
      const fresh = noise();
      x = SAMPLERS.ddpm(denoise, x.map((value, j) => signal * value + deviation * fresh[j]), [step], noise).next().value;
    }
    yield x;
  }
}

// Standard normal numbers (count,), a function of the seed and the numbers that name the image and the draw: sfc32 and
// the Box-Muller transform. They are not NumPy's of inference.py.
function* normals(seed, ...names) {
  let [a, b, c, counter] = [seed | 0, names[0] | 0, names[1] | 0, 1];
  const next = () => {
    const sum = (a + b | 0) + counter | 0;
    counter = counter + 1 | 0;
    a = b ^ b >>> 9;
    b = c + (c << 3) | 0;
    c = (c << 21 | c >>> 11) + sum | 0;
    return ((sum >>> 0) + 0.5) / 2 ** 32;  // in (0, 1)
  };
  for (let i = 0; i < 15; i++) next();  // until every bit of the seed counts
  for (;;) {
    const radius = Math.sqrt(-2 * Math.log(next())), angle = 2 * Math.PI * next();
    yield radius * Math.cos(angle);
    yield radius * Math.sin(angle);
  }
}

function take(numbers, count) {
  return Float32Array.from({ length: count }, () => numbers.next().value);
}

// From noise a to noise b on the sphere, as normal as both: share 0 is a, 1 is b.
function between(a, b, share) {
  const dot = (p, q) => p.reduce((sum, value, i) => sum + value * q[i], 0);
  const angle = Math.acos(clamp(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b))));
  if (angle < 1e-4) return a;
  const [ofA, ofB] = [1 - share, share].map(part => Math.sin(part * angle) / Math.sin(angle));
  return a.map((value, i) => ofA * value + ofB * b[i]);
}

function join(arrays) {
  const result = new Float32Array(arrays.reduce((sum, array) => sum + array.length, 0));
  arrays.reduce((at, array) => (result.set(array, at), at + array.length), 0);
  return result;
}
