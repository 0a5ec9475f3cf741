"""Changes pictures and clips, completes them, and leads from one label or seed to another.

    python -m edit.draw --edit three.png --labels 7                     the 3 becomes a 7 in its place
    python -m edit.draw --inpaint three.png --mask mask.png --labels 8  completes what is white in the mask
    python -m edit.draw --morph 3:8                                     from a 3 to an 8
"""

from support.commands import UserError, run, some_path
from support.image_files import fit, name_of, read_image, to_tensor
from support.labels import parse_labels, parse_morph
from support.noise import noise_source
from support.pictures import frames_of
from support.settings import check_names

import argparse
import dataclasses
import functools
import math

import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

import inference
from edit.ways import between, edit, inpaint
from inference import ANIMATION, STRIP, check_out, draw_states, drawing_parser, load_for_sampling
from latent.vae import each_frame
from video.config import ANY, ClipConfig
from video.draw import read_given, save_clips

STRENGTH = 0.7  # it leaves enough of a 3 for a 7 in its place and slant, and no more
CHANGES = ("edit", "strength", "inpaint", "mask", "morph", "to_seed")  # the flags that only this command has


def check_changes(args):
    """Raises `UserError` unless the flags `CHANGES` go together."""
    kinds = [name for name in ("edit", "inpaint", "morph") if getattr(args, name) is not None]
    if len(kinds) > 1:
        raise UserError(f"--{kinds[0]} and --{kinds[1]} are two things: do one after the other")
    for name, kind in (("strength", "edit"), ("mask", "inpaint"), ("to_seed", "morph")):
        if getattr(args, name) is not None and kind not in kinds:
            raise UserError(f"--{name.replace('_', '-')} is for --{kind}: add that, or leave it out")
    if not kinds:
        raise UserError("say what to do: --edit PICTURE, --inpaint PICTURE --mask PICTURE, or --morph A:B")
    if args.inpaint is not None and args.mask is None:
        raise UserError("--inpaint needs --mask, a picture: black where --inpaint's is kept, and white where it is "
                        "drawn anew")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"--strength {args.strength:g}: must lie between 0, which would change nothing, and 1, which "
                        "keeps nothing")
    if args.morph is not None and args.labels is not None:
        raise UserError("--morph names its labels itself: leave --labels out")
    if args.to_seed is not None and not (0 <= args.to_seed < 2**63 and args.to_seed != getattr(args, "seed", 0)):
        raise UserError(f"--to-seed {args.to_seed}: must be another seed than --seed, and not below 0")


def prepare(model, config, args, frames):
    """What the flags ask for, as arguments of `draw_states`: the configuration, the labels of a row, and a dict of
    options. Reads the pictures. A morph has `frames` images in a row; the model gets their labels.
    """
    if args.morph is not None:
        ends = parse_morph(args.morph, config.class_names)
        if ends[0] == ends[1] and args.to_seed is None:
            raise UserError(f"--morph {args.morph} leads nowhere: name two labels, or another seed with --to-seed")
        add_labels_between(model, *ends, frames)
        config = dataclasses.replace(config, num_classes=frames, classes=())
        return config, list(range(frames)), dict(source=functools.partial(morphing_noise, frames, args.to_seed))
    labels, device = parse_labels(args.labels, config.class_names), next(model.parameters()).device
    picture, known = read_picture(args.inpaint if args.edit is None else args.edit, config, args.mask)
    picture = config.from_images(picture.to(device))
    if args.edit is not None:
        strength = STRENGTH if args.strength is None else args.strength
        config = dataclasses.replace(config, sample_steps=len(
            config.build_process().descending_steps(config.sample_steps, strength)))
        return config, labels, dict(way=functools.partial(edit, picture=picture, strength=strength))
    if known.shape[-2:] != picture.shape[-2:]:  # a latent is known if all of its pixels are
        known = each_frame(lambda part: adaptive_avg_pool2d(part.float(), picture.shape[-2:]) == 1, known)
    return config, labels, dict(way=functools.partial(inpaint, picture=picture, known=known.to(device)))


def read_picture(path, config, mask=None):
    """A picture, or the first frames of a clip, in the size and the channels of the model of `config`, floats (1, C,
    *size); and what of it is known, bool (1, 1, *size), or None without a mask. It is known where the picture `mask` is
    black, in every frame.

    Both are cropped at the centre. A mask of another size is first stretched over the picture. Raises `UserError`.
    """
    *frames, height, width = config.image_size
    (clip, size), count = read_given(path, config, still=not frames), math.prod(frames)
    if clip.shape[2] < count:
        raise UserError(f"{name_of(path)} has {clip.shape[2]} frames, but the model draws clips of {count}")
    picture = clip[:, :, :count].reshape(1, -1, *config.image_size)
    if mask is None:
        return picture, None
    nearest = Image.Resampling.NEAREST
    known = to_tensor(fit(read_image(mask, "L").resize(size, nearest), (height, width), nearest)) < 128
    known = known.view(1, 1, *[1] * len(frames), height, width)
    if known.all() or not known.any():
        raise UserError(f"{name_of(mask)} is {'black' if known.all() else 'white'} all over the part that the model "
                        "sees: make it black where the picture is kept, and white where it is drawn anew")
    return picture, known


