"""The settings of a run on clips: those of `LatentConfig`, and those that only clips have."""

from support.commands import UserError
from support.settings import flag
from support.sizes import LARGEST, as_size, as_sizes, show_size

import dataclasses

from config import Config
from latent.config import LatentConfig
from video.dit import ClipDiT


@dataclasses.dataclass(frozen=True)
class ClipConfig(LatentConfig):
    """All settings of a run of `video.train_dit`; see `Config`."""

    kind = "clips"
    trained_by, drawn_by = "-m video.train_dit", "-m video.draw"
    axes, size_words = (3,), "frames, height and width, such as 16x32x32"

    # Data
    dataset: str = flag("moving", "moving (MNIST's digits move and bounce), sprites, or clips: one folder per class, "
                        "of GIFs or folders of frames", choices=("moving", "sprites", "clips"))
    image_size: tuple = flag((), "frames, height and width of the clips: 16x32x32; 0 = as the data set has them", 1,
                             LARGEST, read=as_size)
    digits: int = flag(1, "digits per clip of --dataset moving: 1, or 2 (half of the clips then still show one)", 1, 2)
    speeds: bool = flag(False, "the labels of --dataset moving also say slow or fast")
    sizes: tuple = flag((), "more sizes to learn, such as 1x32x32,16x32x64: each batch has one of these or image_size",
                        1, LARGEST, read=as_sizes)

    # Model
    patch_size: tuple = flag((), "frames, height and width of a patch: 2x8x8; 0 = a quarter of each", 1, LARGEST,
                             read=as_size)
    rope: bool = flag(False, "rotary positions (2104.09864) as well: attention sees how far apart two patches are")
    qk_norm: bool = flag(False, "normalise the queries and keys of attention (2302.05442)")

    # Training
    motion: float = flag(0.0, "weight of the error's change from frame to frame in the loss, for even motion", 0, 1000)
    given: float = flag(0.0, "share of clips in which some frames are shown clean (needed for --extend)", 0, 1)

    def check(self):
        super().check()
        for size in self.sizes if type(self.sizes) is tuple else [self.sizes]:
            self.check_size("sizes", size)
        if self.sizes and self.latent_shape:
            sizes = ", ".join(map(show_size, self.sizes))
            raise UserError(f"sizes are {sizes}, but only clips of pixels can have several sizes")
        if self.sizes and self.patch_size and self.image_size and any(
                n % p for n, p in zip(self.largest, self.patch_size, strict=True)):
            raise UserError(f"patch_size {show_size(self.patch_size)} does not divide {show_size(self.largest)}, the "
                            "largest of the sizes along each axis")
        if (self.given or self.motion) and self.variance == "learned":
            raise UserError("--given and --motion need a fixed variance: leave them or --variance out")
        if self.rope and self.hidden_size // self.num_heads % 2:
            raise UserError(f"rope turns pairs of channels, but a head has {self.hidden_size // self.num_heads}: set "
                            "hidden_size or num_heads, or --no-rope")

    @property
    def largest(self):
        """The largest frames, height and width of all the sizes that the network sees."""
        return tuple(map(max, zip(self.input_shape[1:], *self.sizes, strict=True)))

    def network_options(self):
        return super().network_options() | dict(input_size=self.largest)

    def build_model(self):
        return ClipDiT(**self.network_options(), rope=self.rope, qk_norm=self.qk_norm)

    def resolve(self, data):
        config = super().resolve(data)
        for size in config.sizes:
            data.at(size)  # or it says that it cannot
        return config

    def open_data(self, device):
        """The clips. Raises `UserError`."""
        from video.clips import CLIPS

        return CLIPS[self.dataset](self, device)


# The shift makes more noise: 16 frames show more of a digit than one does.
MOVING = dict(dataset="moving", patch_size="2x8x8", depth=6, rope=True, shift=9.0, batch_size=32, given=0.3,
              sample_steps=8, guidance=2.0)
PRESETS = {
    "default": {},
    "moving": MOVING,
    # weights/moving.pth was made with these; see README.md.
    "moving-large": MOVING | dict(hidden_size=256, batch_size=64, lr=3e-3, qk_norm=True, motion=2.0),
    # Clips as large as the standard benchmark's (1502.04681), with one or two digits: for a GPU
    "moving-64": MOVING | dict(image_size="20x64x64", digits=2, patch_size="4x8x8", hidden_size=384, depth=12,
                               num_heads=6, batch_size=64, steps=20_000, lr=2e-3, sample_steps=16),
}
# The kinds of models that a command takes which is for images and clips
ANY = (Config, LatentConfig, ClipConfig)
