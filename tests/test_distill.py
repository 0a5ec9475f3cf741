"""One network call instead of many: the objective against its formula, and the command as a user calls it."""

import dataclasses
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SMALL, TINY, assert_refused, flags_of, make_checkpoint, same
from PIL import Image

import latent.draw
import latent.train_dit
import train
import video.draw
import video.train_dit
from config import Config
from diffusion import RectifiedFlow, per_image
from dit import DiT
from few import distill
from inference import draw, generate
from latent.config import LatentConfig
from latent.vae import VAE, save_vae
from record.checkpoint import load_checkpoint, load_model, save_checkpoint
from video.config import ANY

FLAGS = ["--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--log-every", "2"]


class Gaussian(torch.nn.Module):
    """A perfect network: E[x_0 | x_t] of images that are N(mean + y, std^2), pixel by pixel; N(mean, std^2) for the
    null label."""

    null_label = 3

    def __init__(self, process, mean, std):
        super().__init__()
        self.process, self.mean, self.std = process, mean, std

    def forward(self, x, t, y):
        a, s = (per_image(share[t], x) for share in (self.process.signal, self.process.noise))
        mean = self.mean + per_image(torch.where(y == self.null_label, 0, y), x)
        return mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * mean)

    def score(self, x, t, y):
        """The gradient of the logarithm of x_t's density."""
        a, s = (per_image(share[t], x) for share in (self.process.signal, self.process.noise))
        return -(x - a * (self.mean + per_image(y, x))) / (a**2 * self.std**2 + s**2)


def batch(n):
    return (torch.randn(n, 1, 2, 2), torch.randint(1000, (n,)), torch.randint(3, (n,)), torch.randn(n, 1, 2, 2))


def gradient(process, x_0, t, y, noise, teacher, fake, guidance=1):
    x_0.requires_grad_()
    losses = distill.matching_losses(process, x_0, t, y, noise, teacher, fake, guidance)
    assert losses.shape == (len(x_0),)
    return torch.autograd.grad(losses.sum(), x_0)[0]


@pytest.mark.parametrize("guidance", [1, 1.5])
def test_the_gradient_is_the_difference_of_the_scores(guidance):
    """As DMD writes it (2311.18828, equations 7 and 8): that of the student's images less that of the teacher's."""
    process = RectifiedFlow()
    teacher, fake = Gaussian(process, 0.3, 0.5), Gaussian(process, -0.2, 0.8)
    x_0, t, y, noise = batch(20)
    a, s = (per_image(share[t], x_0) for share in (process.signal, process.noise))
    x_t = a * x_0 + s * noise
    real = guidance * teacher.score(x_t, t, y) + (1 - guidance) * teacher.score(x_t, t, torch.zeros_like(y))
    seen = (x_t + s**2 * real) / a  # Tweedie's formula
    scale = (x_0 - seen).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = s**2 / a * (fake.score(x_t, t, y) - real) / scale / 4
    torch.testing.assert_close(gradient(process, x_0, t, y, noise, teacher, fake, guidance), expected, rtol=1e-3,
                               atol=1e-4)


def test_there_is_no_gradient_where_the_distributions_are_one():
    process = RectifiedFlow()
    network = Gaussian(process, 0.3, 0.5)
    assert not gradient(process, *batch(20), network, network).any()


def test_what_a_student_draws_spreads_as_what_its_teacher_draws():
    """The fixed point, where the fake is perfect all the while."""
    process, (mean, std) = RectifiedFlow(), (torch.tensor(-1.0), torch.tensor(0.1))
    teacher = Gaussian(process, 0.3, 0.5)
    for i in range(600):
        z, t, y, noise = batch(256)
        for value in (mean, std):
            value.requires_grad_()
        x_0 = mean + per_image(y, z) + std * z
        fake = Gaussian(process, mean.detach(), std.detach())
        losses = distill.matching_losses(process, x_0, t, y, noise, teacher, fake, 1)
        steps = torch.autograd.grad(losses.mean(), (mean, std))
        mean, std = (value.detach() - (1 - i / 600) * step for value, step in zip((mean, std), steps, strict=True))
    assert mean.item() == pytest.approx(0.3, abs=0.05) and std.item() == pytest.approx(0.5, abs=0.05)


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    """The run folder of a student of `trained` that was not interrupted."""
    folder = tmp_path_factory.mktemp("student") / "run"
    run(trained, folder)
    return folder


