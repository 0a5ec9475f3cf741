"""The settings of a run: one frozen dataclass, its presets, and the flags made from its fields."""

from support.commands import UserError, some_path
from support.sizes import LARGEST, as_size, as_sizes, show_divisors, show_size, show_sizes

import argparse
import dataclasses
import difflib
import math
from pathlib import PurePath

SAMPLERS = {}  # the function of each name: diffusion.py fills in its own
TORCHVISION = {  # data sets that torchvision reads and downloads, and what shows that a folder holds one
    "FashionMNIST": "FashionMNIST/raw", "KMNIST": "KMNIST/raw", "EMNIST": "EMNIST/raw",
    "CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python", "SVHN": "train_32x32.mat"}
MIN_SIGNAL = 1e-6  # the clean image is x_t divided by this at the least: float32 has 7 digits


def flag(default, help, low=None, high=None, choices=None):
    """A field of `Config` that is also a command-line flag; `low` and `high` are inclusive bounds."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Raises `UserError` when a value has the wrong type or is out of range."""

    # Data
    dataset: str = flag("mnist", "mnist, sprites (64x64, in colour: 9 actions), folder (one folder per class); moving "
                        "(clips of MNIST's digits), clips (one folder per class, of GIFs or folders of frames); or a "
                        "data set that torchvision downloads",
                        choices=("mnist", "sprites", "folder", "moving", "clips", *TORCHVISION))
    data_dir: str = flag("", "the folder that holds (or gets) the data set; for --dataset folder and clips, the folder "
                         "of classes; none = the code's own folder, with which MNIST and the sprites come")
    digits: int = flag(1, "of --dataset moving: 1 digit in each clip; or 2, of which half of the clips have one", 1, 2)
    speeds: bool = flag(False, "of --dataset moving: the labels say also whether it is slow or fast")
    image_size: tuple = flag((), "height and width of the images, pixels: 28 or 28x20; of clips also the frames: "
                             "16x32x32; 0 = as the data set has them", 1, LARGEST)
    sizes: tuple = flag((), "of clips: more sizes to learn, such as 1x32x32,16x32x64: each batch has one of these or "
                        "image_size", 1, 1024)
    channels: int = flag(0, "1 grey, 3 RGB; 0 = as the data set has them", 0, 16)
    ground: str = flag("black", "what transparent images of your own are laid on", choices=("black", "white"))
    # The two without a flag: the data set says them.
    num_classes: int = dataclasses.field(default=0, metadata=dict(low=0, high=100_000))
    classes: tuple = ()  # the name of each class; () = their numbers
    flips: bool = flag(False, "mirror half of the images, left to right: for photographs in folders")
    vae: str = flag("", "learn the latents that this VAE makes of the images (2112.10752): a folder that "
                    "latent.train_vae or diffusers wrote, or a name on the Hugging Face hub, such as sd-vae-ft-ema")
    # Nor have these: the VAE says them.
    vae_hash: str = ""        # `fingerprint` of the VAE; "" = not known
    latent_shape: tuple = ()  # (C, *size) of an image's latents
    latent_mean: tuple = ()   # the latents are normalized to (z - latent_mean) / latent_std: one number, or one for
    latent_std: tuple = ()    # each channel

    # Model (DiT, arXiv 2212.09748)
    patch_size: tuple = flag((), "height and width of a patch, pixels: 7 or 7x5; of clips also the frames: 2x8x8; 0 "
                             "= a quarter of the image, which makes 16 tokens, and of its frames", 1, 1024)
    hidden_size: int = flag(128, "width D of a token; a multiple of 4 and of num_heads", 4, 16384)
    depth: int = flag(4, "number of DiT blocks", 1, 256)
    num_heads: int = flag(4, "attention heads in each block", 1, 256)
    mlp_ratio: float = flag(4.0, "width of a block's MLP, as a multiple of hidden_size", 0.25, 16)
    time_spacing: str = flag("dit", "the frequencies that embed the time: as DiT's official code spaces them, or as "
                             "the article does", choices=("dit", "article"))
    # Without a flag, for official weights: the MLP's GELU, exact (none) or by its tanh formula
    gelu: str = dataclasses.field(default="none", metadata=dict(choices=("none", "tanh")))
    rope: bool = flag(False, "rotary positions (2104.09864) as well: attention sees how far apart two patches are")

    # Diffusion
    T: int = flag(1000, "diffusion steps of the forward process", 2, 100_000)
    process: str = flag("flow", "ddpm: linear betas, the network predicts the noise (2006.11239); flow: a straight "
                        "path, the network predicts the image (2209.03003, 2511.13720); sit: that path as SiT's code "
                        "has it, the network predicts the velocity (2401.08740)",
                        choices=("ddpm", "flow", "sit"))
    beta_start: float = flag(1e-4, "first beta of ddpm", 1e-8, 0.5)
    beta_end: float = flag(0.02, "last beta of ddpm", 1e-8, 0.999)
    variance: str = flag("fixed", "of a step of the ddpm sampler: fixed; or learned (2102.09672), for which the "
                         "network of process ddpm predicts it beside the noise", choices=("fixed", "learned"))
    shift: float = flag(2.2, "of flow: above 1, more of the T steps lie where there is much noise (2403.03206)",
                        0.01, 100)
    loss: str = flag("l2", "mean squared (l2) or mean absolute (l1) error of the prediction", choices=("l1", "l2"))

    # Training
    steps: int = flag(5000, "optimizer steps", 1, 100_000_000)
    batch_size: int = flag(64, "images per step", 1, 1_000_000)
    optimizer: str = flag("muon", "muon: for the matrices within the blocks (2502.16982), and AdamW for all else; or "
                          "adamw alone", choices=("muon", "adamw"))
    lr: float = flag(4e-3, "peak learning rate", 0, 10)
    lr_decay: str = flag("sqrt", "after the warm-up the learning rate stays constant, or falls to zero at the last "
                         "step, with the steps left (linear) or their square root (sqrt)",
                         choices=("constant", "linear", "sqrt"))
    warmup: int = flag(100, "steps of linear warm-up", 0, 1_000_000)
    weight_decay: float = flag(0.0, "decoupled weight decay", 0, 10)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 = no clipping", 0, 1e9)
    ema_decay: float = flag(0.9999, "largest decay per step of the averaged weights, which draw every sample; until "
                            "it is reached, they are about those of the last tenth of the steps so far", 0, 0.999999)
    given: float = flag(0.0, "of clips: share of which some frames are given, as they are, to learn the others from: "
                        "for inference.py --extend and its like", 0, 1)
    label_dropout: float = flag(0.1, "share of labels replaced by the null label, for guidance (2207.12598)", 0, 1)
    precision: str = flag("auto", "what the network computes in: fp32; bf16 (in training, a bfloat16 copy of the "
                          "weights computes the gradients); or auto: bf16 where it is the quicker",
                          choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "compile the network (torch.compile; CUDA graphs on GPUs): up to a minute's wait the "
                         "first time, then shorter steps")
    recompute: bool = flag(False, "recompute each block in the backward pass: less memory, more time")
    shard: bool = flag(False, "under torchrun, split the weights, their average and the optimizer's state among the "
                       "processes (FSDP2), for networks that are too large for one")
    seed: int = flag(0, "seed of everything random", 0, 2**63 - 1)
    log_every: int = flag(50, "steps between two rows of log.csv", 1, 100_000_000)
    sample_every: int = flag(1000, "steps between two sample grids", 1, 100_000_000)
    checkpoint_every: int = flag(1000, "steps between two checkpoints", 1, 100_000_000)

    # Sampling
    sampler: str = flag("dpm", "how noise becomes an image", choices=SAMPLERS)
    sample_steps: int = flag(6, "denoising steps of one sample, at most T", 1, 100_000)
    guidance: float = flag(1.4, "classifier-free guidance scale: 0 unconditional, 1 conditional, above 1 sharper",
                           -100, 100)
    eta: float = flag(0.0, "noise of the ddim sampler: 0 none, 1 as much as ddpm", 0, 1)
    spacing: str = flag("trailing", "which of the T steps are taken: trailing, evenly spaced from the last one on "
                        "(2305.08891); or linspace, evenly from the last to the first, as DiT's official code does",
                        choices=("trailing", "linspace"))
    guided_channels: int = flag(0, "so many channels, the first ones, are guided, and the others follow the label "
                                "as at guidance 1; 0 = all. DiT's official code guides 3 of its 4", 0, 1024)
    clamp: bool = flag(True, "clamp each predicted clean image to the range of pixels, which latents do not have")

    def __post_init__(self):
        for name, read in {**SIZES, "data_dir": as_name, "vae": as_name}.items():
            object.__setattr__(self, name, read(getattr(self, name)))
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if not all(type(name) is str for name in self.classes) or len(self.classes) not in (0, self.num_classes):
            raise UserError(f"classes must be the names of {self.num_classes} classes, not {self.classes!r:.80}")
        self.check_latents()
        if self.sizes and (self.latent_shape or {len(size) for size in (*self.sizes, self.image_size)} - {0, 3}):
            raise UserError(f"sizes are {show_sizes(self.sizes)}, but only clips of pixels have several, each frames x "
                            "height x width")
        if self.variance == "learned" and self.process != "ddpm":
            raise UserError(f"variance is learned for process ddpm alone, not for {self.process}")
        if self.given and (self.variance == "learned" or len(self.image_size) == 2):
            raise UserError("frames are given of clips alone, and the variance is then fixed: leave --given out")
        if self.beta_start > self.beta_end:
            raise UserError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        if self.process == "ddpm" and self.log_signal() < math.log(MIN_SIGNAL):
            raise UserError(f"after T = {self.T} steps with betas up to {self.beta_end} too little of the image is "
                            f"left for a float to hold: lower beta_end, or T")
        if self.sample_steps > self.T:
            raise UserError(f"sample_steps is {self.sample_steps}, but there are only T = {self.T} steps to take")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}")
        if self.rope and self.hidden_size // self.num_heads % 2:
            raise UserError(f"rope turns pairs of channels, but a head has {self.hidden_size // self.num_heads}: set "
                            "hidden_size or num_heads, or --no-rope")
        if self.image_size and self.patch_size:
            self.check_patches("latent_shape" if self.latent_shape else "image_size", self.input_shape[1:])

    def check_latents(self):
        """Raises `UserError` unless what is said of latents belongs together."""
        if not self.latent_shape and not (self.vae_hash or self.latent_mean or self.latent_std):
            return
        C, *size = self.latent_shape or (0,)
        if not size or not all(type(n) is int and 1 <= n <= 1024 for n in self.latent_shape):
            raise UserError(f"latent_shape is {self.latent_shape!r:.80}, but must be channels, height and width")
        for name, numbers in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if len(numbers) not in (1, C) or not all(type(n) is float and math.isfinite(n) for n in numbers) or (
                    name == "latent_std" and min(numbers) <= 0):
                raise UserError(f"{name} is {numbers!r:.80}, but must be one number, or one for each of {C} channels")
        if self.clamp:
            raise UserError("clamp is for pixels, and latents have no bounds: --no-clamp")

    def check_patches(self, name, size):
        """Raises `UserError` unless patches divide the `size` of what the network sees, which is the setting `name`."""
        if len(self.patch_size) != len(size) or any(
                side % part for side, part in zip(size, self.patch_size, strict=True)):
            raise UserError(f"patch_size {show_size(self.patch_size)} does not divide {name} {show_size(size)}: choose "
                            f"one of {show_divisors(size)}")

    def log_signal(self):
        """The logarithm of sqrt(alphas_cumprod[T-1]), the share of the image that is left after all steps of ddpm."""
        step = (self.beta_end - self.beta_start) / (self.T - 1)
        return sum(math.log1p(-self.beta_start - i * step) for i in range(self.T)) / 2

    @property
    def input_shape(self):
        """The shape (C, *size) of what the network sees: of latents, or of the images themselves."""
        return self.latent_shape or (self.channels, *self.image_size)

    @property
    def largest(self):
        """The largest number along each axis of all the sizes that the network sees."""
        return tuple(map(max, zip(self.input_shape[1:], *self.sizes, strict=True)))

    @property
    def output_channels(self):
        """What the network predicts for each position: the noise or the image, and perhaps the variance."""
        return self.input_shape[0] * (2 if self.variance == "learned" else 1)

    @property
    def class_names(self):
        """The name of each class, a tuple of num_classes strings."""
        return self.classes or tuple(map(str, range(self.num_classes)))


