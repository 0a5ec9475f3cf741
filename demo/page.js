"use strict";
const $ = id => document.getElementById(id);
const data = { ...JSON.parse($("model").textContent), numbers: $("numbers").textContent };
const { config } = data, [H, W] = config.image_size, C = config.channels, SIZE = C * H * W;
const names = config.class_names, numbered = names.every((name, i) => name === String(i));
const root = document.documentElement, calm = matchMedia("(prefers-reduced-motion: reduce)");

// ---- The network, in a thread of its own ----------------------------------------------------------------------------

const waiting = {};  // slot -> {id, onAnswer}: only the newest request of a slot gets answers
let requests = 0;

function ask(slot, request, onAnswer) {
  const id = ++requests;
  waiting[slot] = { id, onAnswer, request: { ...request, slot, id } };
  send(waiting[slot].request);
}

function receive({ slot, id, error, ...answer }) {
  if (waiting[slot]?.id !== id) return;
  if (error) show($("cost"), error, error);
  else waiting[slot].onAnswer(answer);
}

let send;
try {
  const worker = new Worker(URL.createObjectURL(new Blob([$("engine").textContent], { type: "text/javascript" })));
  worker.onmessage = event => receive(event.data);
  worker.onerror = workHere;
  worker.postMessage(data);
  send = request => worker.postMessage(request);
} catch {
  workHere();
}

// Without a thread, which some browsers do not give to a file.
function workHere() {
  const handle = engine(data, receive);
  send = request => setTimeout(handle, 0, request);
  Object.values(waiting).forEach(({ request }) => send(request));
}

const create = (tag, properties) => Object.assign(document.createElement(tag), properties);

const settings = () => ({ guidance: Number($("guidance").value), steps: Number($("steps").value),
                          sampler: $("sampler").value });
const seed = () => Number($("seed").value) || 0;

// What an answer cost, in words.
function report({ calls, seconds, kernel }, count) {
  const each = (1000 * seconds / calls).toFixed(1), time = seconds.toFixed(2), all = calls.toLocaleString("en");
  show($("cost"),
       `${count} ${count > 1 ? "images" : "image"}: ${all} network calls, ${calls / count} each, took ${time} s: ` +
       `${each} ms a call, on one core (${kernel}).`,
       `${count} 个图像：网络调用 ${all} 次，每个 ${calls / count} 次，共用 ${time} 秒，` +
       `平均每次 ${each} 毫秒（单核，${kernel}）。`);
}

// ---- Two languages, two themes --------------------------------------------------------------------------------------

function show(element, en, zh) {
  Object.assign(element.dataset, { en, zh });
  element.textContent = element.dataset[root.lang];
}

function label(element, en, zh) {
  Object.assign(element.dataset, { labelEn: en, labelZh: zh });
  element.setAttribute("aria-label", root.lang === "zh" ? zh : en);
}

function setLanguage(language) {
  root.lang = language;
  document.querySelectorAll("[data-en]").forEach(element => show(element, element.dataset.en, element.dataset.zh));
  document.querySelectorAll("[data-label-en]").forEach(
    element => label(element, element.dataset.labelEn, element.dataset.labelZh));
  const other = language === "zh" ? "en" : "zh";
  $("language").textContent = other === "zh" ? "中文" : "English";
  $("language").lang = other;
  document.title = "Diffusion Transformer: " + (language === "zh" ? "从噪声中画出图像" : "images out of noise");
}

function setTheme(theme) {
  root.dataset.theme = theme;
  if (theme === "dark") show($("theme"), "Light", "浅色");
  else show($("theme"), "Dark", "深色");
  document.querySelectorAll("canvas").forEach(canvas => canvas.repaint?.());
}

// [red, green, blue] of a colour that page.css names.
function colour(name) {
  const number = parseInt(getComputedStyle(root).getPropertyValue(name).trim().slice(1), 16);
  return [number >> 16, number >> 8 & 255, number & 255];
}

