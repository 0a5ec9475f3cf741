"""Draws the two pictures at the top of the README.

    python -m demo.figures      writes images/collage.gif and images/dit.png

It needs the weights that come with the repository, and two other pictures of the README: images/sprites_moving.gif, and
images/page.png, which shows the page of demo/ in a window of 930 pixels.
"""

from support.commands import Parser, run
from support.pictures import LINE, grid, save_animation, write_figure

import dataclasses
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from config import Config
from inference import draw_states
from record.checkpoint import averaged_model, load_checkpoint
from video.config import ClipConfig

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "images"
WIDTH, GAP, FRAMES, MILLISECONDS, COLOURS = 840, 10, 16, 140, 48  # of the collage


def drawn(name, labels, shown=1, **settings):
    """What the weights `name` draw of labels: uint8 (shown, B, C, *size), see `draw_states`."""
    content = load_checkpoint(ROOT / "weights" / name, (Config, ClipConfig))
    config = dataclasses.replace(content["config"], **settings)
    return draw_states(averaged_model(content), config, labels, 1, shown)


def collage():
    """Digits that appear out of noise, sprites and digits in motion, the page: a list of `FRAMES` pictures."""
    digits = drawn("mnist.pth", [*range(10)], FRAMES // 2 + 1, guidance=2.0)
    clips = drawn("moving.pth", [*range(10), *range(6)], seed=2)[0]                          # (16, 1, T, 32, 32)
    sprites = Image.open(IMAGES / "sprites_moving.gif")
    page = Image.open(IMAGES / "page.png").convert("RGB").crop((24, 20, 586, 316))
    pictures, below = [], 84 + 112 + 2 * GAP
    for i in range(FRAMES):
        picture = Image.new("RGB", (WIDTH, below + page.height))
        picture.paste(grid(digits[min(i, len(digits) - 1)], columns=10, gap=0, height=84))  # at last they stay
        sprites.seek(i % sprites.n_frames)
        for place in range(10):  # of two rows of nine, each 64 x 64
            left, top = 13 + 66 * (place % 9), LINE + 8 + 66 * (place // 9)
            sprite = sprites.convert("RGB").crop((left, top, left + 42, top + 56))
            picture.paste(sprite.resize((84, 112), Image.Resampling.NEAREST), (84 * place, 84 + GAP))
        picture.paste(grid(clips[:, :, i % clips.shape[2]], columns=4, height=64), (WIDTH - 4 * 66 - 2, below + 14))
        picture = ImageOps.posterize(picture, 4)  # 16 levels are enough here, and make a smaller file
        picture.paste(page, (0, below))
        pictures.append(picture)
    # One palette without dithering: what does not move stays the same from frame to frame, and the file small
    palette = Image.fromarray(numpy.concatenate([*map(numpy.asarray, pictures[::4])])).quantize(COLOURS)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def architecture():
    """The network as a matplotlib figure: above from noise to image, below the inside of a block (DiT, figure 3)."""
    from matplotlib.figure import Figure  # here, so that --help does not wait for it
    from matplotlib.patches import Circle, FancyBboxPatch

    figure = Figure(figsize=(10.5, 6.65), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 105), ylim=(0, 66.5))
    axes.axis("off")
    dark, blue, orange, red, green = "#333333", "#d8e6f8", "#fce5bd", "#f8cfcc", "#d9eed8"

    def box(x, y, text, colour, width=9, height=8):
        axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=dark,
                                      boxstyle="round,pad=0,rounding_size=0.8"))
        say(x, y, text, color="black", fontsize=9)

    def say(x, y, text, **style):
        axes.text(x, y, text, **dict(ha="center", va="center", fontsize=8.5, color="#555555", linespacing=1.35) | style)

    def arrow(*points):
        axes.plot(*zip(*points, strict=True), color=dark, linewidth=1.2)
        axes.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=dark, shrinkA=0, shrinkB=0))

    def arrows(y, *ends):
        for left, right in ends:
            arrow((left, y), (right, y))

    def plus(x, y):
        axes.add_patch(Circle((x, y), 1.3, facecolor="white", edgecolor=dark))
        say(x, y, "+", color="black", fontsize=11)

    def show(picture, x, y, half):
        axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255, extent=(x - half, x + half, y - half, y + half))

    noisy, image = drawn("mnist.pth", [5], 9, guidance=2.0)[[5, 8], 0, 0]
    show(noisy, 8, 54, 6)
    show(image, 97, 54, 6)
    for at in (line * 12 / 7 for line in range(1, 7)):
        axes.plot([2, 14], [48 + at] * 2, [2 + at] * 2, [48, 60], color="#f0a030", linewidth=0.8)
    for place, token in enumerate(noisy.unfold(0, 4, 4).unfold(1, 4, 4)[3]):        # (7, 4, 4), the middle row
        show(token, 34.5, 60 - 2 * place, 0.85)
    box(23.5, 54, "patchify\n\nlinear\n+ positions", blue, 10, 11)
    for behind in (1.6, 0.8, 0):
        box(50 + behind, 54 + behind, "DiT block\n\n$\\times$ depth" * (not behind), blue, 14, 11)
    box(68.5, 54, "final layer\n\nLayerNorm\nscale, shift\nlinear", blue, 11, 11)
    box(83, 54, "unpatchify", blue, 10, 11)
    arrows(54, (14.3, 18.5), (28.5, 32.8), (36, 43), (58.6, 63), (74, 78), (88, 90.7))
    for x, y, text in ((8, 62, "$x_t$  (B, C, H, W)"), (34.5, 63.3, "tokens\n(B, N, D)"),
                       (83, 62, "patches\n(B, N, p p C)"), (96.5, 62, "prediction  (B, C, H, W)"),
                       (35, 41.2, "c  (B, D)"), (32.5, 5.5, "c  (B, D)")):
        say(x, y, text)

    # What steers it
    for y, text, embedding in ((43, "step t", "time embedding\nsinusoids, MLP"),
                               (36.5, "label y", "label embedding\ntable")):
        say(3.5, y, text, color="black", fontsize=9)
        arrow((6, y), (8, y))
        box(15, y, embedding, green, 14, 5)
    arrow((22, 43), (27, 43), (27, 41.1))
    arrow((22, 36.5), (27, 36.5), (27, 38.5))
    plus(27, 39.8)
    arrow((28.3, 39.8), (50, 39.8), (50, 48.5))
    arrow((50, 39.8), (68.5, 39.8), (68.5, 48.5))

    # The inside of a block
    axes.add_patch(FancyBboxPatch((1.5, 1.5), 102, 30, facecolor="#f7f7f5", edgecolor="#999999", zorder=0,
                                  boxstyle="round,pad=0,rounding_size=1"))
    axes.plot([43, 2.5], [48.5, 31.5], [57, 102.5], [48.5, 31.5], color="#999999", linewidth=0.8, linestyle=":",
              zorder=0)
    say(3.5, 29.5, "DiT block", ha="left", color="black", fontsize=10, weight="bold")
    for half, middle in (((13.5, 24.5, 36, 47), "multi-head\nself-\nattention"), ((62, 73, 83.5, 93), "MLP")):
        for x, text, colour in zip(half, ("LayerNorm", "scale,\nshift", middle, "gate"), (blue, orange, blue, red),
                                   strict=True):
            box(x, 21, text, colour, 6 if text == "gate" else 9)
    arrows(21, (5, 9), (18, 20), (29, 31.5), (40.5, 44), (50, 52.7), (55.3, 57.5), (66.5, 68.5), (77.5, 79), (88, 90),
           (96, 97.7), (100.3, 103))
    say(4, 21, "x", color="black", fontsize=10)
    for left, right in ((6.5, 54), (56.3, 99)):
        arrow((left, 21), (left, 27.5), (right, 27.5), (right, 22.3))
        plus(right, 21)
    box(54, 5.5, "SiLU, linear:  D to 6 D", green, 22, 4.5)
    arrow((36, 5.5), (43, 5.5))
    for x, text in ((24.5, "shift_1, scale_1"), (47, "gate_1"), (73, "shift_2, scale_2"), (93, "gate_2")):
        arrow((54, 7.75), (54, 11), (x, 11), (x, 17))
        say(x + 0.8, 14, text, ha="left")
    say(79.5, 5.5, "adaLN-Zero: the gates start at 0,\nso an untrained block is the identity", ha="left")
    return figure


def main():
    Parser(description="Draws the two pictures at the top of the README anew, into images/.").parse_args()
    write_figure(architecture(), IMAGES / "dit.png")
    save_animation(IMAGES / "collage.gif", collage(), MILLISECONDS)
    print(f"-> {IMAGES / 'dit.png'}\n-> {IMAGES / 'collage.gif'}")


if __name__ == "__main__":
    run(main)
