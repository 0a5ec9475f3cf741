"""log.csv is for people: whatever they do to it, the run goes on, and what they had is kept."""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_DATA, TINY, assert_refused, train_until
from matplotlib.figure import Figure

import train
from record import log as run_log
from record.checkpoint import load_checkpoint
from record.log import RunLog, read_log
from video.config import ANY

NAMES = ["step", "loss", "loss_t0-24", "loss_t25-49", "loss_t50-74", "loss_t75-99", "lr"]


def make_log(path, start=0, steps=10, window=None):
    return RunLog(path, T=100, start=start, steps=steps, batch_size=4, device="cpu", window=window)


def test_a_row_holds_the_means_since_the_last_one(tmp_path):
    """In all and by quarter of 0..T-1; a quarter that nothing fell into has no mean."""
    with make_log(tmp_path / "log.csv") as log:
        log.add(torch.tensor([1.0, 2, 3, 6]), torch.tensor([0, 24, 25, 99]))
        log.add(torch.tensor([6.0, 6, 6, 6]), torch.tensor([0, 0, 0, 49]))
        assert log.collect()
        log.write(2, 0.5)
        log.add(torch.tensor([1.0, 1, 1, 9]), torch.tensor([50, 50, 74, 75]))
        assert log.collect()
        log.write(3, 0.25)
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        ",".join(NAMES), "2,4.5,4.2,4.5,nan,6,0.5", "3,3,nan,nan,1,9,0.25"]


