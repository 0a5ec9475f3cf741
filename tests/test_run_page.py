from support import parallel

import html
import html.parser
import re
from pathlib import Path

import pytest
from conftest import SMALL_DATA, TINY
from PIL import Image

import train
from config import Config
from record import page

ADDRESSES = ("src", "href", "action", "data", "poster", "srcset", "formaction", "background", "ping", "xlink:href")


class Page(html.parser.HTMLParser):
    """The tags, the addresses and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ADDRESSES]

    def handle_data(self, data):
        self.text += data


def page_of(folder, done=1, seconds=90.0, **settings):
    folder.mkdir(exist_ok=True)
    page.show_run(Config(**dict(num_classes=10, steps=500) | settings), folder, done, seconds, "train.py")
    return Page(folder / "index.html")


def test_the_page_of_a_run(call, tmp_path):
    """It names every grid in order, those from before it was stopped too, the settings and the commands."""
    run = tmp_path / "my run"
    flags = [*TINY, "--sample-every", 2, "--run-dir", run]
    assert call(train, *flags, "--steps", 4)[0] == 0
    early = Page(run / "index.html")
    assert [name for name in early.addresses if "samples" in name] == [
        "samples_000004.png", "samples_000002.png", "samples_000004.png"]
    assert "Step 4 of 4, after " in early.text and "Reload" not in early.text
    assert call(train, *flags, "--steps", 7, "--resume")[0] == 0
    page = Page(run / "index.html")
    assert [name for name in page.addresses if "samples" in name] == [
        "samples_000007.png", *(f"samples_{step:06d}.png" for step in (2, 4, 6, 7))]
    assert page.tags.count("input") == 1 and 'max="3" value="3"' in page.source
    for name, value in (("hidden_size", 32), ("dataset", "mnist"), ("image_size", 8), ("guidance", 1.4)):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page.source
    assert all(f"<dt>{name}</dt>" in page.source for name in Config.__dataclass_fields__)
    changed, _, same = page.source.partition("As by default")
    assert "<dt>hidden_size</dt>" in changed and "<dt>guidance</dt>" in same
    for command in (f"inference.py --checkpoint '{run}'", f"train.py --run-dir '{run}' --resume",
                    f"train.py --run-dir '{run}' --resume --steps 14"):
        assert f"<code>python {command}</code>" in html.unescape(page.source)
    assert f"<h1>A DiT learns {TINY[1]}, in my run</h1>" in page.source
    assert not list(run.glob("*.tmp"))


def test_it_asks_nothing_of_a_network(trained):
    """All that it refers to lies beside it."""
    page = Page(trained / "index.html")
    assert page.addresses and all(name == "data:," or (trained / name).is_file() for name in page.addresses)
    assert not re.search(r"https?:|//|@import|url\(|fetch|XMLHttp|WebSocket|EventSource|import\(", page.source)
    assert not {"iframe", "object", "embed", "video", "audio", "form", "base"} & set(page.tags)
    assert page.tags.count("script") == 1


def test_it_is_watched_while_it_is_trained(call, tmp_path, monkeypatch):
    """With the first grid, when there is no more than that."""
    written = []
    monkeypatch.setattr(train, "show_run", lambda config, run_dir, *rest: (
        page.show_run(config, run_dir, *rest), written.append(Page(run_dir / "index.html"))))
    assert call(train, *TINY, "--steps", 4, "--sample-every", 2, "--run-dir", tmp_path / "run")[0] == 0
    assert re.search("Step 2 of 4, after [0-9]+ s of training. Reload", written[0].text)
    assert {"samples_000002.png", "loss.png"} <= {*written[0].addresses}
    assert written[0].tags.count("input") == 0 and written[-1].tags.count("input") == 1


def test_the_losses_of_an_earlier_run_are_not_shown(call, tmp_path, monkeypatch):
    """Whose model was moved away: the first grid may come before this run has logged any."""
    folder, written = tmp_path / "run", []
    assert call(train, *TINY, "--steps", 1, "--run-dir", folder)[0] == 0
    (folder / "model.pth").unlink()
    monkeypatch.setattr(train, "show_run", lambda config, run_dir, *rest: (
        page.show_run(config, run_dir, *rest), written.append(Page(run_dir / "index.html"))))
    assert call(train, *TINY, "--steps", 2, "--sample-every", 1, "--log-every", 2, "--run-dir", folder)[0] == 0
    assert ["loss.png" in page.addresses for page in written] == [False, True]


def test_only_rank_0_writes_it(tmp_path, monkeypatch):
    """Nor do the others leave anything else."""
    monkeypatch.setattr(parallel, "share", slice)  # there is one process
    for rank, left in ((1, []), (0, ["index.html", "log.csv", "loss.png", "model.pth", "samples_000001.png"])):
        monkeypatch.setattr(parallel, "RANK", rank)
        train.train(SMALL_DATA | dict(hidden_size=16, depth=1, num_heads=2, sample_steps=1, steps=1), tmp_path,
                    device="cpu")
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_names_are_no_markup(tmp_path):
    evil = """<script>alert("1")<script>&amp;'{}\udcff"""
    folder = tmp_path / evil
    folder.mkdir()
    for name in ("samples_1<b>.png", "samples_000001.png"):
        (folder / name).touch()
    shown = page_of(folder, num_classes=2, classes=("<i>", evil), dataset="folder", data_dir=f"<u>/{evil}")
    assert shown.tags.count("script") == 1 and not {"b", "i", "u"} & {*shown.tags}
    # The data and the run in title and heading; a class in the five columns that it has, and in the settings; --run-dir
    # and --checkpoint in the three commands
    assert shown.source.count("alert") == 2 * 2 + 5 + 2 + 3
    assert shown.text.count(evil.replace("\udcff", "?")) == 2 * 2 + 5 + 2
    assert f"<i>, {evil[:-1]}" in shown.text and "<dt>classes</dt>" in shown.source.partition("As by default")[0]


def test_it_depends_on_the_files_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        for step in ((20, 3, 100) if name == "a" else (100, 20, 3)):
            Image.new("L", (4, 4)).save(tmp_path / name / "run" / f"samples_{step:06d}.png")
    pages = [page_of(tmp_path / name / "run") for name in ("a", "b")]
    assert pages[0].source.replace(str(tmp_path / "a"), str(tmp_path / "b")) == pages[1].source
    assert [name[8:14] for name in pages[0].addresses[2:]] == ["000003", "000020", "000100"]


def test_without_a_picture_to_show(tmp_path):
    shown = page_of(tmp_path)
    assert "No loss is logged yet." in shown.text and "The first grid is not drawn yet." in shown.text
    assert "img" not in shown.tags
    (tmp_path / "loss.png").touch()
    assert page_of(tmp_path).addresses[1:] == ["loss.png"]


def test_how_far_a_run_is(tmp_path):
    page = page_of(tmp_path, steps=10**6, done=50_000, seconds=7500)
    assert "Step 50,000 of 1,000,000, after 2 h 05 min of training. Reload" in page.text


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    before = page_of(tmp_path).source
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match="No space left"):
        page_of(tmp_path, done=2)
    assert Path(tmp_path / "index.html").read_text() == before and len(list(tmp_path.iterdir())) == 1
