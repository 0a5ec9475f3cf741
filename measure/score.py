"""How good are fake MNIST digits? Measured with a network that reads digits (`measure/classifier.py`), not photographs.

Every figure stands beside the same figure of real images, which is what perfect fakes would get.
"""

from support.commands import UserError, run
from support.files import make_dir
from support.pictures import grid, save_picture

import argparse
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from tqdm import tqdm

from dataset import list_images, load_dataset, read_image, to_uint8
from fid_computer import frechet_distance, statistics
from inference import load_for_sampling, sample, sampling_parser
from measure.classifier import load_classifier

FEW = 2000  # below this many images, a figure says more about the sample than about the model
K_RECALL, K_COVERAGE = 3, 5  # nearest neighbours, as in 1904.06991 and in 2002.09797
METRICS = ("frechet", "precision", "recall", "density", "coverage")


@torch.inference_mode()
def embed(classifier, images, batch_size=250):
    """Images uint8 (N, 1, 28, 28) -> their features (N, 64) and the probability of each digit (N, 10), on the CPU."""
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
        raise UserError(f"the digit classifier reads grey images of 28 x 28 pixels, uint8 (N, 1, 28, 28), not "
                        f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}")
    device = next(classifier.parameters()).device
    features = [classifier.features(batch.to(device).float() / 127.5 - 1) for batch in images.split(batch_size)]
    probs = [classifier.head(batch).softmax(dim=1) for batch in features]
    return torch.cat(features).cpu(), torch.cat(probs).cpu()


def compare(fake, real):
    """Fréchet distance (1706.08500), precision and recall (1904.06991), density and coverage (2002.09797) of features
    `fake` (N, D) against `real` (M, D): a dict of floats, all NaN where either are too few to have k neighbours.

    A ball around each real reaches to its k-th nearest real. Precision is the share of fakes in any such ball, and
    recall the share of reals in any ball drawn in the same way around the fakes (k = 3). Density is how many balls of
    reals a fake is in, over k: about 1, more where fakes crowd. Coverage is the share of them that hold a fake (k = 5).
    """
    if min(len(fake), len(real)) <= K_COVERAGE:
        return dict.fromkeys(METRICS, float("nan"))
    fake_radius = neighbour_distances(fake)[:, K_RECALL]
    narrow, wide = neighbour_distances(real)[:, [K_RECALL, K_COVERAGE]].T
    precise, density, recall, coverage = torch.zeros(len(fake), dtype=torch.bool), 0, 0, 0
    for rows, distances in distance_blocks(real, fake):
        precise |= (distances <= narrow[rows, None]).any(dim=0)
        recall += (distances <= fake_radius).any(dim=1).sum().item() / len(real)
        inside = distances <= wide[rows, None]
        density += inside.sum().item() / (K_COVERAGE * len(fake))
        coverage += inside.any(dim=1).sum().item() / len(real)
    frechet = frechet_distance(*statistics(fake.numpy()), *statistics(real.numpy()))
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


def nearest(images, train_images, size=500):
    """The training image nearest to each of `images` (N, 1, H, W), by L2 over pixels in [0, 1]: distances and indices,
    both (N,)."""
    train = train_images.flatten(1).float()
    half_square = train.square().sum(dim=1) / 2
    distances, indices = [], []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # as bfloat16 where that is quicker, which holds 0..255 exactly
    for batch in images.flatten(1).float().split(size):
        # |a - b|^2 / 2 without |a|^2 / 2, which changes no minimum. It only finds b: its rounding would hide a copy.
        index = torch.addmm(half_square, batch, train.T, alpha=-1).argmin(dim=1)
        distances.append((batch - train[index]).norm(dim=1) / 255)
        indices.append(index)
    torch.set_float32_matmul_precision(precision)
    return torch.cat(distances), torch.cat(indices)


def draw_reference(labels, real_labels, count, generator):
    """Indices of `count` real images, drawn at random; if `labels` were asked for in like numbers, in the same numbers.

    MNIST's classes differ in size (9 to 11 %): held against them, perfect fakes that are equally many of each digit
    would be at twice the distance of a random draw. But a class that is missing must not be missed here as well.
    """
    order = torch.randperm(len(real_labels), generator=generator)
    if labels is not None:
        counts = labels.bincount(minlength=10)
        if counts.max() <= 2 * counts.min() and (counts <= real_labels.bincount(minlength=10)).all():
            return torch.cat([order[real_labels[order] == digit][:counts[digit]] for digit in range(10)])
    return order[:count]


