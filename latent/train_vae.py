"""Trains a small VAE from nothing.

    python -m latent.train_vae --dataset folder --data-dir X     ten minutes on two CPU cores, for 64 x 64 images

What it minimises is `loss_of`. As in train.py, everything that step i learns from is a function of (seed, i).
"""

from support.commands import (
    Parser,
    UserError,
    add_device_flag,
    catch_signals,
    dtype_of,
    end_stopped,
    first_line,
    pick_device,
    resolve_precision,
    run,
    some_path,
)
from support.files import MARK, check_output, lock_dir, make_dir, write_atomically
from support.folders import has_test_part
from support.muon import Muon
from support.pictures import grid, psnr, save_picture
from support.run_log import Bar, kept_rows, to_csv
from support.sizes import as_size, show_size
from support.tensors import check_tensors, read_tensors

import argparse
import copy
import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from config import Config, add_flags, as_name, check_value, flag, given_flags
from dataset import load_dataset, to_float, to_uint8
from latent.vae import CONFIG, VAE, WEIGHTS, save_vae
from train import (
    change_settings,
    learning_rate,
    round_weights,
    step_generator,
    take_gradients,
    update_average,
    warned,
)

FORMAT = "vae-training-1"
STATE, LOG, PICTURE = "train.pth", "log.csv", "reconstructions.png"
COLUMNS = ["step", "loss", "psnr", "lr"]  # of log.csv
CHANGEABLE = ("steps", "data_dir", "save_every")  # by a resumed run
AUTOMATIC = ("precision", "image_size", "channels", "factor")  # "auto" or 0: as resolved at the start
HELD_OUT = 1000  # test images at the most
MEASURED = 4000  # training images that the statistics of the latents are of
ADAMW_BETAS = (0.9, 0.95)
EMA_DECAY = 0.995
DECODER_ALONE = 0.2  # the last part of the steps: latents stay, and their decoder gets better


def like(name):
    """A field that is as that of `Config`."""
    field = Config.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a VAE and its training. Raises `UserError` when a value has the wrong type or is out of range."""

    # Data
    dataset: str = like("dataset")
    data_dir: str = like("data_dir")
    image_size: tuple = like("image_size")
    channels: int = like("channels")
    ground: str = like("ground")

    # Network
    factor: int = flag(0, "a latent stands for factor x factor pixels; 0 = 4 for images of up to 32 pixels, else 8", 0,
                       256)
    latent_channels: int = flag(8, "numbers of a latent", 1, 256)
    widths: tuple = (96, 48)  # of the levels, each but the last of which halves the image; the stem does the rest
    layers_per_block: int = flag(1, "residual blocks of a level of the encoder; the decoder has one more", 1, 16)

    # Loss
    noise: float = flag(0.1, "the posterior's standard deviation; 0 = learnt", 0, 10)
    kl: float = flag(0.02, "weight of the KL divergence of a latent's number from a standard normal one", 0, 10)
    half_scale: float = flag(0.0, "share of the images that are learnt at half their size, of latents at half their "
                             "size (2502.09509, 2502.14831)", 0, 1)

    # Training
    steps: int = flag(10_000, "optimizer steps", 1, 100_000_000)
    batch_size: int = flag(16, "images per step", 1, 1_000_000)
    lr: float = flag(6e-3, "peak learning rate, from which it falls to zero", 0, 10)
    warmup: int = like("warmup")
    precision: str = like("precision")
    seed: int = like("seed")
    save_every: int = flag(1000, f"steps between two lines of the log, each with {STATE} and {PICTURE} written", 1,
                           100_000_000)

    lr_decay = "linear"

    def __post_init__(self):
        for name, value in (("image_size", as_size(self.image_size)), ("widths", tuple(self.widths)),
                            ("data_dir", as_name(self.data_dir))):
            object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if not 1 <= len(self.widths) <= 8 or not all(type(n) is int and 1 <= n <= 8192 for n in self.widths):
            raise UserError(f"widths are {self.widths!r:.80}, but must be 1 to 8 numbers between 1 and 8192")

    @property
    def halvings(self):
        """How many times smaller the levels make the image; what is left of the factor, the stem does."""
        return 2 ** (len(self.widths) - 1)


@dataclasses.dataclass
class Run:
    """A training run: what it learns, and what that takes."""

    recipe: Recipe
    model: VAE           # fp32 weights
    worker: VAE          # computes the gradients: the model, or its bfloat16 copy
    ema: VAE             # the moving average of the weights, which is what is kept
    optimizers: list     # AdamW and Muon


# What it learns


def build_vae(recipe):
    """A `VAE` with fresh weights; its posterior has the standard deviation `recipe.noise`, if that is set."""
    patch_size = recipe.factor // recipe.halvings
    channels = recipe.channels * patch_size**2
    vae = VAE(channels, channels, recipe.latent_channels, recipe.widths, recipe.layers_per_block,
              norm_num_groups=math.gcd(16, *recipe.widths), mid_block_add_attention=False, patch_size=patch_size)
    if recipe.noise:
        with torch.no_grad():
            vae.quant_conv.weight[recipe.latent_channels:] = 0
            vae.quant_conv.bias[recipe.latent_channels:] = 2 * math.log(recipe.noise)
    return vae


def reconstruction_loss(made, x):
    """The mean absolute error of images `made` of x, each (B, C, H, W), and half of that of their averages over 2 x 2
    and 4 x 4 pixels: those see the shapes that single pixels do not. One for each image, (B,)."""
    loss = 0
    for size, weight in ((1, 1.0), (2, 0.5), (4, 0.5)):
        if min(x.shape[2:]) >= size:
            loss = loss + weight * F.avg_pool2d(made - x, size).abs().mean(dim=(1, 2, 3))
    return loss


def kl_divergence(mean, std):
    """Of normal numbers from standard normal ones, each (B, ...): the mean over an image's, (B,)."""
    return ((mean**2 + std**2 - 1) / 2 - std.log()).flatten(1).mean(dim=1)


