"""How good are fake digits? Measured with a network that reads digits (`measure/classifier.py`), not photographs.

    python -m measure.score --checkpoint run     draws digits and scores them
    python -m measure.score --images images/fake   scores those that generator.py has drawn

Every figure stands beside the same figure of real images, which is what perfect fakes would get.
"""

from support.commands import UserError, pick_device, run, some_path
from support.files import make_dir
from support.pictures import check_picture, grid, save_picture

import argparse
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from tqdm import tqdm

from config import given_flags
from dataset import list_images, load_dataset, read_image, to_float
from fid_computer import frechet_distance, statistics
from inference import batch_that_fits, generate, load_for_sampling, sampling_parser, to_images
from measure.classifier import load_classifier, train_classifier

FEW = 2000  # below this many images, a figure says more about the sample than about the model
K_RECALL, K_COVERAGE = 3, 5  # nearest neighbours, as in 1904.06991 and in 2002.09797
METRICS = ("frechet", "precision", "recall", "density", "coverage")
JUDGED = {(1, 28, 28): "mnist", (1, 8, 8): "digits"}  # images that can be scored: the data set that they belong to


@torch.inference_mode()
def embed(classifier, images, batch_size=250):
    """Images uint8 (N, 1, H, W) -> their features (N, 64) and the probability of each digit (N, 10), on the
    classifier's device."""
    size = classifier.size
    if images.dtype != torch.uint8 or images.shape[1:] != (1, size, size):
        raise UserError(f"the digit classifier reads grey images of {size} x {size} pixels, uint8 (N, 1, {size}, "
                        f"{size}), not {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}")
    device = next(classifier.parameters()).device
    features = [classifier.features(to_float(batch.to(device))) for batch in images.split(batch_size)]
    probs = [classifier.head(batch).softmax(dim=1) for batch in features]
    return torch.cat(features), torch.cat(probs)


def compare(fake, real, around_real=None):
    """Fréchet distance (1706.08500), precision and recall (1904.06991), density and coverage (2002.09797) of features
    `fake` (N, D) against `real` (M, D): a dict of floats, all NaN where either are too few to have k neighbours.

    A ball around each real reaches to its k-th nearest real. Precision is the share of fakes in any such ball, and
    recall the share of reals in any ball drawn in the same way around the fakes (k = 3). Density is how many balls of
    reals a fake is in, over k: about 1, more where fakes crowd. Coverage is the share of them that hold a fake (k = 5).

    around_real: `neighbour_distances` of `real`, where they are known already.
    """
    if min(len(fake), len(real)) <= K_COVERAGE:
        return dict.fromkeys(METRICS, float("nan"))
    fake_radius = neighbour_distances(fake)[:, K_RECALL]
    around_real = neighbour_distances(real) if around_real is None else around_real
    narrow, wide = around_real[:, [K_RECALL, K_COVERAGE]].T
    precise, density, recall, coverage = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), 0, 0, 0
    for rows, distances in distance_blocks(real, fake):
        precise |= (distances <= narrow[rows, None]).any(dim=0)
        recall += (distances <= fake_radius).any(dim=1).sum().item() / len(real)
        inside = distances <= wide[rows, None]
        density += inside.sum().item() / (K_COVERAGE * len(fake))
        coverage += inside.any(dim=1).sum().item() / len(real)
    frechet = frechet_distance(*statistics(fake.cpu()), *statistics(real.cpu()))
    return dict(zip(METRICS, (frechet, precise.float().mean().item(), recall, density, coverage), strict=True))


def distance_blocks(a, b, size=1000):
    """Yields (rows, the distances (size, M) of a[rows] to all of b), for a (N, D) and b (M, D), in bounded memory."""
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        # The faster way, by a matrix product, would leave equal points at a distance above 0.
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(features):
    """Distances of features (N, D) to their nearest, ascending (N, K_COVERAGE + 1): column k is the k-th neighbour's,
    column 0 the point's own."""
    return torch.cat([distances.topk(K_COVERAGE + 1, largest=False).values
                      for _, distances in distance_blocks(features, features)])


def nearest(images, train_images, size=500, device="cpu"):
    """The training image nearest to each of `images` (N, 1, H, W), by L2 over pixels in [0, 1]: distances and indices,
    both (N,), found on `device`."""
    train = train_images.flatten(1).to(device).float()
    half_square = train.square().sum(dim=1) / 2
    distances, indices = [], []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # as bfloat16 where that is quicker, which holds 0..255 exactly
    for batch in images.flatten(1).split(size):
        batch = batch.to(device).float()
        # |a - b|^2 / 2 without |a|^2 / 2, which changes no minimum. It only finds b: its rounding would hide a copy.
        index = torch.addmm(half_square, batch, train.T, alpha=-1).argmin(dim=1)
        distances.append((batch - train[index]).norm(dim=1) / 255)
        indices.append(index)
    torch.set_float32_matmul_precision(precision)
    return torch.cat(distances), torch.cat(indices)