def check_eta(config, given):
    """Raises `UserError` when the user has given an eta, in the dict `given`, that this `Config` has no use for."""
    if given.get("eta") and config.sampler != "ddim":
        raise UserError(f"--eta is the noise of the ddim sampler, but this draws with {config.sampler}: "
                        "add --sampler ddim, or leave --eta out")


PAPER = dict(patch_size=2, batch_size=256, optimizer="adamw", lr=1e-4, lr_decay="constant", warmup=0, ema_decay=0.9999)
PRESETS = {
    "default": {},
    # Clips of a moving digit: more noise, since 16 frames tell more of it than one
    "moving": dict(dataset="moving", patch_size="2x8x8", depth=6, rope=True, shift=9.0, batch_size=32, given=0.3,
                   sample_steps=8, guidance=2.0),
    # As large as the standard benchmark's (1502.04681), with one or two digits: for a GPU.
    "moving-64": dict(dataset="moving", image_size="20x64x64", digits=2, patch_size="4x8x8", hidden_size=384, depth=12,
                      num_heads=6, rope=True, shift=9.0, given=0.3, sample_steps=16, guidance=2.0, steps=20_000,
                      lr=2e-3),
    # The article's own settings; the sampler takes all T steps, without guidance.
    "article": dict(patch_size=4, hidden_size=64, depth=3, num_heads=4, process="ddpm", loss="l1", batch_size=300,
                    optimizer="adamw", lr=1e-3, steps=100_000, sampler="ddpm", sample_steps=1000, guidance=1.0,
                    time_spacing="article"),
    # The sizes of the DiT paper (2212.09748, table 1) at its patch of 2, and its optimizer.
    "S": dict(hidden_size=384, depth=12, num_heads=6) | PAPER,
    "B": dict(hidden_size=768, depth=12, num_heads=12) | PAPER,
    "L": dict(hidden_size=1024, depth=24, num_heads=16) | PAPER,
    "XL": dict(hidden_size=1152, depth=28, num_heads=16) | PAPER,
}