const mix = (a, b, share) => a.map((value, i) => value + share * (b[i] - value));

// Sets each pixel to what rgba(row, column) returns, and again whenever the theme changes.
function fill(canvas, rgba) {
  canvas.repaint = () => {
    [canvas.height, canvas.width] = [H, W];
    const picture = new ImageData(W, H), pixel = rgba();
    for (let i = 0; i < H * W; i++) picture.data.set(pixel(i), 4 * i);
    canvas.getContext("2d").putImageData(picture, 0, 0);
  };
  canvas.repaint();
}

// The colour of pixel i of an image (C, H, W) in [-1, 1]; grey ones are ink on paper.
function shade(image) {
  const [paper, ink] = [colour("--paper"), colour("--ink")];
  const value = i => (clamp(image[i]) + 1) / 2;
  return i => C === 1 ? mix(paper, ink, value(i)) : [0, 1, 2].map(channel => 255 * value(channel * H * W + i));
}

function paint(canvas, image) {
  fill(canvas, () => { const at = shade(image); return i => [...at(i), 255]; });
}

// ---- A number -------------------------------------------------------------------------------------------------------

const MOST = 16;  // images in the row
let images = [];  // of the row: {label, place, draw, states: [{x, t}], shown, tile}
let chosen = 0;   // the one to look into
let draws = 1;    // the newest draw that was asked for; the ends of the way between two begin with 0 and 1

// The labels that a text asks for, null where it has a gap. Throws what it does not know.
function parse(text) {
  if (numbered && names.length <= 10) {
    return [...text.normalize("NFKC")].map(sign => {
      if (!/\d/.test(sign)) return null;
      if (Number(sign) >= names.length) throw sign;
      return Number(sign);
    });
  }
  const known = new Map(names.map((name, i) => [name.toLowerCase(), i]).reverse());
  const find = part => known.get(part.toLowerCase()) ?? (/^\d{1,6}$/.test(part) ? Number(part) : names.length);
  return text.split(/[,，、]/).flatMap(part => known.has(part.trim().toLowerCase()) ? [part.trim()] : part.split(/\s+/))
    .filter(part => part).map(part => {
      if (find(part) >= names.length) throw part;
      return find(part);
    });
}

// What to write for class i: its name, or its number where its name would be read as another, or has a comma.
function written(i) {
  try {
    if (String(parse(names[i])) === String(i)) return names[i];
  } catch { /* nor is it a name then */ }
  return String(i);
}

function readText() {
  let labels = [];
  show($("refused"), "", "");
  try {
    labels = parse($("text").value);
  } catch (part) {
    const some = names.slice(0, 10).join(", ") + (names.length > 10 ? " …" : "");
    show($("refused"), `The network does not know “${part}”, but ${some}.`, `网络不认识“${part}”，它认识：${some}。`);
    return;
  }
  if (labels.filter(item => item !== null).length > MOST) {
    show($("refused"), `Only the first ${MOST} are drawn.`, `只画前 ${MOST} 个。`);
  }
  const old = images;
  images = [];
  const row = [];
  for (const item of labels) {
    if (item === null) {
      if (row.at(-1)?.className === "tile") row.push(create("span", { className: "gap" }));
    } else if (images.length < MOST) {
      const place = images.length, image = old[place]?.label === item ? old[place] : makeImage(item, place);
      images.push(image);
      row.push(image.tile);
    }
  }
  $("row").replaceChildren(...row);
  chosen = Math.min(chosen, Math.max(0, images.length - 1));
  showChoices();
  drawImages(images.filter(image => !image.done), true);
}

function makeImage(item, place) {
  const tile = create("button", { type: "button", className: "tile" });
  const image = { label: item, place, draw: 0, states: [], shown: 0, tile };
  tile.append(create("canvas"));
  if (!numbered) tile.append(create("span", { textContent: names[item] }));
  label(tile, `${names[item]}: draw it anew`, `${names[item]}：重画`);
  tile.onclick = () => {
    const before = image.draw;
    image.draw = ++draws;
    chosen = images.indexOf(image);
    setEnds({ label: item, place, draw: before }, { label: item, place, draw: image.draw });
    drawImages([image], true);
    showChoices();
  };
  return image;
}

