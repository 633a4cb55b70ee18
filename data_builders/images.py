"""Pictures of a row as they are stored: where a path points, what the file holds, whether it opens."""

import difflib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from datasets import Dataset
from datasets.features.image import image_to_bytes


def resolve_path(path: str, folder: Path | None, allow_outside: bool = False) -> str:
    """Returns the absolute path of a picture named in a data file.

    Args:
        path: As written in the file: relative to `folder`, or absolute.
        folder: The data file's folder; None where there is none (a Hub set), and then only absolute paths resolve.
        allow_outside: Let a relative path leave `folder` by "..".

    Raises:
        ValueError: A URL, a relative path that leaves the folder, or one without a folder to start from.
    """
    if "://" in path:
        raise ValueError(f"image {path!r} is a URL; pictures are not fetched: download it and write its path")
    if os.path.isabs(path):
        return path
    if folder is None:
        raise ValueError(f"image {path!r} is a relative path, but the set has no folder of its own")
    folder = Path(os.path.abspath(folder))
    resolved = Path(os.path.normpath(folder / path))
    if not allow_outside and not resolved.is_relative_to(folder):
        raise ValueError(
            f"image {path!r} lies outside the data file's folder {folder}; move it there, or pass allow_outside=True"
        )
    return str(resolved)


def nearest_files(path: str | Path, count: int = 3) -> list[str]:
    """Returns the names in `path`'s folder that are most like its own; none where the folder does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        return []
    names = sorted(entry.name for entry in os.scandir(path.parent))
    return difflib.get_close_matches(path.name, names, n=count, cutoff=0.4)


def image_bytes(image: Any) -> bytes:
    """Returns the encoded bytes of an undecoded picture: a path, `{"bytes", "path"}`, or a PIL image (as PNG).

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(image, PIL.Image.Image):
        return image_to_bytes(image)
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return image["bytes"]
        image = image["path"]
    return Path(image).read_bytes()


def image_key(image: Any) -> str | bytes | int:
    """Returns a key under which the same stored picture is met again: its path, or the digest of its bytes."""
    if isinstance(image, PIL.Image.Image):
        return id(image)
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return content_digest(image["bytes"])
        image = image.get("path")
    return str(image)


def content_digest(content: bytes) -> bytes:
    """Returns the 16-byte BLAKE2 digest of a picture's encoded bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def image_fault(image: Any) -> str | None:
    """Returns why a stored picture cannot be used, or None. Decodes it whole, so that a cut-off file is found."""
    if isinstance(image, PIL.Image.Image):
        return None
    path = image.get("path") if isinstance(image, dict) else image
    embedded = isinstance(image, dict) and image.get("bytes") is not None
    if not embedded and not isinstance(path, str | os.PathLike):
        return f"`images` holds {image!r:.60}; expected a path or a picture"
    if not embedded and not os.path.exists(path):
        near = ", ".join(nearest_files(path))
        return f"image {str(path)!r} does not exist" + (f"; nearest: {near}" if near else "")
    label = repr(str(path)) if path else "stored in the row"
    # Pillow's decoders raise many types (OSError, SyntaxError, ValueError, DecompressionBombError, struct.error).
    try:
        with PIL.Image.open(io.BytesIO(image["bytes"]) if embedded else path) as picture:
            picture.load()
    except Exception as err:
        return f"image {label} cannot be read: {err or type(err).__name__}"
    return None


def picture_file(image: Any, folder: Path | None = None) -> str:
    """Returns the path of a stored picture; one that is bytes is written to a file first, named by what it holds.

    Args:
        image: a path, or `{"bytes", "path"}`.
        folder: for pictures without a file of their own; by default one in the cache of `datasets`.
    """
    if not isinstance(image, dict):
        return str(image)
    if image.get("bytes") is None:
        return str(image["path"])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "biasunlearn_pictures" if folder is None else folder
    file = folder.absolute() / content_digest(image["bytes"]).hex()
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        partial.write_bytes(image["bytes"])
        os.replace(partial, file)
    return str(file)


def undecoded(dataset: Dataset | Iterable[dict]) -> Iterator[dict]:
    """Yields the rows with pictures as stored, `{"bytes", "path"}`; rows of a plain list come as they are."""
    if isinstance(dataset, Dataset):
        # Arrow rows are never decoded, and need no cast: that would copy every picture into the cache.
        for batch in dataset.with_format("arrow").iter(batch_size=256):
            yield from batch.to_pylist()
    else:
        yield from dataset