def add_labels_between(model, first, last, count):
    """Replaces the labels of a `DiT`, in place, by 0..count-1. Their embeddings lie on a straight line from that of its
    label `first` to that of its label `last`."""
    table = model.label_embedding.weight
    rows = torch.stack([torch.lerp(table[first].float(), table[last].float(), i / (count - 1)) for i in range(count)])
    rows = torch.cat([rows.to(table.dtype), table[model.null_label, None]])
    model.label_embedding, model.null_label = torch.nn.Embedding.from_pretrained(rows), count


def morphing_noise(count, to_seed, seed, indices, *rest):
    """`noise_source` for rows of `count` images. All images of row k have the noise of image k of `seed`, or lead from
    it to the noise of image k of `to_seed`."""
    rows, shares = [i // count for i in indices], [i % count / (count - 1) for i in indices]
    here = noise_source(seed, rows, *rest)
    if to_seed is None:
        return here
    there = noise_source(to_seed, rows, *rest)
    return lambda: between(here(), there(), shares)


def draw(labels=None, count=1, **settings):
    """A changed picture for a notebook, a PIL image: draw("7", edit="three.png", strength=0.5), draw(morph="3:8"). The
    frames of a clip stand side by side.

    labels, count: as for `inference.draw`. settings: as the flags of these names; edit, inpaint and mask may also be
    PIL images, or arrays uint8 (H, W) or (H, W, 3). Raises `UserError`.
    """
    check_names(settings, [*ClipConfig.SAMPLING, "labels", "count", "checkpoint", "device", *CHANGES])
    args = argparse.Namespace(labels=labels, **dict.fromkeys(("checkpoint", "device", *CHANGES)) | settings)
    check_changes(args)
    model, config = load_for_sampling(args, ANY)
    config, labels, options = prepare(model, config, args, STRIP)
    frames = torch.stack(frames_of(draw_states(model, config, labels, count, **options)[-1]))
    return inference.strips(frames) if len(frames) > 1 else inference.label_grid(frames[0], config, labels)


def parse_args():
    parser = drawing_parser("Changes pictures and clips, completes them, or leads from one label or seed to another.",
                            ClipConfig, "8; with --strip, and of clips, 1",
                            "draw the denoising of each image, or the frames of each clip, from left to right",
                            "animate the denoising of the grid; clips are animated anyway")
    parser.add_argument("--edit", type=some_path, metavar="PICTURE", help="change this picture into the labels: noise "
                        "it, and denoise it towards them (SDEdit, 2108.01073)")
    parser.add_argument("--strength", type=float, help="how much of --edit's picture is drawn anew, above 0 and at "
                        f"most 1, all of it (default: {STRENGTH})")
    parser.add_argument("--inpaint", type=some_path, metavar="PICTURE", help="complete this picture where --mask is "
                        "white; the rest of it stays as it is (RePaint, 2201.09865; four times the network calls)")
    parser.add_argument("--mask", type=some_path, metavar="PICTURE", help="picture that is black where --inpaint's is "
                        "kept")
    parser.add_argument("--morph", metavar="A:B", help="draw the way from one label to another, 3:8 or cat:dog, as a "
                        "strip, or with --gif there and back")
    parser.add_argument("--to-seed", type=int, metavar="SEED", help="end of --morph: go from --seed to this seed as "
                        "well")
    return parser.parse_args()


def main():
    args = parse_args()
    check_changes(args)
    model, config = load_for_sampling(args, ANY)
    frames, morph = math.prod(config.image_size[:-2]), args.morph is not None
    clip = len(config.image_size) > 2
    if args.count is None:
        args.count = 1 if not morph and (args.strip or clip) else 8
    config, labels, options = prepare(model, config, args, ANIMATION // 2 if args.gif else STRIP)
    if morph and not clip:  # its grid is a strip already
        args.out, args.strip = args.out or ("samples.gif" if args.gif else "strip.png"), False
    back, columns = morph and not clip and args.gif, max(1, min(args.count, 10))
    shown = 1 if morph or clip else STRIP if args.strip else ANIMATION if args.gif else 1
    check_out(args, config, labels, shown * frames, args.gif or (frames > 1 and not args.strip),
              [args.edit, args.inpaint, args.mask], grid=(columns, -(-args.count // columns)) if back else None)
    states = draw_states(model, config, labels, args.count, shown, **options)
    if clip:
        save_clips(args, states[-1], config, labels)
        return
    what, durations = f"{states.shape[1]} images", [1500 // len(states)] * (len(states) - 1) + [2000]
    if back:  # a step of every morph after the other, there and back
        there = states[-1].unflatten(0, (args.count, -1)).transpose(0, 1)              # (steps, count, C, H, W)
        states, labels = torch.cat([there, there[1:-1].flip(0)]), range(columns)
        durations = [1000, *[60] * (len(there) - 2)] * 2                               # milliseconds
    inference.save_views(args, states, config, labels, durations)
    inference.say_drawn(args, config, what)


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