// Draws images of the row; with `slowly` their steps are seen one after the other.
function drawImages(list, slowly) {
  if (!list.length) return;
  const request = { kind: "draw", ...settings(),
                    images: list.map(({ label, place, draw }) => ({ label, place, draw, seed: seed() })) };
  const fresh = list.map(() => []), mine = {};
  $("row").setAttribute("aria-busy", "true");
  list.forEach(image => { image.mine = mine; image.done = false; });
  ask(list.length > 1 ? "row" : `row ${list[0].place}`, request, answer => {
    const last = answer.step === answer.steps;
    list.forEach((image, i) => {
      fresh[i].push({ x: answer.x.slice(i * SIZE, (i + 1) * SIZE), t: answer.t });
      if (image.mine !== mine) return;  // it was asked for again
      if (!answer.step && (slowly || !image.states.length)) [image.states, image.shown] = [fresh[i], 0];
      if (last) [image.states, image.done] = [fresh[i], true];
      if (last && !slowly) image.shown = answer.steps;
      paint(image.tile.firstChild, image.states[Math.min(image.shown, image.states.length - 1)].x);
    });
    if (last) {
      report(answer, list.length);
      showChoices();
      showLook();
    }
    play();
  });
}

// Shows the next step of each image that is behind, until none is.
let playing = null;
function play() {
  if (playing) return;
  const tick = () => {
    let behind = false;
    for (const image of images) {
      const last = image.states.length - 1;
      if (image.shown < last) {
        image.shown = calm.matches ? last : image.shown + 1;
        paint(image.tile.firstChild, image.states[image.shown].x);
      }
      behind ||= image.shown < last || !image.done;
    }
    showStep();
    playing = behind ? setTimeout(tick, Math.max(30, Math.min(150, 1500 / settings().steps))) : null;
    if (!behind) $("row").setAttribute("aria-busy", "false");
  };
  playing = setTimeout(tick, 0);
}

function showStep() {
  const last = Math.max(1, ...images.map(image => image.states.length - 1));
  const shown = Math.min(last, ...images.map(image => image.shown));
  $("step").max = last;
  $("step").value = shown;
  $("step").ariaValueText = `${shown} / ${last}`;
  show($("step-value"), `step ${shown} of ${last}`, `第 ${shown} / ${last} 步`);
}

// ---- Between two draws ----------------------------------------------------------------------------------------------

let ends = [{ label: names.length === 10 ? 3 : 0, place: 100, draw: 0 },
            { label: names.length === 10 ? 8 : names.length - 1, place: 100, draw: 1 }];

function setEnds(...newEnds) {
  ends = newEnds;
  ["left", "right"].forEach((side, i) => { $(`${side}-label`).value = ends[i].label; });
  drawBetween(false);
}

function drawBetween(asked = true) {
  const [a, b] = ends, share = $("share").value / 100, { sampler, ...others } = settings();
  show($("share-value"), `${$("share").value} %`, `${$("share").value} %`);
  const middle = { ...a, label: [a.label, b.label, share], to: { place: b.place, draw: b.draw }, share };
  const request = { kind: "draw", ...others, images: [a, b, middle].map(image => ({ ...image, seed: seed() })),
                    sampler: sampler === "ddpm" ? "ddim" : sampler };  // fresh noise would flicker
  ask("between", request, answer => {
    if (answer.step < answer.steps) return;
    const at = i => answer.x.slice(i * SIZE, (i + 1) * SIZE);
    paint($("left").firstChild, at(0));
    paint($("right").firstChild, at(1));
    paint($("middle"), at(2));
    if (asked) report(answer, 3);
    label($("left"), `Left end, ${names[a.label]}: draw it anew`, `左端，${names[a.label]}：重画`);
    label($("right"), `Right end, ${names[b.label]}: draw it anew`, `右端，${names[b.label]}：重画`);
    label($("middle"), `${$("share").value} % of the way from ${names[a.label]} to ${names[b.label]}`,
          `从 ${names[a.label]} 到 ${names[b.label]} 的 ${$("share").value} % 处`);
  });
}

