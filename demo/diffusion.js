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

// `count` of the T steps, evenly spaced over a share `strength` of them, the least noisy ones: a list of
// {t, at: [signal, noise] at t, after: [signal, noise] at the step after it}; the last leads to the clean image.
function descendingSteps(path, count, strength = 1) {
  const top = Math.max(1, roundHalfEven(strength * path.length));
  count = Math.min(count, top);
  const steps = Array.from({ length: count }, (_, i) => roundHalfEven(top - i * top / count) - 1);
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
  // A step more than twice as long as the one before is of first order.
  *dpm(denoise, x, steps) {
    let last = null, hLast;
    for (const { t, at: [a, s], after: [aAfter, sAfter] } of steps) {
      const x0 = denoise(x, t);
      if (!sAfter) {  // the clean image
        yield x0;
        return;
      }
      const h = Math.log(aAfter / sAfter) - Math.log(a / s);  // the step in log signal-to-noise
      const D = last && h <= 2 * hLast ? x0.map((value, i) => value + h / (2 * hLast) * (value - last[i])) : x0;
      x = x.map((value, i) => sAfter / s * value - aAfter * Math.expm1(-h) * D[i]);
      [last, hLast] = [x0, h];
      yield x;
    }
  },
};

// What to do with a sampler. These share one signature as well, and yield what they start from, then x after each step.

// Draws new images.
function* fromNoise(path, sampler, denoise, noise, count) {
  const x = noise();
  yield x;
  yield* sampler(denoise, x, descendingSteps(path, count), noise);
}

// SDEdit (2108.01073): noises a picture to a share `strength` of the steps, and denoises it from there.
function* edit(path, sampler, denoise, noise, count, picture, strength) {
  const steps = descendingSteps(path, count, strength), [a, s] = steps[0].at, eps = noise();
  const x = eps.map((value, i) => a * picture[i] + s * value);
  yield x;
  yield* sampler(denoise, x, steps, noise);
}

// RePaint (2201.09865): draws what is `hidden` of a picture. The known pixels are put in after each step, as noisy as x
// is by then; and each step is noised again and repeated, `rounds` times in all, for the new ones to come to fit.
function* inpaint(path, sampler, denoise, noise, count, picture, hidden, rounds = 4) {
  const putIn = (x, [a, s], eps) => x.map((value, i) => hidden[i] ? value : a * picture[i] + s * eps[i]);
  const steps = descendingSteps(path, count), start = noise();
  let x = putIn(start, steps[0].at, start);
  yield x;
  for (const step of steps) {
    const { at: [a, s], after: [aAfter, sAfter] } = step, deviation = Math.sqrt(s ** 2 - (a / aAfter * sAfter) ** 2);
    for (let left = rounds - 1; left >= 0; left--) {
      x = putIn([...sampler(denoise, x, [step], noise)].pop(), step.after, noise());
      if (left) {
        const eps = noise();
        x = x.map((value, i) => a / aAfter * value + deviation * eps[i]);
      }
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
