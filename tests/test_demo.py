import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess

import pytest
import torch
from conftest import REPOSITORY, assert_refused
from forks import HANGS

import dit
import dit_block
from config import Config
from demo import export
from diffusion import SAMPLERS, from_noise
from edit.ways import edit, inpaint
from latent.config import LatentConfig
from record.checkpoint import averaged_model, load_checkpoint, save_checkpoint
from video.config import ANY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = Config(image_size=(12, 6), patch_size=(3, 2), channels=1, num_classes=10, hidden_size=32, depth=2, num_heads=2,
               sample_steps=5)


class Chromium:
    """A headless browser, steered through its DevTools protocol."""

    def __init__(self, folder):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        # It reads the protocol from file 3 and writes it to file 4.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.count, self.buffer, self.events = 0, b"", []

    def read(self):
        while b"\0" not in self.buffer:
            self.buffer += os.read(self.answers, 2**16) or pytest.fail("chromium ended")
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **parameters):
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters}
        os.write(self.commands, json.dumps(request | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (message := self.read()).get("id") != self.count:
            self.events.append(message)
        assert "result" in message, message
        return message["result"]

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


class Browser:
    """A page in a `Chromium`."""

    def __init__(self, chromium, page, script=""):
        """script: JavaScript to run before any of the page's own."""
        self.chromium, chromium.events = chromium, []
        self.target = chromium.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = chromium.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        self.call("Page.navigate", url=page)
        while not self.loaded(page):
            chromium.events.append(chromium.read())

    @property
    def events(self):
        return [event for event in self.chromium.events if event.get("sessionId") == self.session]

    def loaded(self, page):
        kinds = [event["method"] for event in self.events
                 if event["params"].get("frame", {"url": page})["url"] == page]  # the blank page is loaded too
        return "Page.frameNavigated" in kinds and "Page.loadEventFired" in kinds[kinds.index("Page.frameNavigated"):]

    def call(self, method, **parameters):
        return self.chromium.call(method, self.session, **parameters)

    def run(self, script):
        """What a JavaScript expression is worth, a promise once it is kept."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        assert self.run(f"""new Promise(resolve => {{
            const ask = () => ({condition}) ? resolve(true) : setTimeout(ask, 20);
            setTimeout(resolve, {HANGS * 1000});
            ask();
        }})"""), condition

    def close(self):
        self.chromium.call("Target.closeTarget", targetId=self.target)


def make_checkpoint(path, config=SMALL, **changes):
    """A checkpoint of random weights, with gates that are not zero, so that every part of the network counts."""
    config = dataclasses.replace(config, **changes)
    weights = config.build_model().state_dict()
    save_checkpoint(path, config, 1, 1.0, {name: weight + 0.05 * torch.randn_like(weight) if weight.ndim else weight
                                           for name, weight in weights.items()})
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here to open the page with: install Debian's chromium")
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@pytest.fixture
def browse(chromium, tmp_path):
    """`browse(checkpoint, script)`: the exported page of a checkpoint in a browser, with nothing left to draw."""
    browsers = []

    def open_page(checkpoint, script=""):
        page = tmp_path / "page.html"
        page.write_text(export.export(checkpoint), encoding="utf-8")
        browsers.append(Browser(chromium, page.as_uri(), script))
        browsers[-1].wait("document.getElementById('row').getAttribute('aria-busy') === 'false'")
        return browsers[-1]

    yield open_page
    for browser in browsers:
        browser.close()


def differences(browser):
    browser.run("document.getElementById('check').click()")
    browser.wait("document.getElementById('checked').dataset.found")
    return json.loads(browser.run("document.getElementById('checked').dataset.found"))


KINDS = [f"{kernel}: {what}" for kernel in ("WebAssembly", "JavaScript")
         for what in ("output", "dpm", "ddim", "ddpm", "edit", "inpaint")]


@pytest.mark.parametrize("checkpoint", [
    REPOSITORY / "weights" / "mnist.pth", dict(process="ddpm", time_spacing="article", mlp_ratio=2.7, guidance=1.0),
    dict(image_size=(9, 6), patch_size=(3, 2), channels=3, num_classes=3, classes=("cat", "</script>", "dog & cow"))])
def test_the_page_draws_what_pytorch_draws(browse, tmp_path, checkpoint):
    if isinstance(checkpoint, dict):
        checkpoint = make_checkpoint(tmp_path / "model.pth", **checkpoint)
    browser = browse(checkpoint)
    found = differences(browser)
    assert list(found) == KINDS
    largest = max(found.values())
    assert largest < 1e-3, found
    verdict = browser.run("$('checked').dataset.en")
    assert verdict.startswith("The same images: ")
    assert float(verdict.split()[-1].rstrip(".")) == pytest.approx(largest, rel=0.06)
    # It asked nobody for anything, and complained of nothing.
    requests = [event["params"]["request"]["url"] for event in browser.events
                if event["method"] == "Network.requestWillBeSent"]
    assert requests
    assert all(url.startswith(("file:", "blob:")) for url in requests), requests
    assert not [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_the_reference_tells_one_image_from_another(browse, tmp_path, monkeypatch):
    """The comparison can fail: when the weights are a thousandth larger, say."""
    pack = export.pack
    monkeypatch.setattr(export, "pack", lambda x, dtype: pack(1.01 * x if dtype == torch.float16 else x, dtype))
    browser = browse(make_checkpoint(tmp_path / "model.pth"))
    found = differences(browser).values()
    assert min(found) > 1e-3
    verdict = browser.run("$('checked').dataset.en")
    assert verdict.startswith("Other images: ")
    assert float(verdict.split()[-1].rstrip(".")) == pytest.approx(max(found), rel=0.06)


def test_an_old_browser_draws_too(browse, tmp_path):
    """One that has no WebAssembly, and gives a file no thread of its own."""
    browser = browse(make_checkpoint(tmp_path / "model.pth"), "delete window.Worker; delete window.WebAssembly")
    assert "(JavaScript)" in browser.run("document.getElementById('cost').textContent")
    assert browser.run("images.every(image => image.states.length === 6)")


def test_the_text_is_read_as_labels(browse, tmp_path):
    browser = browse(make_checkpoint(tmp_path / "model.pth"))

    def type_in(text):
        browser.run(f"$('text').value = {json.dumps(text)}; $('text').oninput()")
        return browser.run("images.map(image => image.label)"), browser.run("$('refused').textContent")

    assert type_in("3-14") == ([3, 1, 4], "")
    assert type_in("２年") == ([2], "")
    assert type_in("") == ([], "")
    assert type_in("0" * 17) == ([0] * 16, "Only the first 16 are drawn.")

    browser = browse(make_checkpoint(tmp_path / "model.pth", num_classes=3, classes=("cat", "big dog", "2")))
    assert type_in("Big Dog, cat 1") == ([1, 0, 1], "")
    _, refused = type_in("cat mouse")
    assert "“mouse”, but cat, big dog, 2." in refused


def test_names_of_any_kind_are_shown_and_asked_for(browse, tmp_path):
    """Markup, a comma, bytes that are no text, two that differ in their case alone."""
    names = ("</script>", "<img src=x onerror=oops()>", "{{numbers}}", "a, b", "\udcb9\udcab", "Cat", "cat", "猫")
    browser = browse(make_checkpoint(tmp_path / "model.pth", num_classes=len(names), classes=names))
    shown = [*names[:4], r"\udcb9\udcab", *names[5:]]
    for element in ("$('row').querySelectorAll('span')", "$('chips').children", "$('left-label').options"):
        assert browser.run(f"[...{element}].map(element => element.textContent)") == shown
    assert browser.run("images.map(({ label }) => label)") == [*range(8)]
    for i in range(8):
        browser.run(f"$('text').value = ''; $('chips').children[{i}].click()")
        assert browser.run("images.map(({ label }) => label)") == [i]
        assert browser.run("$('refused').textContent") == ""
    assert not [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_the_pen_has_a_colour(browse, tmp_path):
    browser = browse(make_checkpoint(tmp_path / "model.pth", channels=3))
    browser.run("$('ink').value = '#ff8000'; dot(6, 3)")
    channels = torch.tensor(browser.run("[...drawing]")).view(3, 12, 6)
    scale = 6 / 28
    assert scale < 1
    cover = 1.1 * scale + 0.5 - 0.5 ** 0.5  # of each of the four pixels about the dot
    for channel, value in enumerate((1, 128 / 127.5 - 1, -1)):
        torch.testing.assert_close(channels[channel, 5:7, 2:4], torch.full((2, 2), -1 + cover * (value + 1)))
    assert (channels > -1).sum() == 8
    browser.run("showDrawing()")
    pixels = browser.run("[...$('pad').getContext('2d').getImageData(2, 5, 1, 1).data]")
    expected = cover * torch.tensor([255.0, 128, 0])
    torch.testing.assert_close(torch.tensor(pixels[:3], dtype=torch.float32), expected, atol=1.1, rtol=0)


def test_noise_is_standard_normal(browse, tmp_path):
    """Whatever names it, on the way between two as well."""
    browser = browse(make_checkpoint(tmp_path / "model.pth"))
    draws = browser.run("""[[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]].map(
                           names => take(normals(...names), 20000)).map(numbers => [...numbers])""")
    midway = browser.run("[...between(take(normals(0, 0, 0), 20000), take(normals(0, 0, 1), 20000), 0.5)]")
    draws, midway = torch.tensor(draws), torch.tensor(midway)
    assert torch.equal(draws[0], draws[-1])
    for noise in [*draws, midway]:
        moments = torch.stack([noise.pow(k).mean() for k in (1, 2, 3, 4)])
        torch.testing.assert_close(moments, torch.tensor([0.0, 1.0, 0.0, 3.0]), atol=0.2, rtol=0)
    assert draws[:-1].corrcoef().fill_diagonal_(0).abs().max() < 0.04
    assert min(torch.stack([midway, noise]).corrcoef()[0, 1] for noise in draws[:2]) > 0.6


def test_steps_are_those_of_pytorch(browse, tmp_path):
    """Also where half of a step is rounded, to the even one."""
    page = browse(make_checkpoint(tmp_path / "model.pth"))
    found = page.run("""[1, 0.3].map(strength => Array.from({ length: 100 }, (_, i) =>
                        descendingSteps(Array(1000).fill([1, 0]), i + 1, strength).map(step => step.t)))""")
    process = SMALL.build_process()
    assert found == [[[t for t, *_ in process.descending_steps(count, strength)] for count in range(1, 101)]
                     for strength in (1, 0.3)]


# Kept for the tests of the controls: the last answer to each slot. Then all is asked for once more.
FOLLOW = """
    const answers = {}, pass = receive;
    receive = message => { pass(message); answers[message.slot] = message; };
    drawAll();
"""
SETTLED = """
    Object.entries(waiting).every(([slot, { id }]) => answers[slot]?.id === id &&
                                                      answers[slot].step === answers[slot].steps)
    && !playing
"""


class Controls:
    """A page of `make_checkpoint` whose controls are used, beside what PyTorch makes of the same noise and weights."""

    def __init__(self, browser, checkpoint):
        self.browser, content = browser, load_checkpoint(checkpoint, ANY)
        self.config = content["config"]
        content["ema"] = {name: weight.half().float() for name, weight in content["ema"].items()}
        self.model, self.process = averaged_model(content, precision="fp32"), self.config.build_process()
        self.shape = (1, self.config.channels, *self.config.image_size)
        browser.run(FOLLOW)
        browser.wait(SETTLED)

    def do(self, *actions):
        """Each action, and all answers to it."""
        for action in actions:
            self.browser.run(action)
            self.browser.wait(SETTLED)

    def set(self, event="input", **values):
        for name, value in values.items():
            self.do(f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('{event}'))")

    def press(self, name, *keys):
        self.do(*[f"$('{name}').dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}}}))" for key in keys])

    def numbers(self, expression, *shape):
        return torch.tensor(self.browser.run(f"[...{expression}]"), dtype=torch.float32).view(shape or self.shape)

    def text(self, name):
        return self.browser.run(f"$('{name}').textContent")

    def label(self, canvas):
        return self.browser.run(f"{canvas}.getAttribute('aria-label')")

    def noise(self, seed, place, draw, calls=60):
        """What the page draws one image from, (calls, *shape)."""
        size = math.prod(self.shape)
        return self.numbers(f"take(normals({seed}, {place}, {draw}), {calls * size})", calls, *self.shape)

    @torch.no_grad()
    def states(self, label, noise, *arguments, way=from_noise, sampler="dpm", steps=5, guidance=2.0):
        """What a sampler makes of noise (calls, *shape), step by step: (steps + 1, *shape). label: or (a, b, share)."""
        first, last, share = label if isinstance(label, tuple) else (label, label, 0.0)
        model, table = copy.deepcopy(self.model), self.model.label_embedding.weight
        rows = torch.stack([torch.lerp(table[first], table[last], share), table[-1]])
        model.label_embedding, model.null_label = torch.nn.Embedding.from_pretrained(rows), 1

        def denoise(x, t):
            return self.process.denoise(model, x, t, torch.tensor([0]), guidance)

        return torch.stack([*way(self.process, SAMPLERS[sampler], denoise, functools.partial(next, iter(noise)), steps,
                                 *arguments)])

    @torch.no_grad()
    def look(self, x, t, label, guidance=2.0):
        """The guess of the network, like x, and how strongly each patch of each head of each block attends, in a list
        of (h, N, N)."""
        found = []

        def keep(module, inputs, output):  # (B, N, 3 D), with the label first, then without
            q, k, _ = output[0].unflatten(1, (3, self.config.num_heads, -1)).permute(1, 2, 0, 3)  # each (h, N, D/h)
            found.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1))

        hooks = [block.attention.qkv.register_forward_hook(keep) for block in self.model.blocks]
        guess = self.process.denoise(self.model, x, t, torch.tensor([label]), guidance)
        for hook in hooks:
            hook.remove()
        return guess, found

    def colour(self, name):
        return torch.tensor(self.browser.run(f"colour('--{name}')"), dtype=torch.float32)

    def pixels(self, canvas):
        """What is seen on a canvas, 0..255, (H, W, 3)."""
        height, width = self.config.image_size
        data = self.numbers(f"{canvas}.getContext('2d').getImageData(0, 0, {width}, {height}).data", height, width, 4)
        return data[..., :3]

    def ink(self, x):
        """The pixels of a grey image x (1, 1, H, W) in the page's colours."""
        return torch.lerp(self.colour("paper"), self.colour("ink"), (x[0, 0, ..., None].clamp(-1, 1) + 1) / 2)

    def shows(self, canvas, x):
        torch.testing.assert_close(self.pixels(canvas), self.ink(x), atol=1.1, rtol=0)


def alike(a, b):
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.fixture
def controls(browse, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model.pth")
    return Controls(browse(checkpoint), checkpoint)


def tile(i):
    return f"$('row').querySelectorAll('canvas')[{i}]"


def test_the_row_shows_what_its_settings_draw(controls):
    def row(expected, calls, **options):
        """expected: a label, seed and draw for each image."""
        for i, (label, seed, draw) in enumerate(expected):
            states = controls.states(label, controls.noise(seed, i, draw), **options)
            assert controls.browser.run(f"images[{i}].states.length") == len(states)
            for step, state in enumerate(states):
                alike(controls.numbers(f"images[{i}].states[{step}].x"), state)
            controls.shows(tile(i), states[-1])
        assert f"{calls} network calls, {calls // len(expected)} each" in controls.text("cost")

    controls.set(text="3-14")
    row([(3, 0, 0), (1, 0, 0), (4, 0, 0)], 30)
    controls.set(guidance=3)
    row([(3, 0, 0), (1, 0, 0), (4, 0, 0)], 30, guidance=3)
    controls.set(guidance=1, sampler="ddim")
    row([(3, 0, 0), (1, 0, 0), (4, 0, 0)], 15, guidance=1, sampler="ddim")
    controls.set(guidance=0, sampler="ddpm", steps=3, seed=5)
    row([(3, 5, 0), (1, 5, 0), (4, 5, 0)], 9, guidance=0, sampler="ddpm", steps=3)
    controls.do("$('reset').click()")
    row([(3, 0, 0), (1, 0, 0), (4, 0, 0)], 30)

    controls.do(f"{tile(1)}.parentElement.click()")
    assert "1 image: 10 network calls, 10 each" in controls.text("cost")
    states = controls.states(1, controls.noise(0, 1, 2))
    alike(controls.numbers("images[1].states[5].x"), states[5])
    # The click also lays the old draw and the new one side by side.
    controls.shows("$('left').firstChild", controls.states(1, controls.noise(0, 1, 0))[5])
    controls.shows("$('right').firstChild", states[5])

    controls.set(step=2)
    controls.shows(tile(1), states[2])
    controls.shows(tile(2), controls.states(4, controls.noise(0, 2, 0))[2])
    assert controls.text("step-value") == "step 2 of 5"
    controls.do("$('play').click()")
    controls.shows(tile(1), states[5])
    # What stays in its place in the text is not drawn anew; what another image is, is.
    controls.set(text="314-1")
    assert controls.browser.run("images.map(({ label, place, draw }) => [label, place, draw])") == [
        [3, 0, 0], [1, 1, 2], [4, 2, 0], [1, 3, 0]]
    assert "1 image: 10 network calls" in controls.text("cost")
    controls.do("$('reseed').click()")
    seed = controls.browser.run("seed()")
    assert seed
    alike(controls.numbers("images[3].states[5].x"), controls.states(1, controls.noise(seed, 3, 0))[5])


def test_the_slider_leads_from_one_draw_to_the_other(controls):
    def noise(share, a, b, seed=0):
        a, b = (controls.noise(seed, 100, draw, 1)[0] for draw in (a, b))
        angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        return (((1 - share) * angle).sin() * a + (share * angle).sin() * b)[None] / angle.sin()

    def shown(labels, share, draws, seed=0, **options):
        for canvas, at in (("$('left').firstChild", 0), ("$('middle')", share), ("$('right').firstChild", 1)):
            x = controls.states((*labels, at), noise(at, *draws, seed), **options)[-1]
            controls.shows(canvas, x)

    shown((3, 8), 0.5, (0, 1))
    controls.set(share=90)
    shown((3, 8), 0.9, (0, 1))
    assert controls.text("share-value") == "90 %"
    assert "3 images: 30 network calls, 10 each" in controls.text("cost")
    assert controls.label("$('middle')") == "90 % of the way from 3 to 8"
    controls.set("change", **{"left-label": 1})
    shown((1, 8), 0.9, (0, 1))
    controls.do("$('right').click()")
    shown((1, 8), 0.9, (0, 2))
    controls.set(guidance=2, sampler="ddpm", steps=4, seed=7)  # fresh noise would flicker: ddim instead
    shown((1, 8), 0.9, (0, 2), 7, guidance=2, sampler="ddim", steps=4)


def test_inside_is_what_pytorch_sees_there(controls):
    grid = [n // p for n, p in zip(controls.config.image_size, controls.config.patch_size, strict=True)]
    controls.set(text="629")

    def shown(image, label, moment, patch, **options):
        x = controls.states(label, controls.noise(0, image, 0), **options)[moment]
        t, *_ = controls.process.descending_steps(5)[moment]
        guess, attention = controls.look(x, t, label, **options)
        assert controls.text("moment-value") == f"step {moment + 1} of 5, t = {t}"
        controls.shows("$('noisy')", x)
        alike(controls.numbers("seen.guess"), guess)
        controls.shows("$('guess')", guess)
        row, column = patch // grid[1], patch % grid[1]
        assert f"row {row + 1} of {grid[0]}, column {column + 1} of {grid[1]}" in controls.label("$('noisy')")
        paper, accent = controls.colour("paper"), controls.colour("accent")
        for block, weights in enumerate(attention):
            alike(controls.numbers(f"seen.attention[{block}]", *weights.shape), weights)
            for head, looks in enumerate(weights[:, patch]):  # (N,)
                strongest, canvas = looks.argmax().item(), f"$('attention-{block}-{head}')"
                assert controls.label(canvas) == (
                    f"Block {block + 1}, head {head + 1}: most to row {strongest // grid[1] + 1}, column "
                    f"{strongest % grid[1] + 1}, {(100 * looks.max()).round():.0f} %")
                heat = (looks / looks.max() * 0.9).view(grid)
                for axis, size in enumerate(controls.config.patch_size):
                    heat = heat.repeat_interleave(size, axis)
                expected = torch.lerp(torch.lerp(paper, controls.ink(guess), 0.25), accent, heat[..., None])
                torch.testing.assert_close(controls.pixels(canvas), expected, atol=1.1, rtol=0)

    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    shown(0, 6, 3, middle)
    assert controls.label("$('choices').children[2]") == "Look into image 3, 9"
    controls.do("$('choices').children[2].click()")
    shown(2, 9, 3, middle)
    controls.set(moment=0)
    controls.press("noisy", "ArrowUp", "ArrowLeft")
    shown(2, 9, 0, middle - grid[1] - 1)
    controls.do("""{
        const box = $('noisy').getBoundingClientRect(), at = { clientX: box.right - 1, clientY: box.bottom - 1 };
        $('noisy').dispatchEvent(new PointerEvent('pointerdown', at));
    }""")
    controls.set(guidance=2.5)
    shown(2, 9, 0, math.prod(grid) - 1, guidance=2.5)


def dots(controls, places, radius):
    """What a tool covers of each pixel, 0..1, at places (row, column)."""
    height, width = controls.config.image_size
    scale = min(height, width) / 28
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    covers = [(radius * scale + 0.5 - torch.hypot(rows - row, columns - column)).clamp(0, 1)
              for row, column in places]
    return torch.stack(covers).amax(0).expand(controls.shape)


def test_the_pen_draws_and_the_network_changes_and_completes_it(controls):
    noises = []

    def noise():
        noises.append(controls.browser.run("draws"))
        return controls.noise(0, 200, noises[-1])

    # The pen starts in the middle, lifted; it is lowered and goes up twice.
    height, width = controls.config.image_size
    start = height / 2, width / 2
    controls.press("pad", "ArrowLeft", " ", "ArrowUp", "ArrowUp")
    path = [(start[0] - step / 2, start[1] - 1) for step in range(5)]
    expected = 2 * dots(controls, path, 1.1) - 1
    alike(controls.numbers("drawing"), expected)
    controls.shows("$('pad')", expected)
    assert f"pen down, row {height // 2 - 1}, column {width // 2}" in controls.label("$('pad')")

    controls.browser.run("$('turn-label').value = 4; $('strength').value = 0.6")
    controls.do("$('turn').click()")
    changed = controls.states(4, noise(), expected, 0.6, way=edit)[-1]
    alike(controls.numbers("result"), changed)
    controls.shows("$('drawn')", changed)
    assert "1 image: 10 network calls, 10 each" in controls.text("cost")
    controls.browser.run("$('complete').click()")
    assert "Erase a part" in controls.text("cost")

    controls.do("$('keep').click()")
    alike(controls.numbers("drawing"), changed)
    controls.browser.run("document.querySelector('[value=eraser]').click()")
    controls.press("pad", "ArrowLeft")
    erased = dots(controls, [(start[0] - 2, start[1] - 1 - step / 2) for step in (1, 2)], 2.6) > 0
    assert 0 < erased.sum() < erased.numel()
    assert torch.equal(controls.numbers("hidden") > 0, erased)
    picture = torch.where(erased, torch.tensor(-1.0), changed)
    alike(controls.numbers("drawing"), picture)
    controls.browser.run("$('complete-label').value = 7")
    for label, calls in ((7, 40), ("", 20)):  # 5 steps of 4 rounds, twice the calls with guidance
        controls.do(f"$('complete-label').value = '{label}'; $('complete').click()")
        completed = controls.states(label or 0, noise(), picture, ~erased, way=inpaint,
                                    guidance=2.0 if label else 0)[-1]
        alike(controls.numbers("result"), completed)
        assert controls.browser.run("drawing.every((value, i) => hidden[i] || value === result[i])")
        assert f"1 image: {calls} network calls, {calls} each" in controls.text("cost")
    assert noises == sorted(set(noises)), "each asks for fresh noise"

    # A pixel that is drawn on is no longer one to complete; nor is any of a new drawing.
    controls.browser.run("document.querySelector('[value=pen]').click()")
    controls.press("pad", "ArrowLeft")
    drawn = dots(controls, [(start[0] - 2, start[1] - 2 - step / 2) for step in (1, 2)], 1.1) > 0
    assert (erased & drawn).any()
    assert torch.equal(controls.numbers("hidden") > 0, erased & ~drawn)
    controls.do("$('borrow').click()")
    alike(controls.numbers("drawing"), controls.numbers("images[0].states[5].x"))
    assert not controls.numbers("hidden").any()
    controls.browser.run("hidden.fill(1)")
    controls.do("$('clear').click()")
    assert (controls.numbers("drawing") == -1).all()
    assert not controls.numbers("hidden").any()


def test_the_page_speaks_two_languages_and_is_light_or_dark(controls):
    for name, value in {"lang": "zh", "data-theme": "dark"}.items():
        button = {"lang": "language", "data-theme": "theme"}[name]
        controls.browser.run(f"$('{button}').click()")
        assert controls.browser.run(f"document.documentElement.getAttribute('{name}')") == value
    assert "网络调用" in controls.text("cost")
    controls.shows(tile(0), controls.numbers("images[0].states[5].x"))  # in the dark theme's colours
    # What needs a name for those who cannot see it has one.
    assert not controls.browser.run(
        "[...document.querySelectorAll('button, input, select, canvas[role]')].filter(element => "
        "!element.textContent.trim() && !element.ariaLabel && !element.labels?.length && "
        "!element.getAttribute('aria-labelledby')).map(element => element.outerHTML).join()")


def test_the_command_writes_the_page(call, tmp_path):
    code, out, _ = call(export, "--checkpoint", make_checkpoint(tmp_path / "model.pth"), "--out", tmp_path / "a.html")
    assert code == 0
    assert f"{tmp_path / 'a.html'}: 0." in out
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_what_the_page_cannot_show_is_refused_in_one_line(call, tmp_path, monkeypatch):
    model, out = tmp_path / "model.pth", tmp_path / "a.html"
    assert_refused(call(export, "--checkpoint", model, "--out", out), "there is no checkpoint")
    make_checkpoint(model, channels=4)
    assert_refused(call(export, "--checkpoint", model, "--out", out), "4 channels", "grey (1 channel)")
    make_checkpoint(model, sampler="heun")
    assert_refused(call(export, "--checkpoint", model, "--out", out), "sampler heun",
                   "python -m demo.share --sampler")
    make_checkpoint(model, LatentConfig(**vars(SMALL)))
    assert_refused(call(export, "--checkpoint", model, "--out", out), "a model of latents")
    make_checkpoint(model)
    assert_refused(call(export, "--checkpoint", model, "--out", tmp_path / "no" / "a.html"), "cannot be written")
    make_checkpoint(tmp_path / "large.pth", hidden_size=256, depth=2)
    assert_refused(call(export, "--checkpoint", tmp_path / "large.pth", "--out", out), "6 MB is the most")
    monkeypatch.setattr(export, "LARGEST", 50_000)
    assert_refused(call(export, "--checkpoint", model, "--out", out), "weights, a page of 0.2 MB", "--hidden-size")
    content = torch.load(model, weights_only=True)
    content["ema"]["label_embedding.weight"][0, 0] = 1e5
    torch.save(content, model)
    assert_refused(call(export, "--checkpoint", model, "--out", out), "half precision")
    assert not out.exists()


@pytest.mark.parametrize(("T", "most"), [(20, 20), (1000, 100)])
def test_what_the_page_holds_of_the_model(tmp_path, T, most):
    """No more steps than there are, or than the slider has; and a name that looks like the end of a script."""
    names = ("</script><b>", "<!--", *"23456789")
    path = make_checkpoint(tmp_path / "model.pth", T=T, classes=names)
    found = re.search('id="model">(.*?)</script>', export.export(path))[1]
    assert "<" not in found and json.loads(found)["most_steps"] == most
    assert json.loads(found)["config"]["class_names"] == [*names]


def test_a_page_with_guidance_opens_with_enough_of_it(tmp_path):
    for own, opened in ((0.5, 0.5), (1.0, 1.0), (1.1, 2.0), (3.0, 3.0)):
        page = export.export(make_checkpoint(tmp_path / "model.pth", guidance=own))
        model = json.loads(re.search('id="model">(.*?)</script>', page)[1])
        assert (model["config"]["guidance"], model["reference"]["guidance"]) == (opened, own)


def rms_norm(block, x, c):
    """The forward pass of a DiTBlock with another norm, without weights."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.modulation(c).chunk(6, dim=1)
    norm = functools.partial(torch.nn.functional.rms_norm, normalized_shape=x.shape[-1:])
    x = dit_block.add_gated(x, gate_1, block.attention(dit_block.modulate(norm(x), shift_1, scale_1)))
    return dit_block.add_gated(x, gate_2, block.mlp(dit_block.modulate(norm(x), shift_2, scale_2)))


class Renamed(dit_block.DiTBlock):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.feed_forward = self.mlp
        del self.mlp

    @property
    def mlp(self):
        return self.feed_forward


@pytest.mark.parametrize("change", [
    lambda patch: patch.setattr(dit_block.DiTBlock, "forward", rms_norm),
    lambda patch: patch.setattr(dit.DiT.__init__, "__defaults__", (*dit.DiT.__init__.__defaults__[:-1], Renamed)),
    lambda patch: patch.setattr(torch.nn.GELU, "forward", lambda self, x: torch.nn.functional.silu(x)),
    lambda patch: patch.setattr(dit_block, "attend", lambda q, k, v: (q @ k.mT).softmax(dim=-1) @ v)])
def test_a_network_that_the_page_does_not_know_is_refused(call, tmp_path, monkeypatch, change):
    change(monkeypatch)
    model, out = make_checkpoint(tmp_path / "model.pth"), tmp_path / "a.html"
    assert_refused(call(export, "--checkpoint", model, "--out", out), "no longer the one that demo/dit.js computes")
    assert not out.exists()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return export.export(make_checkpoint(tmp_path_factory.mktemp("page") / "model.pth"))


def test_the_page_is_whole(page):
    """It asks for nothing, and nothing is left to be filled in."""
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|\bimport\(|fetch\(|XMLHttpRequest|WebSocket|\{\{", page)


def test_every_text_is_there_in_both_languages(page):
    body = page[:page.index('<script type="application/json"')]
    assert [*re.findall(r'<span\s+lang="(..)"', body)] == ["en", "zh"] * body.count('lang="zh">', body.index("<h1>"))
    for kind in ("data-", "data-label-"):
        assert body.count(f"{kind}en=") == body.count(f"{kind}zh=") > 0