// ---- A drawing ------------------------------------------------------------------------------------------------------

const drawing = new Float32Array(SIZE).fill(-1), hidden = new Uint8Array(SIZE), pen = { row: H / 2, column: W / 2 };
let result = null;

// A dot of the pen, or of the eraser, at a place in pixels.
function dot(row, column) {
  const erase = document.querySelector("[name=tool]:checked").value === "eraser", scale = Math.min(H, W) / 28;
  const radius = (erase ? 2.6 : 1.1) * scale, ink = C === 1 ? [255] : rgb($("ink").value);
  for (let y = Math.max(0, Math.floor(row - radius - 1)); y < Math.min(H, row + radius + 1); y++) {
    for (let x = Math.max(0, Math.floor(column - radius - 1)); x < Math.min(W, column + radius + 1); x++) {
      const cover = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(y + 0.5 - row, x + 0.5 - column)));
      for (let channel = 0; channel < C && cover; channel++) {
        const i = channel * H * W + y * W + x, value = ink[channel] / 127.5 - 1;
        const mixed = drawing[i] + cover * (value - drawing[i]);
        [hidden[i], drawing[i]] = erase ? [1, -1] : [0, C === 1 ? Math.max(drawing[i], 2 * cover - 1) : mixed];
      }
    }
  }
}

const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));

// A line from where the pen is.
function lineTo(row, column) {
  const length = Math.ceil(2 * Math.hypot(row - pen.row, column - pen.column)) || 1;
  for (let i = 1; i <= length; i++) {
    dot(pen.row + (row - pen.row) * i / length, pen.column + (column - pen.column) * i / length);
  }
  Object.assign(pen, { row, column });
  showDrawing();
}

function showDrawing() {
  paint($("pad"), drawing);
  $("pad-hint").hidden = drawing.some(value => value > -1) || hidden.some(value => value) || pen.keys;
  fill($("pad-over"), () => {
    const accent = colour("--accent");
    return i => {
      const [row, column] = [Math.floor(i / W), i % W];
      if (pen.keys && row === Math.floor(pen.row) && column === Math.floor(pen.column)) return [...accent, 255];
      return [...accent, hidden[i] ? 70 + 60 * ((row + column) % 2) : 0];
    };
  });
}

function useAsDrawing(image) {
  drawing.set(image);
  hidden.fill(0);
  showDrawing();
}

function redraw(extra, item) {
  const image = { label: Number(item), seed: seed(), place: 200, draw: ++draws };
  const picture = Float32Array.from(drawing);
  const request = { kind: "draw", ...settings(), images: [{ ...image, picture, ...extra }] };
  if (item === "") request.guidance = 0;  // anything: no label is followed
  $("drawn").scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
  $("drawn-hint").hidden = true;
  ask("pen", request, answer => {
    paint($("drawn"), answer.x);
    if (answer.step < answer.steps) return;
    result = answer.x;
    report(answer, 1);
    const name = names[item] ?? "";
    label($("drawn"), `What the network made of it: ${name}`, `网络画成的：${name}`);
  });
}

function complete() {
  if (!hidden.some(value => value)) {
    show($("cost"), "Erase a part of the drawing first: that is what the network completes.",
         "请先擦掉一部分：网络补全的就是那里。");
    return;
  }
  redraw({ hidden: Uint8Array.from(hidden) }, $("complete-label").value);
}

// ---- Inside ---------------------------------------------------------------------------------------------------------

