"""Pictures that a set names by address alone, and a user downloaded: a folder of files called by the row's number.

The published loaders of such sets save row 17's picture as `images/17.jpg`, whatever came back: of addresses years old
many are gone, and a file may hold a page that says so. What does not open is left out and counted.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from biasunlearn_trainer.data_builders.images import image_fault
from biasunlearn_trainer.data_builders.schema import DECODING_THREADS, Faults

logger = logging.getLogger(__name__)

FOLDER = "images"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def find_numbered(folder: str | Path, numbers: Sequence[int], faults: Faults) -> dict[int, Path]:
    """Finds the pictures of rows that open.

    Args:
        folder: with files `0.jpg`, `1.png`, ...: the row's number in the published file, counted from 0.
        numbers: the rows' numbers.
        faults: where it is noted that the folder is not there, has two files of one number, or no picture that opens.

    Returns:
        By number, the absolute path; rows without a picture that opens are missing, and their count is logged.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        faults.add(
            f"there is no folder of pictures at {folder}. The set names its pictures by address: download them, row "
            "number N (counted from 0) as N.jpg or N.png, or name their folder with `pictures`"
        )
        return {}
    named: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.stem.isdecimal() and path.suffix.lower() in SUFFIXES:
            if int(path.stem) in named:
                faults.add(f"{named[int(path.stem)].name} and {path.name} are both pictures of row {int(path.stem)}")
            named[int(path.stem)] = path
    wanted = [number for number in numbers if number in named]
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        broken = list(pool.map(lambda number: image_fault(named[number]), wanted))
    found = {number: named[number] for number, fault in zip(wanted, broken, strict=True) if fault is None}
    if not found:
        faults.add(f"no picture in {folder} opens: {len(wanted)} are named by a row's number")
    elif len(found) < len(numbers):
        logger.warning(
            "%s: %d of %d rows have a picture; %d have no file, %d files do not open. The others are left out.",
            *(folder, len(found), len(numbers), len(numbers) - len(wanted), len(wanted) - len(found)),
        )
    return found
