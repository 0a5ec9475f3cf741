"""How good are fake images? Measured with a network that reads just such images (`measure/classifier.py`).

    python -m measure.score --checkpoint run                                       draws images and scores them
    python -m measure.score --images images/fake --dataset folder --data-dir mine  scores those in a folder
    python -m measure.score --vae vae --dataset folder --data-dir mine             scores what a VAE makes of real ones

Every figure stands beside the same figure of real images, which is what perfect fakes would get, and where a model
draws latents, beside that of real images that went through its VAE: no fakes of such latents can be better.
"""

from support.commands import UserError, in_full_precision, pick_device, run, some_path
from support.files import check_output, make_dir, write_atomically
from support.folders import Folder
from support.image_files import list_images, opened, read_image
from support.labels import are_numbers, check_classes, class_weights, labels_by
from support.pictures import LINE, check_picture, grid, psnr, save_picture, write
from support.settings import add_flags, given_flags, say_default

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset import to_float, to_uint8
from fid_computer import frechet_distance, statistics
from inference import draw_batches, load_for_sampling, sampling_parser
from latent.config import IMAGES, LatentConfig
from latent.vae import check_shapes, load_vae
from measure.classifier import DIGITS, FEATURES, find_classifier, load_parts

FEW = 2000  # below this many images, a figure says more about the sample than about the model
K_RECALL, K_COVERAGE = 3, 5  # nearest neighbours, as in 1904.06991 and in 2002.09797
METRICS = ("frechet", "precision", "recall", "density", "coverage")
ROWS = 20  # of classes in a report, or in a picture
SMALL = 32  # images are compared by their pixels at this size at most
BLOCK = 2**26  # numbers that are floats at once: 256 MB


@in_full_precision()
def embed(classifier, images, batch_size=250):
    """Images uint8 (N, C, H, W) -> their features (N, 64) and the probability of each class (N, num_classes), on the
    classifier's device."""
    C, H, W = classifier.shape
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (C, H, W):
        raise UserError(f"the classifier reads images of {H} x {W} pixels, uint8 (N, {C}, {H}, {W}), not "
                        f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}")
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

    around_real: `neighbour_distances` of `real`, if they are known already.
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


