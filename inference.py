"""Draws samples: a grid of digits, the strip of their denoising, or its animation; or clips. Changes pictures,
completes them, leads from one label or seed to another, and makes clips longer."""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.image_files import fit, name_of, read_clip, read_image, to_tensor
from support.labels import are_numbers, parse_labels, parse_morph
from support.pictures import check_picture, frames_of, grid, grid_size, save_animation
from support.sizes import as_size, demand_memory, show_size

import argparse
import dataclasses
import functools
import inspect
import itertools
import math
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from checkpoint import checkpoint_file, load_model
from config import SAMPLING, add_flags, check_eta, check_names, given_flags
from dataset import BOUND, to_float, to_uint8
from diffusion import SAMPLERS, between, build_process, complete, edit, from_noise, inpaint
from latent.vae import open_vae

# The model just trained, else the weights that come with the repository
CHECKPOINTS = (Path("run/model.pth"), Path(__file__).with_name("weights") / "mnist.pth")

# Batches are filled up to a multiple of this: the libraries multiply a few rows in another order, and round otherwise.
FULL_BATCH = 16

STRIP, ANIMATION = 11, 61  # images of a strip, of an animation
LONGER = ("extend", "before", "between", "loop", "frames")  # the flags that make clips longer
FRAME = 100  # milliseconds that a clip shows each of its frames
STRENGTH = 0.7  # of a 3, enough is left for a 7 in its place and slant, and no more


