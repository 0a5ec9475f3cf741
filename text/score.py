"""Does a model draw what sentences about sprites say? Each drawn frame is read as the nearest real frame.

    python -m text.score --checkpoint run_text

Beside each figure stands the same figure of real images.
"""

from support.commands import UserError, run, some_path
from support.sizes import show_size

import argparse
import itertools
import math
import random
import time

import torch

from dataset import resize
from inference import load_for_sampling
from latent.sprites import FRAMES, load_images, split_characters
from measure.score import nearest
from text.captions import KINDS, LOOKS, look_of, pair_caption, sprite_caption
from text.config import TextConfig
from text.draw import text_parser
from text.words import read_prompt
from video.score import draw as draw_words
from video.score import shown_by_vae
from video.sprites import PARTS, SIDE, SpriteJudge, as_pixels, parts_of

Z = 1.96  # of a 95 % interval


def wilson(right):
    """The share of True among booleans (N,), and its 95 % interval (Wilson 1927): three floats."""
    n, p = len(right), right.float().mean().item()
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (min(1.0, max(0.0, edge / (1 + Z**2 / n))) for edge in (middle - half, middle + half))
    return p, low, high


class Reader(SpriteJudge):
    """Reads clips of sprites, or images as clips of one frame."""

    def read(self, clips, asked):
        """What clips uint8 (N, C, T, H, W) show: each frame's choice of `PARTS` (N, T, 4), and the kind (N,). Some real
        images belong to two kinds: they count as the kind that was `asked` for (N,), if it is one of the two."""
        N, T = len(clips), clips.shape[2]
        frames = resize(clips.transpose(1, 2).flatten(0, 1), (SIDE, SIDE)).reshape(N, T, -1)
        if T == FRAMES:
            kinds = self.find(frames)[1]
            return parts_of(self.characters(frames, kinds)), kinds
        _, index = nearest(as_pixels(frames.flatten(0, 1)), as_pixels(self.gallery.flatten(0, 2)))
        characters, kinds = index // (self.kinds * FRAMES), index // FRAMES % self.kinds
        found, others = self.gallery.flatten(0, 2)[index], self.gallery[characters, asked]           # (N, D), (N, 8, D)
        both = (found[:, None] == others).all(2).any(1)
        return parts_of(characters)[:, None], torch.where(both, asked, kinds)


def compare(read, asked):
    """Which clips show what was asked for in every frame: {name: booleans (N,)}. read: what `Reader.read` returns.
    asked: looks (N, 4) and kinds (N,)."""
    right = (read[0] == asked[0][:, None]).all(1)                                                    # (N, 4)
    action = read[1] == asked[1]
    return {**{part: right[:, i] for i, part in enumerate(PARTS)}, "action and direction": action,
            "all": right.all(1) & action}


def ask(characters, count, draw):
    """`count` random characters, of the numbers `characters`, and kinds: looks (N, 4), kinds (N,)."""
    looks = [look_of(draw.choice(characters)) for _ in range(count)]
    return torch.tensor(looks), torch.tensor([draw.randrange(len(KINDS)) for _ in range(count)])


def sentences(looks, kinds, config, draw, language=None):
    """A sentence about each sprite, as `read_prompt` reads it, int64 (N, L)."""
    return torch.tensor([read_prompt(sprite_caption(look, kind, draw, whole=True, language=language), config)
                         for look, kind in zip(looks.tolist(), kinds.tolist(), strict=True)])


def swaps():
    """All ways to swap the colours of two parts: [(part, other part, their choices, their choices with the colours
    swapped)]. The nouns stay the same."""
    found = []
    for i, j in itertools.combinations(range(len(PARTS)), 2):
        one, two = ([(colours.split()[0], nouns) for colours, nouns in LOOKS["english"][PARTS[k]]] for k in (i, j))
        for (a, (x, noun)), (b, (y, other)) in itertools.product(enumerate(one), enumerate(two)):
            if x != y and (y, noun) in one and (x, other) in two:
                found.append((i, j, (a, b), (one.index((y, noun)), two.index((x, other)))))
    return found


def ask_swapped(characters, count, draw):
    """`count` pairs of looks that differ in two swapped colours. The first of each pair is of the numbers `characters`.
    Returns both looks, each (N, 4), and which parts are swapped (N, 2)."""
    pairs = [(look_of(number), swap) for number in characters for swap in swaps()
             if [look_of(number)[k] for k in swap[:2]] == list(swap[2])]
    chosen = [draw.choice(pairs) for _ in range(count)]
    looks = torch.tensor([look for look, _ in chosen])
    swapped, parts = looks.clone(), torch.tensor([swap[:2] for _, swap in chosen])
    swapped.scatter_(1, parts, torch.tensor([swap[3] for _, swap in chosen]))
    return looks, swapped, parts