def pick_reference(labels, real_labels, count, generator):
    """Indices of `count` real images, picked at random. If `labels` were asked for in like numbers, there are as many
    of each.

    MNIST's classes differ in size (9 to 11 %): held against them, perfect fakes that are equally many of each digit
    would be at twice the distance of a random draw. But a class that is missing must not be missed here as well.
    """
    order = torch.randperm(len(real_labels), generator=generator)
    if labels is not None:
        counts = labels.bincount(minlength=10)
        if counts.max() <= 2 * counts.min() and (counts <= real_labels.bincount(minlength=10)).all():
            return torch.cat([order[real_labels[order] == digit][:counts[digit]] for digit in range(10)])
    return order[:count]


def share(which):
    """The share of True among booleans (N,); NaN of none."""
    return which.float().mean().item()


class Judge:
    """Real digits, and a network that reads them, for fakes to be held against.

    train, test: the real ones, each a `Dataset`. classifier: a `DigitClassifier`; all is computed on its device.
    """

    def __init__(self, train, test, classifier):
        self.train, self.test, self.classifier = train, test, classifier
        self.device = next(classifier.parameters()).device
        self.test_features, self.test_reads = self.read(test.images)
        self.test_labels = test.labels.to(self.device)
        self.around_test = neighbour_distances(self.test_features)

    def read(self, images):
        """The features (N, 64) of images uint8 (N, 1, H, W), and what they are read as, int64 (N,)."""
        features, probs = embed(self.classifier, images)
        return features, probs.argmax(dim=1)

    def compare(self, features):
        """`compare` with all test images."""
        return compare(features, self.test_features, self.around_test)

    def brief(self, fakes, labels):
        """The quick ones among the figures of `score`: METRICS and accuracy."""
        features, reads = self.read(fakes)
        return self.compare(features) | {"accuracy": share(reads == labels.to(self.device))}

    def brief_real(self, labels, seed=0):
        """The same of real images, training images in the place of fakes that were asked to show `labels`."""
        picked = pick_reference(labels, self.train.labels, len(labels), torch.Generator().manual_seed(seed))
        features, _ = self.read(self.train.images[picked])
        return self.compare(features) | {"accuracy": share(self.test_reads == self.test_labels)}

    def find_copies(self, fakes, fake_reads):
        """The distance of each fake to the nearest training image, and whether it is nearer than 99 % of the test
        images that are read alike; then both of the test images."""
        distances, _ = nearest(torch.cat([fakes, self.test.images]), self.train.images, device=self.device)
        fake_near, test_near = distances.split([len(fakes), len(self.test.images)])
        # A limit for each digit: the simple stroke of a 1 is always near another.
        limits = torch.stack([test_near[self.test_reads == digit].quantile(0.01) for digit in range(10)])
        return fake_near, fake_near < limits[fake_reads], test_near, test_near < limits[self.test_reads]

    def score(self, fakes, labels, seed=0):
        """All figures of `fakes` uint8 (N, 1, H, W) that were asked to show `labels` int64 (N,), None where not known.

        Returns a dict of plain values (NaN: cannot be known), where "fake" and "real" are each a dict of
            METRICS   of `compare`, against the test images; real: of as many training images in the fakes' place
            accuracy  share read as what was asked for; real: of the test images, as are the next two
            nearest   median distance to the nearest training image
            copies    share that is nearer to one than 99 % of the test images read alike: 0.01 by definition for those,
                      1 for copies, while images a little smoother than real ones may reach 0.03
        and beside these are "count" (of fakes), "reference" (of training images in their place), "ratio" (fake over
        real Fréchet distance) and "classes", a list of the same for each digit; fakes without labels count as what they
        are read as.
        """
        if len(fakes) <= K_COVERAGE:
            raise UserError(f"{len(fakes)} images are too few to score: draw {FEW:,} or more")
        if labels is not None and (len(labels) != len(fakes) or labels.min() < 0 or labels.max() > 9):
            raise UserError(f"the {len(fakes):,} images need as many labels, each a digit from 0 to 9")
        picked = pick_reference(labels, self.train.labels, len(fakes), torch.Generator().manual_seed(seed))
        fake, fake_reads = self.read(fakes)
        train, _ = self.read(self.train.images[picked])
        asked = fake_reads if labels is None else labels.to(self.device)
        fake_right = (fake_reads == asked) if labels is not None else torch.full((len(fake),), float("nan"))
        test_right = self.test_reads == self.test_labels

        fake_near, fake_copies, test_near, test_copies = self.find_copies(fakes, fake_reads)

        def figures(compare, of_fake, of_train, of_test):
            result = {"count": int(of_fake.sum()), "reference": int(of_train.sum()),
                      "fake": compare(fake[of_fake]), "real": compare(train[of_train])}
            for part, of, right, near, copies in (("fake", of_fake, fake_right, fake_near, fake_copies),
                                                  ("real", of_test, test_right, test_near, test_copies)):
                result[part] |= {"accuracy": share(right[of]), "nearest": near[of].cpu().nanmedian().item(),
                                 "copies": share(copies[of])}
            return result | {"ratio": result["fake"]["frechet"] / result["real"]["frechet"]}

        def of_digit(digit):
            of_test = self.test_labels == digit
            return figures(lambda features: compare(features, self.test_features[of_test]), asked == digit,
                           self.train.labels[picked].to(self.device) == digit, of_test)

        everything = [torch.ones(len(some), dtype=torch.bool, device=self.device) for some in (fake, train, test_right)]
        return figures(self.compare, *everything) | {"classes": [of_digit(digit) for digit in range(10)]}


