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
from record.log import read_log
from record.page import POINTS, log_ticks, short, show_loss, ticks, write_page

NAMES = ["step", "loss", "loss_t0-499", "loss_t500-999", "lr"]
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


def write_log(folder, rows):
    (folder / "log.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in [NAMES, *rows]))


def page_of(folder, **changes):
    write_page(folder / "index.html", **dict(title="run", steps=500, seconds=90, columns="0, 1", settings={"lr": 1},
                                            defaults={"lr": 0}, commands={}) | changes)
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
    monkeypatch.setattr(page, "write_page", lambda path, *rest: (write_page(path, *rest), written.append(Page(path))))
    assert call(train, *TINY, "--steps", 4, "--sample-every", 2, "--run-dir", tmp_path / "run")[0] == 0
    assert re.search("Step 2 of 4, after [0-9]+ s of training. Reload", written[0].text)
    assert "samples_000002.png" in written[0].addresses
    assert written[0].tags.count("input") == 0 and written[-1].tags.count("input") == 1


def test_only_rank_0_writes_it(tmp_path, monkeypatch):
    """Nor do the others leave anything else."""
    monkeypatch.setattr(parallel, "share", slice)  # there is one process
    for rank, left in ((1, []), (0, ["index.html", "log.csv", "loss.png", "model.pth", "samples_000001.png"])):
        monkeypatch.setattr(parallel, "RANK", rank)
        train.train(SMALL_DATA | dict(hidden_size=16, depth=1, num_heads=2, sample_steps=1, steps=1), tmp_path,
                    device="cpu")
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_names_are_no_markup(tmp_path):
    evil = """<script>alert("1")</script>&amp;'{}\udcff"""
    for name in ("samples_1<b>.png", "samples_000001.png"):
        (tmp_path / name).touch()
    first = page_of(tmp_path, title=evil, columns=evil, settings={evil: evil}, defaults={evil: 1},
                    commands={evil: evil})
    assert first.tags.count("script") == 1 and "b" not in first.tags and first.source.count("alert") == 7
    assert first.text.count(evil.replace("\udcff", "?")) == 7
    config = Config(num_classes=2, classes=("<i>", "a&b"))
    folder = tmp_path / "<u>"
    folder.mkdir()
    page.show_run(config, folder, 1.0, "train.py")
    shown = Page(folder / "index.html")
    assert not {"i", "u"} & set(shown.tags) and "<i>, a&b" in shown.text
    assert f"A DiT learns {config.dataset}, in <u>" in shown.text
    assert "<dt>classes</dt>" in shown.source.partition("As by default")[0]


def test_it_depends_on_the_files_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for step in ((20, 3, 100) if name == "a" else (100, 20, 3)):
            Image.new("L", (4, 4)).save(tmp_path / name / f"samples_{step:06d}.png")
        write_log(tmp_path / name, [[10, 3, 2, 4, 1]])
    assert page_of(tmp_path / "a").source == page_of(tmp_path / "b").source
    assert [name[8:14] for name in page_of(tmp_path / "a").addresses[2:]] == ["000003", "000020", "000100"]


@pytest.mark.parametrize("log", [None, "", "not,a,log\n1,2,3\n", "folder", [], [[1, "nan", "nan", "inf", 0]],
                                 [[5, 0, 0, 0, 0]]])
def test_without_a_loss_to_show(tmp_path, log):
    """Whatever is done to log.csv, the run goes on."""
    if log == "folder":
        (tmp_path / "log.csv").mkdir()
    elif isinstance(log, list):
        write_log(tmp_path, log)
    elif log is not None:
        (tmp_path / "log.csv").write_text(log)
    page = page_of(tmp_path)
    assert "No loss is logged yet." in page.text and "The first grid is not drawn yet." in page.text
    assert "path" not in page.tags


def test_the_curves(tmp_path):
    """A level that was not met is left out where it was not; the last point is the last row, at the right edge."""
    write_log(tmp_path, [[10, 3, "nan", 4, 1], [20, 2, 2, "nan", 1], [40, 0.25, 0.5, 0.125, 1]])
    source = show_loss(*read_log(tmp_path / "log.csv"))
    paths = dict(re.findall(r'<path class="(c\d)" d="M([^"]+)"/>\n', source))
    points = {name: [tuple(map(float, point.split())) for point in path.split("L")] for name, path in paths.items()}
    assert [[x for x, _ in points[name]] for name in ("c0", "c1", "c2")] == [[25, 50, 100], [50, 100], [25, 100]]
    low, high = points["c2"][1][1], points["c2"][0][1]
    assert 0 < high < 5 and 95 < low < 100
    assert points["c0"][2][1] - points["c0"][1][1] == pytest.approx((low - high) * 3 / 5, abs=0.02)  # of log2 32
    assert "all t: 0.25" in source and "t = 0–499: 0.5" in source and "t = 500–999: 0.125" in source


def test_a_long_log_makes_no_large_page(tmp_path):
    write_log(tmp_path, [[step, 1 / step, 2, 3, 1] for step in range(1, 50_001)])
    page = page_of(tmp_path, steps=10**6, seconds=7500)
    assert len(page.source) < 60_000 and "Step 50,000 of 1,000,000, after 2 h 05 min of training. Reload" in page.text
    assert "all t: 2e-05" in page.text and page.source.count("L") > POINTS


def test_one_row_is_a_page(tmp_path):
    write_log(tmp_path, [[1, 0.5, 0.5, 0.5, 1]])
    assert "all t: 0.5" in page_of(tmp_path).text


def test_ticks_are_round_and_few():
    assert ticks(700) == [0, 200, 400, 600] and ticks(5000) == [0, 1000, 2000, 3000, 4000, 5000]
    for end in (1, 2, 3, 9, 10, 49, 50, 51, 99, 12_345, 100_000_000):
        assert 2 <= len(ticks(end)) <= 6 and 0 <= ticks(end)[-1] <= end, end
    assert log_ticks(0.18, 11) == [0.2, 0.5, 1, 2, 5, 10]
    assert log_ticks(0.0009, 110) == [0.001, 0.01, 0.1, 1, 10, 100]
    assert [short(n) for n in (0, 200, 1500, 20_000, 2_500_000)] == ["0", "200", "1.5k", "20k", "2.5M"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    before = page_of(tmp_path).source
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match="No space left"):
        page_of(tmp_path, title="other")
    assert Path(tmp_path / "index.html").read_text() == before and len(list(tmp_path.iterdir())) == 1
