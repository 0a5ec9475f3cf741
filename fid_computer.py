"""The Fréchet Inception Distance (FID, arXiv 1706.08500): how far fake images lie from real ones; 0 is no distance."""

from support import parallel
from support.commands import Parser, UserError, add_device_flag, in_full_precision, run, some_path
from support.files import check_output
from support.image_files import list_images, read_batches
from support.stats import read_stats, save_stats

import argparse
import http.client
import os
import socket
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

# TensorFlow's Inception of 2015-12-05, which defines the score, as ported by pytorch-fid. The name ends in its SHA-256.
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_NAME = WEIGHTS_URL.rpartition("/")[2]


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """The squared Fréchet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (1706.08500).

    Means (D,) and covariances (D, D), float64. Returns a float, at least 0.

    No matrix root is needed. With C = F F^T, the eigenvalues of C1 C2 are the squared singular values of F1^T F2, whose
    sum is therefore the trace. It is exact to rounding for singular covariances too, where roots of eigenvalues are
    not: one that should be 0 comes out as 1e-16, and its root as 1e-8.
    """
    root_trace = np.linalg.svd(psd_factor(cov_1).T @ psd_factor(cov_2), compute_uv=False).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * root_trace
    return max(float(distance), 0.0)


def psd_factor(cov):
    """F (D, rank) with F F^T = `cov`, a covariance (D, D). Eigenvalues that are 0 but for rounding are dropped."""
    values, vectors = np.linalg.eigh(cov)
    keep = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def statistics(features):
    """Mean (D,) and unbiased covariance (D, D), both float64, of features (N, D), N at least 2."""
    features = np.asarray(features)
    if not np.isfinite(features).all():
        raise UserError("the network's features are not finite numbers: are its weights damaged?")
    return features.mean(axis=0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def compute_features(paths, extract, batch_size, title=None):
    """The features float32 (N, D) of N image files. Each process reads its shard.

    extract: the network, a function from a list of B images, each uint8 (3, H, W) of any size, to a tensor (B, D).
    """
    features, own = [], paths[parallel.share(len(paths))]
    with tqdm(total=len(own), desc=title, unit=" images", leave=False, disable=parallel.RANK > 0 or None) as bar:
        for images in read_batches(own, batch_size):
            features.append(extract(images).float().cpu().numpy())
            bar.update(len(images))
    return parallel.gather(np.concatenate(features) if features else np.empty((0, 0)))


def inception_extractor(dims, weights, device):
    """FID's Inception as a function for `compute_features`; D = `dims` is 64, 192, 768 or 2048.

    weights: its file; None: the one in torch hub's cache, downloaded if need be.
    Raises `UserError` when the weights cannot be had or are not those of this network.
    """
    with parallel.rank_0_first():
        weights = weights or cached_weights()
    from pytorch_fid import inception  # here, since torchvision comes with it and takes seconds

    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # The constructor downloads the weights by itself and takes no others, so it is handed ours in that call.
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *args, **kwargs: state):
            network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).to(device).eval()
    except OSError as error:
        raise UserError(f"{weights} cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged file fails in too many ways to list
        raise UserError(f"{weights} does not hold the weights of FID's Inception: take {WEIGHTS_URL}") from None

    @in_full_precision()
    def extract(images):
        # What the network does first, here, since images of several sizes cannot be stacked before
        batch = torch.cat([interpolate(image[None].to(device) / 255, size=(299, 299), mode="bilinear",
                                       align_corners=False) for image in images])
        return network(batch)[0].mean(dim=(2, 3))  # (B, D, h, w) -> (B, D)

    return extract


def cached_weights():
    """The file of Inception's weights in torch hub's cache, downloaded (96 MB) when it is not there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if file.is_file():
        return file
    print(f"downloading {WEIGHTS_NAME} into {file.parent} ...", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that swallows packets must not hang the command
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(file), hash_prefix="6726825d", progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(f"Inception's weights are not at {file} and cannot be downloaded ({error!s:.100}): fetch "
                        f"{WEIGHTS_URL} elsewhere and put it there, or name it with --weights FILE") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return file


def parse_args():
    parser = Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prints the Fréchet Inception Distance (FID, arXiv 1706.08500) of a folder of fake images against\n"
                    "a folder of real ones: lower is better, 0 is no distance.",
        epilog=f"""\
A folder's images may be of any size; its subfolders are not read. In place of a folder, give a .npz file of its
statistics, from --save-stats or from pytorch-fid, which does not say of how many images: shown as ?.

Compare scores of equal counts only, 10,000 or more if you can: FID falls as images are added. Digits, which Inception
has never seen, are better scored by python -m measure.score --images DIR.

Inception's weights (96 MB) are downloaded once, to hub/checkpoints in torch hub's cache, ~/.cache/torch or $TORCH_HOME.
On a machine without internet put them there, or name them with --weights:
  {WEIGHTS_URL}

examples:
  python fid_computer.py                                        images/fake against images/real
  python fid_computer.py --fake samples --save-stats mnist.npz  keeps the statistics of images/real ...
  python fid_computer.py --fake other --real mnist.npz          ... so that they need not be computed again""")
    parser.add_argument("--fake", type=some_path, default=Path("images/fake"), metavar="DIR",
                        help="the folder to score, or its statistics (default: %(default)s)")
    parser.add_argument("--real", type=some_path, default=Path("images/real"), metavar="DIR",
                        help="the folder to score it against, or its statistics (default: %(default)s)")
    parser.add_argument("--save-stats", type=some_path, metavar="FILE.npz",
                        help="keep the statistics of the real folder in this file, for a later --real FILE.npz")
    parser.add_argument("--dims", type=int, default=2048, choices=(64, 192, 768, 2048),
                        help="features per image: the FID of papers has 2048; fewer come from earlier layers, "
                             "suit fewer images, and compare with nothing else (default: %(default)s)")
    parser.add_argument("--weights", type=some_path, metavar="FILE",
                        help="the weights of Inception (default: see below)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N",
                        help="images at a time: affects the speed, not the score (default: %(default)s)")
    add_device_flag(parser)
    return parser.parse_args()


@parallel.one_for_all()
def main():
    args = parse_args()
    target = args.save_stats
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, but must be at least 1")
    if target and target.suffix != ".npz":
        raise UserError(f"--save-stats {target} cannot be written: it must end in .npz")
    if target:
        check_output(target, b"dims.npy", [args.fake])
    if target and args.real.suffix == ".npz":
        raise UserError(f"--save-stats keeps the statistics of a folder, but --real is the file {args.real}")
    device = parallel.join(args.device)
    if os.path.realpath(args.real) == os.path.realpath(args.fake):
        parallel.say(f"warning: --real and --fake are both {args.fake}: this is the distance of images to themselves")

    # Both inputs are looked at before the network is loaded: a wrong name should not cost minutes.
    inputs = {}
    for path in (args.real, args.fake):
        inputs[path] = found = read_stats(path, args.dims) if path.suffix == ".npz" else list_images(path)
        if isinstance(found, list) and len(found) < 2:
            raise UserError(f"{path} holds {len(found) or 'no'} image files, but the score needs at least 2")
    extract = None
    for path, found in inputs.items():
        if isinstance(found, list):
            extract = extract or inception_extractor(args.dims, args.weights, device)
            features = compute_features(found, extract, args.batch_size, title=str(path))
            inputs[path] = (*statistics(features), len(features))
            if target and path == args.real and not parallel.RANK:
                save_stats(target, *inputs[path])
        count = inputs[path][2]
        if count is not None and count <= args.dims:
            parallel.say(f"warning: {count:,} images in {path} are too few for {args.dims} features: their covariance "
                         f"is singular and the score biased; have more than {args.dims:,}, or lower --dims")

    (*fake, fake_count), (*real, real_count) = inputs[args.fake], inputs[args.real]
    fake_count, real_count = ("?" if count is None else f"{count:,}" for count in (fake_count, real_count))
    print(f"FID {frechet_distance(*fake, *real):.4f}  ({args.dims} Inception features; "
          f"{fake_count} images in {args.fake} against {real_count} in {args.real})")


if __name__ == "__main__":
    run(main)
