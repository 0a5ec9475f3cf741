"""The page of a training run, index.html: one static file that shows the run's other files. It asks nothing of any
network or server, and is a function of those files, of the settings and of the time of training alone."""

from support.commands import flag_words
from support.files import write_atomically
from support.sizes import show_size, show_time

import dataclasses
import math
import re
import shlex
from html import escape
from pathlib import Path
from urllib.parse import quote

from record.log import read_log

POINTS = 600  # of a curve at most: a long log is thinned out

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="generator" content="A Diffusion Transformer, from nothing">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1d2125; --soft: #6a7178; --line: #dfe2e6; --paper: #fff; --card: #f6f7f8;
  --accent: #2f6fab; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e6e8; --soft: #98a0a8; --line: #343a40; --paper: #15181b;
  --card: #1d2125; --accent: #7db4e6; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 58rem; padding: 2rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }}
h2 {{ margin: 2.5rem 0 .75rem; font-size: 1.1rem; }}
p {{ margin: .25rem 0; }}
a {{ color: var(--accent); }}
.soft, figcaption, dt, .plot span {{ color: var(--soft); }}
code {{ display: block; padding: .6rem .8rem; border-radius: .4rem; background: var(--card);
  font: .9rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }}
figure {{ margin: 0; }}
img {{ display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: .4rem; }}
input[type=range] {{ width: 100%; max-width: 36.4rem; margin: .75rem 0 0; accent-color: var(--accent); }}
output {{ font-variant-numeric: tabular-nums; }}
summary {{ cursor: pointer; margin: .5rem 0; color: var(--soft); }}
ol {{ columns: 9rem; margin: 0; padding-left: 1.5rem; }}
.plot {{ position: relative; height: 17rem; margin: 1rem 0 2rem 3.5rem; }}
.plot svg {{ width: 100%; height: 100%; overflow: visible; }}
.plot path {{ fill: none; stroke-width: 1.25; stroke-linejoin: round; vector-effect: non-scaling-stroke; }}
.plot span {{ position: absolute; font-size: .8rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.plot .y {{ right: calc(100% + .6rem); transform: translateY(-50%); }}
.plot .x {{ top: calc(100% + .3rem); transform: translateX(-50%); }}
.plot .rule {{ stroke: var(--line); stroke-width: 1; }}
.c0 {{ stroke: var(--ink); }} .plot .c0 {{ stroke-width: 2.25; }}
.c1 {{ stroke: #4c8fd0; }} .c2 {{ stroke: #35a08f; }} .c3 {{ stroke: #d69a2d; }} .c4 {{ stroke: #d3566f; }}
.key {{ display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0; padding: 0; list-style: none;
  font-size: .9rem; }}
.key svg {{ width: 1.5rem; height: .6rem; margin-right: .4rem; stroke-width: 3; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .25rem 2rem; margin: 0; }}
dl div {{ display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line); }}
dd {{ margin: 0; text-align: right; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p class="soft">{progress}</p>
<h2>Samples</h2>
{samples}
<h2>Loss</h2>
{loss}
<h2>Commands</h2>
{commands}
<h2>Settings</h2>
{settings}
<script>
const links = [...document.querySelectorAll("#grids a")], slider = document.querySelector("#step")
function show() {{
  const link = links[slider.value]
  document.querySelector("#grid").src = link.href
  document.querySelector("#grid").alt = "Samples after " + link.textContent
  document.querySelector("#shown").textContent = link.textContent
  slider.setAttribute("aria-valuetext", link.textContent)
}}
if (slider) {{
  slider.oninput = show
  slider.onfocus = slider.onpointerenter = () => {{
    links.forEach(link => {{ new Image().src = link.href }})
    slider.onfocus = slider.onpointerenter = null
  }}
}}
</script>
</html>
"""


def write_page(path, title, steps, seconds, columns, settings, defaults, commands):
    """Writes the page of a run into its folder, beside log.csv and the grids samples_*.png that are there.

    steps: how many the run is to make. seconds: of training so far. columns: what the columns of a grid show, and how.
    settings, defaults: dicts from names to values; those that differ are shown first. commands: a dict from what they
    do to how they are called.
    Raises `UserError` when the file cannot be written.
    """
    names, rows = read_log(path.with_name("log.csv"))
    done = int(rows[-1][0]) if rows else 0
    text = PAGE.format(
        title=escape(title), samples=show_grids(path.parent, columns), loss=show_loss(names, rows),
        progress=f"Step {done:,} of {steps:,}, after {show_time(seconds)} of training." + (
            " Reload this page to see how it goes on." if done < steps else ""),
        settings=show_settings(settings, defaults), commands="\n".join(
            f"<p>{escape(what)}</p>\n<code>{escape(how)}</code>" for what, how in commands.items()))
    write_atomically(path, lambda file: file.write(text.encode(errors="replace")))


def show_grids(folder, columns):
    """The newest grid of samples, a slider over all of them, and their list, which the slider reads."""
    grids = sorted((int(found[1]), path.name) for path in folder.iterdir()
                   if (found := re.fullmatch(r"samples_([0-9]{1,18})\.png", path.name)))
    if not grids:
        return '<p class="soft">The first grid is not drawn yet.</p>'
    words, last = [(f"step {step:,}", quote(name)) for step, name in grids], len(grids) - 1
    newest, source = words[-1]
    items = "\n".join(f'<li><a href="{name}">{step}</a></li>' for step, name in words)
    slider = (f'<input id="step" type="range" min="0" max="{last}" value="{last}" autocomplete="off" '
              f'aria-label="Step of training" aria-valuetext="{newest}">\n') if last else ""
    caption = f'<output id="shown">{newest}</output>; {escape(columns)}'
    return (f'<figure>\n<img id="grid" src="{source}" alt="Samples after {newest}">\n{slider}'
            f'<figcaption>{caption}</figcaption>\n</figure>\n'
            f'<details>\n<summary>All grids</summary>\n<ol id="grids">\n{items}\n</ol>\n</details>')


def show_loss(names, rows):
    """The curves of a log, the loss in all and by noise level, on a logarithmic scale."""
    thin = rows[::-1][::len(rows) // POINTS + 1][::-1]  # with the last one
    curves = {name: [(row[0], row[i]) for row in thin if 0 < row[i] < math.inf]
              for i, name in enumerate(names[:-1]) if i}
    values = [value for curve in curves.values() for _, value in curve]
    if not values:
        return '<p class="soft">No loss is logged yet.</p>'
    low, high, end = min(values) / 1.1, max(values) * 1.1, thin[-1][0]

    def x(step):
        return 100 * step / end

    def y(loss):
        return 100 * math.log(high / loss) / math.log(high / low)

    marks = [f'<span class="y" style="top:{y(v):.2f}%">{v:g}</span>' for v in log_ticks(low, high)]
    marks += [f'<span class="x" style="left:{x(v):.2f}%">{short(v)}</span>' for v in ticks(end)]
    rules = "".join(f"M0 {y(v):.2f}H100" for v in log_ticks(low, high))
    lines, keys = [], []
    for i, (name, curve) in enumerate(curves.items()):
        lines.append(f'<path class="c{i}" d="M' + "L".join(f"{x(s):.2f} {y(v):.2f}" for s, v in curve) + '"/>')
        what = f"t = {name.removeprefix('loss_t').replace('-', '–')}" if i else "all t" if len(curves) > 1 else name
        keys.append(f'<li><svg viewBox="0 0 24 10" aria-hidden="true"><path class="c{i}" d="M0 5H24"/></svg>'
                    f'{escape(what)}: {curve[-1][1] if curve else math.nan:.4g}</li>')
    return ('<figure>\n<div class="plot">\n<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="The loss by step">\n<path class="rule" d="{rules}"/>\n' + "\n".join(lines[1:] + lines[:1])
            + "\n</svg>\n" + "\n".join(marks) + '\n</div>\n<ul class="key">\n' + "\n".join(keys) + "\n</ul>\n</figure>")


def log_ticks(low, high):
    """Round numbers between two positive ones: 1, 2 and 5 times powers of ten, or the powers alone where those are
    many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    fine = [tick for tick in fine if low <= tick <= high]
    return fine if len(fine) < 9 else [tick for tick in fine if f"{tick:e}".startswith("1.")]


def ticks(end):
    """Round numbers from 0 to `end`, at most six."""
    power = 10 ** math.floor(math.log10(end))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if end / step <= 5)
    return [i * step for i in range(int(end / step) + 1)]


def short(number):
    """2,000 as 2k, 3,000,000 as 3M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def show_settings(settings, defaults):
    """The settings that are not the defaults, and the rest behind a click."""
    parts = [[], []]
    for name, value in settings.items():
        parts[value == defaults[name]].append(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>")
    other, same = ("<dl>\n" + "\n".join(part) + "\n</dl>" for part in parts)
    return f"{other}\n<details>\n<summary>As by default</summary>\n{same}\n</details>"


def show_setting(value):
    """The value of a setting in a few words: 28x20 for a size, names of classes, at most ten."""
    if value and type(value) is tuple:
        if all(type(part) is int for part in value):
            return show_size(value)
        return ", ".join(map(show_setting, value[:10])) + (" ..." if len(value) > 10 else "")
    return "0" if value == () else str(value)


def show_run(config, run_dir, seconds, script):
    """Writes the page of the run in the folder `run_dir`, index.html. seconds: of training so far. script: the command
    that trains it, without the run folder."""
    settings, defaults = ({field.name: show_setting(getattr(of, field.name)) for field in dataclasses.fields(of)}
                          for of in (config, type(config)()))
    page = dict(network="DiT", commands=run_commands) | dict(config.page)
    columns = page.get("columns") or "columns: " + ", ".join(
        config.class_names[i % config.num_classes] for i in range(10)) + "; from the same noise at every step"
    data = Path(config.data_dir).resolve().name if config.dataset == "folder" else config.dataset
    write_page(run_dir / "index.html", f"A {page['network']} learns {data}, in {run_dir.resolve().name}", config.steps,
               seconds, columns, settings, defaults, page["commands"](config, run_dir, script))


def run_commands(config, run_dir, script):
    """What to do with a run, and how: a dict."""
    folder, checkpoint = ("" if run_dir == Path("run") else " " + shlex.join(flag_words(flag, run_dir))
                          for flag in ("--run-dir", "--checkpoint"))
    return {"Draw with its last checkpoint:": f"python {config.drawn_by}{checkpoint}",
            "Go on where it was stopped:": f"python {script}{folder} --resume",
            "Train it for longer:": f"python {script}{folder} --resume --steps {2 * config.steps}"}
