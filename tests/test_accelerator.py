"""What runs on a GPU, run here on fake CUDA tensors: they have a device and a shape, but no values. An operation that
mixes devices raises, as it would there."""

from support.graphs import Replay

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from conftest import learn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import edit.draw
import inference
import train
from config import Config
from dataset import Dataset
from diffusion import SAMPLERS
from edit.ways import inpaint
from latent.cache import Latents
from latent.config import LatentConfig
from latent.vae import LIMITS, VAE, in_full_batches
from measure.classifier import DigitClassifier, accuracy_on
from measure.score import embed, nearest, reconstruct
from record.log import RunLog
from train import start_run
from video.moving import Moving

CONFIG = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=2, num_heads=2,
                batch_size=4, sample_steps=3)
CUDA = torch.device("cuda", 0)
PROCESSES = {"flow": CONFIG, "ddpm": dataclasses.replace(CONFIG, process="ddpm"),
             "learned": LatentConfig(**vars(CONFIG) | {"process": "ddpm", "variance": "learned"})}
SCHEDULES = ("signal", "noise", "error_scale", "log_posterior", "log_betas", "error_to_mean")


@pytest.fixture
def fake(monkeypatch):
    """Every tensor within is fake."""

    def apply(module, convert, recurse=True):
        """As `Module.to` does it, which swaps what is within a parameter: a fake one cannot be swapped."""
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = torch.nn.Parameter(convert(weight.detach()), weight.requires_grad)
            part._buffers.update({name: convert(value) for name, value in part._buffers.items() if value is not None})
        return module

    def make_process(config, build, device="cpu"):
        """The process computes with the values of its schedule, so it is made of real tensors, and they made fake."""
        with unset_fake_temporarily():
            diffusion = build(config)
        for name in set(SCHEDULES) & vars(diffusion).keys():
            setattr(diffusion, name, mode.from_tensor(getattr(diffusion, name)).to(device))
        return diffusion

    def fused_adamw(*lists, lr, **_):
        """There is none of fake tensors."""
        assert {tensor.device for tensors in lists for tensor in tensors} == {lr.device} == {CUDA}

    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    monkeypatch.setattr(torch, "_fused_adamw_", fused_adamw)
    for of in (Config, LatentConfig):
        monkeypatch.setattr(of, "build_process", functools.partialmethod(make_process, of.build_process))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step(process, optimizer, precision, fake, tmp_path, monkeypatch):
    config = dataclasses.replace(PROCESSES[process], optimizer=optimizer, precision=precision)
    called = []  # there is no graph without a GPU
    monkeypatch.setattr(train, "Replay", lambda: lambda function, *args: (called.append(function), function(*args))[1])
    run = start_run(config, CUDA)

    def backward(loss):
        """The engine of the true one asks the driver."""
        assert loss.device == CUDA and loss.requires_grad
        for weight in run.worker.parameters():
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    t = run.process.random_t(torch.rand(4, device=CUDA))
    x_0, noise = torch.randn(2, 4, 1, 8, 8, device=CUDA)
    monkeypatch.setattr(train, "make_batch", lambda *_: (x_0, torch.arange(4, device=CUDA), t, noise))
    losses, t = learn(run, None, 0)
    with RunLog(tmp_path / "log.csv", config.T, 0, 1, 4, CUDA) as log:
        log.add(losses, t)
        assert log.window.device == CUDA
    assert losses.device == CUDA and losses.dtype == torch.float32 and called == [train.descend]
    for part in (run.model, run.ema):
        assert {weight.device for weight in part.state_dict().values()} == {CUDA}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling(process, sampler, fake, monkeypatch):
    config = dataclasses.replace(PROCESSES[process], sampler=sampler,
                                 eta=0.5 * (sampler == "ddim"))
    model = config.build_model().to(CUDA)

    def noise_source(seed, indices, shape, device, *_):
        return lambda: torch.randn(len(list(indices)), *shape, device=device)

    monkeypatch.setattr(inference, "noise_source", noise_source)  # NumPy's numbers cannot be faked
    *_, x = inference.sample(model, config, torch.arange(4, device=CUDA))
    assert x.device == CUDA and x.shape == (4, 1, 8, 8)


@pytest.mark.parametrize("process", PROCESSES)
def test_schedules_are_gathered_from_where_the_images_are(process):
    diffusion = PROCESSES[process].build_process(torch.device("meta"))
    gathered = [getattr(diffusion, name) for name in SCHEDULES[:6 if process == "learned" else 3]]
    assert {schedule.device.type for schedule in gathered} == {"meta"}
    assert {schedule.dtype for schedule in gathered} == {torch.float32}  # MPS has no float64