const grid = { rows: H / config.patch_size[0], columns: W / config.patch_size[1] };
let patch = Math.floor(grid.rows / 2) * grid.columns + Math.floor(grid.columns / 2);
let seen = null;  // {guess, attention} of the image and step that are shown

function showChoices() {
  $("choices").replaceChildren(...images.map((image, i) => {
    const button = create("button", { type: "button" }), canvas = create("canvas");
    button.append(canvas);
    button.setAttribute("aria-pressed", i === chosen);
    label(button, `Look into image ${i + 1}, ${names[image.label]}`, `看第 ${i + 1} 个图像：${names[image.label]}`);
    if (image.states.length) paint(canvas, image.states.at(-1).x);
    button.onclick = () => {
      chosen = i;
      [...$("choices").children].forEach((other, j) => other.setAttribute("aria-pressed", i === j));
      showLook();
    };
    return button;
  }));
}

function showLook() {
  const image = images[chosen];
  if (!image?.done) return;
  const last = image.states.length - 1;
  $("moment").max = last - 1;
  const step = Number($("moment").value), { x, t } = image.states[step];
  show($("moment-value"), `step ${step + 1} of ${last}, t = ${t}`, `第 ${step + 1} / ${last} 步，t = ${t}`);
  paint($("noisy"), x);
  ask("look", { kind: "look", x, t, label: image.label, guidance: settings().guidance }, answer => {
    seen = answer;
    paint($("guess"), seen.guess);
    showAttention();
  });
}

const placeOf = token => [Math.floor(token / grid.columns), token % grid.columns];

function tokenAt(pixel) {
  const [row, column] = [Math.floor(pixel / W), pixel % W], [height, width] = config.patch_size;
  return Math.floor(row / height) * grid.columns + Math.floor(column / width);
}

function showAttention() {
  const [row, column] = placeOf(patch), N = grid.rows * grid.columns, heads = config.num_heads;
  const at = `row ${row + 1} of ${grid.rows}, column ${column + 1} of ${grid.columns}`;
  label($("noisy"), `What the network sees. Patch in ${at}`, `网络看到的图像。图块：第 ${row + 1} 行，第 ${column + 1} 列`);
  fill($("patches"), () => {
    const accent = colour("--accent");
    return i => [...accent, tokenAt(i) === patch ? 110 : 0];
  });
  if (!seen) return;
  seen.attention.forEach((weights, block) => {
    for (let head = 0; head < heads; head++) {
      const start = (head * N + patch) * N, looks = weights.slice(start, start + N);
      const most = looks.indexOf(Math.max(...looks)), share = Math.round(100 * looks[most]);
      const canvas = $(`attention-${block}-${head}`);
      fill(canvas, () => {
        const [paper, accent, base] = [colour("--paper"), colour("--accent"), shade(seen.guess)];
        return i => [...mix(mix(paper, base(i), 0.25), accent, looks[tokenAt(i)] / looks[most] * 0.9), 255];
      });
      const [y, x] = placeOf(most);
      label(canvas, `Block ${block + 1}, head ${head + 1}: most to row ${y + 1}, column ${x + 1}, ${share} %`,
            `第 ${block + 1} 层，第 ${head + 1} 头：最关注第 ${y + 1} 行第 ${x + 1} 列，${share} %`);
      canvas.title = `${share} %`;
    }
  });
}

function makeTable() {
  const element = (tag, parent) => parent.appendChild(create(tag));
  const heads = [...Array(config.num_heads).keys()], top = element("tr", element("thead", $("attention")));
  element("td", top);
  heads.forEach(head => show(element("th", top), `head ${head + 1}`, `头 ${head + 1}`));
  const body = element("tbody", $("attention"));
  for (let block = 0; block < config.depth; block++) {
    const line = element("tr", body);
    show(element("th", line), `block ${block + 1}`, `第 ${block + 1} 层`);
    heads.forEach(head => element("td", line).append(
      create("canvas", { id: `attention-${block}-${head}`, role: "img" })));
  }
}

