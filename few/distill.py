"""Distills a model that takes many network calls into one that draws in one call, or a few. It learns from the
teacher's answers to noise: no data are needed. All that step i draws is a function of (seed, i): a resumed run is the
same run.

Distribution matching (DMD, 2311.18828; DMD2, 2405.14867, algorithm 1 without its GAN). Three networks begin alike: the
student draws images; the fake learns, as train.py does, to denoise what the student draws; and the student moves its
images from where the fake sees them to where the teacher does (`matching_losses`).
"""

from support import parallel
from support.commands import UserError, dtype_of, flag_words, resolve_precision, run, say_end, some_path
from support.files import lock_dir, make_dir
from support.graphs import directly
from support.settings import add_flags, given_flags, say_default

import contextlib
import dataclasses
import functools
import hashlib
import math
import shlex
from pathlib import Path

import torch

import train
from diffusion import SAMPLERS, per_image
from inference import load_for_sampling, sampling_parser
from record.checkpoint import load_checkpoint
from record.log import announce
from record.resume import load_to_resume, open_run
from video.config import ANY, ClipConfig
from video.train_dit import show as show_clips

STEPS = 4000
SLOWER = 0.3  # the student's learning rate over the fake's, which has to keep up
TRAINING = ("steps", "batch_size", "lr", "ema_decay", "recompute", "log_every", "sample_every", "checkpoint_every")
SAMPLING = ("sample_steps", "guidance", "seed", "precision", "vae")
CHANGEABLE = ("steps", "recompute", "log_every", "sample_every", "checkpoint_every", "vae")  # by a resumed run


def student_of(config):
    """The configuration of the student, from that of the fake, whose guidance is the teacher's."""
    return dataclasses.replace(config, lr=SLOWER * config.lr, guidance=1.0, sampler="ddpm", eta=0.0)


def matching_losses(process, x_0, t, y, noise, teacher, fake, guidance):
    """The loss of each image (B,) that a student has drawn: x_0 (B, C, *size) with a gradient, for labels y (B,). It
    makes the student's images spread as the teacher's do. Its gradient is

    (fake(x_t) - teacher(x_t)) / mean |x_0 - teacher(x_t)|      (DMD, 2311.18828, equations 7 and 8)

    divided by the number of an image's values; its value is half the mean of the squares of that. Each network knows
    the score of a distribution at noise of t (B,): the guided teacher the target's, and `fake`, which is trained on x_0
    meanwhile (2405.14867), the student's. Where the two are equal, the gradient is 0 on average.
    """
    with torch.no_grad():
        x_t, _ = process.forward_add_noise(x_0, t, noise)
        real = process.predict(teacher, x_t, t, y, guidance)
        error = fake(x_t, t, y) - real
        gradient = error / per_image((x_0 - real).abs().flatten(1).mean(dim=1), x_0)
    return (x_0 - (x_0 - gradient).detach()).square().flatten(1).mean(dim=1) / 2


def draw(run, y, step, noise):
    """Draws with the student for labels y (B,): x_0 (B, C, *size), with a gradient. Step i of the training is about
    the student's network call number i modulo the number of its calls; the calls before that one have no gradient.

    noise(): fresh noise like x_0.
    """
    config, process = run.config, run.process
    *before, (t, *_) = process.descending_steps(config.sample_steps)[:1 + step % config.sample_steps]
    x = noise()
    with torch.no_grad():
        for state in SAMPLERS["ddpm"](lambda x, t: process.denoise(run.worker, x, t, y, 1), x, before, noise):
            x = state
    return process.denoise(run.worker, x, t, y, 1, math.inf)


def distill_step(student, fake, teacher, step):
    """Draws images with the student, and takes a step of the fake on them. Returns the student's own step, as
    `train.prepare` does."""
    config, process, device = fake.config, fake.process, next(fake.model.parameters()).device
    B, generator = config.batch_size, train.step_generator(config.seed, step, device)

    def noise():
        return torch.randn(B, *config.input_shape, generator=generator, device=device)

    def times():
        return process.random_t(torch.rand(B, generator=generator, device=device))

    y = torch.randint(config.num_classes, (B,), generator=generator, device=device)
    train.round_weights(student)
    x_0 = draw(student, y, step, noise)

    # The fake learns to denoise the student's images.
    train.take_step(fake, step, lambda fake: process.losses(fake.worker, x_0.detach(), times(), y, noise(),
                                                            config.loss))
    train.round_weights(fake)

    # The student moves its images.
    t = times()
    return lambda _: matching_losses(process, x_0, t, y, noise(), teacher, fake.worker, config.guidance), (), t


def fake_path(run_dir, step):
    return run_dir / f"fake_{step:06d}.pth"


