"""How good are generated images? Compares their features, read by a classifier of such images, with real ones.

    python -m measure.score --checkpoint run                                       draws images and scores them
    python -m measure.score --images images/fake --dataset folder --data-dir mine  scores the images in a folder
    python -m measure.score --vae vae --dataset folder --data-dir mine             scores real images that a VAE coded

`measure.classifier` trains the classifier. Beside each figure stands that of real images, which perfect fakes would
reach. For a model of latents there is a third column: real images after a round trip through its VAE, which no fakes of
such latents can surpass.
"""

from support.commands import UserError, in_full_precision, pick_device, run, some_path
from support.files import check_output, make_dir, write_atomically
from support.image_files import list_images, read_image, recolour
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
from measure.classifier import DIGITS, FEATURES, embed, find_classifier, load_parts

FEW = 2000  # below this number of images, a figure says more about the sample than about the model
K_RECALL, K_COVERAGE = 3, 5  # nearest neighbours, as in 1904.06991 and in 2002.09797
BLOCK = 1000  # points whose distances to all others are computed at once, to bound the memory
EXACT = "donot_use_mm_for_euclid_dist"  # of `cdist`: a matrix product would not find equal points at distance 0
METRICS = ("frechet", "precision", "recall", "density", "coverage")
ROWS = 20  # classes in a report or a picture, at most
SHAPE_FLAGS = ("image_size", "channels", "ground")
SMALL = 32  # pixels: images are compared at this size at most


def compare(fake, real, around_real=None):
    """Compares features `fake` (N, D) with features `real` (M, D).

    Returns a dict of floats: the Fréchet distance (1706.08500), precision and recall (1904.06991), density and coverage
    (2002.09797). All are NaN if either set is too small to have k neighbours.

    The ball of a real point reaches to its k-th nearest real neighbour. Precision is the share of fakes that lie in a
    ball; recall is the share of reals that lie in a ball drawn around a fake in the same way (k = 3). Density is the
    mean number of balls that a fake lies in, divided by k: about 1, and more where fakes crowd. Coverage is the share
    of balls that hold a fake (k = 5).

    around_real: `neighbour_distances` of `real`, if they are known already.
    """
    if min(len(fake), len(real)) <= K_COVERAGE:
        return dict.fromkeys(METRICS, math.nan)
    fake_radius = neighbour_distances(fake)[:, K_RECALL]
    around_real = neighbour_distances(real) if around_real is None else around_real
    precise, density, recall, coverage = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), 0, 0, 0
    radii = around_real[:, [K_RECALL, K_COVERAGE]]
    for part, part_radii in zip(real.split(BLOCK), radii.split(BLOCK), strict=True):
        distances, (narrow, wide) = torch.cdist(part, fake, compute_mode=EXACT), part_radii.T[..., None]
        precise |= (distances <= narrow).any(dim=0)
        recall += (distances <= fake_radius).any(dim=1).sum().item() / len(real)
        inside = distances <= wide
        density += inside.sum().item() / (K_COVERAGE * len(fake))
        coverage += inside.any(dim=1).sum().item() / len(real)
    frechet = frechet_distance(*statistics(fake.cpu()), *statistics(real.cpu()))
    return dict(zip(METRICS, (frechet, share(precise), recall, density, coverage), strict=True))


def neighbour_distances(features):
    """The distances of features (N, D) to their nearest neighbours, ascending (N, K_COVERAGE + 1). Column 0 is each
    point itself, column k its k-th neighbour."""
    return torch.cat([torch.cdist(part, features, compute_mode=EXACT).topk(K_COVERAGE + 1, largest=False).values
                      for part in features.split(BLOCK)])