def real_clips(config, count, draw, device):
    """`count` clips of T frames of held-out characters, as the model's VAE shows them: uint8 (N, C, T, H, W), on the
    CPU, their looks (N, 4) and kinds (N,)."""
    T, *size = config.image_size
    frames = load_images("sprites", config.data_dir, False, size, config.channels).images.unflatten(0, (-1, FRAMES))
    index = torch.tensor([draw.randrange(len(frames)) for _ in range(count)])
    first = torch.tensor([draw.randrange(FRAMES - T + 1) for _ in range(count)])
    clips = frames[index[:, None], first[:, None] + torch.arange(T)].movedim(1, 2)
    numbers = torch.from_numpy(split_characters(False))[index // len(KINDS)]
    return shown_by_vae(config, clips, device), parts_of(numbers), index % len(KINDS)


def score_pairs(model, config, reader, count, seed=0):
    """As `score`, for a model that draws two figures side by side."""
    draw, columns = random.Random(seed), {}
    for title, train in (("held out", False), ("seen", True)):
        asked = [ask(split_characters(train).tolist(), count, draw) for _ in range(2)]
        both = zip(*(zip(looks.tolist(), kinds.tolist(), strict=True) for looks, kinds in asked), strict=True)
        words = torch.tensor([read_prompt(pair_caption(pair, draw, whole=True), config) for pair in both])
        halves = draw_words(model, config, words).chunk(2, dim=-1)
        shown = [reader.read(half, kinds) for half, (_, kinds) in zip(halves, asked, strict=True)]
        left, right = (compare(*pair) for pair in zip(shown, asked, strict=True))
        alike = [torch.stack([torch.stack([*compare(half, figure).values()]).sum(0) for half, figure in
                              zip(shown, figures, strict=True)]).sum(0) for figures in (asked, asked[::-1])]
        columns[title] = {"left figure, all": left["all"], "right figure, all": right["all"],
                          "both figures, all": left["all"] & right["all"], "on their sides": alike[0] > alike[1]}
    return columns


def score(model, config, reader, count, seed=0):
    """The tables of `report`: {figure: {column: booleans (N,)}}."""
    draw, columns = random.Random(seed), {}
    held_out, seen = (split_characters(train).tolist() for train in (False, True))
    for title, characters in (("held out", held_out), ("seen", seen)):
        looks, kinds = ask(characters, count, draw)
        words = sentences(looks, kinds, config, draw)
        shown = reader.read(draw_words(model, config, words), kinds)
        columns[title] = compare(shown, (looks, kinds))
        if title == "held out":
            again = reader.read(draw_words(model, config, sentences(looks, kinds, config, draw)), kinds)
            same = [(a == b).view(count, -1).all(1) for a, b in zip(shown, again, strict=True)]
            columns[title]["the same in other words"] = same[0] & same[1]
    looks, swapped, parts = ask_swapped(held_out, count, draw)
    kinds, seeds = ask(held_out, count, draw)[1], [draw.random() for _ in range(count)]
    apart = []
    for asked in (looks, swapped):
        words = torch.cat([sentences(look[None], kind[None], config, random.Random(seed))
                           for look, kind, seed in zip(asked, kinds, seeds, strict=True)])
        shown = reader.read(draw_words(model, config, words), kinds)[0]                              # (N, T, 4)
        apart.append((shown == asked[:, None]).all(1).gather(1, parts).all(1))
    columns["held out"]["two colours swapped"] = apart[0] & apart[1]
    return columns


def report(columns):
    """The shares of True in {column: {figure: booleans (N,)}} and their 95 % intervals, as a table to print."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [" " * 24 + "".join(f"{title:>26}" for title in columns)]
    for name in names:
        cells = ("{:.1%} ({:.1%} to {:.1%})".format(*wilson(column[name])) if name in column else ""
                 for column in columns.values())
        lines.append(f"{name:24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main():
    parser = text_parser("Draws what sentences about sprites say, and reads each drawn image as the nearest real one: "
                         "does it show each part, the action and the direction as asked, in every frame? The sentences "
                         "are about characters that the model has seen, and about held-out ones; some pairs of them "
                         "differ in two swapped colours, and some say the same in other words.")
    parser.add_argument("--count", type=int, default=500, help="sentences of each sort (default: 500)")
    parser.add_argument("--data-dir", type=some_path, default=argparse.SUPPRESS,
                        help="where Sprites/ is (default: as in training)")
    args = parser.parse_args()
    if not 20 <= args.count <= 100_000:
        raise UserError(f"--count {args.count}: must lie between 20 and 100,000")
    model, config = load_for_sampling(args, (TextConfig,))
    if config.dataset != "sprites" or config.image_size[0] not in (1, FRAMES):
        raise UserError(f"only sprites, as images or as clips of {FRAMES} frames, can be read, and this model draws "
                        f"{config.dataset} of {show_size(config.image_size)}")
    reader, began = Reader(config.data_dir, config.channels), time.monotonic()
    columns = (score if config.figures == 1 else score_pairs)(model, config, reader, args.count)
    if config.figures == 1:
        clips, *asked = real_clips(config, args.count, random.Random(1), next(model.parameters()).device)
        columns["real, held out"] = compare(reader.read(clips, asked[1]), asked)
    print(f"{args.checkpoint}: {args.count} sentences of each sort, {config.sampler}, {config.sample_steps} steps, "
          f"guidance {config.guidance:g}, seed {config.seed}; {time.monotonic() - began:.0f} s; in brackets 95 % "
          "intervals (Wilson)")
    print(report(columns))


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
