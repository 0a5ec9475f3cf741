"""Folders of images by their numbers, {index:06d}_{label}.png, and a note of what made them."""

from support import parallel
from support.commands import UserError
from support.files import make_dir, write_atomically
from support.image_files import list_images

import json
import os
import re


def open_folder(folder, count, settings, of):
    """Makes `folder` for images that `settings` (a dict) made, or checks that those in it were made by the same:
    images of two kinds in one folder would have a score that means nothing. Raises `UserError`.

    of: the class of settings, which has the value of a setting that an older note does not name.
    Returns this process's share of the indices below `count` that have no image in it yet.
    """
    with parallel.rank_0_first():
        make_dir(folder)
        note, images = folder / "settings.json", list_images(folder)
        strange = [image for image in images if not re.fullmatch(r"[0-9]{6}_[0-9]+\.png", image.name)]
        if strange or (images and not os.path.lexists(note)):
            raise UserError(f"{folder} holds images of unknown origin ({(strange or images)[0].name:.50}): remove the "
                            "folder, or choose another one")
        if os.path.lexists(note):
            try:
                before = json.loads(note.read_bytes())
                changed = [name for name, value in settings.items()
                           if before.get(name, getattr(of, name, None)) != value]
            except (OSError, ValueError, AttributeError, RecursionError):
                raise UserError(f"{note} does not say what made the images beside it: remove the folder, or choose "
                                "another one") from None
            if changed:
                raise UserError(f"the images in {folder} were made with another {', '.join(changed)}: remove the "
                                "folder, or choose another one")
        elif not parallel.RANK:
            write_atomically(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        if len(images) > count:
            parallel.say(f"{folder} holds {len(images):,} images already, and all of them will be scored: for a score "
                         f"of {count:,}, choose another folder")
    there = {image.name[:6] for image in images}
    todo = [index for index in range(count) if f"{index:06d}" not in there]
    parallel.wait()  # none writes an image before all have looked
    return todo[parallel.share(len(todo))]