def run(trained, folder, *flags, until=None):
    """Runs the command in this process, with Ctrl-C pressed during step `until`; returns its exit code."""
    words = ["few/distill.py", "--checkpoint", trained, "--run-dir", folder, "--steps", 7, *FLAGS, *flags]
    original = distill.distill_step

    def pressed(*args):
        if args[-1] + 1 == until:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    with mock.patch("sys.argv", [*map(str, words)]), mock.patch.object(distill, "distill_step", pressed):
        try:
            distill.main()
        except SystemExit as end:
            return end.code
    return 0


def test_the_command(command, trained, tmp_path):
    """Leaves a checkpoint like any other, that draws in one call; the page says how to go on."""
    folder = tmp_path / "few run"
    result = command("few.distill", "--checkpoint", trained, "--run-dir", folder, "--steps", 4, "--sample-every", 2,
                     *FLAGS)
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stderr and "the teacher is" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == [
        "fake_000004.pth", "index.html", "log.csv", "loss.png", "model.pth", "samples_000002.png", "samples_000004.png"]
    assert "-m few.distill --checkpoint" in (folder / "index.html").read_text()
    assert command("inference.py", "--checkpoint", folder, "--out", tmp_path / "drawn.png").returncode == 0


@pytest.mark.parametrize(("trainer", "drawer", "flags"), [
    (latent.train_dit, latent.draw, ["--vae", "vae", "--patch-size", 2]),
    (video.train_dit, video.draw, ["--dataset", "moving", "--image-size", "4x24x24", "--patch-size", "2x12x12",
                                   "--given", 0.5, "--sizes", "1x24x24"])])
def test_students_of_latents_and_of_clips(call, tmp_path, monkeypatch, capsys, trainer, drawer, flags):
    """Each is drawn by the command of its kind, and a grid of clips moves."""
    monkeypatch.chdir(tmp_path)
    save_vae(VAE(1, 1, 2, (4, 8), norm_num_groups=4), "vae")
    assert call(trainer, *TINY[2:] if drawer is video.draw else TINY, *flags, "--steps", 2)[0] == 0
    assert run("run", "run_few", "--steps", 2) == 0
    name = drawer.__name__
    assert f"draw with: python -m {name} --checkpoint run_few/model.pth" in capsys.readouterr().out
    code, out, err = call(drawer, "--checkpoint", "run_few", "--labels", 3)
    assert code == 0 and "ddpm with 1 steps, guidance 1" in out, err
    with Image.open("run_few/samples_000002.png") as image:
        assert getattr(image, "n_frames", 1) == (4 if drawer is video.draw else 1)
    assert f"python -m {name}" in Path("run_few/index.html").read_text()


@pytest.mark.parametrize("calls", [1, 2])
def test_it_draws_in_so_many_network_calls(trained, tmp_path, calls):
    assert run(trained, tmp_path / "run", "--sample-steps", calls, "--steps", 2) == 0
    with mock.patch.object(DiT, "forward", autospec=True, side_effect=DiT.forward) as forward:
        draw("0123456789", checkpoint=tmp_path / "run", device="cpu")
    assert [len(call.args[1]) for call in forward.call_args_list] == [16] * calls


