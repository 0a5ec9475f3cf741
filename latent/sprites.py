"""The sprites of arXiv 1803.02991, as stills: game characters in colour, made of sheets that artists of the Liberated
Pixel Cup drew (CC-BY-SA 3.0 or GPL 3.0).

Each of 1,296 characters is another choice of body, bottomwear, topwear and hair. 1,000 are to train; the others, to
test, are made of the same parts, but no choice of the four occurs in both.
"""

from support.commands import UserError
from support.image_files import opened
from support.sizes import as_size, demand_memory

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import BRING_BACK, HERE, Dataset, load_dataset, resize

SHEETS = {  # layers, each on top of those before it, and the numbers of their files
    "body": range(6), "bottomwear": range(6), "topwear": range(6), "hair": range(6), "shoes": [1]}
CHARACTERS, TRAINING_CHARACTERS = 6**4, 1000  # a character is one sheet of each layer
CELL, ROWS, COLUMNS = 64, 21, 13  # a cell's pixels; a sheet's cells
FRAMES = 8  # of an action
# The row of each action seen from the left, and the columns of its 8 frames. The rows below show it from the front and
# from the right. The frames, and the split into training and test characters, are those of arXiv 1803.02991.
ACTIONS = {"walk": (9, (8, 1, 2, 3, 4, 5, 6, 7)), "cast": (1, (0, 1, 2, 3, 4, 5, 4, 6)),
           "slash": (13, (0, 1, 2, 3, 4, 5, 4, 0))}
DIRECTIONS = {"front": 1, "left": 0, "right": 2}


def load_images(name, data_dir="", train=True, image_size=(), channels=0, ground="black"):
    """As `dataset.load_dataset`, but it knows the sprites as well."""
    if name != "sprites":
        return load_dataset(name, data_dir, train, image_size, channels, ground)
    frames = read_sprites(Path(data_dir or HERE), train, as_size(image_size), channels)
    n, kinds, T = frames.shape[:3]
    return Dataset(name, frames.flatten(0, 2), torch.arange(kinds).repeat_interleave(T).repeat(n),
                   [f"{action} {direction}" for action in ACTIONS for direction in DIRECTIONS])


def read_sprites(data_dir, train, image_size=(), channels=0):
    """The frames of the characters to train or to test, uint8 (characters, 9, 8, C, H, W): 3 actions from 3 directions,
    as `ACTIONS` and `DIRECTIONS` order them, in 8 frames.

    Two pairs of these frames are the same in each slash, and one in each cast. 1.4 % of all images belong to two
    classes: under some tops, a cast and a slash begin alike. Raises `UserError` when the sheets are not there, are
    damaged or do not fit into memory.
    """
    if channels not in (0, 1, 3):
        raise UserError(f"channels is {channels}, but must be 1 (grey), 3 (RGB) or 0 (as the sprites are)")
    order = split_characters(train)
    kinds, T, size = len(ACTIONS) * len(DIRECTIONS), FRAMES, image_size or (CELL, CELL)
    demand_memory(len(order) * kinds * T, channels or 3, size)
    folder = next((folder for folder in (data_dir / "Sprites", data_dir) if (folder / "body").is_dir()), None)
    if not folder:
        raise UserError(f"{data_dir} does not hold the sprites: leave --data-dir out to use those that come with the "
                        "code")
    layers = [[cut_sheet(folder / layer / f"{k}.png") for k in numbers] for layer, numbers in SHEETS.items()]
    frames = torch.empty(len(order), kinds, T, channels or 3, *size, dtype=torch.uint8)
    place = {number: i for i, number in enumerate(order.tolist())}
    characters = dress(Image.new("RGBA", layers[0][0].size, "black"), layers)
    for number, image in enumerate(tqdm(characters, "making sprites", CHARACTERS, leave=False, disable=None)):
        if number in place:
            cells = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
            cells = cells.view(kinds * T, CELL, CELL, -1).permute(0, 3, 1, 2)  # (72, C, 64, 64)
            frames[place[number]] = resize(cells, size).unflatten(0, (kinds, T))
    return frames


def split_characters(train):
    """The numbers of the characters to train or to test, as arXiv 1803.02991 split and ordered them."""
    order = np.random.RandomState(423).permutation(CHARACTERS)
    return order[:TRAINING_CHARACTERS] if train else order[TRAINING_CHARACTERS:]


def dress(below, layers):
    """The image `below` (PIL, RGBA) under each choice of one image a layer, the last layer's choice changing first."""
    if not layers:
        yield below
        return
    for image in layers[0]:
        yield from dress(Image.alpha_composite(below, image), layers[1:])


def cut_sheet(path):
    """The 72 cells of a sheet that are frames, one below the other, as a PIL image of 64 x 4,608 pixels, RGBA."""
    with opened(path) as image:
        sheet = np.asarray(image.convert("RGBA"))
    if sheet.shape != (ROWS * CELL, COLUMNS * CELL, 4):
        raise UserError(f"{path} is of {sheet.shape[1]} x {sheet.shape[0]} pixels, but a sheet of sprites has "
                        f"{COLUMNS * CELL} x {ROWS * CELL}: {BRING_BACK}")
    cells = sheet.reshape(ROWS, CELL, COLUMNS, CELL, 4).swapaxes(1, 2)  # (rows, columns, 64, 64, 4)
    chosen = [cells[row + below, columns] for row, columns in ACTIONS.values() for below in DIRECTIONS.values()]
    return Image.fromarray(np.concatenate(chosen).reshape(-1, CELL, 4))
