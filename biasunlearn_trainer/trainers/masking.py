"""The part of a trainer that keeps its forgetting to salient weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn

from biasunlearn_trainer.saliency import GradientMask, SaliencyBuilder, SaliencyMask
from biasunlearn_trainer.saliency.building import weights_digest
from biasunlearn_trainer.saliency.gradients import RestoreProtected
from biasunlearn_trainer.saliency.mixed_rows import MixedRows
from biasunlearn_trainer.saliency.rows import InseparableRows
from biasunlearn_trainer.sharding import is_sharded
from biasunlearn_trainer.trainers.config import BUILT_MASKS, UnlearnConfig

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


class SaliencyMasking:
    """What `UnlearnTrainer` does with a saliency mask.

    Attributes:
        saliency_mask: the mask of the run, once it was given or made; None where there is none.
        masked_streams: the streams whose gradients a mask of scope `forget` covers.
    """

    masked_streams: ClassVar[tuple[str, ...]] = ("forget",)
    saliency_mask: SaliencyMask | None = None

    @classmethod
    def check_masking(cls, args: UnlearnConfig, mask: Any | None = None) -> None:
        """Raises a ValueError where gradients cannot be masked, before a model is loaded."""
        if (mask is not None or args.saliency_mask is not None) and is_sharded():
            raise ValueError(
                "A saliency mask needs whole weights on every process: ZeRO-3 and FSDP leave each with a part of them. "
                "Launch with ddp.yaml or zero2.yaml, or leave `saliency_mask` out."
            )

    def _begin_masking(
        self, model: nn.Module, mask: SaliencyMask | str | os.PathLike | None, preserve: Rows | None
    ) -> None:
        """Take the mask or what it is made of; of a LoRA adapter only B is trained then."""
        mask = mask if mask is not None else self.args.saliency_mask
        self._given_mask, self._preserve = mask, preserve
        self._gradient_mask: GradientMask | None = None
        self._inseparable: str | None = None
        if preserve is not None and mask not in BUILT_MASKS:
            raise ValueError(
                "A preserve_dataset is what a mask is built with, and none is: set `saliency_mask` to 'fisher' or "
                "'random', or leave it out."
            )
        if mask is None:
            return
        frozen = [value for name, value in model.named_parameters() if "lora_A" in name or "lora_embedding_A" in name]
        for value in frozen:
            value.requires_grad_(False)
        if frozen:
            # Where B is 0, as at the start, A has no gradient, so no saliency can be measured for it.
            logger.info("With a saliency mask the adapter's B matrices are trained, its A matrices stay as drawn.")

    def prepare_saliency(self) -> None:
        """Makes or loads the mask for the weights as they are now, and puts it to work; once."""
        if self._given_mask is None or self._gradient_mask is not None:
            return
        self.saliency_mask = self._made_mask()
        self._gradient_mask = GradientMask(self.model, self.saliency_mask, self.args.mask_scope)
        if self.args.mask_scope == "update":
            self.add_callback(RestoreProtected(self._gradient_mask))
        logger.info("The saliency mask lets %.1f %% of the weights through.", 100 * self.saliency_mask.density)

    def _made_mask(self) -> SaliencyMask:
        given, args, kept = self._given_mask, self.args, self._kept_mask()
        if kept is not None:
            mask = SaliencyMask.load(kept)
            # The weights that it was made from are those of the run's start; of these only the names are left.
            mask.check(self.model, mask.provenance.get("model", ""))
            return mask
        if given not in BUILT_MASKS:
            mask = given if isinstance(given, SaliencyMask) else SaliencyMask.load(given)
            mask.check(self.model, self._counted_weights())
            return mask
        builder = SaliencyBuilder(
            self.model,
            self.collator,
            self.accelerator,
            args.saliency_settings(),
            args.saliency_cache_dir,
            self._counted_weights(),
        )
        mask = builder.mask(self.train_dataset.streams["forget"].rows, self._preserved_rows())
        return mask.shuffled(args.saliency_seed) if given == "random" else mask

    def _counted_weights(self) -> str:
        """The digest that a mask is made for; a fresh adapter counts in it, and in no other digest."""
        known = None if isinstance(self.model, PeftModel) else self._weights_before()
        return known or weights_digest(self.model)

    def _preserved_rows(self) -> Rows:
        """What the mask protects: the preserve set, or else the retain set, or else the utility set."""
        if self._preserve is not None:
            return self._preserve
        sets = self.train_dataset.streams
        for name in ("retain", "utility"):
            if name in sets:
                return sets[name].rows
        raise ValueError(
            f"saliency_mask={self._given_mask!r} compares what is forgotten with what is to be preserved, and there is "
            "no such set. Give a preserve_dataset."
        )

    def masking(self, batch: Mapping[str, Tensor], num_masked: int) -> AbstractContextManager:
        """Inside, what the model computes for the first rows of a batch gets its gradients through the mask.

        Raises:
            InseparableRows: where these are some of the rows and the model does not let them be told apart.
        """
        if num_masked == 0:
            return nullcontext()
        if num_masked == len(batch["input_ids"]):
            return self._gradient_mask.covering()
        if self._inseparable is not None:
            raise InseparableRows(self._inseparable)
        return MixedRows(self.model, self._gradient_mask.salient, batch, num_masked).running()

    def is_masked(self, stream: str) -> bool:
        """Whether a mask lies over what a stream alone sends back."""
        has_mask = self._gradient_mask is not None and self.args.mask_scope == "forget"
        return has_mask and stream in self.masked_streams

    @property
    def mixes_masked(self) -> bool:
        """Whether masked streams may go through the model together with others, as far as is known.

        Layers that are run again for the backward pass do not know then which rows are masked, and to compiled ones
        the modules of such a pass are new ones in every step.
        """
        runs_again = getattr(self.model, "is_activation_checkpointing", False)
        return self._inseparable is None and not runs_again and not self.args.torch_compile

    def mask_apart(self, reason: str) -> None:
        """From the next step on no masked stream goes through the model together with others."""
        if self._inseparable is None:
            self._inseparable = reason
            logger.info("Masked rows go through the model in passes of their own: %s.", reason)