def test_latents_are_decoded_where_they_are(fake, monkeypatch):
    vae = VAE(block_out_channels=(8, 16), norm_num_groups=4).to(CUDA)
    monkeypatch.setattr(LatentConfig, "find_vae", lambda config, device: vae)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: np.ones(1))  # a fake tensor has no values to ask about
    config = LatentConfig(**vars(CONFIG) | dict(latent_shape=(4, 8, 8), latent_mean=(0.0,), latent_std=(1.0,),
                                                clamp=False))
    images = config.to_images(torch.randn(3, 4, 8, 8, device=CUDA))
    assert images.device == CUDA and images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    assert vae.encode(torch.randn(2, 3, 8, 8, device=CUDA))[1].device == CUDA


@pytest.mark.parametrize("way", [edit.ways.edit, inpaint, None])
def test_changing_pictures(way, fake, monkeypatch):
    """None: a morph."""
    for module in (inference, edit.draw):
        monkeypatch.setattr(module, "noise_source", lambda seed, indices, shape, device, *_: (
            lambda: torch.randn(len(indices), *shape, device=device)))
    model, picture = CONFIG.build_model().to(CUDA), torch.rand(1, 1, 8, 8, device=CUDA)
    options = {edit.ways.edit: dict(strength=0.5), inpaint: dict(known=picture > 0.5)}
    if way is None:
        edit.draw.add_labels_between(model, 1, 2, 4)
        options = dict(source=functools.partial(edit.draw.morphing_noise, 4, 1))
    else:
        options = dict(way=functools.partial(way, picture=picture, **options[way]))
    *_, x = inference.sample(model, CONFIG, torch.arange(4, device=CUDA), **options)
    assert x.device == CUDA and x.shape == (4, 1, 8, 8)


def test_numbers_for_times_and_labels(fake):
    model = CONFIG.build_model().to(CUDA)
    assert model(torch.randn(2, 1, 8, 8, device=CUDA), 5, 1).device == CUDA


def test_times_to_train_on_have_a_kernel_everywhere():
    """The normal quantile by erfinv, which MPS has, is that of ndtri, which it has not."""
    u = (torch.arange(10_000) + 0.5) / 10_000
    t = CONFIG.build_process().random_t(u)
    exact = (torch.special.ndtri(u.double()).sigmoid() * CONFIG.T).long()
    assert (t - exact).abs().max() <= 1 and (t == exact).float().mean() > 0.999
    assert np.array_equal(np.sort(t), t)


def test_scoring_reads_where_the_classifier_is(fake):
    """Images lie on the CPU; they go to the classifier, and its features stay there."""
    classifier = DigitClassifier().to(CUDA).eval()
    features, probs = embed(classifier, torch.zeros(7, 1, 28, 28, dtype=torch.uint8), batch_size=4)
    assert features.device == probs.device == CUDA and features.shape == (7, 64) and probs.shape == (7, 10)


@pytest.mark.parametrize("before", ["tf32", "none"])
def test_rulers_measure_in_full_precision(before, monkeypatch):
    """Whatever cuDNN is told to round to outside of them, which stays as it was, also after an error."""
    conv, seen = torch.backends.cudnn.conv, []
    images, vae = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), VAE(1, 1, 2, (4, 8), norm_num_groups=4)
    data, digits = Dataset("mnist", images, torch.zeros(2).long(), [*"0123456789"]), DigitClassifier().eval()
    rulers = [lambda: embed(digits, images), lambda: accuracy_on(digits, data),
              lambda: vae.encode(torch.zeros(1, 1, 8, 8)), lambda: reconstruct(vae, images)]
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda module, x: (
        seen.append((conv.fp32_precision, torch.is_grad_enabled())), forward(module, x))[1])
    default = conv.fp32_precision
    try:
        conv.fp32_precision = before
        for ruler in rulers:
            ruler()
            assert {*seen} == {("ieee", False)} and conv.fp32_precision == before and torch.is_grad_enabled()
            seen.clear()
        with pytest.raises(RuntimeError):
            vae.encode(torch.zeros(1, 9, 8, 8))
        assert conv.fp32_precision == before
    finally:
        conv.fp32_precision = default


