"""A small network that reads MNIST digits: its features are the ruler of `measure.score`.

    python -m measure.classifier --data-dir .    trains it anew, a minute or two on two CPU cores

The weights are kept in the repository (float16, half a megabyte), so that scoring needs no download.
"""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.files import check_file, write_atomically

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import Config
from dataset import load_dataset, to_float

WEIGHTS = Path(__file__).parent.parent / "weights" / "digit_classifier.pth"
FORMAT = "digit-classifier-1"


def conv(in_channels, out_channels, kernel_size):
    """Convolution, halved by taking maxima, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
                         nn.MaxPool2d(2), nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitClassifier(nn.Module):
    """Reads images float (B, 1, size, size) in [-1, 1]; the shapes below are those of MNIST."""

    def __init__(self, size=28):
        super().__init__()
        self.size = size
        self.body = nn.Sequential(
            conv(1, 32, 5),                                                              # (B, 32, 14, 14)
            conv(32, 64, 3),                                                             # (B, 64, 7, 7)
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(),                             # not averaged over the image: it counts where a stroke is
            nn.Linear(64 * (size // 4) ** 2, 64, bias=False), nn.BatchNorm1d(64),        # (B, 64)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 10))
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def features(self, x):
        """(B, 64), as they are before the ReLU: nearer to a Gaussian, which the Fréchet distance takes them for, and
        they keep more of what differs within a class."""
        return self.body(x)

    def forward(self, x):
        """The logits (B, 10)."""
        return self.head(self.features(x))


def augment(x, generator):
    """Images (B, 1, H, W), each turned by up to 10 degrees, scaled by up to 10 % and shifted by up to a 14th of
    its side: 2 pixels of MNIST's 28."""
    turn, scale, shift_x, shift_y = torch.rand(4, len(x), generator=generator).to(x.device) * 2 - 1  # each (B,)
    angle, scale, shift = turn * torch.pi / 18, 1 + scale / 10, 2 / 14  # the image reaches from -1 to 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, shift_x * shift, sin, cos, shift_y * shift], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(images, labels, epochs=5, batch_size=256, lr=5e-3, seed=0, device="cpu"):
    """A `DigitClassifier` trained on images uint8 (N, 1, size, size) and labels (N,), its weights as of float16."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    classifier = DigitClassifier(images.shape[-1]).to(device)
    batches = len(images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    with tqdm(total=epochs * batches, desc="training the classifier", leave=False, disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator).to(device)
            for index in order[:batches * batch_size].view(batches, batch_size):
                x = augment(to_float(images[index]), generator)
                loss = F.cross_entropy(classifier(x), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.half().float().eval()  # what is measured now is what the file will hold


def load_classifier(dataset_name="mnist", path=WEIGHTS, device="cpu"):
    """The trained classifier. Raises `UserError` when the file is missing, damaged, or reads another data set."""
    retrain = "fetch it anew, or train it with python -m measure.classifier"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no classifier {path}: {retrain}") from None
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        raise UserError(f"{path} is not a digit classifier, or is cut short ({type(error).__name__}): "
                        f"{retrain}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a digit classifier (no format {FORMAT!r} in it): {retrain}")
    if content.get("dataset") != dataset_name:
        raise UserError(f"{path} reads {content.get('dataset')!r:.40}, not {dataset_name!r:.40}: its features mean "
                        f"nothing there")
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(content["state_dict"])
    except Exception as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]:.100}): {retrain}") from None
    return classifier.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # twice as fast


def main():
    parser = Parser(description="Trains the classifier of MNIST digits that measure.score uses.")
    parser.add_argument("--data-dir", type=some_path, default=".",
                        help="the folder that holds (or gets) MNIST/ (default: .)")
    parser.add_argument("--out", type=some_path, default=WEIGHTS,
                        help="the file to write (default: weights/digit_classifier.pth)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    add_device_flag(parser)
    args = parser.parse_args()
    check_file(args.out)
    Config(seed=args.seed)  # it knows which seeds there are
    device = pick_device(args.device)
    train, test = (load_dataset("mnist", args.data_dir, train=part) for part in (True, False))
    classifier = train_classifier(train.images, train.labels, seed=args.seed, device=device)
    with torch.inference_mode():
        reads = [classifier(to_float(x.to(device))).argmax(1).cpu() for x in test.images.split(1000)]
    accuracy = (torch.cat(reads) == test.labels).float().mean().item()
    state = {name: tensor.half().cpu() if tensor.is_floating_point() else tensor.cpu()
             for name, tensor in classifier.state_dict().items()}
    content = {"format": FORMAT, "dataset": "mnist", "test_accuracy": accuracy, "state_dict": state}
    write_atomically(args.out, lambda file: torch.save(content, file))
    print(f"{args.out}: reads {accuracy:.2%} of the test images right, {os.path.getsize(args.out) / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main, memory="what else needs memory here", alone=True)