def noise_source(seed, indices, shape, device, calls=1):
    """A function that returns fresh standard normal noise (B, *shape) at each call, one random stream per image:
    what image k gets is a function of (seed, k) alone, whatever else is in its batch.

    calls: how many may come. Only what is not first is drawn ahead, since most samplers ask for no more.
    """
    streams = [np.random.Generator(np.random.Philox(key=[seed, k])) for k in indices]
    ahead = max(1, min(8, 2**24 // (len(streams) * math.prod(shape))))  # at most 64 MB

    def noises():
        for done in itertools.chain([0], itertools.count(1, ahead)):
            block = torch.empty(len(streams), min(ahead, max(1, calls - done)) if done else 1, *shape,
                                pin_memory=torch.device(device).type == "cuda")
            for stream, numbers in zip(streams, block.numpy(), strict=True):
                stream.standard_normal(out=numbers, dtype=np.float32)
            for noise in block.to(device, non_blocking=True).unbind(1):
                yield noise.contiguous()

    return functools.partial(next, noises())


@torch.no_grad()
def sample(model, config, labels, indices=None, way=from_noise, source=None, size=()):
    """Draws one image per label, as the images number `indices` (default: 0, 1, ...) of the seed `config.seed`.

    labels: int64 (B,) on the model's device. How they are drawn (sampler, sample_steps, guidance, eta) is in `config`.
    way: `from_noise` or, with the rest of its arguments bound, `edit`, `inpaint` or `complete`. source: as
    `noise_source`. size: in the place of the configuration's, another that the model knows.
    A generator: yields the noise (B, C, *size) that it starts from, then x after each step; the last one is the images,
    in [-1, 1], or their latents: `to_images` shows either.
    An image is the same to the last bit whatever the batch that it is drawn in, on one kind of CPU, in one precision.
    """
    B, indices = len(labels), list(indices or range(len(labels)))
    fill = -B % FULL_BATCH
    labels, indices = torch.cat([labels, labels[:1].expand(fill)]), indices + indices[:1] * fill
    shape = (config.input_shape[0], *size) if size else config.input_shape
    noise = (source or noise_source)(config.seed, indices, shape, labels.device, config.sample_steps)
    process, bound = build_process(config), BOUND if config.clamp else math.inf
    options = {"ddim": {"eta": config.eta}, "ddpm": {"spread": lambda: process.spread}}.get(config.sampler, {})
    sampler = functools.partial(SAMPLERS[config.sampler], **options)

    def denoise(x, t):
        return process.denoise(model, x, t, labels, config.guidance, bound, config.guided_channels)

    for x in way(process, sampler, denoise, noise, config.sample_steps):
        yield x[:B]


def generate(model, config, labels, indices=None):
    """The images float (B, C, *size) in [-1, 1] that `sample` ends with; no earlier state is kept."""
    return deque(sample(model, config, labels, indices), maxlen=1).pop()


def each_frame(function, x):
    """`function` of images (N, C, H, W), of every frame of clips x (B, C, T, H, W), or of images as they are."""
    frames = x.movedim(1, -3)                                                         # (B, T, C, H, W)
    return function(frames.flatten(0, -4)).unflatten(0, frames.shape[:-3]).movedim(-3, 1)


def to_images(x, config):
    """Images uint8 (B, C, *size) of a state x of `sample`, of latents through their VAE. The one way to see a state."""
    return to_uint8(each_frame(find_vae(config, x.device).decode, x) if config.latent_shape else x)


def from_images(x, config, known=None):
    """Images x (B, C, *size) in [-1, 1] as the model sees them: their latents, where it draws latents. With `known`,
    bool (B, 1, *size), also what of that is known: a latent is where all of its pixels are."""
    if config.latent_shape:
        vae = find_vae(config, x.device)
        x = each_frame(lambda images: vae.encode(images)[0], x)
        if known is not None:
            known = each_frame(lambda part: adaptive_avg_pool2d(part.float(), x.shape[-2:]) == 1, known)
    return x if known is None else (x, known)


def find_vae(config, device):
    """The `VAE` whose latents a configuration is of, with the statistics that the model has learned with. Raises
    `UserError` when it is not there or is another one."""
    image, latent = ((shape[0], *shape[-2:]) for shape in ((config.channels, *config.image_size), config.latent_shape))
    return open_vae(config.vae, config.vae_hash, image, latent, config.latent_mean, config.latent_std, device)


def batch_that_fits(config, device):
    """How many images to draw at once: an estimate, on the safe side, of what half of a GPU's free memory, or 2 GB of
    any other, holds; at most 4,096 on a GPU, and elsewhere 8,192 tokens, beyond which nothing gets quicker, and clips
    get slower."""
    tokens = math.prod(config.input_shape[1:]) // math.prod(config.patch_size)
    # What a block keeps for a token: qkv, its output and the MLP's two, in fp32; with guidance for two images
    floats = 2 * tokens * config.hidden_size * (8 + 2 * config.mlp_ratio)
    floats += 2 * tokens**2 * config.num_heads  # where attention has no kernel of its own
    floats += 20 * math.prod(config.input_shape)  # the states, and noise drawn ahead
    free, most = (torch.cuda.mem_get_info(device)[0] / 2, 4096) if device.type == "cuda" else (2e9, 8192 // tokens)
    return int(max(min(free / (4 * floats), most), 1))


def find_checkpoint(path=None):
    """The file of a checkpoint: `path`, or model.pth in it when it is a run folder; None: the first of `CHECKPOINTS`
    that exists. Raises `UserError` when there is none."""
    if path is None:
        path = next((checkpoint for checkpoint in CHECKPOINTS if checkpoint.is_file()), None)
        if path is None:
            raise UserError("no checkpoint: run train.py first, or point --checkpoint at one")
    if not str(path):
        raise UserError("--checkpoint is empty: name a checkpoint or a run folder, or leave it out")
    return checkpoint_file(path)


def load_for_sampling(args):
    """The model and configuration that `--checkpoint`, `--device` and the flags in `args` ask for; sets
    `args.checkpoint` to the file."""
    settings = {"seed": 0, "precision": "auto", **given_flags(args)}
    args.checkpoint = find_checkpoint(args.checkpoint)
    device = pick_device(args.device)
    model, config = load_model(args.checkpoint, device, settings["precision"])
    if "vae" in settings and not config.latent_shape:
        raise UserError(f"{args.checkpoint} draws images without a VAE: leave --vae out")
    beside = Path(args.checkpoint).parent / config.vae  # where weights are shared, their VAE is
    if config.vae and not Path(config.vae).exists() and beside.is_dir():
        settings = {"vae": str(beside), **settings}
    config = dataclasses.replace(config, **settings)
    check_eta(config, settings)
    if config.latent_shape:
        find_vae(config, device)
    return model, config


def check_count(count, labels):
    """Raises `UserError` unless `count` rows of `labels` can be drawn at once."""
    if not 1 <= count * len(labels) <= 10_000:
        raise UserError(f"--count {count}: draw between 1 and 10,000 images at once; generator.py draws more")


def draw_states(model, config, labels, count, shown=1, **options):
    """Draws `count` rows of `labels` (a list): of all states, the last `shown` that are evenly spaced, as uint8
    (shown, B, C, *size) on the CPU. The rest is not kept. options: further arguments of `sample`."""
    check_count(count, labels)
    y = torch.tensor(labels * count, device=next(model.parameters()).device)
    total = config.sample_steps + 1
    kept = set(torch.linspace(total - 1, 0, min(total, shown)).round().long().tolist())
    states = tqdm(sample(model, config, y, **options), total=total, desc=f"drawing {len(y)} images", unit="step",
                  leave=False, disable=None)
    return torch.stack([to_images(x, config).cpu() for i, x in enumerate(states) if i in kept])


def label_grid(images, config, labels):
    """The grid of images uint8 (B, C, H, W) whose columns show `labels`, with their names where they have any."""
    names = config.class_names
    return grid(images, len(labels), captions=() if are_numbers(names) else [names[label] for label in labels])


def strips(views):
    """A picture with a row for each image of the views uint8 (B, C, H, W): how it looks in one after the other."""
    return grid(torch.stack([*views], dim=1).flatten(0, 1), columns=len(views))


def check_changes(args):
    """Raises `UserError` unless the flags that change a picture, complete one or morph go together."""
    kinds = [name for name in ("edit", "inpaint", "morph", *LONGER[:-1]) if getattr(args, name, None) is not None]
    if len(kinds) > 1:
        raise UserError(f"--{kinds[0]} and --{kinds[1]} are two things: do one after the other")
    for name, kind in (("strength", "edit"), ("mask", "inpaint"), ("to_seed", "morph")):
        if getattr(args, name) is not None and kind not in kinds:
            raise UserError(f"--{name.replace('_', '-')} is for --{kind}: add that, or leave it out")
    if args.frames is not None and set(kinds) - {"extend", "before"}:
        raise UserError(f"--frames goes with --extend, --before, or alone, and not with --{kinds[0]}")
    if args.inpaint is not None and args.mask is None:
        raise UserError("--inpaint needs --mask: a picture that is black where --inpaint's is kept, and white where it "
                        "is drawn anew")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"--strength {args.strength:g}: must lie between 0, which would change nothing, and 1, which "
                        "keeps nothing")
    if args.morph is not None and args.labels is not None:
        raise UserError("--morph names its labels itself: leave --labels out")
    if args.to_seed is not None and not (0 <= args.to_seed < 2**63 and args.to_seed != getattr(args, "seed", 0)):
        raise UserError(f"--to-seed {args.to_seed}: must be another seed than --seed, and not below 0")


def check_clip_flags(config, args):
    """Raises `UserError` unless the model can do what --size and the flags `LONGER` ask for."""
    longer = [name for name in LONGER if getattr(args, name) is not None]
    if longer and len(config.image_size) != 3:
        raise UserError(f"--{longer[0]} is for clips, but this model draws images")
    if not args.size:
        return
    if longer or args.edit is not None or args.inpaint is not None:
        raise UserError("--size is for what is drawn anew, and not for a given picture or clip")
    if len(config.image_size) != 3 or config.latent_shape:
        raise UserError(f"--size {show_size(args.size)}: this model draws nothing but {show_size(config.image_size)}")
    if type(args.size) is not tuple or len(args.size) != 3 or any(
            not 0 < side <= most for side, most in zip(args.size, config.largest, strict=True)):
        raise UserError(f"--size {show_size(args.size)}: this model draws clips of at most "
                        f"{show_size(config.largest)}, frames x height x width")


def prepare(model, config, args, frames):
    """What the flags ask for, as arguments of `draw_states`: the configuration, the labels of a row, and a dict of the
    options.

    A morph has `frames` images in a row. Reads the pictures; gives the model the labels of a morph.
    """
    if args.morph is not None:
        ends = parse_morph(args.morph, config.class_names)
        if ends[0] == ends[1] and args.to_seed is None:
            raise UserError(f"--morph {args.morph} leads nowhere: name two labels, or another seed with --to-seed")
        add_labels_between(model, *ends, frames)
        return config, list(range(frames)), dict(source=functools.partial(morphing_noise, frames, args.to_seed))
    labels, device = parse_labels(args.labels, config.class_names), next(model.parameters()).device
    if args.edit is not None:
        picture, _ = read_picture(args.edit, config)
        strength = STRENGTH if args.strength is None else args.strength
        steps = len(build_process(config).descending_steps(config.sample_steps, strength))
        return dataclasses.replace(config, sample_steps=steps), labels, dict(
            way=functools.partial(edit, picture=from_images(picture.to(device), config), strength=strength))
    if args.inpaint is not None:
        picture, known = read_picture(args.inpaint, config, args.mask)
        picture, known = from_images(picture.to(device), config, known.to(device))
        return config, labels, dict(way=functools.partial(inpaint, picture=picture, known=known))
    return config, labels, {}


def read_picture(path, config, mask=None):
    """A picture, or the first frames of a clip, as the model of `config` sees images, (1, C, *size), and which of it is
    known by the picture `mask`, bool (1, 1, *size): what is black there, in every frame. Without a mask None.

    Both are brought to the model's size from the centre; a mask of another size is first stretched over the picture.
    Raises `UserError`.
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
                        "sees: let it be black where the picture is kept, and white where it is drawn anew")
    return picture, known


def read_given(path, config, still=False):
    """All frames of a clip, or of a picture its one, as the model of `config` sees images, (1, C, T, H, W), and the
    first one's size in the file, (width, height); still: the first frame alone. Raises `UserError`."""
    if config.channels not in (1, 3):
        raise UserError(f"{name_of(path)} cannot be brought to a model that draws {config.channels} channels, which "
                        "are no picture")
    mode = "L" if config.channels == 1 else "RGB"
    clip, size = read_clip(path, config.image_size[-2:], mode, config.ground, still)
    return to_float(clip.movedim(0, 1))[None], size


def add_labels_between(model, first, last, count):
    """Gives a `DiT`, in place, other labels: 0..count-1, which lead from its label `first` to its label `last`. Their
    embeddings lie on a straight line."""
    table = model.label_embedding.weight
    rows = torch.stack([torch.lerp(table[first].float(), table[last].float(), i / (count - 1)) for i in range(count)])
    rows = torch.cat([rows.to(table.dtype), table[model.null_label, None]])
    model.label_embedding, model.null_label = torch.nn.Embedding.from_pretrained(rows), count


def morphing_noise(count, to_seed, seed, indices, *rest):
    """`noise_source` for rows of `count` images: in row k all have the noise of image k of `seed`, or lead from there
    to that of `to_seed`."""
    rows, places = [i // count for i in indices], [i % count / (count - 1) for i in indices]
    here = noise_source(seed, rows, *rest)
    if to_seed is None:
        return here
    there = noise_source(to_seed, rows, *rest)

    def noise():
        a, b = here(), there()
        return between(a, b, torch.tensor(places, device=a.device))

    return noise


def fill_batch(x):
    """x (B, ...) as `sample` fills its batch up."""
    return torch.cat([x, x[:1].expand(-len(x) % FULL_BATCH, *x.shape[1:])])


def draw_window(model, config, y, before, after, number=0):
    """What lies between the last frames `before` and the first frames `after`, both (B, C, t, H, W), of which it knows
    as many as leave half of the model's frames to be drawn: (B, C, T / 2, H, W), or more where there are fewer.

    y: labels (B,). number: of the window, each of which has noise of its own.
    """
    T = config.input_shape[1]
    most = T // 2 if min(before.shape[2], after.shape[2]) == 0 else T // 4
    start, end = before[:, :, max(0, before.shape[2] - most):], after[:, :, :most]
    missing = T - start.shape[2] - end.shape[2]
    new = torch.zeros(len(y), start.shape[1], missing, *start.shape[3:], device=start.device)
    known = torch.ones(T, 1, 1, dtype=torch.bool, device=start.device)
    known[start.shape[2]:T - end.shape[2]] = False
    way = functools.partial(complete if config.given else inpaint, picture=fill_batch(torch.cat([start, new, end], 2)),
                            known=known)
    *_, x = sample(model, config, y, [k + number * 2**32 for k in range(len(y))], way)
    return x[:, :, start.shape[2]:T - end.shape[2]]


def draw_longer(model, config, labels, count, args):
    """Draws `count` rows of `labels` as the flags `LONGER` ask for: clips uint8 (B, C, frames, H, W), on the CPU. The
    frames that are given are in them as the model sees them."""
    device = next(model.parameters()).device
    y = torch.tensor(labels * count, device=device)
    if args.frames not in (None, *range(1, 10_001)):
        raise UserError(f"--frames {args.frames}: draw between 1 and 10,000 frames")

    def ask(frames):
        demand_memory(len(y) * frames, 4 * config.channels, config.image_size[1:], "lower --count or --frames")

    ask(args.frames or config.image_size[0])
    paths = [args.extend, args.before, *(args.between or ()), args.loop]
    clips = [from_images(read_given(path, config)[0].to(device), config).expand(len(y), -1, -1, -1, -1)
             for path in paths if path is not None] or [generate(model, config, y)]
    ask(sum(clip.shape[2] for clip in clips) + config.image_size[0])
    x, none = clips[0], clips[0][:, :, :0]
    if args.between or args.loop:
        middle = draw_window(model, config, y, x, clips[-1])
        x = torch.cat([x, middle, *clips[1:]], dim=2)
    total, number = args.frames or x.shape[2] + (0 if args.between or args.loop else config.image_size[0] // 2), 0
    with tqdm(total=total, initial=x.shape[2], desc=f"drawing {len(y)} clips", unit=" frames", leave=False,
              disable=None) as bar:
        while x.shape[2] < total:
            number += 1
            if args.before is not None:
                x = torch.cat([draw_window(model, config, y, none, x, number), x], dim=2)
            else:
                x = torch.cat([x, draw_window(model, config, y, x, none, number)], dim=2)
            bar.update(x.shape[2] - bar.n)
    x = x[:, :, -total:] if args.before is not None else x[:, :, :total]
    return to_images(x, config).cpu()


def draw(labels=None, count=1, checkpoint=None, device=None, edit=None, strength=None, inpaint=None, mask=None,
         morph=None, to_seed=None, **settings):
    """A grid of images for a notebook, a PIL image: draw("31415"), draw([3, 1, 4], count=2, guidance=2.0),
    draw("7", edit="three.png", strength=0.5), draw(morph="3:8"). Of clips, their frames from left to right.

    labels: as `parse_labels` takes them. count: how many of each. edit, inpaint, mask: files, PIL images, or arrays
    uint8 (H, W) or (H, W, 3). The others and settings (sampler, sample_steps, guidance, eta, seed, precision ...): as
    the flags of these names. Raises `UserError`.
    """
    check_names(settings, [*SAMPLING, "vae", *inspect.signature(draw).parameters][:-1])  # the last one is `settings`
    args = argparse.Namespace(checkpoint=checkpoint, device=device, labels=labels, edit=edit, strength=strength,
                              inpaint=inpaint, mask=mask, morph=morph, to_seed=to_seed, frames=None, **settings)
    check_changes(args)
    model, config = load_for_sampling(args)
    config, labels, options = prepare(model, config, args, STRIP)
    frames = frames_of(draw_states(model, config, labels, count, **options)[-1])
    if len(frames) > 1:
        return strips(frames)
    return grid(frames[0], len(labels)) if morph is not None else label_grid(frames[0], config, labels)


def say_default(parser, names, default):
    """Has --help name another default of these flags than the one that `Config` has."""
    for action in parser._actions:
        if action.dest in names:
            action.help = f"{action.help.rpartition(' (default')[0]} (default: {default})"


def sampling_parser(description, names=SAMPLING):
    """The flags that every command shares which draws from a checkpoint; of the settings, those in `names`."""
    parser = Parser(description=description)
    parser.add_argument("--checkpoint", help="the model to draw with, a file or a run folder (default: run/model.pth, "
                        "else weights/mnist.pth)")
    add_flags(parser, names)
    say_default(parser, set(SAMPLING) - {"seed", "precision"}, "the model's own")
    parser.add_argument("--vae", default=argparse.SUPPRESS, help="of a model that draws latents, the VAE that makes "
                        "images of them: a folder, or a name on the Hugging Face hub (default: where the model's own "
                        "was when it was made)")
    add_device_flag(parser)
    return parser


def add_changes(parser):
    """The flags of `check_changes`."""
    parser.add_argument("--edit", type=some_path, metavar="PICTURE",
                        help="draw the labels onto this picture: noise it, and denoise it "
                        "as what they ask for (SDEdit, 2108.01073)")
    parser.add_argument("--strength", type=float, help="of --edit: how much of the picture is drawn anew, above 0 and "
                        f"at most 1, which is all (default: {STRENGTH})")
    parser.add_argument("--inpaint", type=some_path, metavar="PICTURE",
                        help="complete this picture where --mask is white; the rest of it stays as it is (RePaint, "
                        "2201.09865; four times the network calls)")
    parser.add_argument("--mask", type=some_path, metavar="PICTURE",
                        help="of --inpaint: black where the picture is known")
    parser.add_argument("--morph", metavar="A:B", help="draw the way from one label to another, 3:8 or cat:dog, as a "
                        "strip, or with --gif there and back")
    parser.add_argument("--to-seed", type=int, metavar="SEED", help="of --morph: go from --seed to this seed as well")


def add_longer(parser):
    """The flags of `LONGER`."""
    for name, count, metavar, text in (
            ("extend", None, "CLIP", "of clips: draw how this clip, or picture, goes on"),
            ("before", None, "CLIP", "of clips: draw what leads to this clip"),
            ("between", 2, ("CLIP", "CLIP"), "of clips: draw what leads from the first one to the second"),
            ("loop", None, "CLIP", "of clips: draw what leads from the end of this clip to its beginning")):
        parser.add_argument(f"--{name}", type=some_path, nargs=count, metavar=metavar, help=text)
    parser.add_argument("--frames", type=int, help="of clips: so many in all, however few were trained: a window "
                        "slides along")


def parse_args():
    parser = sampling_parser("Draws digits with a trained model. How it draws is up to the flags below; where one is "
                             "not given, to the model's own configuration.")
    parser.add_argument("--labels", nargs="+", help="what to draw, names or numbers: 31415, or a list: 3 1 4, cat dog "
                        "(default: each label)")
    parser.add_argument("--count", type=int, help="how many of each (default: 8; with --strip, and of clips, 1)")
    parser.add_argument("--size", type=as_size, default=(), metavar="TxHxW", help="of clips: draw them in another size "
                        "that the model has learned (train.py --sizes)")
    parser.add_argument("--out", type=some_path,
                        help="the picture to write (default: samples.png, strip.png or samples.gif)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--strip", action="store_true", help="draw the denoising of each image, or the frames of each "
                      "clip, from left to right")
    kind.add_argument("--gif", action="store_true", help="animate the denoising of the grid; clips are animated anyway")
    add_changes(parser)
    add_longer(parser)
    return parser.parse_args()


def lay_out(states, config, labels, args):
    """What `draw_states` drew as PIL pictures, and how long each is shown in an animation, milliseconds."""
    frames = frames_of(states[-1])
    if args.morph is not None and args.gif and len(frames) == 1:  # there and back
        there = [grid(images, min(args.count, 10)) for images in frames[0].unflatten(0, (args.count, -1)).unbind(1)]
        way = [60] * (len(there) - 2)
        return there + there[-2:0:-1], [1000, *way, 1000, *way]
    views = [view for state in states for view in frames_of(state)]
    if args.morph is not None:
        pictures = [grid(view, len(labels)) for view in views]
    elif args.strip:
        pictures = [strips(views)]
    else:
        pictures = [label_grid(view, config, labels) for view in views]
    if len(frames) > 1:
        return pictures, [FRAME] * len(pictures)
    return pictures, [1500 // len(pictures)] * (len(pictures) - 1) + [2000]


def check_size(config, labels, args, views, animated):
    """Raises `UserError` before the work when there are too many images, or the format of `--out` holds no picture as
    large as that of `lay_out`."""
    check_count(args.count, labels)
    columns, N = len(labels), len(labels) * args.count
    if args.strip and args.morph is None:
        columns, N = views, views * N
    elif args.morph is not None and args.gif:
        columns, N = min(args.count, 10), args.count
    names = () if are_numbers(config.class_names) else config.class_names
    size, _ = grid_size(N, *(args.size or config.image_size)[-2:], columns, captions=names)
    if max(size) > 10_000:  # all formats hold that
        check_picture(args.out, animated, size=size)


def main():
    args = parse_args()
    check_changes(args)
    model, config = load_for_sampling(args)
    check_clip_flags(config, args)
    count = math.prod((args.size or config.image_size)[:-2])  # of frames
    if args.count is None:
        args.count = 1 if args.morph is None and (args.strip or count > 1) else 8
    animated = args.gif or (count > 1 and not args.strip)
    if args.out is None:
        args.out = "samples.gif" if animated else "strip.png" if args.strip or args.morph else "samples.png"
    check_picture(args.out, animated, [args.checkpoint, args.edit, args.inpaint, args.mask, args.extend, args.before,
                                       *(args.between or ()), args.loop])
    if any(getattr(args, name) is not None for name in LONGER):
        labels = parse_labels(args.labels, config.class_names)
        check_size(config, labels, args, args.frames or count, animated)
        states = draw_longer(model, config, labels, args.count, args)[None]
        count = states.shape[3]
    else:
        config, labels, options = prepare(model, config, args, ANIMATION // 2 if args.gif else STRIP)
        shown = 1 if args.morph is not None or count > 1 else STRIP if args.strip else ANIMATION if args.gif else 1
        check_size(config, labels, args, shown * count, animated)
        states = draw_states(model, config, labels, args.count, shown, size=args.size, **options)
    save_animation(args.out, *lay_out(states, config, labels, args))
    kind = f"clips of {count} frames" if count > 1 else "images"
    print(f"{args.out}: {states.shape[1]} {kind}, {config.sampler} with {config.sample_steps} steps, guidance "
          f"{config.guidance:g}, seed {config.seed}, drawn with {args.checkpoint}")


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