def find_fakes(run_dir, data):
    """The files of the fakes of a teacher in this folder, a list. data: the fingerprint of the teacher."""
    found = []
    for path in run_dir.glob("fake_*.pth"):
        with contextlib.suppress(UserError):
            content = load_checkpoint(path, ANY)
            if content.get("data") == data and path == fake_path(run_dir, content["step"]):
                found.append(path)
    return found


def save_both(fake, student, path, step, seconds, data, window):
    """`train.save` for both. The fake is saved first: whenever the process is killed, the fake of the same step lies
    beside the student's checkpoint."""
    own = fake_path(path.parent, step)
    train.save(fake, own, step, seconds, data, window)
    train.save(student, path, step, seconds, data, window)
    for old in {*find_fakes(path.parent, data)} - {own}:
        old.unlink()


def start(config, settings, data, run_dir, resume):
    """The configuration of the fake, and the checkpoints that student and fake go on from, or None and None.

    config: the teacher's. settings: what the user asks for, a dict. data: the fingerprint of the teacher.
    """
    path = run_dir / "model.pth"
    if not resume:
        open_run(run_dir)
        for other in {*run_dir.glob("fake_*.pth")} - {*find_fakes(run_dir, data)}:
            raise UserError(f"{other} is no fake of this teacher's: choose another --run-dir, or remove it")
        unset = dict(steps=STEPS, sample_steps=1, lr=config.lr / 2, precision="auto")
        of_clips = dict(given=0.0, sizes=()) if isinstance(config, ClipConfig) else {}
        config = dataclasses.replace(config, **unset | settings | of_clips, compile=False)
        return config, None, None
    student = load_checkpoint(path, ANY)
    own = fake_path(run_dir, student["step"])
    if not own.is_file():
        raise UserError(f"{path} cannot be trained on: its fake, {own.name}, is not beside it. Bring it back, or make "
                        "a new student in another --run-dir")
    config, fake = load_to_resume(own, settings, type(student["config"]), CHANGEABLE)
    if not student.get("data") == fake["data"] == data or student["config"] != student_of(fake["config"]):
        raise UserError(f"{path} was not made of this teacher: name the one that it was made of with --checkpoint")
    return config, student, fake


def parse_args():
    parser = sampling_parser("Distills a model that takes many network calls into one that draws in one call, or a "
                             "few. It needs no data.", ClipConfig, SAMPLING)
    parser.add_argument("--run-dir", type=some_path, default=Path("run_few"), help="folder that gets model.pth, a "
                        "checkpoint like any other, and all else that train.py leaves (default: run_few)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, exactly where its "
                        "last checkpoint is")
    add_flags(parser, ClipConfig, TRAINING)
    say_default(parser, TRAINING, "the teacher's own")
    for name, default in (("steps", STEPS), ("sample_steps", 1), ("lr", "half of the teacher's")):
        say_default(parser, [name], default)
    return parser.parse_args()


def main():
    args = parse_args()
    if parallel.WORLD > 1:
        raise UserError("few.distill is work for one process: start it without torchrun")
    settings, args.precision = given_flags(args, ClipConfig), "fp32"  # in which the weights are as they were saved
    teacher, config = load_for_sampling(args, ANY)
    if config.process != "flow":
        raise UserError(f"{args.checkpoint} learned the process {config.process}: of noise alone its network says next "
                        "to nothing about the image; a model of --process flow can learn to draw in one call")
    if getattr(config, "guidance_high", 1) < 1:
        raise UserError(f"{args.checkpoint} guides a share of its steps alone, and a student learns one guidance: "
                        "make a teacher of it by python -m demo.share --guidance-high 1")
    device, run_dir = next(teacher.parameters()).device, args.run_dir
    data = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    make_dir(run_dir)
    with lock_dir(run_dir):
        config, *saved = start(config, settings, data, run_dir, args.resume)
        config = dataclasses.replace(config, precision=resolve_precision(config.precision, device))
        weights = teacher.state_dict()
        first = {"model": weights, "ema": weights, "optimizers": ()}
        student, fake = (train.start_run(of, device, content or first)
                         for of, content in zip((student_of(config), config), saved, strict=True))
        student.replay = fake.replay = directly  # a step's functions differ from step to step
        teacher.to(dtype_of(config.precision, device))
        announce(config, f"none: the teacher is {args.checkpoint}, guidance {config.guidance:g}", teacher, device,
                 saved[0]["step"] if saved[0] else 0, run_dir)
        show = show_clips if config.kind == "clips" else train.show
        script = shlex.join(["-m", "few.distill", *flag_words("--checkpoint", args.checkpoint)])
        done, stopped = train.loop(student, lambda step: distill_step(student, fake, teacher, step), data, saved[0],
                                   run_dir, config.steps, show, functools.partial(save_both, fake), script)
    say_end(done, stopped, run_dir, config.drawn_by, ("-m", "few.distill"))


if __name__ == "__main__":
    run(main)