def score(fakes, labels, real_train, real_test, classifier, seed=0):
    """All figures of `fakes` uint8 (N, 1, 28, 28) that were asked to show `labels` int64 (N,), None where not known.

    real_train, real_test: MNIST, each a `Dataset`. classifier: the one of `load_classifier`.

    Returns a dict of plain values (NaN: cannot be known), where "fake" and "real" are each a dict of
        METRICS   of `compare`, against the test images; real: of as many training images in the fakes' place
        accuracy  share read as what was asked for; real: of the test images, as are the next two
        nearest   median distance to the nearest training image
        copies    share that is nearer to one than 99 % of the test images read alike: 0.01 by definition for those,
                  1 for copies, while images a little smoother than real ones may reach 0.03
    and beside these are "count" (of fakes), "ratio" (fake over real Fréchet distance) and "classes", a list of the same
    for each digit; fakes without labels count as what they are read as.
    """
    if len(fakes) <= K_COVERAGE:
        raise UserError(f"{len(fakes)} images are too few to score: draw {FEW:,} or more")
    if labels is not None and (len(labels) != len(fakes) or labels.min() < 0 or labels.max() > 9):
        raise UserError(f"the {len(fakes):,} images need as many labels, each a digit from 0 to 9")
    drawn = draw_reference(labels, real_train.labels, len(fakes), torch.Generator().manual_seed(seed))
    drawn_labels = real_train.labels[drawn]
    fake, fake_reads = embed(classifier, fakes)
    test, test_reads = embed(classifier, real_test.images)
    train, _ = embed(classifier, real_train.images[drawn])
    fake_reads, test_reads = fake_reads.argmax(dim=1), test_reads.argmax(dim=1)
    asked = fake_reads if labels is None else labels
    fake_right = (fake_reads == asked).float() if labels is not None else torch.full((len(fake),), float("nan"))
    test_right = (test_reads == real_test.labels).float()

    distances, _ = nearest(torch.cat([fakes, real_test.images]), real_train.images)
    fake_near, test_near = distances.split([len(fakes), len(test)])
    # A limit for each digit: the simple stroke of a 1 is always near another.
    limits = torch.stack([test_near[test_reads == digit].quantile(0.01) for digit in range(10)])
    fake_copies, test_copies = fake_near < limits[fake_reads], test_near < limits[test_reads]

    def figures(of_fake, of_train, of_test):
        result = {"count": int(of_fake.sum()), "fake": compare(fake[of_fake], test[of_test]),
                  "real": compare(train[of_train], test[of_test])}
        for part, of, right, near, copies in (("fake", of_fake, fake_right, fake_near, fake_copies),
                                              ("real", of_test, test_right, test_near, test_copies)):
            result[part] |= {"accuracy": right[of].mean().item(), "nearest": near[of].nanmedian().item(),
                             "copies": copies[of].float().mean().item()}
        return result | {"ratio": result["fake"]["frechet"] / result["real"]["frechet"]}

    everything = [torch.ones(n, dtype=torch.bool) for n in (len(fake), len(train), len(test))]
    return figures(*everything) | {"classes": [figures(asked == digit, drawn_labels == digit, real_test.labels == digit)
                                               for digit in range(10)]}


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
    lines += ["", "real: as many training images, held against the test images as the fakes are;",
              "      in the last three rows of the first table, the test images themselves"]
    if result["count"] < FEW:
        lines.append(f"warning: {result['count']:,} images are few: below {FEW:,} these figures say more about the "
                     f"sample than about the model")
    return "\n".join(lines).replace("nan", "  -")


def nearest_picture(fakes, train, each=6):
    """Of each digit, a row of the fakes most like an image of the `Dataset` train, left of that image: a PIL image."""
    distances, indices = nearest(fakes, train.images)
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
    """The images uint8 (N, 1, H, W) of a folder, and their labels int64 (N,) if every name ends in one, as those of
    generator.py do: 000000_7.png (else None). Raises `UserError` when they are not all of one size."""
    paths = list_images(folder)
    images = [np.array(read_image(path, "L")) for path in tqdm(paths, desc=str(folder), leave=False, disable=None)]
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{folder} holds {'images of several sizes' if images else 'no images'}: it must hold digits "
                        "of 28 x 28 pixels")
    labels = [re.search(r"_([0-9])$", path.stem) for path in paths]
    labels = torch.tensor([int(label[1]) for label in labels]) if all(labels) else None
    return torch.from_numpy(np.stack(images))[:, None], labels


def draw_fakes(model, config, count):
    """The images number 0 to `count` - 1 that `config` draws with `model`, equally many of each digit: uint8
    (count, 1, 28, 28) and their labels int64 (count,), both on the CPU."""
    device = next(model.parameters()).device
    labels = torch.arange(count) % 10
    fakes = []
    with tqdm(total=count, desc="drawing", unit=" images", leave=False, disable=None) as bar:
        for indices in torch.arange(count).split(500):
            *_, x = sample(model, config, labels[indices].to(device), indices.tolist())
            fakes.append(to_uint8(x).cpu())
            bar.update(len(indices))
    return torch.cat(fakes), labels


def judge_mnist(fakes, labels, data_dir, device, pictures=None):
    """Prints the `report` of fakes against MNIST, and draws its pictures into the folder `pictures`."""
    train, test = (load_dataset("mnist", data_dir, train=part) for part in (True, False))
    classifier = load_classifier("mnist", device=device)
    print(report(score(fakes, labels, train, test, classifier)))
    if pictures:
        save_picture(pictures / "nearest.png", nearest_picture(fakes, train))
        if labels is not None:
            save_picture(pictures / "worst.png", worst_picture(fakes, labels, embed(classifier, fakes)[1]))


def main():
    parser = sampling_parser("Draws digits from a checkpoint and scores them against MNIST.")
    parser.add_argument("--count", type=int, default=10_000, help="how many, equally many of each digit (default: "
                        "10000; scores of different counts do not compare)")
    parser.add_argument("--data-dir", default=argparse.SUPPRESS, help="where MNIST/ is (default: as in training)")
    parser.add_argument("--pictures", type=Path, help="a folder that gets nearest.png, the fakes beside the training "
                        "images nearest to them, and worst.png, those that are least read as what was asked for")
    args = parser.parse_args()
    if not 10 <= args.count <= 100_000:
        raise UserError(f"--count {args.count}: must lie between 10 and 100,000")
    if args.pictures:
        make_dir(args.pictures)
    model, config = load_for_sampling(args)
    load_classifier(config.dataset)  # refuses a model of other images before they are drawn
    fakes, labels = draw_fakes(model, config, args.count)
    print(f"{config.sampler}, {config.sample_steps} steps, guidance {config.guidance:g}, seed {config.seed}")
    judge_mnist(fakes, labels, config.data_dir, next(model.parameters()).device, args.pictures)


if __name__ == "__main__":
    run(main)
