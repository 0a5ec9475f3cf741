"""The page of a training run, index.html: one static file that shows the run's pictures, its settings and what to do
next. It asks nothing of any network or server."""

from support.commands import flag_words
from support.files import write_atomically
from support.sizes import show_size, show_time

import dataclasses
import re
import shlex
from html import escape
from pathlib import Path
from urllib.parse import quote

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
.soft, figcaption, dt {{ color: var(--soft); }}
code {{ display: block; padding: .6rem .8rem; border-radius: .4rem; background: var(--card);
  font: .9rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; }}
figure {{ margin: 0; }}
img {{ display: block; max-width: 100%; height: auto; border-radius: .4rem; }}
#grid {{ image-rendering: pixelated; }}
input[type=range] {{ width: 100%; max-width: 36.4rem; margin: .75rem 0 0; accent-color: var(--accent); }}
output {{ font-variant-numeric: tabular-nums; }}
summary {{ cursor: pointer; margin: .5rem 0; color: var(--soft); }}
ol {{ columns: 9rem; margin: 0; padding-left: 1.5rem; }}
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
if (slider) slider.oninput = show
</script>
</html>
"""


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


def show_settings(config):
    """The settings that are not the defaults, and the rest behind a click."""
    other, same = [], []
    for field in dataclasses.fields(config):
        value, default = (show_setting(getattr(of, field.name)) for of in (config, type(config)()))
        (same if value == default else other).append(f"<div><dt>{field.name}</dt><dd>{escape(value)}</dd></div>")
    other, same = ("<dl>\n" + "\n".join(part) + "\n</dl>" for part in (other, same))
    return f"{other}\n<details>\n<summary>As by default</summary>\n{same}\n</details>"


def show_setting(value):
    """The value of a setting in a few words: 28x20 for a size, names of classes, at most ten."""
    if value and type(value) is tuple:
        if all(type(part) is int for part in value):
            return show_size(value)
        return ", ".join(map(show_setting, value[:10])) + (" ..." if len(value) > 10 else "")
    return "0" if value == () else str(value)


def show_run(config, run_dir, done, seconds, script):
    """Writes index.html, the page of a run, into its folder `run_dir`: after `done` steps and `seconds` of training.

    script: the command that trains it, without the run folder. Raises `UserError` when the file cannot be written.
    """
    page = dict(network="DiT", commands=run_commands) | dict(config.page)
    columns = page.get("columns") or "columns: " + ", ".join(
        config.class_names[i % config.num_classes] for i in range(10)) + "; from the same noise at every step"
    data = Path(config.data_dir).resolve().name if config.dataset == "folder" else config.dataset
    commands = page["commands"](config, run_dir, script)
    text = PAGE.format(
        title=escape(f"A {page['network']} learns {data}, in {run_dir.resolve().name}"),
        progress=f"Step {done:,} of {config.steps:,}, after {show_time(seconds)} of training." + (
            " Reload this page to see how it goes on." if done < config.steps else ""),
        samples=show_grids(run_dir, columns),
        loss='<img src="loss.png" alt="The loss by step">' if (run_dir / "loss.png").is_file() else
        '<p class="soft">No loss is logged yet.</p>',
        commands="\n".join(f"<p>{escape(what)}</p>\n<code>{escape(how)}</code>" for what, how in commands.items()),
        settings=show_settings(config))
    write_atomically(run_dir / "index.html", lambda file: file.write(text.encode(errors="replace")))


def run_commands(config, run_dir, script):
    """What to do with a run, and how: a dict."""
    folder, checkpoint = ("" if run_dir == Path("run") else " " + shlex.join(flag_words(flag, run_dir))
                          for flag in ("--run-dir", "--checkpoint"))
    return {"Draw with its last checkpoint:": f"python {config.drawn_by}{checkpoint}",
            "Go on where it was stopped:": f"python {script}{folder} --resume",
            "Train it for longer:": f"python {script}{folder} --resume --steps {2 * config.steps}"}
