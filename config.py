"""The settings of a run, what they say, and presets. support/settings.py makes flags of them."""

from support import parallel
from support.commands import UserError
from support.settings import Settings, flag
from support.sizes import LARGEST, as_size, show_divisors, show_size

import dataclasses
import functools
import math

from dataset import TORCHVISION, load_dataset, to_uint8
from diffusion import DDPM, SAMPLERS, RectifiedFlow
from dit import DiT

MIN_SIGNAL = 1e-6  # the clean image is x_t divided by this at the least: float32 has 7 digits


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """All settings of a run on images, and what they say: the data, the network and the process. Raises `UserError`
    when a value has the wrong type or is out of range.

    A wing has a class of its own below this one: more settings, and other answers to the same questions.
    """

    kind = "images"  # what a model of these settings draws; its checkpoint says so
    trained_by, drawn_by = "train.py", "inference.py"
    adamw_betas = (0.9, 0.99)
    input_name = "image_size"  # the setting that says the size of what the network sees
    # The settings that say how to draw, and those that a resumed run may change
    SAMPLING = ("sampler", "sample_steps", "guidance", "eta", "seed", "precision")
    CHANGEABLE = ("steps", "data_dir", "log_every", "sample_every", "checkpoint_every", "sampler", "sample_steps",
                  "guidance", "eta", "compile", "recompute")

    # Data
    dataset: str = flag("mnist", "mnist; folder: one folder per class; or a data set that torchvision downloads",
                        choices=("mnist", "folder", *TORCHVISION))
    data_dir: str = flag("", "folder of the data set; without it this repository, which contains MNIST; for --dataset "
                         "folder: the folder of the classes")
    image_size: tuple = flag((), "height and width of the images, pixels: 28 or 28x20; 0 = as the data set has them", 1,
                             LARGEST, read=as_size)
    channels: int = flag(0, "1 grey, 3 RGB; 0 = as the data set has them", 0, 16)
    ground: str = flag("black", "background of transparent images", choices=("black", "white"))
    # The two without a flag: the data set says them.
    num_classes: int = dataclasses.field(default=0, metadata=dict(low=0, high=100_000))
    classes: tuple = ()  # the name of each class; () = their numbers

    # Model (DiT, arXiv 2212.09748)
    patch_size: tuple = flag((), "height and width of a patch, pixels: 7 or 7x5; 0 = a quarter of the image, which "
                             "makes 16 tokens", 1, LARGEST, read=as_size)
    hidden_size: int = flag(128, "width D of a token; a multiple of 4 and of num_heads", 4, 16384)
    depth: int = flag(4, "number of DiT blocks", 1, 256)
    num_heads: int = flag(4, "attention heads in each block", 1, 256)
    # These two have no flag: a preset or an imported checkpoint says them.
    mlp_ratio: float = dataclasses.field(default=4.0, metadata=dict(low=0.25, high=16))  # MLP's width / hidden_size
    time_spacing: str = dataclasses.field(default="dit", metadata=dict(choices=("dit", "article")))  # see `sinusoids`

    # Diffusion
    T: int = flag(1000, "diffusion steps of the forward process", 2, 100_000)
    process: str = flag("flow", "ddpm: linear betas, the network predicts the noise (2006.11239); flow: a straight "
                        "path, the network predicts the image (2209.03003, 2511.13720)", choices=("ddpm", "flow"))
    beta_start: float = flag(1e-4, "first beta of ddpm", 1e-8, 0.5)
    beta_end: float = flag(0.02, "last beta of ddpm", 1e-8, 0.999)
    shift: float = flag(2.2, "time shift of flow: above 1, more of the T steps have much noise (2403.03206)", 0.01, 100)
    loss: str = flag("l2", "mean squared (l2) or mean absolute (l1) error of the prediction", choices=("l1", "l2"))

    # Training
    steps: int = flag(5000, "optimizer steps", 1, 100_000_000)
    batch_size: int = flag(64, "images per step", 1, 1_000_000)
    optimizer: str = flag("muon", "muon (2502.16982) for the matrices of the blocks and AdamW for the rest; or adamw "
                          "for all", choices=("muon", "adamw"))
    lr: float = flag(4e-3, "peak learning rate", 0, 10)
    lr_decay: str = flag("sqrt", "learning rate after the warm-up: constant, or falling to zero with the steps left "
                         "(linear) or their square root (sqrt)", choices=("constant", "linear", "sqrt"))
    warmup: int = flag(100, "steps of linear warm-up", 0, 1_000_000)
    weight_decay: float = flag(0.0, "decoupled weight decay", 0, 10)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 = no clipping", 0, 1e9)
    ema_decay: float = flag(0.9999, "upper limit of the EMA decay; before it is reached, the average covers about the "
                            "last tenth of the steps", 0, 0.999999)
    label_dropout: float = flag(0.1, "share of labels replaced by the null label, for guidance (2207.12598)", 0, 1)
    precision: str = flag("auto", "number format of the network: fp32; bf16 (in training, a bfloat16 copy of the "
                          "weights computes the gradients); or auto: bf16 if it is faster",
                          choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "compile the network (torch.compile): up to a minute's wait "
                         "first, then shorter steps")
    recompute: bool = flag(False, "recompute each block in the backward pass: less memory, more time")
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

    def check(self):
        """Raises `UserError` unless the settings go together."""
        for name in ("image_size", "patch_size"):
            self.check_size(name, getattr(self, name))
        if not all(type(name) is str for name in self.classes) or len(self.classes) not in (0, self.num_classes):
            raise UserError(f"classes must be the names of {self.num_classes} classes, not {self.classes!r:.80}")
        if self.beta_start > self.beta_end:
            raise UserError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        if self.process == "ddpm" and self.log_signal() < math.log(MIN_SIGNAL):
            raise UserError(f"after T = {self.T} steps with betas up to {self.beta_end} too little of the image is "
                            f"left for a float to hold: lower beta_end, or T")
        if self.sample_steps > self.T:
            raise UserError(f"sample_steps is {self.sample_steps}, but there are only T = {self.T} steps to take")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}")
        size, patch = self.input_shape[1:], self.patch_size
        if size and patch and (len(patch) != len(size) or any(n % p for n, p in zip(size, patch, strict=True))):
            raise UserError(f"patch_size {show_size(patch)} does not divide {self.input_name} {show_size(size)}: "
                            f"choose one of {show_divisors(size)}")

    def log_signal(self):
        """The logarithm of sqrt(alphas_cumprod[T-1]), the share of the image that is left after all steps of ddpm."""
        step = (self.beta_end - self.beta_start) / (self.T - 1)
        return sum(math.log1p(-self.beta_start - i * step) for i in range(self.T)) / 2

    @property
    def input_shape(self):
        """The shape (C, *size) of what the network sees."""
        return (self.channels, *self.image_size)

    @property
    def class_names(self):
        """The name of each class, a tuple of num_classes strings."""
        return self.classes or tuple(map(str, range(self.num_classes)))

    def resolve(self, data):
        """These settings, completed with those that the data decide. Raises `UserError`."""
        config = dataclasses.replace(self, **data.settings, patch_size=())
        size = config.input_shape[1:]
        if not self.patch_size and any(side % 4 for side in size):
            near = show_size([max(1, round(side / 4)) * 4 * image // side
                              for side, image in zip(size, config.image_size, strict=True)])
            raise UserError(f"{config.input_name} {show_size(size)} cannot be cut into 4 x 4 patches: set --patch-size "
                            f"to one of {show_divisors(size)}, or --image-size to {near}")
        return dataclasses.replace(config, patch_size=self.patch_size or tuple(side // 4 for side in size))

    def describe(self, model):
        """The network in a few words."""
        return f"{self.depth} blocks of width {self.hidden_size}, {math.prod(model.grid)} tokens"

    # What the settings say

    def build_model(self):
        """The untrained `DiT`; the sizes must be known."""
        return DiT(**self.network_options())

    def network_options(self):
        """The arguments of `DiT`, a dict."""
        channels, *size = self.input_shape
        return dict(input_size=tuple(size), patch_size=self.patch_size, channels=channels, num_classes=self.num_classes,
                    hidden_size=self.hidden_size, depth=self.depth, num_heads=self.num_heads, mlp_ratio=self.mlp_ratio,
                    time_spacing=self.time_spacing, recompute=self.recompute)

    def build_process(self, device="cpu"):
        """The diffusion process."""
        if self.process == "flow":
            return RectifiedFlow(self.T, self.shift, device)
        return DDPM(self.T, self.beta_start, self.beta_end, device)

    def build_sampler(self, process):
        """The sampler, a function as `diffusion.SAMPLERS` has them."""
        return functools.partial(SAMPLERS[self.sampler], **({"eta": self.eta} if self.sampler == "ddim" else {}))

    def open_data(self, device):
        """The training images, a `Dataset`. Raises `UserError`."""
        with parallel.rank_0_first():  # it may download them
            return load_dataset(self.dataset, self.data_dir, image_size=self.image_size, channels=self.channels,
                                ground=self.ground)

    def ready(self, checkpoint, device):
        """These settings, of the file `checkpoint`, once everything that drawing needs is there. Raises `UserError`."""
        return self

    def drawn_how(self, device):
        """The settings that decide how images look, besides weights and labels: a dict."""
        return {name: getattr(self, name) for name in self.SAMPLING}

    def to_images(self, x):
        """Images uint8 (B, C, H, W) of a state x of `inference.sample`. The one way to see a state."""
        return to_uint8(x)

    def from_images(self, x):
        """Images x (B, C, H, W) in [-1, 1] as the network sees them."""
        return x


PAPER = dict(patch_size=2, batch_size=256, optimizer="adamw", lr=1e-4, lr_decay="constant", warmup=0, ema_decay=0.9999)
PRESETS = {
    "default": {},
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