def open_judge(shape, data_dir, device, dataset=None):
    """The `Judge` of images of this shape (C, H, W), and of this data set where that is known. For scikit-learn's
    digits, 8x8, a classifier is trained here, in seconds. Raises `UserError` for images that none reads."""
    name = JUDGED.get(tuple(shape))
    if name is None or dataset not in (name, None):
        raise UserError(f"images of {'x'.join(map(str, shape))}{f' of {dataset}' if dataset else ''} cannot be scored: "
                        "only MNIST's (--dataset mnist, 1x28x28) and scikit-learn's (--dataset digits, 1x8x8) can")
    train, test = (load_dataset(name, data_dir, train=part) for part in (True, False))
    if name == "mnist":
        return Judge(train, test, load_classifier(device=device))
    return Judge(train, test, train_classifier(train.images, train.labels, epochs=20, batch_size=100).to(device))


def few(count):
    """The warning that so many images are few, as a list of lines; empty where they are not."""
    return [f"warning: {count:,} images are few: below {FEW:,} these figures say more about the sample than about the "
            f"model"] if count < FEW else []


def report(result):
    """What `score` returned, as a table to print; "-" is what cannot be known."""
    fake, real = result["fake"], result["real"]
    lines = [f"{format(result['count'], ',') + ' images':30}     fake      real",
             f"{'Fréchet distance':30} {fake['frechet']:8.3f}  {real['frechet']:8.3f}   ratio {result['ratio']:.2f}"]
    for name, title in (("precision", "precision"), ("recall", "recall"), ("density", "density"),
                        ("coverage", "coverage"), ("accuracy", "read as the digit asked for"),
                        ("nearest", "distance to a training image"), ("copies", "nearer than 99 % of real ones")):
        lines.append(f"{title:30} {fake[name]:8.3f}  {real[name]:8.3f}")
    lines += ["", "digit  images  read as asked   Fréchet (real)   recall (real)  coverage (real)"]
    for digit, part in enumerate(result["classes"]):
        fake, real = part["fake"], part["real"]
        lines.append(f"{digit:5}  {part['count']:6,}  {fake['accuracy']:13.3f}"
                     f"  {fake['frechet']:7.3f} ({real['frechet']:5.3f})"
                     f"   {fake['recall']:5.3f} ({real['recall']:5.3f})"
                     f"    {fake['coverage']:5.3f} ({real['coverage']:5.3f})")
    lines += ["", f"real: {result['reference']:,} training images, held against the test images as the fakes are;",
              "      in the last three rows of the first table, the test images themselves", *few(result["count"])]
    return "\n".join(lines).replace("nan", "  -")


def nearest_picture(fakes, train, each=6, device="cpu"):
    """Of each digit, a row of the fakes most like an image of the `Dataset` train, left of that image: a PIL image."""
    distances, indices = (part.cpu() for part in nearest(fakes, train.images, device=device))
    order = distances.argsort(stable=True)
    digits = train.labels[indices[order]]
    order = torch.cat([order[digits == digit][:each] for digit in range(10)])  # the nearest of all are all ones
    return grid(torch.cat([fakes[order], train.images[indices[order]]], dim=3), columns=each)