def test_each_call_is_trained_from_what_the_calls_before_have_drawn(trained):
    """The second one sees the first one's images, noised anew, and alone has a gradient."""
    config = dataclasses.replace(load_checkpoint(trained / "model.pth", ANY)["config"], sample_steps=2)
    started = train.start_run(distill.student_of(config), torch.device("cpu"))
    seen, y, fresh = [], torch.zeros(4, dtype=torch.long), [torch.full((4, 1, 8, 8), value) for value in (1.0, 2.0)]

    def network(x, t, y):
        seen.append((x, t[0].item(), torch.is_grad_enabled()))
        return x.new_full(x.shape, 0.5)

    started.worker = network
    network.null_label = 10
    noises = iter(fresh)
    distill.draw(started, y, 0, lambda: next(noises))
    noises = iter(fresh)
    distill.draw(started, y, 1, lambda: next(noises))
    a, s = started.process.path[499]
    assert [entry[1:] for entry in seen] == [(999, True), (999, False), (499, True)]
    assert same(seen[0][0], fresh[0]) and same(seen[1][0], fresh[0])
    torch.testing.assert_close(seen[2][0], a * 0.5 + s * fresh[1], rtol=0, atol=0.01)


def test_what_learns_is_not_clamped(trained):
    """Where it were, it would have no gradient."""
    config = load_checkpoint(trained / "model.pth", ANY)["config"]
    started = train.start_run(distill.student_of(dataclasses.replace(config, sample_steps=1)), torch.device("cpu"))

    class Bright(torch.nn.Module):
        null_label = 10

        def forward(self, x, t, y):
            return torch.full_like(x, 2.0)

    started.worker = Bright()
    drawn = distill.draw(started, torch.zeros(4, dtype=torch.long), 0, lambda: torch.zeros(4, 1, 8, 8))
    assert (drawn == 2).all()


@pytest.mark.parametrize("until", [1, 4])
def test_a_resumed_run_is_the_same_run(trained, student, tmp_path, until, capsys):
    folder = tmp_path / "run"
    assert run(trained, folder, until=until) == 130
    assert f"go on with: python -m few.distill --checkpoint {trained}" in capsys.readouterr().out
    assert load_checkpoint(folder / "model.pth", ANY)["step"] == until
    assert run(trained, folder, "--resume") == 0
    for name in ("model.pth", "fake_000007.pth"):
        ours, theirs = ({**load_checkpoint(place / name, ANY), "seconds": 0} for place in (folder, student))
        assert same(ours, theirs), name
    assert (folder / "log.csv").read_text() == (student / "log.csv").read_text()


def test_a_run_that_is_killed_between_two_files_is_the_same_run(trained, student, tmp_path):
    folder, original, steps = tmp_path / "run", train.save, []

    def killed(run, path, step, *rest):
        steps.append(step)
        if steps.count(4) == 2:
            raise KeyboardInterrupt
        original(run, path, step, *rest)

    with mock.patch.object(train, "save", killed), pytest.raises(KeyboardInterrupt):
        run(trained, folder, "--checkpoint-every", 2)
    assert load_checkpoint(folder / "model.pth", ANY)["step"] == 2
    assert run(trained, folder, "--resume", "--checkpoint-every", 1000) == 0
    assert [path.name for path in folder.glob("fake*")] == ["fake_000007.pth"]
    ours, theirs = (load_checkpoint(place / "model.pth", ANY)["model"] for place in (folder, student))
    assert same(ours, theirs)


def test_it_starts_as_its_teacher_and_learns(trained, tmp_path):
    """A student that learns nothing answers as its teacher does. Weights of half precision will do."""
    shared = tmp_path / "shared.pth"
    content = load_checkpoint(trained / "model.pth", ANY)
    save_checkpoint(shared, content["config"], 6, 1.0, {n: w.half() for n, w in content["ema"].items()})
    for lr in (0, 0.01):
        assert run(shared, tmp_path / str(lr), "--lr", lr, "--steps", 1) == 0
        left = [load_checkpoint(tmp_path / str(lr) / name, ANY)["model"] for name in ("model.pth", "fake_000001.pth")]
        for weights in left:
            assert same(weights, {n: w.half().float() for n, w in content["ema"].items()}) == (lr == 0)


