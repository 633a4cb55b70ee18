"""Which part of what a model computes for a batch belongs to which row of it.

Activations come in several layouts: a row each, an image each, a patch each, a completion token each. In all of them a
row's entries lie together, one row after the other, so that their numbers say it all.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from biasunlearn_trainer.models import base_model

Counts = tuple[int, ...]
# Patches that a vision tower merges into one token: 1, or a square of so many.
MERGED = (1, 4, 9, 16)


class InseparableRows(Exception):
    """What belongs to which row of a batch cannot be told, or not by what is known here."""


class Layouts:
    """How many entries along the first dimension belong to each row of a batch, by the size of that dimension.

    Args:
        batch: what `CompletionCollator` returns, with `num_images` (B,) where it has pictures.
    """

    def __init__(self, batch: Mapping[str, Tensor]):
        self.num_rows, length = batch["input_ids"].shape
        self._completions: Counts = tuple(batch["completion_mask"][:, 1:].sum(-1).tolist())
        self.pictured = "pixel_values" in batch
        self._images = tuple(batch["num_images"].tolist()) if self.pictured else ()
        known = {(1,) * self.num_rows, (length,) * self.num_rows, *([self._images] if self._images else [])}
        if "image_grid_thw" in batch:
            patches = batch["image_grid_thw"].prod(-1).split(list(self._images))
            numbers = [int(of_row.sum()) for of_row in patches]
            known |= {tuple(n // k for n in numbers) for k in MERGED if not any(n % k for n in numbers)}
        sizes = [sum(counts) for counts in known]
        self._known = {sum(counts): counts for counts in known if sizes.count(sum(counts)) == 1}

    def of(self, size: int, is_head: bool) -> Counts:
        """Entries of each row.

        Args:
            size: of the first dimension.
            is_head: of an activation of the output head, which may run on completion positions only.

        Raises:
            InseparableRows: where no layout, or more than one, has this size.
        """
        if is_head and size == sum(self._completions):
            return self._completions
        if size not in self._known:
            raise InseparableRows(f"no layout of {self.num_rows} rows, or more than one, has {size} entries")
        return self._known[size]

    @property
    def one_each(self) -> bool:
        """Whether rows and pictures, if there are any, come in equal numbers, one to one."""
        return not self._images or self._images == (1,) * self.num_rows


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The output head, and what an adapter put into it."""
    base = base_model(model)
    for owner in (base, getattr(base, "language_model", None)):
        if owner is not None and owner.get_output_embeddings() is not None:
            return set(owner.get_output_embeddings().modules())
    return set()