def worst_picture(fakes, labels, probs, count=40):
    """The fakes least read as the label asked for, the worst first, each above what was asked and read: a PIL image.

    probs (N, 10): of `embed`."""
    order = probs[torch.arange(len(fakes)), labels].argsort(stable=True)[:count]
    columns, scale, caption, gap = 10, 3, 4, 2  # caption: its height, in pixels of the fakes
    tiles = F.pad(fakes[order], (0, 0, 0, caption))
    width, height = scale * tiles.shape[3], scale * tiles.shape[2]
    picture = grid(tiles, columns, gap, height)
    draw = ImageDraw.Draw(picture)
    for i, k in enumerate(order.tolist()):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        draw.text((left + 4, top + height - scale * caption), f"{labels[k]} read {probs[k].argmax()}", fill=255)
    return picture


def read_fakes(folder):
    """The images uint8 (N, 1, H, W) of a folder, and their labels int64 (N,), which their names end in, as those of
    generator.py do: 000000_7.png; None if no name does. Raises `UserError` when they differ in that, or in size."""
    paths = list_images(folder)
    images = [np.array(read_image(path, "L")) for path in tqdm(paths, desc=str(folder), leave=False, disable=None)]
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{folder} holds {'images of several sizes' if images else 'no images'}: it must hold digits, "
                        "all of 28x28 or all of 8x8 pixels")
    labels = [re.search(r"_([0-9])$", path.stem) for path in paths]
    if any(labels) and not all(labels):
        raise UserError(f"{folder} holds {labels.count(None):,} images whose names end in no label, such as "
                        f"{paths[labels.index(None)].name:.50}, beside others: all of them should, or none")
    labels = torch.tensor([int(label[1]) for label in labels]) if all(labels) else None
    return torch.from_numpy(np.stack(images))[:, None], labels


def draw_fakes(model, config, count):
    """The images number 0 to `count` - 1 that `config` draws with `model`, equally many of each digit: uint8
    (count, 1, H, W) and their labels int64 (count,), both on the CPU."""
    device = next(model.parameters()).device
    labels = torch.arange(count) % 10
    fakes = []
    with tqdm(total=count, desc="drawing", unit=" images", leave=False, disable=None) as bar:
        for indices in torch.arange(count).split(batch_that_fits(config, device)):
            x = generate(model, config, labels[indices].to(device), indices.tolist())
            fakes.append(to_images(x, config).cpu())
            bar.update(len(indices))
    return torch.cat(fakes), labels


def main():
    parser = sampling_parser("Draws digits from a checkpoint, or takes those in a folder, and scores them against the "
                             "real ones: MNIST, or scikit-learn's 8x8 digits, for which a small classifier is trained "
                             "first, in seconds (its scores compare with no others).")
    parser.add_argument("--images", type=some_path, metavar="DIR", help="score the images in this folder, which "
                        "generator.py filled; the label that a name ends in, 000000_7.png, is what it should show")
    parser.add_argument("--count", type=int, help="how many to draw, equally many of each digit (default: 10000, or as "
                        "many as there are training images; scores of different counts do not compare)")
    parser.add_argument("--data-dir", default=argparse.SUPPRESS, help="where MNIST/ is (default: as in training)")
    parser.add_argument("--pictures", type=some_path, help="a folder that gets nearest.png, the fakes beside the "
                        "training images nearest to them, and worst.png, those that are least read as asked for")
    args = parser.parse_args()
    if args.count is not None and not 10 <= args.count <= 100_000:
        raise UserError(f"--count {args.count}: must lie between 10 and 100,000")
    if args.images and (args.checkpoint is not None or args.count or given_flags(args).keys() - {"data_dir"}):
        raise UserError("--images scores what lies in a folder: leave out the flags that say what to draw, and how")
    if args.pictures:
        make_dir(args.pictures)
        for name in ("nearest.png", "worst.png"):
            check_picture(args.pictures / name)
    if args.images:
        fakes, labels = read_fakes(args.images)
        judge = open_judge(fakes.shape[1:], getattr(args, "data_dir", "."), pick_device(args.device))
    else:
        model, config = load_for_sampling(args)
        judge = open_judge((config.channels, *config.image_size), config.data_dir,
                           next(model.parameters()).device, config.dataset)
        fakes, labels = draw_fakes(model, config, args.count or min(10_000, len(judge.train.images)))
        print(f"{args.checkpoint}: {config.sampler}, {config.sample_steps} steps, guidance {config.guidance:g}, "
              f"seed {config.seed}")
    print(report(judge.score(fakes, labels)))
    if args.pictures:
        save_picture(args.pictures / "nearest.png", nearest_picture(fakes, judge.train, device=judge.device))
        if labels is not None:
            probs = embed(judge.classifier, fakes)[1].cpu()
            save_picture(args.pictures / "worst.png", worst_picture(fakes, labels, probs))


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