def test_a_student_is_as_varied_as_its_teacher(call, tmp_path):
    """The teacher alone draws the mean of a label's images in one call, and the student images like its many."""
    flags = ["--data-dir", SMALL, "--image-size", 8, "--hidden-size", 32, "--depth", 2, "--num-heads", 2, "--device",
             "cpu"]
    assert call(train, *flags, "--steps", 300, "--run-dir", tmp_path / "teacher")[0] == 0
    assert run(tmp_path / "teacher", tmp_path / "student", "--steps", 150, "--batch-size", 32) == 0
    labels, spread = torch.arange(10).repeat(40), {}
    for name, steps in (("teacher", 1), ("teacher", 12), ("student", 1)):
        model, config = load_model(tmp_path / name / "model.pth", precision="fp32", kinds=(Config,))
        images = generate(model, dataclasses.replace(config, sample_steps=steps), labels)
        spread[name, steps] = images.unflatten(0, (40, 10)).std(dim=0).mean().item()
    assert spread["teacher", 1] < 0.5 * spread["teacher", 12]
    assert spread["student", 1] == pytest.approx(spread["teacher", 12], rel=0.3)


def test_refusals(call, trained, student, tmp_path):
    before = {path: path.read_bytes() for path in student.iterdir()}
    words = ["--checkpoint", trained, "--run-dir"]
    assert_refused(call(distill, *words, student), student / "model.pth", "--resume")
    for flags in (["--guidance", 3], ["--sample-steps", 2], ["--lr", 0.1], ["--batch-size", 9], ["--seed", 1]):
        assert_refused(call(distill, *words, student, "--resume", *flags), "other settings", flags[0][2:5])
    assert_refused(call(distill, *words, student, "--resume", "--steps", 3), "7 steps already")
    assert_refused(call(distill, "--checkpoint", student, "--run-dir", student, "--resume"), "teacher")
    assert_refused(call(distill, *words, tmp_path / "none", "--resume"), "no checkpoint")
    assert_refused(call(distill, *words, tmp_path / "run", "--sample-steps", 1001), "1001")
    assert_refused(call(distill, *words, tmp_path / "run", "--lr", "nan"), "lr")
    assert_refused(call(distill, "--checkpoint", tmp_path / "none.pth"), "none.pth")
    (tmp_path / "broken").mkdir()
    shutil.copy(student / "model.pth", tmp_path / "broken")
    assert_refused(call(distill, *words, tmp_path / "broken", "--resume"), "fake_000007.pth, is not beside it")
    assert_refused(call(train, *TINY, "--run-dir", student, "--resume"), "is a student", "few.distill --resume")
    assert before == {path: path.read_bytes() for path in student.iterdir()}


@pytest.mark.parametrize(("flags", "guidance"), [([], 1.4), (["--guidance", 2.5], 2.5)])
def test_guidance_is_what_the_teacher_answers_with(trained, tmp_path, monkeypatch, flags, guidance):
    """The teacher's own, if not asked for; the student draws with none."""
    seen, original = [], distill.matching_losses
    monkeypatch.setattr(distill, "matching_losses", lambda *args: (seen.append(args[7]), original(*args))[1])
    assert run(trained, tmp_path / "run", "--steps", 2, *flags) == 0
    assert seen == [guidance] * 2 and load_checkpoint(tmp_path / "run" / "model.pth", ANY)["config"].guidance == 1