def shrink(images):
    """Images uint8 (N, C, H, W), averaged over blocks of pixels until no side is longer than SMALL."""
    H, W = images.shape[2:]
    if max(H, W) <= SMALL:
        return images
    size = [max(1, side * SMALL // max(H, W)) for side in (H, W)]
    return torch.cat([F.adaptive_avg_pool2d(part.float(), size).round().byte() for part in images.split(1000)])


def nearest(images, train_images, size=2048, device="cpu"):
    """Finds the training image nearest to each of `images` (N, C, H, W), by L2 over pixels in [0, 1] after `shrink`.

    Returns the distances and the indices, each (N,), on `device`. Blocks of `size` images bound the memory.
    """
    images, train_images = (shrink(some).flatten(1) for some in (images, train_images))
    precision, found = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision("medium")  # bfloat16 where that is faster; it holds 0..255 exactly
    try:
        for part in images.split(size):
            x = part.to(device).float()
            least = torch.full((len(x),), math.inf, device=device)
            indices = torch.zeros(len(x), dtype=torch.int64, device=device)
            for start in range(0, len(train_images), size):
                train = train_images[start:start + size].to(device).float()
                # |a - b|^2 / 2 without |a|^2 / 2, which does not change which b is nearest. The distance itself is
                # computed below, since rounding could hide a copy here.
                halves, index = torch.addmm(train.square().sum(dim=1) / 2, x, train.T, alpha=-1).min(dim=1)
                indices = torch.where(halves < least, start + index, indices)
                least = torch.minimum(halves, least)
            found.append(((x - train_images[indices.cpu()].to(device).float()).norm(dim=1) / 255, indices))
    finally:
        torch.set_float32_matmul_precision(precision)
    distances, indices = map(torch.cat, zip(*found, strict=True))
    return distances, indices


def pick_reference(labels, real_labels, count, num_classes=10, seed=0):
    """Picks `count` real images at random, to compare with fakes that were asked to show `labels` (None: not known).

    If the fakes have each class equally often, or as often as the real images have it, the reference has the same
    number of each class. MNIST's classes differ in size (9 to 11 %): beside a purely random draw, perfect fakes with
    equally many of each digit would have twice its distance. Otherwise the draw is purely random, so that a class which
    the fakes lack shows in their score. Returns indices, fewer than `count` if a class has too few real images.
    """
    order = torch.randperm(len(real_labels), generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return order[:count]
    counts, there = (some.bincount(minlength=num_classes) for some in (labels, real_labels))
    usual = [weights * (len(labels) / weights.sum()) for weights in (torch.ones(num_classes), there)]
    alike = any(((counts >= some / 2 - 1) & (counts <= 2 * some + 1)).all() for some in usual)
    if not alike or (there[counts > 0] == 0).any():
        return order[:count]
    scarce = torch.where(counts > 0, there / counts, math.inf).argmin()
    counts = counts * torch.minimum(there, counts)[scarce] // counts[scarce]
    return torch.cat([order[real_labels[order] == label][:counts[label]] for label in range(num_classes)])


def share(which):
    """The share of True among booleans of any shape; NaN if there are none."""
    return which.float().mean().item()


@in_full_precision()
def reconstruct(vae, images, seed=0, batch_size=250):
    """Images uint8 (N, C, H, W) after a round trip through a `VAE`: encoded, sampled, decoded. On the CPU."""
    device, generator, parts = vae.mean.device, torch.Generator().manual_seed(seed), []
    with tqdm(total=len(images), desc="through the VAE", unit=" images", leave=False, disable=None) as bar:
        for batch in images.split(batch_size):
            mean, std = vae.encode(to_float(batch.to(device)))
            noise = torch.randn(mean.shape, generator=generator).to(device)
            parts.append(to_uint8(vae.decode(mean + std * noise)).cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def ratio(fake, real):
    """The Fréchet distance of fakes, in multiples of that of real images. Both are dicts of figures."""
    return fake["frechet"] / real["frechet"] if real["frechet"] else math.nan


class Judge:
    """Scores images against the real ones.

    train, test: the two parts of the real images, each a `Dataset`. classifier: see `measure.classifier`; everything is
    computed on its device.
    """

    def __init__(self, train, test, classifier):
        self.train, self.test, self.classifier = train, test, classifier
        self.num_classes, self.device = len(train.classes), next(classifier.parameters()).device
        if len(test.images) <= K_COVERAGE:
            raise UserError(f"{len(test.images)} test images are too few to compare with: use more than {FEATURES}, or "
                            f"{FEW:,} if you can")
        self.test_features, self.test_reads = self.read(test.images)
        self.test_labels = test.labels.to(self.device)
        self.around_test = neighbour_distances(self.test_features)

    def read(self, images):
        """The features (N, 64) of images uint8 (N, C, H, W), and the classes that they are read as, int64 (N,)."""
        features, probs = embed(self.classifier, images)
        return features, probs.argmax(dim=1)

    def brief(self, fakes, labels):
        """Those figures of `score` that are quick to compute: METRICS and accuracy."""
        features, reads = self.read(fakes)
        figures = compare(features, self.test_features, self.around_test)
        return figures | {"accuracy": share(reads == labels.to(self.device))}

    def labels(self, count, equal=False):
        """The labels to draw, int64 (count,), in the proportions of `class_weights`."""
        return labels_by(class_weights(self.train.labels, self.num_classes, equal), count)

    def pick(self, labels, count):
        """The indices of the training images that serve as the reference; see `pick_reference`."""
        return pick_reference(labels, self.train.labels, count, self.num_classes)

    def brief_real(self, labels):
        """`brief` of real images: METRICS of training images that replace fakes of these labels, and the accuracy of
        the test images."""
        picked = self.pick(labels, len(labels))
        figures = self.brief(self.train.images[picked], self.train.labels[picked])
        return figures | {"accuracy": share(self.test_reads == self.test_labels)}

    def round_trip(self, vae, picked):
        """`brief` of the training images `picked` after a round trip through a `VAE`, and their "psnr" (dB)."""
        images = self.train.images[picked]
        made = reconstruct(vae, images)
        return self.brief(made, self.train.labels[picked]) | {"psnr": psnr(made, images)}

    def score_vae(self, vae, count):
        """The figures of a `VAE`: a dict as of `score`, without "fake" and "classes". Its "ratio" is that of "vae"."""
        labels = self.labels(count)
        picked = self.pick(labels, count)
        if len(picked) <= K_COVERAGE:
            raise UserError(f"{len(picked)} images are too few to score: {FEW:,} or more would do")
        vae, real = self.round_trip(vae, picked), self.brief_real(labels)
        return {"count": len(picked), "reference": len(picked), "test": len(self.test.images),
                "vae": vae, "real": real, "ratio": ratio(vae, real)}

    def score(self, fakes, labels, vae=None):
        """All figures of `fakes`, uint8 (N, C, H, W), that were asked to show `labels`, int64 (N,), or None.

        Returns a dict of plain values, NaN where nothing can be known. Its "fake" and "real" are dicts:
            METRICS   `compare` with the test images; real: of training images in place of the fakes
            accuracy  share read as the class that was asked for; real: of the test images, like the next two
            nearest   median distance to the nearest training image
            copies    share closer to one than 99 % of the test images that are read alike: 0.01 for those themselves, 1
                      for copies, up to 0.03 for images a little smoother than real ones
            unseen    share whose nearest real image is a test image; real: what chance would give, the share of test
                      images among all real ones. Only in the totals
        Beside them are "count" (fakes), "reference" (training images in their place), "test" (test images), "ratio" (of
        the two Fréchet distances), and "classes", a list with the same dict for each class and its "name". Fakes
        without labels belong to the class that they are read as. With a `vae` there is also "vae", the `round_trip` of
        the reference.
        """
        if len(fakes) <= K_COVERAGE:
            raise UserError(f"{len(fakes)} images are too few to score: draw {FEW:,} or more")
        if labels is not None and (len(labels) != len(fakes) or labels.min() < 0 or labels.max() >= self.num_classes):
            raise UserError(f"the {len(fakes):,} images need as many labels, each from 0 to {self.num_classes - 1}")
        picked = self.pick(labels, len(fakes))
        fake, reads = self.read(fakes)
        train, _ = self.read(self.train.images[picked])
        train_labels = self.train.labels[picked].to(self.device)
        asked = reads if labels is None else labels.to(self.device)
        right = (reads == asked) if labels is not None else torch.full((len(fake),), math.nan)
        near, test_near = (nearest(some, self.train.images, device=self.device)[0] for some in (
            fakes, self.test.images))
        # A limit for each class, since the simple stroke of a 1 is always close to another. NaN: none
        limits = torch.full((self.num_classes,), math.nan, device=self.device)
        for label in self.test_reads.unique().tolist():
            limits[label] = test_near[self.test_reads == label].quantile(0.01)
        by_image = {"fake": {"accuracy": right, "nearest": near, "copies": near < limits[reads]},
                    "real": {"accuracy": self.test_reads == self.test_labels, "nearest": test_near,
                             "copies": test_near < limits[self.test_reads]}}

        def figures(of_fake, of_train, of_test, around_test=None):
            result = {"count": len(fake[of_fake]), "reference": len(train[of_train])}
            for part, features, rows in (("fake", fake[of_fake], of_fake), ("real", train[of_train], of_test)):
                result[part] = compare(features, self.test_features[of_test], around_test)
                for name, values in by_image[part].items():
                    result[part][name] = values[rows].cpu().nanmedian().item() if name == "nearest" else (
                        share(values[rows]))
            return result | {"ratio": ratio(result["fake"], result["real"])}

        everything = slice(None)
        result = figures(everything, everything, everything, self.around_test)
        result["fake"]["unseen"] = share(nearest(fakes, self.test.images, device=self.device)[0] < near)
        result["real"]["unseen"] = len(self.test.images) / (len(self.test.images) + len(self.train.images))
        classes = [{"name": name} | figures(asked == label, train_labels == label, self.test_labels == label)
                   for label, name in enumerate(self.train.classes)]
        result |= {"test": len(self.test.images), "classes": classes}
        return result | ({"vae": self.round_trip(vae, picked)} if vae else {})


def open_judge(config, device):
    """The `Judge` of the images that a `Config` names. Raises `UserError` when the images or their classifier are
    missing, or the model has other classes."""
    train, test = load_parts(config)
    if config.num_classes:
        check_classes(config, train)
    return Judge(train, test, find_classifier(train, config.data_dir, device))


def few(count, test_count):
    """A list of warnings: that `count` images to score, or `test_count` test images, are few."""
    lines = []
    if count < FEW:
        lines.append(f"warning: {count:,} images are few: below {FEW:,} these figures say more about the sample than "
                     "about the model")
    least, what = min((count, "images"), (test_count, "test images"))
    if least <= FEATURES:
        lines.append(f"warning: {least:,} {what} are too few for {FEATURES} features: the Fréchet distances mean "
                     f"nothing, also those of real images; use more than {FEATURES}")
    return lines


def cell(value, width=8, digits=3):
    """A number in a table, or "-" for NaN."""
    return f"{value:{width}.{digits}f}" if math.isfinite(value) else "-".rjust(width)


def report(result):
    """The result of `score` or `score_vae` as a table to print."""
    columns = [name for name in ("fake", "real", "vae") if name in result]
    lines = [f"{format(result['count'], ',') + ' images':30} " + "  ".join(f"{name:>8}" for name in columns)]
    for name, title in (("frechet", "Fréchet distance"), ("precision", "precision"), ("recall", "recall"),
                        ("density", "density"), ("coverage", "coverage"), ("accuracy", "read as asked for"),
                        ("nearest", "distance to a training image"), ("copies", "nearer than 99 % of real ones"),
                        ("unseen", "nearest is a test image"), ("psnr", "PSNR, dB")):
        if any(name in result[column] for column in columns):
            lines.append(f"{title:30} " + "  ".join(cell(result[column].get(name, math.nan)) for column in columns))
    lines[1] += f"   ratio {cell(result['ratio'], 0, 2)}"
    if "classes" in result:
        lines += ["", *class_table(result["classes"])]
    lines += ["", f"real: {result['reference']:,} training images, compared with the test images like the fakes"]
    if "fake" in result:
        lines.append("      (the last four rows of the first table: the test images themselves)")
    if "vae" in result:
        lines.append("vae:  the same training images after a round trip through the VAE; no fakes of its latents can "
                     "be closer")
    return "\n".join([*lines, *few(result["count"], result["test"])])


def class_table(classes):
    """The lines of the report about single classes: all of them, or the ROWS worst."""
    shown = classes
    if len(classes) > ROWS:  # least accurate first, then the largest ratio; NaN comes last
        shown = sorted(classes, key=lambda part: [value if math.isfinite(value) else math.inf for value in (
            part["fake"]["accuracy"], -part["ratio"])])[:ROWS]
    names = [" ".join(part["name"].split()) for part in shown]
    width = min(30, max(map(len, ["class", *names])))
    lines = [f"{'class':>{width}}  images  read as asked   Fréchet (real)   recall (real)  coverage (real)"]
    for name, part in zip(names, shown, strict=True):
        fake, real = part["fake"], part["real"]
        lines.append(f"{name if len(name) <= width else name[:width - 1] + '…':>{width}}  {part['count']:6,}"
                     f"  {cell(fake['accuracy'], 13)}"
                     f"  {cell(fake['frechet'], 7)} ({cell(real['frechet'], 5)})"
                     f"   {cell(fake['recall'], 5)} ({cell(real['recall'], 5)})"
                     f"    {cell(fake['coverage'], 5)} ({cell(real['coverage'], 5)})")
    if len(classes) > ROWS:
        lines.append(f"the {ROWS} of {len(classes):,} classes that are least read as asked for")
    return lines


def captioned(images, columns, captions, height):
    """A grid of images uint8 (N, C, H, W), enlarged to about `height` pixels each, with the captions (N strings of one
    or more lines) below them. A PIL image."""
    scale, gap = max(1, round(height / images.shape[2])), 2
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    H, W = images.shape[2:]
    foot = LINE * max(len(caption.splitlines()) for caption in captions)
    picture = grid(F.pad(images, (0, 0, 0, foot)), columns, gap, H + foot)
    for i, caption in enumerate(captions):
        left, top = gap + i % columns * (W + gap), gap + i // columns * (H + foot + gap)
        for row, line in enumerate(caption.splitlines()):
            write(picture, left + 4, top + H + 1 + row * LINE, line, W - 4)
    return picture


def nearest_picture(fakes, train, each=6, device="cpu"):
    """A PIL image of the fakes that are closest to an image of the `Dataset` train, each left of that image. It has a
    row for each class, or for the ROWS classes with the closest ones."""
    distances, indices = (part.cpu() for part in nearest(fakes, train.images, device=device))
    order = distances.argsort(stable=True)
    labels = train.labels[indices[order]]
    found = list(dict.fromkeys(labels.tolist()))[:ROWS]
    order = torch.cat([order[labels == label][:each] for label in sorted(found)])
    pairs = torch.cat([fakes[order], train.images[indices[order]]], dim=3)
    if are_numbers(train.classes):
        return grid(pairs, columns=each)
    return captioned(pairs, each, [train.classes[train.labels[k]] for k in indices[order]], height=56)


def worst_picture(fakes, labels, probs, names, count=40):
    """A PIL image of the fakes that are read least as their label, the worst first. Captions say the label and what is
    read.

    probs (N, num_classes): as from `embed`. names: of the classes."""
    order = probs[torch.arange(len(fakes)), labels].argsort(stable=True)[:count]
    between = " " if are_numbers(names) else "\n"
    captions = [f"{names[labels[k]]}{between}read {names[probs[k].argmax()]}" for k in order]
    return captioned(fakes[order], 10, captions, height=84)


def read_fakes(folder):
    """The images of a folder, uint8 (N, 3, H, W), and their labels int64 (N,).

    A label is the number at the end of a name, as in generator.py's 000000_7.png. The labels are None if no name has
    one. Raises `UserError` when only some have one, or when the images differ in size."""
    paths = list_images(folder)
    images = [np.array(read_image(path, "RGB")) for path in tqdm(paths, desc=str(folder), leave=False, disable=None)]
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{folder} holds {'images of several sizes' if images else 'no images'}: all should be of the "
                        "size that the classifier reads")
    labels = [re.search(r"_([0-9]{1,6})$", path.stem) for path in paths]
    if any(labels) and not all(labels):
        raise UserError(f"{folder} holds {labels.count(None):,} images whose names end in no label, such as "
                        f"{paths[labels.index(None)].name:.50}, beside others: all of them should, or none")
    labels = torch.tensor([int(label[1]) for label in labels]) if all(labels) else None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


def draw_fakes(model, config, labels):
    """Draws the images number 0, 1, ... of `config` with these labels int64 (N,): uint8 (N, C, H, W), on the CPU."""
    return torch.cat([images for _, images in draw_batches(model, config, labels)])


def open_folder(args, device):
    """The `Judge` for the images in the folder `--images`, these images, and their labels (or None)."""
    fakes, labels = read_fakes(args.images)
    given, size = given_flags(args, LatentConfig), tuple(fakes.shape[2:])
    if "dataset" not in given and size != DIGITS[1][1:]:
        raise UserError(f"the images in {args.images} have {size[0]} x {size[1]} pixels: name the real ones to compare "
                        "them with by --dataset and --data-dir (28 x 28 pixels stand for MNIST)")
    judge = open_judge(LatentConfig(**{"dataset": DIGITS[0]} | given, image_size=size), device)
    if labels is not None and labels.max() >= judge.num_classes:
        raise UserError(f"{args.images} holds an image whose name ends in _{labels.max()}, but the labels of "
                        f"{judge.train.name} are 0 to {judge.num_classes - 1}: name them as generator.py does, or "
                        "without a number")
    channels = judge.train.shape[0]
    return judge, torch.cat([recolour(part, channels) for part in fakes.split(1000)]), labels


def score_vae(args, device):
    """Scores the VAE `--vae` alone. If it is a folder, keeps the result in it."""
    given = given_flags(args, LatentConfig)
    if "dataset" not in given:
        raise UserError("--vae without --checkpoint scores the VAE alone: name the images to try it on by --dataset "
                        "and --data-dir, or the model that draws its latents by --checkpoint")
    path = Path(given.pop("vae")) / "round_trip.json"
    if path.parent.is_dir():
        check_output(path, b'"vae_hash"')
    vae = load_vae(args.vae, device)
    config = LatentConfig(**{"channels": vae.image_channels if vae.image_channels in (1, 3) else 0} | given)
    train, test = load_parts(config)
    check_shapes(args.vae, vae, train.shape)
    judge = Judge(train, test, find_classifier(train, config.data_dir, device))
    result = judge.score_vae(vae, min(args.count or 10_000, len(judge.train.images)))
    print(report(result))
    if path.parent.is_dir():
        result |= {"vae_hash": vae.hash_of()}
        write_atomically(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
        print(f"-> {path}")


def parse_args():
    parser = sampling_parser("Scores images against real ones: those that a checkpoint draws, or those in a folder. "
                             "The classifier that compares them comes with the repository for MNIST; "
                             "measure.classifier trains it for other images. --vae without --checkpoint scores what "
                             "the VAE makes of real images, and keeps the result in its folder as round_trip.json.",
                             LatentConfig)
    parser.add_argument("--images", type=some_path, metavar="DIR", help="score the images in this folder, as filled by "
                        "generator.py: a number at the end of a name, 000000_7.png, is the label")
    parser.add_argument("--count", type=int, help="images to draw (default: 10000, or as many as there are training "
                        "images). Scores of different counts do not compare")
    parser.add_argument("--equal", action="store_true", help="draw equally many of each class (default: as "
                        "generator.py does)")
    add_flags(parser, LatentConfig, ["dataset", "data_dir", *SHAPE_FLAGS])
    say_default(parser, ["dataset", "data_dir"], "as in training; for --images of 28 x 28 pixels, MNIST")
    say_default(parser, SHAPE_FLAGS, "as the VAE and the data have it; for --vae alone")
    parser.add_argument("--pictures", type=some_path, help="a folder to write nearest.png to, the fakes beside the "
                        "training images closest to them, and worst.png, those read least as what was asked for")
    args = parser.parse_args()
    given = given_flags(args, LatentConfig).keys() | {
        name for name in ("checkpoint", "count", "equal", "pictures") if getattr(args, name)}
    args.vae_alone = "vae" in given and "checkpoint" not in given and not args.images
    if args.count is not None and not 10 <= args.count <= 100_000:
        raise UserError(f"--count {args.count}: must lie between 10 and 100,000")
    if args.images:
        what, unused = "--images scores what lies in a folder", given - {"dataset", "data_dir", "pictures"}
    elif args.vae_alone:
        what = "--vae without --checkpoint scores the VAE alone, which draws nothing"
        unused = given - {"vae", "count", "dataset", "data_dir", *SHAPE_FLAGS}
    else:
        what, unused = "--image-size, --channels and --ground are for --vae alone", given & {*SHAPE_FLAGS}
    if unused:
        raise UserError(f"{what}: leave out {', '.join('--' + name.replace('_', '-') for name in sorted(unused))}")
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
        judge, fakes, labels = open_folder(args, pick_device(args.device))
    else:
        model, config = load_for_sampling(args, IMAGES)
        device = next(model.parameters()).device
        judge = open_judge(config, device)
        vae = config.find_vae(device) if config.kind == "latents" and config.latent_shape else None
        labels = judge.labels(args.count or min(10_000, len(judge.train.images)), args.equal)
        fakes = draw_fakes(model, config, labels)
        print(f"{args.checkpoint}: {config.sampler}, {config.sample_steps} steps, guidance {config.guidance:g}, "
              f"seed {config.seed}")
    print(report(judge.score(fakes, labels, vae)))
    if args.pictures:
        save_picture(args.pictures / "nearest.png", nearest_picture(fakes, judge.train, device=judge.device))
        if labels is not None:
            probs = embed(judge.classifier, fakes)[1].cpu()
            save_picture(args.pictures / "worst.png", worst_picture(fakes, labels, probs, judge.train.classes))


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
