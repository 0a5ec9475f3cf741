import dataclasses
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from conftest import HANGS, REPOSITORY, assert_refused

from checkpoint import save_checkpoint
from config import Config
from demo import export
from dit import build_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = Config(image_size=8, patch_size=2, channels=1, num_classes=10, hidden_size=32, depth=2, num_heads=2,
               sample_steps=5)


class Browser:
    """A page in a headless Chromium, steered through its DevTools protocol."""

    def __init__(self, page, folder, script=""):
        """script: JavaScript to run before any of the page's own."""
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        # It reads the protocol from file 3 and writes it to file 4.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.session, self.count, self.buffer, self.events = {}, 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        self.call("Page.navigate", url=page)
        while not self.loaded(page):
            self.events.append(self.read())

    def loaded(self, page):
        kinds = [event["method"] for event in self.events
                 if event["params"].get("frame", {"url": page})["url"] == page]  # the blank page is loaded too
        return "Page.frameNavigated" in kinds and "Page.loadEventFired" in kinds[kinds.index("Page.frameNavigated"):]

    def read(self):
        while b"\0" not in self.buffer:
            self.buffer += os.read(self.answers, 2**16) or pytest.fail("chromium ended")
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(request).encode() + b"\0")
        while (message := self.read()).get("id") != self.count:
            self.events.append(message)
        assert "result" in message, message
        return message["result"]

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
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


def make_checkpoint(path, config=SMALL, **changes):
    """A checkpoint of random weights, with gates that are not zero, so that every part of the network counts."""
    config = dataclasses.replace(config, **changes)
    weights = build_model(config).state_dict()
    save_checkpoint(path, config, 1, 1.0, {name: weight + 0.05 * torch.randn_like(weight) if weight.ndim else weight
                                           for name, weight in weights.items()})
    return path


@pytest.fixture
def browse(tmp_path):
    """`browse(checkpoint, script)`: the exported page of a checkpoint in a browser, with nothing left to draw."""
    if not CHROMIUM:
        pytest.skip("no Chromium here to open the page with: install Debian's chromium")
    browsers = []

    def open_page(checkpoint, script=""):
        page = tmp_path / "page.html"
        page.write_text(export.export(checkpoint), encoding="utf-8")
        browsers.append(Browser(page.as_uri(), tmp_path / f"chromium_{len(browsers)}", script))
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
    assert max(found.values()) < 1e-3, found
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
    assert min(differences(browse(make_checkpoint(tmp_path / "model.pth"))).values()) > 1e-3


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


def image_of(canvas):
    """A JavaScript expression: the pixels of a canvas, a string."""
    return f"[...{canvas}.getContext('2d').getImageData(0, 0, {canvas}.width, {canvas}.height).data].join()"


def test_every_control_changes_what_it_says(browse, tmp_path):
    browser = browse(make_checkpoint(tmp_path / "model.pth"))
    idle = "$('row').getAttribute('aria-busy') === 'false'"

    def picture(canvas):
        return browser.run(image_of(canvas))

    def change(canvas, action):
        before = picture(canvas)
        browser.run(action)
        browser.wait(f"{image_of(canvas)} !== {before!r}")
        browser.wait(idle)

    def set_value(name, value, event="input"):
        return f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('{event}', {{bubbles: true}}))"

    browser.run(set_value("text", "2026-11"))
    browser.wait(f"{idle} && $('row').querySelectorAll('button').length === 6")
    first, second = "$('row').querySelectorAll('canvas')[0]", "$('row').querySelectorAll('canvas')[1]"
    own, other = picture(first), picture(second)
    change(first, f"{first}.parentElement.click()")
    assert picture(second) == other, "only the image that was clicked is drawn anew"
    for name, value in dict(guidance=3, sampler="ddim", steps=2, seed=5, step=0).items():
        change(second, set_value(name, value))
    browser.run("$('reset').click()")
    browser.wait(f"{idle} && {image_of(second)} === {other!r}")
    assert picture(first) != own

    change("$('middle')", set_value("share", 90))
    change("$('left').firstChild", set_value("left-label", 1, "change"))
    change("$('right').firstChild", "$('right').click()")

    change("$('guess')", set_value("moment", 0))
    change("$('attention-1-1')", "$('noisy').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowUp'}))")
    assert "row 2 of 4" in browser.run("$('noisy').getAttribute('aria-label')")

    change("$('pad')", "for (const key of [' ', 'ArrowUp', 'ArrowUp', 'ArrowLeft']) "
           "$('pad').dispatchEvent(new KeyboardEvent('keydown', {key}))")
    change("$('drawn')", "result = null; $('turn').click()")
    browser.wait("result")
    browser.run("$('complete').click()")
    assert "Erase" in browser.run("$('cost').textContent")
    change("$('pad')", "document.querySelector('[value=eraser]').click(); "
           "$('pad').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))")
    browser.run("result = null; $('complete').click()")
    browser.wait("result")
    assert browser.run("drawing.filter((value, i) => !hidden[i] && value !== result[i]).length") == 0
    assert browser.run("drawing.filter((value, i) => hidden[i] && value !== result[i]).length") > 0

    for name, value in {"lang": "zh", "data-theme": "dark"}.items():
        button = {"lang": "language", "data-theme": "theme"}[name]
        browser.run(f"$('{button}').click()")
        assert browser.run(f"document.documentElement.getAttribute('{name}')") == value
    assert "网络调用" in browser.run("$('cost').textContent")
    # What needs a name for those who cannot see it has one.
    assert not browser.run("[...document.querySelectorAll('button, input, select, canvas[role]')].filter(element => "
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
    assert_refused(call(export, "--checkpoint", model, "--out", out), "4 channels of 8", "grey (1 channel)")
    make_checkpoint(model)
    assert_refused(call(export, "--checkpoint", model, "--out", tmp_path / "no" / "a.html"), "cannot be written")
    monkeypatch.setattr(export, "LARGEST", 50_000)
    assert_refused(call(export, "--checkpoint", model, "--out", out), "weights, a page of 0.2 MB", "--hidden-size")
    content = torch.load(model, weights_only=True)
    content["ema"]["label_embedding.weight"][0, 0] = 1e5
    torch.save(content, model)
    assert_refused(call(export, "--checkpoint", model, "--out", out), "half precision")
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