def loss_of(worker, x, noise, recipe, alone=False):
    """What training minimises, a mean over the images x float (B, C, H, W) in [-1, 1].

    noise: standard normal, of the latents' shape. alone: the decoder learns alone.
    Some of the images, `recipe.half_scale`, are decoded at half their size, of latents at half their size: a latent is
    to mean at every scale what it does at one, which makes the latents smooth. It takes the network time to learn, and
    in ten minutes there is none to spare (EXPERIMENTS.md).
    """
    dtype = worker.quant_conv.weight.dtype
    with torch.set_grad_enabled(not alone):
        mean, std = (part.float() for part in worker.posterior(x.to(dtype)))
        std = std.detach() if recipe.noise else std
        z, divergence = mean + std * noise, kl_divergence(mean, std)  # (B, C_latent, h, w), (B,)
    small = 0 if alone else round(len(x) * recipe.half_scale)
    pairs = [(z[small:], x[small:])] if small < len(x) else []
    if small:
        size = [-(-side // 2) for side in z.shape[2:]]
        pairs.append((F.adaptive_avg_pool2d(z[:small], size),
                      F.adaptive_avg_pool2d(x[:small], [side * worker.factor for side in size])))
    losses = torch.cat([reconstruction_loss(worker.reconstruct(latents.to(dtype)).float(), images)
                        for latents, images in pairs])
    return (losses + recipe.kl * divergence).mean()  # the images are in another order: to the mean it is the same


# The training


def make_batch(images, run, step):
    """The batch of step `step`, on the device of `images`: images float (B, C, H, W) and the noise of their latents."""
    recipe = run.recipe
    generator = step_generator(recipe.seed, step, images.device)
    index = torch.randint(len(images), (recipe.batch_size,), generator=generator, device=images.device)
    shape = recipe.latent_channels, *(side // recipe.factor for side in images.shape[2:])
    noise = torch.randn((recipe.batch_size, *shape), generator=generator, device=images.device)
    return to_float(images[index]), noise


def start_run(recipe, device, saved=None):
    """The `Run` of a recipe, at its start, or as it was `saved`."""
    torch.manual_seed(recipe.seed)
    model = build_vae(recipe).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    worker = copy.deepcopy(model).bfloat16() if recipe.precision == "bf16" else model
    others, kernels = ([weight for _, weight in part] for part in split_weights(model))
    optimizers = [torch.optim.AdamW(others, betas=ADAMW_BETAS, weight_decay=0.0, fused=True),
                  Muon(kernels, dtype=dtype_of(recipe.precision, device))]
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return Run(recipe, model, worker, ema, optimizers)


def split_weights(model):
    """The weights for AdamW and those for Muon, two lists of names and tensors: Muon gets the blocks' convolutions."""
    named = list(model.named_parameters())
    return [[(name, weight) for name, weight in named if ("_block" in name and weight.ndim == 4) == inner]
            for inner in (False, True)]


def decoder_alone(recipe, step):
    """Whether step `step` belongs to the last part, in which the decoder learns alone."""
    return step >= recipe.steps - int(DECODER_ALONE * recipe.steps)


def train_step(run, batch, step):
    """One optimizer step on a batch of `make_batch`. Returns the loss."""
    recipe, alone = run.recipe, decoder_alone(run.recipe, step)
    if alone:  # from here on the latents are those that are kept
        for part in ("encoder", "quant_conv"):
            getattr(run.model, part).load_state_dict(getattr(run.ema, part).state_dict())
    round_weights(run)
    loss = loss_of(run.worker, *batch, recipe, alone)
    loss.backward()
    take_gradients(run)
    weights = list(run.model.parameters())
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()

    update_average(run.ema, weights, step, EMA_DECAY)
    return loss.detach()


def reconstructions(vae, images):
    """Images uint8 (N, C, H, W) there and back, through the means of their posteriors."""
    device = vae.mean.device
    return torch.cat([to_uint8(vae.decode(vae.encode(to_float(part.to(device)))[0])).cpu()
                      for part in images.split(100)])


def measure_latents(vae, images):
    """Sets the statistics of a VAE to those of the latents of images uint8 (N, C, H, W), drawn from their posteriors:
    each channel's numbers then have mean 0 and standard deviation 1."""
    C, device = vae.settings["latent_channels"], vae.mean.device
    vae.normalize_by([0.0] * C, [1.0] * C)
    sums = torch.zeros(2, C, dtype=torch.float64)
    for part in images.split(100):
        mean, std = (numbers.double().cpu() for numbers in vae.encode(to_float(part.to(device))))  # (B, C, h, w)
        sums += torch.stack([mean.sum(dim=(0, 2, 3)), (mean**2 + std**2).sum(dim=(0, 2, 3))])
    mean, square = sums / (len(images) * math.prod(vae_shape(vae, images)))
    std = (square - mean**2).sqrt()
    if not (std > 1e-6).all():
        raise UserError("the latents of these images are all the same: train for longer, or on images that differ")
    vae.normalize_by(mean.tolist(), std.tolist())


def vae_shape(vae, images):
    """The height and width of the latents of images."""
    return [side // vae.factor for side in images.shape[2:]]


# Its settings, data and folder


def resolve(recipe, data, device):
    """The recipe with all filled in that the data and the device decide."""
    C, *size = data.images.shape[1:]
    factor = recipe.factor or max(4 if max(size) <= 32 else 8, recipe.halvings)
    if factor % recipe.halvings or any(side % factor for side in size):
        fit = [n for n in range(1, 257) if not any(side % n for side in size) and n % recipe.halvings == 0
               and n // recipe.halvings <= 16]
        near = [round(side / factor) * factor or factor for side in size]
        ways = [*([f"--factor to one of {fit}"] if fit else []),
                *([] if factor % recipe.halvings else [f"--image-size to {show_size(near)}"])]
        raise UserError(f"images of {show_size(size)} cannot become latents {factor} times smaller with "
                        f"{len(recipe.widths)} widths, each but the last of which halves them: set "
                        + (" or ".join(ways) or "fewer --widths"))
    if factor // recipe.halvings > 16:
        raise UserError(f"factor {factor} with {len(recipe.widths)} widths would take patches of more than 16 pixels: "
                        "give more --widths")
    return dataclasses.replace(recipe, dataset=data.name, image_size=tuple(size), channels=C, factor=factor,
                               precision=resolve_precision(recipe.precision, device))


def split(recipe, data):
    """Training images and held-out ones, uint8 (N, C, H, W): those of the test part, or where a folder has none, and
    too few images of each class to hold some out, every 20th image."""
    if not data.held_out and not has_test_part(data.name, recipe.data_dir):
        apart = torch.arange(len(data.images)) % 20 == 0
        if len(apart) < 2:
            raise UserError(f"{recipe.data_dir} holds a single image: training needs some, and others to test on")
        images, tests = data.images[~apart], data.images[apart]
    else:
        images, tests = data.images, load_dataset(data.name, recipe.data_dir, False, recipe.image_size,
                                                  recipe.channels, recipe.ground).images
    return images, some(tests, HELD_OUT)


def some(images, count):
    """At most `count` of the images, evenly spaced."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()]


def configure(settings, out, resume):
    """The recipe that `settings` (a dict) ask for and, to resume, the state to go on from (else None)."""
    path = out / STATE
    if not resume:
        return Recipe(**settings), None
    saved = load_state(path)
    if "widths" in settings:
        settings = settings | {"widths": tuple(settings["widths"])}
    recipe = change_settings(saved["recipe"], settings, path, CHANGEABLE, AUTOMATIC)
    if saved["step"] > recipe.steps:
        raise UserError(f"{path} is trained for {saved['step']:,} steps already: ask for as many with --steps, or more")
    return recipe, saved


def check_folder(out):
    """Raises `UserError` when the folder is not one for a new VAE."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if CONFIG in names or WEIGHTS in names:
        raise UserError(f"{out} holds a VAE already: choose another --out, or remove it")
    if STATE in names:
        raise UserError(f"{out} holds a VAE in training: go on with it (--resume), choose another --out, or remove it")
    others = [name for name in names if name not in (LOG, PICTURE, ".lock") and not name.endswith(".tmp")]
    for name, own in ((LOG, b"step,loss,"), (PICTURE, MARK)):
        if name in names:
            check_output(out / name, own)
    if others:
        raise UserError(f"{out} holds other things ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): a VAE "
                        "needs a folder of its own, choose another --out")


def save_state(run, path, step, seconds, data, window):
    """Writes what the run needs to go on. Raises `UserError` when it cannot."""
    content = {"format": FORMAT, "recipe": dataclasses.asdict(run.recipe), "step": step, "seconds": seconds,
               "data": data, "window": window, "model": run.model.state_dict(), "ema": run.ema.state_dict(),
               "optimizers": [optimizer.state_dict()["state"] for optimizer in run.optimizers]}
    write_atomically(path, lambda file: torch.save(content, file))


def load_state(path):
    """Reads what `save_state` wrote, with a `Recipe` under "recipe". Raises `UserError`."""
    try:
        content = read_tensors(path)
    except FileNotFoundError:
        finished = (path.parent / CONFIG).is_file()
        raise UserError(f"{path.parent} holds no {STATE}: " + ("the VAE in it is finished" if finished else
                        "there is nothing to go on with")) from None
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        raise UserError(f"{path} is damaged or cut short ({first_line(error, 150)}): train a new VAE") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no state of a VAE in training (no format {FORMAT!r} in it)")
    try:
        content["recipe"] = recipe = Recipe(**content["recipe"])
        if type(content["step"]) is not int or content["step"] < 0 or type(content["data"]) is not str:
            raise UserError("its step or its data are not what they should be")
        content["seconds"] = float(content["seconds"])
        with torch.device("meta"):  # shapes without memory
            model = build_vae(recipe)
        for name in ("model", "ema"):
            check_tensors(name, content[name], {name: weight.shape for name, weight in model.state_dict().items()})
        check_tensors("log", {"window": content["window"]}, {"window": (2,)})
        for states, part in zip(content["optimizers"], split_weights(model), strict=True):
            for i, state in states.items():
                weight = part[i][1]
                check_tensors("optimizers", state, {"momentum": weight.flatten(1).shape} if "momentum" in state else
                              {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape})
    except Exception as error:
        raise UserError(f"{path} is damaged ({first_line(error, 150)}): train a new VAE") from None
    return content


# The command


def train_vae(settings, out="vae", resume=False, device=None):
    """Trains a VAE; leaves it in the folder `out`, for `load_vae`, with log.csv and a picture of reconstructions.

    settings: a dict of the fields of `Recipe` that are not the defaults; of a resumed run, those to hold it to.
    resume: go on with the run in `out`, exactly where it was. device: a name; None: the fastest.
    Returns the recipe, the step that was reached, and the number of the signal that ended it there (0: none).
    Raises `UserError`.
    """
    out, device = Path(out), pick_device(device)
    recipe, saved = configure(settings, out, resume)
    if not resume:
        check_folder(out)
    make_dir(out)
    with lock_dir(out):
        data = load_dataset(recipe.dataset, recipe.data_dir, image_size=recipe.image_size, channels=recipe.channels,
                            ground=recipe.ground)
        fingerprint = data.fingerprint
        if saved and saved["data"] != fingerprint:
            raise UserError(f"{out / STATE} was trained on other data: images, labels or names of classes have changed "
                            "since; bring them back, or train a new VAE")
        recipe = resolve(recipe, data, device)
        images, tests = split(recipe, data)
        run = start_run(recipe, device, saved)
        announce(run, data, images, tests, device, saved["step"] if saved else 0, out)
        done, stopped = train_on(run, images.to(device), tests, fingerprint, saved, out)
        if not stopped:
            finish(run, images, tests, out)
        return recipe, done, stopped


def announce(run, data, images, tests, device, start, out):
    """Says what the run is about to do."""
    recipe, vae = run.recipe, run.model
    height, width = recipe.image_size
    h, w = vae_shape(vae, images)
    print(f"device    {device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""))
    print(f"data      {data.name}: {len(images):,} images of {height} x {width} to train, {len(tests):,} to test, "
          f"{'grey' if recipe.channels == 1 else 'colour'}")
    print(f"model     {sum(p.numel() for p in vae.parameters()):,} parameters; {recipe.channels * height * width:,} "
          f"numbers of an image become {recipe.latent_channels} x {h} x {w} = {recipe.latent_channels * h * w:,}")
    print(f"training  steps {start:,} to {recipe.steps:,} of {recipe.batch_size} images, {recipe.precision}, "
          f"seed {recipe.seed}")
    print(f"results   {out}/{LOG}, {PICTURE}; at the end {CONFIG} and {WEIGHTS}", flush=True)


def train_on(run, images, tests, fingerprint, saved, out):
    """The training loop; see `train_vae`. Returns the step that was reached and the signal that ended it there."""
    recipe, path = run.recipe, out / STATE
    start, before = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    window = saved["window"] if saved else torch.zeros(2)  # the sum and number of losses since the last row
    window = window.to(images.device)
    rows = [COLUMNS, *kept_rows(out / LOG, COLUMNS, start)]
    began, done, stopped = time.monotonic() - before, start, 0
    last_good = f"{path}, step {start:,}" if saved else "none"
    bar = Bar(total=recipe.steps * recipe.batch_size, initial=start * recipe.batch_size, unit=" images",
              unit_scale=True, desc="training", mininterval=0.2 if sys.stderr.isatty() else 20)
    with bar, catch_signals() as signals:
        for step in range(start, recipe.steps):
            # Learn.
            loss = train_step(run, make_batch(images, run, step), step)
            window += torch.stack([loss, torch.ones_like(loss)])
            bar.update(recipe.batch_size)
            done, stopped = step + 1, signals[0] if signals else 0
            due = done % recipe.save_every == 0 or done == recipe.steps
            if not (due or stopped):
                continue

            # Log and save.
            report = ""
            try:
                if not window.isfinite().all() or not all(p.isfinite().all() for p in run.ema.parameters()):
                    raise UserError(f"the loss or the weights are not finite at step {done:,}, learning rate "
                                    f"{learning_rate(recipe, step):.2g}")
                if due:
                    loss, quality = (window[0] / window[1]).item(), show(run.ema, tests, out / PICTURE)
                    rows.append([done, f"{loss:.6g}", f"{quality:.4f}", f"{learning_rate(recipe, step):.6g}"])
                    write_atomically(out / LOG, lambda file: file.write(to_csv(rows)))
                    report = f"step {done:,}: loss {loss:.4f}, PSNR {quality:.2f} dB on {len(tests):,} held-out images"
                    window.zero_()
                save_state(run, path, done, time.monotonic() - began, fingerprint, window)
            except UserError as error:
                raise UserError(f"{error}; last good state: {last_good}") from None
            last_good = f"{path}, step {done:,}"
            if report:
                bar.write(report)
            if stopped:
                break
    return done, stopped


def show(vae, tests, path):
    """The PSNR of held-out images' reconstructions, dB; the picture at `path` shows some of both, in turns."""
    made = reconstructions(vae, tests)
    pairs = [part for real, fake in zip(some(tests, 30).split(10), some(made, 30).split(10), strict=True)
             for part in (real, fake)]
    with warned():
        save_picture(path, grid(torch.cat(pairs), columns=min(10, len(tests))))
    return psnr(made, tests)


def finish(run, images, tests, out):
    """Measures the latents, and writes the VAE. Only then is there nothing to go on with."""
    vae = run.ema.half().float().eval()  # what is measured now is what the file holds
    measure_latents(vae, some(images, MEASURED))
    made = reconstructions(vae, tests)
    save_vae(vae, out)
    (out / STATE).unlink(missing_ok=True)
    numbers = {name: ", ".join(f"{number:.3f}" for number in part.flatten().tolist())
               for name, part in (("mean", vae.mean), ("std", vae.std))}
    print(f"{out}: PSNR {psnr(made, tests):.2f} dB on {len(tests):,} held-out images; its latents' channels have mean "
          f"{numbers['mean']} and std {numbers['std']}")
    if vae.patch_size > 1:
        print(f"it sees patches: with diffusers, torch's pixel_unshuffle goes before its encoder, and pixel_shuffle "
              f"behind its decoder, each by {vae.patch_size}; a VAE of more --widths needs neither")


def parse_args():
    parser = Parser(description="Trains a small autoencoder (VAE), whose latents train.py --vae learns to draw.")
    parser.add_argument("--out", type=some_path, default=Path("vae"), help="the folder that gets it (default: vae)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it was")
    add_flags(parser, of=Recipe)
    parser.add_argument("--widths", type=int, nargs="+", default=argparse.SUPPRESS, metavar="N",
                        help="channels of each level; a level but the last halves the image, and patches that become "
                        f"channels do the rest of the factor (default: {' '.join(map(str, Recipe.widths))})")
    add_device_flag(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    recipe, done, stopped = train_vae(given_flags(args, Recipe), args.out, args.resume, args.device)
    if stopped:
        end_stopped(done, stopped, "-m", "latent.train_vae")
    data_dir = [] if recipe.data_dir == Config.data_dir else ["--data-dir", str(recipe.data_dir)]
    print("train on its latents with: " + shlex.join([
        "python", "train.py", "--vae", str(args.out), "--dataset", recipe.dataset, *data_dir,
        "--image-size", show_size(recipe.image_size)]))


if __name__ == "__main__":
    run(main, memory="--batch-size or --image-size", alone=True)