def shrink(images):
    """Images uint8 (N, C, H, W), averaged over blocks of pixels until no side is longer than SMALL."""
    H, W = images.shape[2:]
    if max(H, W) <= SMALL:
        return images
    size = [max(1, side * SMALL // max(H, W)) for side in (H, W)]
    return torch.cat([F.adaptive_avg_pool2d(part.float(), size).round().byte() for part in images.split(1000)])


def nearest(images, train_images, size=500, device="cpu"):
    """The training image nearest to each of `images` (N, C, H, W), by L2 over pixels in [0, 1] (`shrink`): distances
    and indices, both (N,), found on `device` in bounded memory."""
    images, train_images = (shrink(some).flatten(1) for some in (images, train_images))
    best = torch.full((len(images),), math.inf, device=device)
    indices = torch.zeros(len(images), dtype=torch.int64, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # as bfloat16 if that is quicker; it holds 0..255 exactly
    length = max(1, BLOCK // images.shape[1])
    try:
        for start in range(0, len(train_images), length):
            train = train_images[start:start + length].to(device).float()
            half_square = train.square().sum(dim=1) / 2
            for part in torch.arange(len(images), device=device).split(size):
                batch = images[part.cpu()].to(device).float()
                # |a - b|^2 / 2 without |a|^2 / 2, which changes no minimum. It only finds b: rounded, it would hide a
                # copy.
                least, index = torch.addmm(half_square, batch, train.T, alpha=-1).min(dim=1)
                nearer = part[least < best[part]]
                indices[nearer] = start + index[least < best[part]]
                best[part] = torch.minimum(least, best[part])
    finally:
        torch.set_float32_matmul_precision(precision)
    distances = [(batch.float() - train_images[index.cpu()].float()).norm(dim=1) / 255
                 for batch, index in zip(images.split(size), indices.split(size), strict=True)]
    return torch.cat(distances).to(device), indices


def pick_reference(labels, real_labels, count, generator, num_classes=10):
    """Indices of `count` real images, picked at random. If `labels` were asked for about equally often, or as often as
    the real images have them, there are as many of each; of all, fewer where a class has not so many.

    MNIST's classes differ in size (9 to 11 %): held against them, perfect fakes that are equally many of each digit
    would be at twice the distance of a random draw. But a class that is missing must not be missed here as well.
    """
    order = torch.randperm(len(real_labels), generator=generator)
    if labels is not None:
        counts, there = (some.bincount(minlength=num_classes) for some in (labels, real_labels))
        usual = [weights * (len(labels) / weights.sum()) for weights in (torch.ones(num_classes), there)]
        if any(((counts >= some / 2 - 1) & (counts <= 2 * some + 1)).all() for some in usual) and (
                there[counts > 0] > 0).all():
            scarce = torch.where(counts > 0, there / counts, math.inf).argmin()
            if there[scarce] < counts[scarce]:
                counts = counts * there[scarce] // counts[scarce]
            return torch.cat([order[real_labels[order] == label][:counts[label]] for label in range(num_classes)])
    return order[:count]


def share(which):
    """The share of True among booleans of any shape; NaN of none."""
    return which.float().mean().item()


@in_full_precision()
def reconstruct(vae, images, seed=0, batch_size=250):
    """Images uint8 (N, C, H, W) encoded by a `VAE`, their latents sampled, and decoded: uint8 (N, C, H, W), on the
    CPU."""
    device, generator, parts = vae.mean.device, torch.Generator().manual_seed(seed), []
    with tqdm(total=len(images), desc="through the VAE", unit=" images", leave=False, disable=None) as bar:
        for batch in images.split(batch_size):
            mean, std = vae.encode(to_float(batch.to(device)))
            noise = torch.randn(mean.shape, generator=generator).to(device)
            parts.append(to_uint8(vae.decode(mean + std * noise)).cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def ratio(fake, real):
    """How many times further than real images fakes are, by the figures of both."""
    return fake["frechet"] / real["frechet"] if real["frechet"] else math.nan


class Judge:
    """Real images, and a network that reads them, for fakes to be held against.

    train, test: the real ones, each a `Dataset`. classifier: of `measure.classifier`; all is computed on its device.
    """

    def __init__(self, train, test, classifier):
        self.train, self.test, self.classifier = train, test, classifier
        self.names, self.num_classes = tuple(train.classes), len(train.classes)
        self.device = next(classifier.parameters()).device
        if len(test.images) <= K_COVERAGE:
            raise UserError(f"{len(test.images)} test images are too few to hold others against: have more than "
                            f"{FEATURES}, or {FEW:,} if you can")
        self.test_features, self.test_reads = self.read(test.images)
        self.test_labels = test.labels.to(self.device)
        self.around_test = neighbour_distances(self.test_features)

    def read(self, images):
        """The features (N, 64) of images uint8 (N, C, H, W), and what they are read as, int64 (N,)."""
        features, probs = embed(self.classifier, images)
        return features, probs.argmax(dim=1)

    def compare(self, features):
        """`compare` with all test images."""
        return compare(features, self.test_features, self.around_test)

    def brief(self, fakes, labels):
        """The quick ones among the figures of `score`: METRICS and accuracy."""
        features, reads = self.read(fakes)
        return self.compare(features) | {"accuracy": share(reads == labels.to(self.device))}

    def labels(self, count, equal=False):
        """`count` labels to draw, int64 (count,), in the proportions of `class_weights`."""
        return labels_by(class_weights(self.train.labels, self.num_classes, equal), count)

    def pick(self, labels, count, seed=0):
        """Indices of the training images that stand in the place of `count` fakes; see `pick_reference`."""
        generator = torch.Generator().manual_seed(seed)
        return pick_reference(labels, self.train.labels, count, generator, self.num_classes)

    def brief_real(self, labels, seed=0):
        """The same of real images, training images in the place of fakes that were asked to show `labels`."""
        picked = self.pick(labels, len(labels), seed)
        features, _ = self.read(self.train.images[picked])
        return self.compare(features) | {"accuracy": share(self.test_reads == self.test_labels)}

    def round_trip(self, vae, picked, seed=0):
        """The figures of `brief` of the training images number `picked` after their way through a `VAE`, and "psnr",
        `psnr`."""
        images = self.train.images[picked]
        made = reconstruct(vae, images, seed)
        return self.brief(made, self.train.labels[picked]) | {"psnr": psnr(made, images)}

    def score_vae(self, vae, count):
        """The figures of a `VAE` alone, as `score` returns them, without "fake" and "classes"; "ratio" is its Fréchet
        distance over that of real images."""
        labels = self.labels(count)
        picked = self.pick(labels, count)
        if len(picked) <= K_COVERAGE:
            raise UserError(f"{len(picked)} images are too few to score: {FEW:,} or more would do")
        vae, real = self.round_trip(vae, picked), self.brief_real(labels)
        return {"count": len(picked), "reference": len(picked), "test": len(self.test.images),
                "vae": vae, "real": real, "ratio": ratio(vae, real)}

    def find_copies(self, fakes, fake_reads):
        """The distance of each fake to the nearest training image, and whether it is nearer than 99 % of the test
        images that are read alike; then both of the test images."""
        distances, _ = nearest(torch.cat([fakes, self.test.images]), self.train.images, device=self.device)
        fake_near, test_near = distances.split([len(fakes), len(self.test.images)])
        # A limit for each class: the simple stroke of a 1 is always near another.
        limits = torch.full((self.num_classes,), math.nan, device=self.device)  # where nothing is read so: none
        for label in self.test_reads.unique().tolist():
            limits[label] = test_near[self.test_reads == label].quantile(0.01)
        return fake_near, fake_near < limits[fake_reads], test_near, test_near < limits[self.test_reads]

    def score(self, fakes, labels, seed=0, vae=None):
        """All figures of `fakes` uint8 (N, C, H, W) that were asked to show `labels` int64 (N,), None if not known.

        Returns a dict of plain values (NaN: cannot be known), where "fake" and "real" are each a dict of
            METRICS   of `compare`, against the test images; real: of as many training images in the fakes' place
            accuracy  share read as what was asked for; real: of the test images, as are the next two
            nearest   median distance to the nearest training image
            copies    share that is nearer to one than 99 % of the test images read alike: 0.01 by definition for those,
                      1 for copies, while images a little smoother than real ones may reach 0.03
            unseen    share whose nearest real image is a test image, in all and not by class; real: the value that
                      chance would give, the share of test images among the real ones
        With a `vae`, "vae" is the same of `round_trip`: of the training images of "real" that went through it.
        And beside these are "count" (of fakes), "reference" (of training images in their place), "test" (of test
        images), "ratio" (fake over real Fréchet distance) and "classes", a list of the same for each class, with its
        "name"; fakes without labels count as what they are read as.
        """
        if len(fakes) <= K_COVERAGE:
            raise UserError(f"{len(fakes)} images are too few to score: draw {FEW:,} or more")
        if labels is not None and (len(labels) != len(fakes) or labels.min() < 0 or labels.max() >= self.num_classes):
            raise UserError(f"the {len(fakes):,} images need as many labels, each from 0 to {self.num_classes - 1}")
        picked = self.pick(labels, len(fakes), seed)
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
            return result | {"ratio": ratio(result["fake"], result["real"])}

        def of_class(label):
            of_test = self.test_labels == label
            return {"name": self.names[label]} | figures(
                lambda features: compare(features, self.test_features[of_test]), asked == label,
                self.train.labels[picked].to(self.device) == label, of_test)

        everything = [torch.ones(len(some), dtype=torch.bool, device=self.device) for some in (fake, train, test_right)]
        result = figures(self.compare, *everything)
        from_test, _ = nearest(fakes, self.test.images, device=self.device)
        result["fake"]["unseen"] = share(from_test < fake_near)
        result["real"]["unseen"] = len(self.test.images) / (len(self.test.images) + len(self.train.images))
        result |= {"test": len(self.test.images), "classes": [of_class(label) for label in range(self.num_classes)]}
        return result | ({"vae": self.round_trip(vae, picked)} if vae else {})


def open_judge(config, device):
    """The `Judge` of the images that a `Config` is of. Raises `UserError` when these or their classifier cannot be
    had, or the model knows other classes."""
    train, test = load_parts(config)
    if config.num_classes:
        check_classes(config, train)
    return Judge(train, test, find_classifier(train, config.data_dir, device))


def few(count, test_count):
    """The warnings that so many images, or test images, are few, as a list of lines; else empty."""
    lines = [f"warning: {count:,} images are few: below {FEW:,} these figures say more about the sample than about the "
             f"model"] if count < FEW else []
    least, what = min((count, "images"), (test_count, "test images"))
    return lines + ([f"warning: {least:,} {what} are too few for {FEATURES} features: the Fréchet distances mean "
                     f"nothing, also those of real images; have more than {FEATURES}"] if least <= FEATURES else [])


def cell(value, width=8, digits=3):
    """A number in a table; "-" is what cannot be known."""
    return f"{value:{width}.{digits}f}" if math.isfinite(value) else "-".rjust(width)


def report(result):
    """What `score` or `score_vae` returned, as a table to print."""
    columns = [name for name in ("fake", "real", "vae") if name in result]
    lines = [f"{format(result['count'], ',') + ' images':30} " + "  ".join(f"{name:>8}" for name in columns)]
    for name, title in (("frechet", "Fréchet distance"), ("precision", "precision"), ("recall", "recall"),
                        ("density", "density"), ("coverage", "coverage"), ("accuracy", "read as asked for"),
                        ("nearest", "distance to a training image"), ("copies", "nearer than 99 % of real ones"),
                        ("unseen", "nearest is a test image"),
                        ("psnr", "PSNR, dB")):
        if any(name in result[column] for column in columns):
            lines.append(f"{title:30} " + "  ".join(cell(result[column].get(name, math.nan)) for column in columns))
    lines[1] += f"   ratio {cell(result['ratio'], 0, 2)}"
    if "classes" in result:
        lines += ["", *class_table(result["classes"])]
    lines += ["", f"real: {result['reference']:,} training images, held against the test images as the fakes are"
              + (";\n      in the last four rows of the first table, the test images themselves" if "fake" in result
                 else "")]
    if "vae" in result:
        lines.append("vae:  the same training images through the VAE; what it makes of latents cannot be nearer")
    return "\n".join([*lines, *few(result["count"], result["test"])])


def class_table(classes):
    """The lines of the report that tell of each class, or of the ROWS that are the worst."""
    shown = classes
    if len(classes) > ROWS:  # unknown comes last
        shown = sorted(classes, key=lambda part: [value if math.isfinite(value) else math.inf for value in (
            part["fake"]["accuracy"], -part["ratio"])])[:ROWS]
    width = min(30, max(len(part["name"]) for part in [{"name": "class"}, *shown]))
    lines = [f"{'class':>{width}}  images  read as asked   Fréchet (real)   recall (real)  coverage (real)"]
    for part in shown:
        fake, real = part["fake"], part["real"]
        name = " ".join(part["name"].split())
        lines.append(f"{name if len(name) <= width else name[:width - 1] + '…':>{width}}  {part['count']:6,}"
                     f"  {cell(fake['accuracy'], 13)}"
                     f"  {cell(fake['frechet'], 7)} ({cell(real['frechet'], 5)})"
                     f"   {cell(fake['recall'], 5)} ({cell(real['recall'], 5)})"
                     f"    {cell(fake['coverage'], 5)} ({cell(real['coverage'], 5)})")
    if len(classes) > ROWS:
        lines.append(f"the {ROWS} of {len(classes):,} classes that are least read as asked for")
    return lines


def captioned(images, columns, captions, height):
    """A grid of images uint8 (N, C, H, W), each enlarged to about `height` pixels, above its caption: strings (N,),
    of one line or several. A PIL image."""
    scale = max(1, round(height / images.shape[2]))
    lines = max(len(caption.splitlines()) for caption in captions)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    H, W = images.shape[2:]
    tiles, gap = F.pad(images, (0, 0, 0, lines * LINE)), 2
    picture = grid(tiles, columns, gap, tiles.shape[2])
    for i, caption in enumerate(captions):
        left, top = gap + i % columns * (W + gap), gap + i // columns * (tiles.shape[2] + gap)
        for row, line in enumerate(caption.splitlines()):
            write(picture, left + 4, top + H + 1 + row * LINE, line, W - 4)
    return picture


def nearest_picture(fakes, train, each=6, device="cpu"):
    """A picture of the fakes most like an image of the `Dataset` train, each left of that image: a row for each class,
    or for the ROWS classes with the nearest ones. A PIL image."""
    distances, indices = (part.cpu() for part in nearest(fakes, train.images, device=device))
    order = distances.argsort(stable=True)
    labels = train.labels[indices[order]]
    found = list(dict.fromkeys(labels.tolist()))[:ROWS]  # the nearest first
    rows = [order[labels == label][:each] for label in sorted(found)]  # the nearest of all are all of one class
    order = torch.cat(rows)
    pairs = torch.cat([fakes[order], train.images[indices[order]]], dim=3)
    if are_numbers(train.classes):
        return grid(pairs, columns=each)
    return captioned(pairs, each, [train.classes[train.labels[k]] for k in indices[order]], height=56)


def worst_picture(fakes, labels, probs, names, count=40):
    """The fakes least read as the label asked for, the worst first, each above what was asked and read: a PIL image.

    probs (N, num_classes): as `embed` returns them. names: those of the classes."""
    order = probs[torch.arange(len(fakes)), labels].argsort(stable=True)[:count]
    between = " " if are_numbers(names) else "\n"
    captions = [f"{names[labels[k]]}{between}read {names[probs[k].argmax()]}" for k in order]
    return captioned(fakes[order], 10, captions, height=84)


def fake_size(folder):
    """The size (H, W) of the first image in a folder of fakes. Raises `UserError` if it has none."""
    paths = list_images(folder)
    if not paths:
        raise UserError(f"{folder} holds no images to score")
    with opened(paths[0]) as image:
        return image.height, image.width


def read_fakes(folder, mode="L"):
    """The images uint8 (N, C, H, W) of a folder, grey (mode L) or RGB, and their labels int64 (N,), which their names
    end in, as those of generator.py do: 000000_7.png; None if no name does. Raises `UserError` when they differ in
    that, or in size."""
    paths = list_images(folder)
    images = [np.array(read_image(path, mode)) for path in tqdm(paths, desc=str(folder), leave=False, disable=None)]
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{folder} holds {'images of several sizes' if images else 'no images'}: all should be of the "
                        "size that the classifier reads")
    labels = [re.search(r"_([0-9]{1,6})$", path.stem) for path in paths]
    if any(labels) and not all(labels):
        raise UserError(f"{folder} holds {labels.count(None):,} images whose names end in no label, such as "
                        f"{paths[labels.index(None)].name:.50}, beside others: all of them should, or none")
    labels = torch.tensor([int(label[1]) for label in labels]) if all(labels) else None
    images = torch.from_numpy(np.stack(images))
    return images[:, None] if mode == "L" else images.permute(0, 3, 1, 2).contiguous(), labels


def draw_fakes(model, config, labels):
    """The images number 0, 1, ... that `config` draws with `model`, of these labels int64 (N,): uint8 (N, C, H, W), on
    the CPU."""
    return torch.cat([images for _, images in draw_batches(model, config, labels)])


def score_folder(args, device):
    """Scores the images in the folder `--images`. Returns the judge, the images, and their labels or None."""
    given = {name: value for name, value in given_flags(args, LatentConfig).items() if name in ("dataset", "data_dir")}
    size = fake_size(args.images)
    if "dataset" not in given:
        if size != DIGITS[1][1:]:
            raise UserError(f"the images in {args.images} are of {size[0]} x {size[1]} pixels: name the real ones to "
                            "hold them against with --dataset and --data-dir (only MNIST's, 28 x 28, are known by "
                            "their size)")
        given["dataset"] = DIGITS[0]
    judge = open_judge(LatentConfig(**given, image_size=size), device)
    fakes, labels = read_fakes(args.images, "L" if judge.train.images.shape[1] == 1 else "RGB")
    if labels is not None and labels.max() >= judge.num_classes:
        raise UserError(f"{args.images} holds an image whose name ends in _{labels.max()}, but the labels of "
                        f"{judge.train.name} are 0 to {judge.num_classes - 1}: name them as generator.py does, or "
                        "without a number")
    return judge, fakes, labels


def score_vae(args, device):
    """Scores the VAE `--vae` alone, and keeps the result in its folder, if it is one."""
    flags = given_flags(args, LatentConfig)
    if "dataset" not in flags:
        raise UserError("--vae without --checkpoint scores the VAE alone: name the images to try it on with --dataset "
                        "and --data-dir, or the model that draws its latents with --checkpoint")
    path = Path(args.vae) / "round_trip.json"
    if path.parent.is_dir():
        check_output(path, b'"vae_hash"')
    vae = load_vae(args.vae, device)
    C = vae.image_channels
    config = LatentConfig(**{"channels": C if C in (1, 3) else 0} | {name: flags[name] for name in (
        "dataset", "data_dir", "image_size", "channels", "ground") if name in flags})
    train, test = load_parts(config)
    check_shapes(args.vae, vae, train.shape)
    judge = Judge(train, test, find_classifier(train, config.data_dir, device))
    result = judge.score_vae(vae, min(args.count or 10_000, len(judge.train.images)))
    print(report(result))
    if path.parent.is_dir():
        # A folder has the fingerprint of its files, since training reads them one by one
        data = Folder(config.data_dir, True, train.shape[1:], train.shape[0], config.ground) if (
            train.name == "folder") else train
        result |= {"vae_hash": vae.hash_of(), "data": data.fingerprint}
        write_atomically(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
        print(f"-> {path}")


def parse_args():
    parser = sampling_parser("Draws images from a checkpoint, or takes those in a folder, and scores them against the "
                             "real ones, with the classifier that measure.classifier has trained on these (MNIST's "
                             "comes with the repository). With --vae and no --checkpoint, scores "
                             "what the VAE makes of real images, and keeps that in its folder as round_trip.json.",
                             LatentConfig)
    parser.add_argument("--images", type=some_path, metavar="DIR", help="score the images in this folder, which "
                        "generator.py filled; the label that a name ends in, 000000_7.png, is what it should show")
    parser.add_argument("--count", type=int, help="how many to draw (default: 10000, or as many as there are training "
                        "images; scores of different counts do not compare)")
    parser.add_argument("--equal", action="store_true", help="draw equally many of each class (default: as "
                        "generator.py does)")
    add_flags(parser, LatentConfig, ["dataset", "data_dir", "image_size", "channels", "ground"])
    say_default(parser, ["dataset", "data_dir"], "as in training; with --images, guessed from their size")
    say_default(parser, ["image_size", "channels"], "as the VAE and the data have them; for --vae alone")
    parser.add_argument("--pictures", type=some_path, help="a folder that gets nearest.png, the fakes beside the "
                        "training images nearest to them, and worst.png, those read worst as what was asked for")
    args = parser.parse_args()
    args.vae_alone = "vae" in args and args.checkpoint is None and not args.images
    if args.count is not None and not 10 <= args.count <= 100_000:
        raise UserError(f"--count {args.count}: must lie between 10 and 100,000")
    if args.images and (args.checkpoint is not None or args.count or args.equal
                        or given_flags(args, LatentConfig).keys() - {"dataset", "data_dir"}):
        raise UserError("--images scores what lies in a folder: leave out the flags that say what to draw, and how")
    if not args.vae_alone and given_flags(args, LatentConfig).keys() & {"image_size", "channels", "ground"}:
        raise UserError("--image-size, --channels and --ground are for --vae alone: whatever else is scored has its "
                        "own")
    if args.vae_alone and (args.pictures or args.equal or given_flags(args, LatentConfig).keys() - {
            "vae", "dataset", "data_dir", "image_size", "channels", "ground"}):
        raise UserError("--vae without --checkpoint scores the VAE alone, which draws nothing: leave out the flags "
                        "that say how to draw, or name the model with --checkpoint")
    return args


def main():
    args = parse_args()
    if args.vae_alone:
        score_vae(args, pick_device(args.device))
        return
    if args.pictures:
        make_dir(args.pictures)
        for name in ("nearest.png", "worst.png"):
            check_picture(args.pictures / name)
    vae = None
    if args.images:
        judge, fakes, labels = score_folder(args, pick_device(args.device))
    else:
        model, config = load_for_sampling(args, IMAGES)
        device = next(model.parameters()).device
        judge = open_judge(config, device)
        vae = config.find_vae(device) if config.kind == "latents" and config.latent_shape else None
        labels = judge.labels(args.count or min(10_000, len(judge.train.images)), args.equal)
        fakes = draw_fakes(model, config, labels)
        print(f"{args.checkpoint}: {config.sampler}, {config.sample_steps} steps, guidance {config.guidance:g}, "
              f"seed {config.seed}")
    print(report(judge.score(fakes, labels, vae=vae)))
    if args.pictures:
        save_picture(args.pictures / "nearest.png", nearest_picture(fakes, judge.train, device=judge.device))
        if labels is not None:
            probs = embed(judge.classifier, fakes)[1].cpu()
            save_picture(args.pictures / "worst.png", worst_picture(fakes, labels, probs, judge.names))


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
