import numpy
import torch
from PIL import Image, ImageOps

from demo import figures


def fake_drawn(name, labels, shown=1, **settings):
    """Black, but for the digit's own grey and, of clips, a white row that falls."""
    if name == "mnist.pth":
        x = torch.zeros(shown, len(labels), 1, 28, 28, dtype=torch.uint8)
        x[-1] = (16 * torch.tensor(labels) + 16).view(-1, 1, 1, 1)
        return x
    x = torch.zeros(1, len(labels), 1, 16, 32, 32, dtype=torch.uint8)
    for frame in range(16):
        x[..., frame, 2 * frame, :] = 255
    return x


def test_the_pictures_of_the_readme(call, monkeypatch, tmp_path):
    sprites = Image.open(figures.IMAGES / "sprites_moving.gif")
    for name in ("sprites_moving.gif", "page.png"):
        (tmp_path / name).write_bytes((figures.IMAGES / name).read_bytes())
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr(figures, "drawn", fake_drawn)
    code, out, _ = call(figures)
    assert code == 0
    assert out.split() == ["->", str(tmp_path / "dit.png"), "->", str(tmp_path / "collage.gif")]
    with Image.open(tmp_path / "dit.png") as picture:
        assert picture.size == (1260, 798)
    with Image.open(tmp_path / "collage.gif") as picture:
        assert (picture.size[0], picture.n_frames) == (840, 16)
        for i in (0, 15):
            picture.seek(i)
            frame = picture.convert("RGB")
            for digit in (0, 3, 9):  # first noise, here black; at last the digit, and so it stays
                assert abs(frame.getpixel((84 * digit + 40, 40))[0] - (16 * digit + 16) * (i == 15)) < 12
            column = [frame.getpixel((600, 232 + y))[0] > 128 for y in range(64)]  # of the first clip
            assert [y for y in range(64) if column[y]] == [4 * i, 4 * i + 1]
            sprites.seek(i % 8)
            expected = ImageOps.posterize(sprites.convert("RGB").crop((79, 22, 121, 78)), 4).resize((84, 112), 0)
            found = numpy.asarray(frame.crop((84, 94, 168, 206)), dtype=float)
            assert abs(found - numpy.asarray(expected)).mean() < 6