// ---- What the reader does -------------------------------------------------------------------------------------------

const SAMPLER_HELP = {
  dpm: ["Looks back one step to bend its way (second order): few steps suffice. The same noise gives the same image.",
        "会参考上一步来修正方向（二阶），所以步数可以很少。噪声相同，图像就相同。"],
  ddim: ["Goes straight ahead at every step (first order). The same noise gives the same image.",
         "每一步都沿直线前进（一阶）。噪声相同，图像就相同。"],
  ddpm: ["Adds fresh noise after every step: the first diffusion sampler, best with many steps.",
         "每一步之后再加入新噪声：最早的扩散采样器，步数多时效果最好。"] };

function showSettings() {
  for (const name of ["guidance", "steps", "strength"]) {
    const value = String(Number($(name).value));
    show($(`${name}-value`), value, value);
  }
  show($("sampler-help"), ...SAMPLER_HELP[$("sampler").value]);
}

function drawAll() {
  showSettings();
  drawImages(images, false);
  drawBetween(false);
}

function reset() {
  $("steps").max = Math.min(data.most_steps, Math.max(50, config.sample_steps));
  $("steps").value = config.sample_steps;
  $("guidance").min = Math.min(0, config.guidance);
  $("guidance").max = Math.max(4, config.guidance);
  $("guidance").value = config.guidance;
  $("sampler").value = config.sampler;
  $("seed").value = 0;
}

function move(event, rows, columns, row, column) {
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!arrows[event.key]) return null;
  const [down, right] = arrows[event.key];
  event.preventDefault();
  return [Math.max(0, Math.min(rows, row + down)), Math.max(0, Math.min(columns, column + right))];
}

// Where a pointer is on a canvas, in pixels of its image.
function place(event) {
  const box = event.currentTarget.getBoundingClientRect();
  return [(event.clientY - box.top) / box.height * H, (event.clientX - box.left) / box.width * W];
}

function listen() {
  $("language").onclick = () => setLanguage(root.lang === "zh" ? "en" : "zh");
  $("theme").onclick = () => setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  matchMedia("(prefers-color-scheme: dark)").onchange = event => setTheme(event.matches ? "dark" : "light");

  $("text").oninput = readText;
  $("step").oninput = () => {
    images.forEach(image => {
      image.shown = Math.min(Number($("step").value), image.states.length - 1);
      if (image.states.length) paint(image.tile.firstChild, image.states[image.shown].x);
    });
    showStep();
  };
  $("play").onclick = () => {
    images.forEach(image => { image.shown = 0; });
    play();
  };
  for (const name of ["guidance", "steps", "sampler", "seed"]) $(name).oninput = drawAll;
  $("reseed").onclick = () => {
    $("seed").value = Math.floor(Math.random() * 1e6);
    drawAll();
  };
  $("reset").onclick = () => { reset(); drawAll(); };

  ["left", "right"].forEach((side, i) => {
    $(side).onclick = () => {
      ends[i] = { ...ends[i], draw: ++draws };
      drawBetween();
    };
    $(`${side}-label`).onchange = event => {
      ends[i] = { ...ends[i], label: Number(event.target.value) };
      drawBetween();
    };
  });
  $("share").oninput = () => drawBetween();

  $("pad").onpointerdown = event => {
    event.currentTarget.setPointerCapture(event.pointerId);
    [pen.row, pen.column] = place(event);
    pen.keys = false;
    lineTo(...place(event));
  };
  $("pad").onpointermove = event => { if (event.buttons) lineTo(...place(event)); };
  $("pad").onkeydown = event => {
    const to = move(event, H - 0.5, W - 0.5, pen.row, pen.column);
    if (event.key === " ") {
      event.preventDefault();
      pen.down = !pen.down;
    } else if (!to) return;
    pen.keys = true;
    if (pen.down) lineTo(...to ?? [pen.row, pen.column]);
    else if (to) [pen.row, pen.column] = to;
    showDrawing();
    const [row, column] = [Math.floor(pen.row) + 1, Math.floor(pen.column) + 1];
    label($("pad"), `Drawing area, pen ${pen.down ? "down" : "up"}, row ${row}, column ${column}`,
          `画板，${pen.down ? "落笔" : "抬笔"}，第 ${row} 行，第 ${column} 列`);
  };
  $("clear").onclick = () => useAsDrawing(new Float32Array(SIZE).fill(-1));
  $("borrow").onclick = () => images[chosen]?.done && useAsDrawing(images[chosen].states.at(-1).x);
  $("keep").onclick = () => result && useAsDrawing(result);
  $("strength").oninput = showSettings;
  $("turn").onclick = () => redraw({ strength: Number($("strength").value) }, $("turn-label").value);
  $("complete").onclick = complete;

  $("moment").oninput = showLook;
  $("noisy").onpointerdown = event => {
    const [row, column] = place(event);
    patch = tokenAt(Math.min(H - 1, Math.floor(row)) * W + Math.min(W - 1, Math.floor(column)));
    showAttention();
  };
  $("noisy").onkeydown = event => {
    const to = move(event, grid.rows - 1, grid.columns - 1, ...placeOf(patch));
    if (!to) return;
    patch = to[0] * grid.columns + to[1];
    showAttention();
  };

  $("check").onclick = check;
}