def test_each_flag_reaches_the_training(call, trained, tmp_path, monkeypatch):
    """Both networks, which differ in three settings alone, and the loop; what it does with them is train.py's."""
    asked = dict(steps=6, batch_size=40, lr=0.02, ema_decay=0.5, recompute=True, log_every=3, sample_every=2,
                 checkpoint_every=4, sample_steps=2, guidance=2.5, seed=7, precision="bf16")
    assert flags_of(distill) == {*asked, "checkpoint", "run_dir", "resume", "device", "vae"}
    started, steps, seeds = [], [], []
    begin, step = train.start_run, distill.distill_step
    monkeypatch.setattr(train, "start_run", lambda *args: started.append(begin(*args)) or started[-1])
    monkeypatch.setattr(distill, "distill_step", lambda *args: steps.append(args) or step(*args))
    generator = train.step_generator
    monkeypatch.setattr(train, "step_generator", lambda *args: seeds.append(args[:2]) or generator(*args))
    labels, original = set(), distill.matching_losses
    monkeypatch.setattr(distill, "matching_losses", lambda *args: (labels.update(args[3].tolist()), original(*args))[1])
    words = [word for name, value in asked.items() for word in (
        [f"--{name.replace('_', '-')}"] + [value] * (value is not True))]
    code, out, err = call(distill, "--checkpoint", trained, "--run-dir", tmp_path / "run", *words, "--device", "cpu")
    assert code == 0, err
    student, fake = started
    assert labels == {*range(10)}  # all classes
    assert {name: getattr(fake.config, name) for name in asked} == asked
    assert dataclasses.replace(fake.config, lr=0.3 * 0.02, guidance=1.0, sampler="ddpm", eta=0.0) == student.config
    assert [part[3] for part in steps] == [*range(6)] and seeds == [(7, i) for i in range(6)]
    assert {part[2].blocks[0].attention.qkv.weight.dtype for part in steps} == {torch.bfloat16}  # of the teacher
    assert all(run.model.recompute for run in started)
    assert "6 of 40 images, bf16, seed 7" in out and "guidance 2.5" in out
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["3", "6"]
    left = sorted(path.name for path in (tmp_path / "run").glob("*0*"))
    assert left == ["fake_000006.pth", "samples_000002.png", "samples_000004.png", "samples_000006.png"]


def test_a_fake_of_another_student_is_refused(call, trained, student, tmp_path):
    """It comes from the same teacher, and differs in one setting."""
    folder = shutil.copytree(student, tmp_path / "run")
    fake = folder / "fake_000007.pth"
    content = torch.load(fake, weights_only=True)
    torch.save(content | {"config": content["config"] | {"lr": 2 * content["config"]["lr"]}}, fake)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert_refused(call(distill, "--checkpoint", trained, "--run-dir", folder, "--resume"), "not made of this teacher")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_what_is_not_asked_for_is_as_the_teacher_has_it(trained, tmp_path, monkeypatch):
    """But for the precision, which the machine chooses anew."""
    started, begin, asked = [], train.start_run, []
    monkeypatch.setattr(distill, "resolve_precision", lambda name, device: asked.append(name) or "bf16")
    monkeypatch.setattr(train, "start_run", lambda *args: started.append(begin(*args)) or started[-1])
    with mock.patch.object(train, "loop", return_value=(0, 0)), mock.patch(
            "sys.argv", ["few/distill.py", "--checkpoint", str(trained), "--run-dir", str(tmp_path / "run")]):
        distill.main()
    teacher = load_checkpoint(trained / "model.pth", ANY)["config"]
    assert dataclasses.replace(teacher, steps=4000, sample_steps=1, lr=teacher.lr / 2, compile=False,
                               precision="bf16") == started[1].config and asked == ["auto"]


def test_a_process_without_signal_at_its_end_is_refused(call, tmp_path):
    assert call(train, *TINY, "--process", "ddpm", "--steps", 1, "--run-dir", tmp_path / "ddpm")[0] == 0
    assert_refused(call(distill, "--checkpoint", tmp_path / "ddpm", "--run-dir", tmp_path / "run"), "ddpm", "flow")


def test_a_teacher_that_is_guided_in_some_steps_alone_is_refused(call, tmp_path):
    teacher = make_checkpoint(tmp_path / "teacher.pth", of=LatentConfig, guidance_high=0.7)
    assert_refused(call(distill, "--checkpoint", teacher, "--run-dir", tmp_path / "run"), "share of its steps", "share")
    assert not (tmp_path / "run").exists()


def test_torchrun_is_refused(call, trained, monkeypatch):
    monkeypatch.setattr(distill.parallel, "WORLD", 2)
    assert_refused(call(distill, "--checkpoint", trained), "torchrun")