# The fields that say how to draw
SAMPLING = ("sampler", "sample_steps", "guidance", "eta", "spacing", "guided_channels", "clamp", "seed", "precision")


def as_name(value):
    """A `Path` as the string that it stands for; what is none stays as it is."""
    return str(value) if isinstance(value, PurePath) else value


def check_names(given, known):
    """Raises `UserError` when `given` (a dict, or names) holds a setting that is not among the names `known`."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise UserError(f"{name!r:.50} is no setting here" + (f": is {near[0]!r} meant?" if near else
                                                                  f"; there are {', '.join(known)}"))


# The fields that hold sizes, and how they are read
SIZES = {"image_size": as_size, "patch_size": as_size, "sizes": as_sizes}


def check_value(field, value):
    """Raises `UserError` unless `value` has the type of `field` and lies within its bounds or choices."""
    rule = field.metadata
    if type(value) is not field.type and not (field.type is float and type(value) is int):
        raise UserError(f"{field.name} must be of type {field.type.__name__}, not {value!r:.80}")
    if rule.get("choices") and value not in rule["choices"]:
        raise UserError(f"{field.name} is {value!r:.80}, but must be one of {', '.join(rule['choices'])}")
    if field.name in SIZES:
        sizes = value if field.name == "sizes" else [value] if value else []
        if not all(type(size) is tuple and len(size) in (2, 3) and all(
                type(side) is int and rule["low"] <= side <= rule["high"] for side in size) for size in sizes):
            raise UserError(f"{field.name} is {value!r:.80}, but must be height and width, such as 28x20, or of clips "
                            f"frames, height and width, such as 16x32x32, each between {rule['low']} and "
                            f"{rule['high']}")
        return
    if field.type in (str, bool, tuple):
        return
    if not rule["low"] <= value <= rule["high"]:  # NaN lies nowhere
        raise UserError(f"{field.name} is {value!r:.80}, but must lie between {rule['low']} and {rule['high']}")


def add_flags(parser, names=None, of=Config):
    """Adds a flag to `parser` for each field of a class such as `Config`, or for those in `names`. The flags have no
    default: the namespace holds only what the user gave."""
    for field in dataclasses.fields(of):
        rule = field.metadata
        if "help" in rule and (names is None or field.name in names):
            kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(
                type={**SIZES, "data_dir": some_path}.get(field.name, field.type), choices=rule["choices"],
                metavar=None if rule["choices"] else "HxW" if field.name in SIZES else field.type.__name__)
            default = 0 if field.name in SIZES else "none" if field.default == "" else field.default
            functions = rule["choices"].items() if isinstance(rule["choices"], dict) else ()
            each = "".join(f"; {name}: {(of.__doc__ or '').split(':')[0]}" for name, of in functions)
            parser.add_argument("--" + field.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                                help=f"{rule['help']}{each} (default: {default})")


def given_flags(args, of=Config):
    """The fields of a class such as `Config` that the user set on the command line, as a dict."""
    names = {field.name for field in dataclasses.fields(of)}
    return {name: value for name, value in vars(args).items() if name in names}