def test_the_plot_shows_each_column_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text(",".join(NAMES) + "\n1,10,11,12,13,14,0.5\n3,20,21,22,nan,24,0.25\n")
    seen, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (seen.append(figure.axes[0]),
                                                                             original(figure, *args, **options))[1])
    run_log.plot_loss(tmp_path / "log.csv", tmp_path / "loss.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in seen[0].lines}
    assert (tmp_path / "loss.png").exists() and seen[0].lines[0].get_color() == "black"
    assert lines.pop("t = 50-74")[0] == [1, 13]
    assert lines == {"all t": [[1, 10], [3, 20]], "t = 0-24": [[1, 11], [3, 21]], "t = 25-49": [[1, 12], [3, 22]],
                     "t = 75-99": [[1, 14], [3, 24]]}


def test_losses_that_are_not_finite_are_noticed(tmp_path):
    for value in ("nan", "inf"):
        with make_log(tmp_path / "log.csv") as log:
            log.add(torch.tensor([1.0, float(value), 1, 1]), torch.tensor([0, 1, 2, 3]))
            assert not log.collect()


def test_the_window_of_a_checkpoint_goes_on(tmp_path):
    with make_log(tmp_path / "log.csv") as log:
        log.add(torch.tensor([8.0, 8, 8, 8]), torch.zeros(4, dtype=torch.long))
        window = log.window.clone()
    with make_log(tmp_path / "log.csv", start=1, window=window) as log:
        log.add(torch.tensor([2.0, 2, 2, 2]), torch.zeros(4, dtype=torch.long))
        log.collect()
        log.write(2, 1.0)
    assert (tmp_path / "log.csv").read_text().splitlines()[1].startswith("2,5,5,nan")


def test_the_bar_counts_images_from_where_the_run_goes_on(tmp_path):
    """Its rate is that of this run: what was trained before does not count."""
    with make_log(tmp_path / "log.csv", start=6) as log:
        for _ in range(4):
            log.add(torch.ones(4), torch.zeros(4, dtype=torch.long))
        assert (log.bar.initial, log.bar.n, log.bar.total, log.bar.unit) == (24, 40, 40, " images")
        assert log.bar.unit_scale is True  # a number would not scale `initial`


@pytest.mark.parametrize(("text", "steps", "whole"), [
    ("1,1,1,1,1,1,1\r\n2,1,1,1,1,1,1\r\n", [1, 2], True),
    ("1,1,nan,1,1,1,1\r\n", [1], True),
    ("1,1,1,1,1,1,1\r\n2,1,1", [1], False),                     # cut within a row
    ("1,1,1,1,1,1,1\r\n2,1,1,1,1,1,1", [1], False),             # or within its last number
    ("1,1,1,1,1,1,1\r\n\r\n2,1,1,1,1,1,1\r\n", [1], False),
    ("1,1,1,1,1,1,1\r\n2,one,1,1,1,1,1\r\n3,1,1,1,1,1,1\r\n", [1], False),
    ("1,1,1,1,1,1,1,note\r\n", [], False),
    ("2,1,1,1,1,1,1\r\n1,1,1,1,1,1,1\r\n", [2], False),
    ("1,1,1,1,1,1,1\r\n1,2,1,1,1,1,1\r\n", [1], False),         # a step comes once
    ("1.5,1,1,1,1,1,1\r\n", [], False),
    ("nan,1,1,1,1,1,1\r\n", [], False),
    ("1;1;1;1;1;1;1\r\n", [], False),
    ('1,"1,1,1,1,1,1\r\n2,1,1,1,1,1,1\r\n', [], False),
])
def test_rows_that_are_whole(tmp_path, text, steps, whole):
    """Those before the first that is damaged."""
    (tmp_path / "log.csv").write_text(",".join(NAMES) + "\r\n" + text)
    names, rows, all_whole = read_log(tmp_path / "log.csv")
    assert names == NAMES and [int(row[0]) for row in rows] == steps and all_whole == whole


@pytest.mark.parametrize(("step", "kept"), [(3, [2]), (4, [2, 4]), (5, [2, 4]), (9, [2, 4, 6])])
def test_rows_up_to_the_checkpoint_are_kept(tmp_path, step, kept):
    """Of the checkpoint's own step too; what comes after it comes again."""
    (tmp_path / "log.csv").write_text("".join(f"{row}\n" for row in (",".join(NAMES), *(
        f"{i},1,1,1,1,1,1" for i in (2, 4, 6)))))
    assert [int(row[0]) for row in run_log.kept_rows(tmp_path / "log.csv", NAMES, step)] == kept


@pytest.mark.parametrize("text", ["step;loss\r\n1;2\r\n", "", "\0\0\0", "not,a,log\n1,2,3\n", None])
def test_another_header_is_no_log_of_ours(tmp_path, text):
    """Nor is a folder; no picture is made of either."""
    if text is None:
        (tmp_path / "log.csv").mkdir()
    else:
        (tmp_path / "log.csv").write_text(text)
    assert read_log(tmp_path / "log.csv")[1:] == ([], False)
    run_log.plot_loss(tmp_path / "log.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def cut(text):
    return text[:-9]


def blank_line(text):
    return text.replace("\n4,", "\n\n4,")


def edited(text):
    return text.replace("\n4,", "\nfour,")


def semicolons(text):
    return text.replace(",", ";")


def note_column(text):
    return "\n".join(line + ",mine" if line else line for line in text.splitlines()) + "\n"


def bytes_of_nothing(text):
    return "\0" * 500


@pytest.mark.parametrize("damage", [cut, blank_line, edited, semicolons, note_column, bytes_of_nothing, None])
def test_a_damaged_log_is_put_aside_and_the_run_goes_on(call, tmp_path, damage):
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [*TINY, "--steps", 9]
    assert call(train, *flags, "--run-dir", whole)[0] == 0
    train_until(call, [*flags, "--run-dir", run], 7)
    text = (run / "log.csv").read_text()
    if damage:
        (run / "log.csv").write_text(damage(text))
    else:
        (run / "log.csv").unlink()
    code, _, err = call(train, *flags, "--run-dir", run, "--resume")
    assert code == 0 and err.count("warning:") == 1
    windows = [load_checkpoint(folder / "model.pth", ANY)["window"] for folder in (run, whole)]
    assert torch.equal(*windows)
    rows, complete = (run / "log.csv").read_text().splitlines(), (whole / "log.csv").read_text().splitlines()
    assert rows[0] == complete[0] and rows[-2:] == complete[-2:] and set(rows) <= set(complete)
    if damage:
        assert (run / "log_damaged.csv").read_text() == damage(text)
        assert "log_damaged.csv" in err
    assert (run / "loss.png").exists()


def test_a_log_is_never_half_rewritten(call, tmp_path, monkeypatch):
    """The disk is full when a resumed run wants to write its log anew: the old rows are still there."""
    run = tmp_path / "run"
    train_until(call, [*TINY, "--steps", 9, "--run-dir", run], 7)
    before = (run / "log.csv").read_text()

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run_log, "to_csv", full)
    assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", run, "--resume"), "log.csv", "No space left")
    assert (run / "log.csv").read_text() == before


def test_a_full_disk_at_the_first_row(call, tmp_path, monkeypatch):
    original, calls = run_log.to_csv, []

    def full(rows):
        calls.append(rows)
        if len(calls) > 1:
            raise OSError(28, os.strerror(28))
        return original(rows)

    monkeypatch.setattr(run_log, "to_csv", full)
    assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", tmp_path / "run"), "log.csv", "No space left")


def test_a_log_that_cannot_be_written(call, tmp_path):
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    assert_refused(call(train, *TINY, "--steps", 2, "--run-dir", tmp_path / "run"), "log.csv", "cannot be written")


@pytest.mark.parametrize("change", ["removed", "emptied", "folder", "moved"])
def test_a_log_that_goes_while_the_run_writes_it(tmp_path, capsys, change):
    """The rows to come go into a new one; what stands in its place is kept."""
    path = tmp_path / "log.csv"
    with make_log(path) as log:
        for step in (1, 2, 3):
            log.add(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 25, 50, 75]))
            log.collect()
            log.write(step, 0.5)
            if step == 1:
                if change == "emptied":
                    path.write_text("")
                elif change == "moved":
                    path.rename(tmp_path / "mine.csv")
                else:
                    path.unlink()
                if change == "folder":
                    path.mkdir()
    assert path.read_text().splitlines() == [",".join(NAMES), *(f"{step},2.5,1,2,3,4,0.5" for step in (2, 3))]
    assert capsys.readouterr().err.count("warning: ") == 1
    kept = {path.name for path in tmp_path.iterdir()} - {"log.csv"}
    assert kept == {"removed": set(), "emptied": {"log_damaged.csv"}, "folder": {"log_damaged.csv"},
                    "moved": {"mine.csv"}}[change]