function check() {
  show($("checked"), "Computing …", "正在计算……");
  ask("check", { kind: "check" }, ({ found }) => {
    const largest = Math.max(...Object.values(found));
    $("checked").dataset.found = JSON.stringify(found);
    const verdict = largest < 1e-3 ? ["The same images", "图像相同"] : ["Other images", "图像不同"];
    const size = largest.toExponential(1);
    show($("checked"), `${verdict[0]}: of all pixels, from -1 to 1, the largest difference is ${size}.`,
         `${verdict[1]}：像素取值 -1 到 1，最大差别为 ${size}。`);
  });
}

function start() {
  root.toggleAttribute("data-names", !(numbered && names.length <= 10));
  root.toggleAttribute("data-grey", C === 1);
  root.style.setProperty("--shape", `${W} / ${H}`);
  document.querySelectorAll(".count").forEach(element => { element.textContent = data.count.toLocaleString("en"); });
  for (const id of ["left-label", "right-label", "turn-label", "complete-label"]) {
    $(id).append(...names.map((name, i) => new Option(name, i)));
  }
  const any = new Option("", "");
  show(any, "anything", "任意");
  $("complete-label").prepend(any);
  $("complete-label").value = "";
  $("turn-label").value = Math.min(7, names.length - 1);
  if (!numbered) {
    $("chips").append(...names.slice(0, 40).map((name, i) => {
      const chip = create("button", { type: "button", textContent: name });
      chip.onclick = () => {
        $("text").value = [$("text").value.trim(), written(i)].filter(part => part).join(", ");
        readText();
      };
      return chip;
    }));
  } else if (names.length <= 10) $("text").inputMode = "decimal";
  document.querySelectorAll("output").forEach(output => { output.ariaLive = "off"; });  // the sliders say it too
  makeTable();
  reset();
  paint($("drawn"), drawing);
  label($("drawn"), "What the network makes of your drawing", "网络画成的结果");
  const today = new Date(), digits = n => String(n).padStart(2, "0");
  const date = `${today.getFullYear()}-${digits(today.getMonth() + 1)}-${digits(today.getDate())}`;
  $("text").value = names.length === 10 && numbered ? date : names.slice(0, 8).map((_, i) => written(i)).join(", ");
  setLanguage(root.lang);
  setTheme(root.dataset.theme);
  showSettings();
  showDrawing();
  listen();
  readText();
  setEnds(...ends);
  if (location.hash === "#selftest") check();
}

start();