def test_the_search_for_copies_leaves_the_precision_as_it_was():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert nearest(images, images)[0].tolist() == [0, 0]
    with pytest.raises(RuntimeError):  # these cannot be compared
        nearest(images, images[..., :4])
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("free", "place"), [(2 * 10 * 64, CUDA), (2 * 10 * 64 - 1, torch.device("cpu"))])
def test_data_go_to_a_gpu_that_has_room_for_them(free, place, fake, monkeypatch, capsys):
    """Else each batch does."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    labels, latents = torch.zeros(10).long(), Latents.__new__(Latents)
    images = Dataset("folder", torch.zeros(10, 1, 8, 8, dtype=torch.uint8), labels, ["a"], flips=True)
    vars(latents).update(labels=labels, rows=torch.zeros(10, 2, 2, 2, 2, 2).half(), shape=(2, 2, 2),  # as many bytes
                         mean=torch.zeros(2, 1, 1), std=torch.ones(2, 1, 1))
    for data, name in ((images, "images"), (latents, "rows")):
        data = data.to(CUDA)
        assert data.labels.device == CUDA and getattr(data, name).device == place
        x = data.x_0(torch.arange(4, device=CUDA), slice(1, 4), None)
        assert x.device == CUDA and x.shape == (3, *data.shape)
        assert ("more than half" in capsys.readouterr().err) == (place != CUDA)


def test_moving_digits_need_nothing_from_the_host(fake, monkeypatch):
    """A tensor that is made there and copied would make it wait at every step."""
    data = Moving(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(5, 2).long(), torch.zeros(5, 2),
                  torch.zeros(5).long(), ["a"], (1, 4, 32, 40)).to(CUDA)
    monkeypatch.setattr(torch, "tensor", None)
    x = data.x_0(torch.arange(4, device=CUDA), slice(1, 4), None)
    assert x.device == CUDA and x.shape == (3, 1, 4, 32, 40)


def test_a_vae_fills_no_batch_on_a_gpu(fake):
    """No equal bytes are promised there, and one image would cost as much as 32."""
    sizes, pixels = [], 256 * 256
    for count in (1, 40):
        x = torch.zeros(count, 2, device=CUDA)
        assert in_full_batches(lambda part: (sizes.append(len(part)), part)[1], x, pixels).shape == x.shape
    assert sizes == [1, 32, 8] and LIMITS["cuda"][1] // pixels == 32


# A captured step


class Recording:
    """What there is of CUDA's graphs in `support.graphs`. `launch` runs what it is given, unless a graph is being
    recorded: that one keeps it, and runs it at each replay. seen: what happened, in order. streams: those in use, the
    current one last."""

    def __init__(self, monkeypatch):
        self.graph, self.seen, self.streams, main = None, [], ["main"], self

        class Stream:
            def __init__(self, name="own"):
                self.name = name

            def wait_stream(self, other):
                main.seen.append(f"{self.name} waits for {other.name}")

        class Graph:
            def __init__(self):
                self.kernels = []

            def replay(self):
                main.seen.append("replay")
                for kernel in self.kernels:
                    kernel()

        @contextlib.contextmanager
        def use(stream):
            self.streams.append(stream.name)
            yield
            self.streams.pop()

        @contextlib.contextmanager
        def record(graph, stream):
            self.graph = graph
            with use(stream):
                yield
            self.graph = None

        for name, value in dict(Stream=Stream, stream=use, CUDAGraph=Graph, graph=record,
                                current_stream=lambda: Stream(self.streams[-1])).items():
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, kernel):
        self.graph.kernels.append(kernel) if self.graph else kernel()

    def happened(self):
        self.seen, seen = [], self.seen
        return seen


@pytest.fixture
def recording(monkeypatch):
    return Recording(monkeypatch)


@pytest.fixture
def double(recording):
    """A function for `Replay`: `factor` times x, and what the tensor `run` holds."""
    def double(run, x, factor):
        recording.seen.append(f"{'record' if recording.graph else 'run'} on {recording.streams[-1]}")
        result = torch.empty_like(x)
        recording.launch(lambda: result.copy_(factor * x + run))
        return result

    return double


def test_three_calls_run_and_the_fourth_is_recorded(recording, double):
    """Later ones copy their inputs into those of the graph; the caller's stay as they are."""
    replay, run = Replay(), torch.tensor(100.0)
    inputs = [torch.tensor([i, 10.0 * i]) for i in range(7)]
    for i, x in enumerate(inputs):
        run.fill_(100 * i)  # written in place
        assert replay(double, run, x, 2).tolist() == [102 * i, 120 * i]
        direct = ["own waits for main", "run on own", "main waits for own"]
        assert recording.happened() == (direct if i < 3 else ["record on own", "replay"] if i == 3 else ["replay"])
    assert [x.tolist() for x in inputs] == [[i, 10 * i] for i in range(7)]


def test_each_shape_kind_flag_and_function_has_its_graph(recording, double):
    """The graphs before are good for all that."""
    replay, run, x = Replay(), torch.tensor(0.0), torch.tensor([1.0, 3.0])

    def other(*args):
        return double(*args)

    cases = [(double, x, 2), (double, x[:1], 2), (double, x.half(), 2), (double, x, 5), (other, x, 2)]
    for case, (function, x, factor) in enumerate(cases):
        for i in range(5):
            assert torch.equal(replay(function, run, i * x, factor), factor * i * x), (case, i)
        seen = recording.happened()
        assert [entry.split()[0] for entry in seen if "waits" not in entry] == [*["run"] * 3, "record", *["replay"] * 2]
    for function, x, factor in cases:
        assert torch.equal(replay(function, run, 7 * x, factor), factor * 7 * x)
    assert recording.happened() == ["replay"] * 5