def test_each_damaged_log_is_kept(tmp_path, monkeypatch):
    for text in ("one", "two"):
        (tmp_path / "log.csv").write_text(text)
        assert run_log.kept_rows(tmp_path / "log.csv", NAMES, 5) == []
    (tmp_path / "log.csv").mkdir()
    assert run_log.kept_rows(tmp_path / "log.csv", NAMES, 5) == []
    (tmp_path / "log.csv").write_text("three")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    assert run_log.kept_rows(tmp_path / "log.csv", NAMES, 5) == []
    monkeypatch.undo()
    assert {path.name: path.is_dir() or path.read_text() for path in tmp_path.iterdir()} == {
        "log_damaged.csv": "one", "log_damaged2.csv": "two", "log_damaged3.csv": True, "log_damaged4.csv": "three"}


def test_the_hook_gets_each_row(tmp_path):
    """As TensorBoard or Weights & Biases take it."""
    seen = []
    settings = dict(**SMALL_DATA, hidden_size=32, depth=1, num_heads=2, batch_size=8, steps=5, log_every=2,
                    sample_steps=2)
    train.train(settings, tmp_path, device="cpu", log=lambda step, values: seen.append((step, values)))
    names, rows, whole = read_log(tmp_path / "log.csv")
    assert whole and [step for step, _ in seen] == [2, 4, 5] == [int(row[0]) for row in rows]
    for (_, values), row in zip(seen, rows, strict=True):
        numbers = [*map(float, row[1:])]
        assert list(values) == names[1:] and list(values.values()) == pytest.approx(numbers, rel=1e-5, nan_ok=True)


def test_without_matplotlib_the_run_ends_well(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = call(train, *TINY, "--steps", 2, "--run-dir", tmp_path)
    assert code == 0 and "warning:" in err and "matplotlib does not work" in err
    assert (tmp_path / "model.pth").exists() and (tmp_path / "index.html").exists()
