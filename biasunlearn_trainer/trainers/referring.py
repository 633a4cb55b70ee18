"""The part of a trainer that chooses and makes the reference policy."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from biasunlearn_trainer.models import has_fresh_adapter, load_model
from biasunlearn_trainer.reference import (
    AdapterReference,
    ModelReference,
    PrecomputedReference,
    ReferenceBuilder,
)
from biasunlearn_trainer.sharding import is_fsdp, whole_weights

logger = logging.getLogger(__name__)


class ReferencePolicy:
    """What `UnlearnTrainer` does about the model that the policy is compared with.

    Attributes:
        reference: by stream, the reference policy; empty until `prepare_reference`.
    """

    reference: dict[str, AdapterReference | ModelReference | PrecomputedReference]

    def _begin_reference(self, reference_model: str | PreTrainedModel | None) -> None:
        """Check the choice while the model is as it was given."""
        self._reference_model = reference_model
        self._has_fresh_adapter = self._finds_fresh_adapter()
        self.reference = {}
        self._check_reference()

    @property
    def has_reference_model(self) -> bool:
        """Whether the reference is another model than the policy before unlearning."""
        return self._reference_model is not None or self.args.reference_model_name_or_path is not None

    def reference_mode(self, stream: str) -> str:
        """`adapter`, `precomputed` or `model`: what `args.reference` comes to on a stream."""
        has_own_adapter = self._has_fresh_adapter and not self.has_reference_model
        mode = self.args.reference
        if mode == "auto":
            mode = "adapter" if has_own_adapter else "precomputed"
        if mode == "precomputed" and self.references(self.args)[stream] == "logits":
            return "adapter" if has_own_adapter else "model"  # whole distributions are not kept
        return mode

    def _check_reference(self) -> None:
        other = self.has_reference_model
        needs = self.references(self.args)
        if not needs:
            if other:
                raise ValueError(f"{type(self).__name__} with these settings uses no reference policy; one was given.")
            return
        if self.args.reference == "adapter" and (other or not isinstance(self.model, PeftModel)):
            raise ValueError(
                "reference='adapter' switches the model's own PEFT adapter off: it needs a `peft_config` (or use_peft) "
                "and no other reference model. Use 'precomputed' or 'model'."
            )
        if self.args.reference == "adapter" and not self._has_fresh_adapter:
            logger.warning(
                "The model's adapter is trained already; reference='adapter' compares with the base below it."
            )
        if self.args.reference == "precomputed" and "logps" not in needs.values():
            raise ValueError(
                "reference='precomputed' keeps one number per row, but a KL needs the reference's whole distribution. "
                "Use 'adapter' (with LoRA) or 'model'."
            )

    def prepare_reference(self) -> None:
        """Makes the reference policy of each stream that needs one, from the model as it is now; once."""
        modes = {stream: self.reference_mode(stream) for stream in self.references(self.args)}
        if not modes or self.reference:
            return
        kept = {name: ref for name, ref in self._kept_reference().items() if modes.get(name) == "precomputed"}
        other = self._reference_model or self.args.reference_model_name_or_path
        if isinstance(other, str) and modes.keys() - kept.keys():
            other = self._load_reference(other)
        if other is None and is_fsdp() and {"precomputed", "model"} & set(modes.values()):
            other = self._policy_loaded_whole()
        made: dict[str, Any] = {}
        if "adapter" in modes.values():
            made["adapter"] = AdapterReference()
        if any(mode == "precomputed" and stream not in kept for stream, mode in modes.items()):
            builder = self._reference_builder(other if other is not None else self.model)
        if "model" in modes.values():
            made["model"] = ModelReference(other) if other is not None else ModelReference.of(self.model)
        self.reference = kept | {
            stream: PrecomputedReference(builder.table(stream, self.reference_rows(stream)))
            if mode == "precomputed"
            else made[mode]
            for stream, mode in modes.items()
            if stream not in kept
        }

    def _finds_fresh_adapter(self) -> bool:
        return has_fresh_adapter(self.model)

    def _load_reference(self, name_or_path: str) -> PreTrainedModel:
        return load_model(name_or_path, dtype=self.model.dtype)

    def _policy_loaded_whole(self) -> PreTrainedModel:
        """The policy before unlearning, once more: FSDP leaves weights on the first process only until training begins.

        Raises:
            ValueError: where the policy is a trained adapter, which its base's name does not bring back.
        """
        if isinstance(self.model, PeftModel) and not self._has_fresh_adapter:
            raise ValueError(
                "Under FSDP a trained adapter cannot be its own reference. Give a reference_model, or launch with "
                "zero2.yaml."
            )
        with whole_weights():
            return self._load_reference(self.model.config._name_or_path)

    def _reference_builder(self, model: nn.Module) -> ReferenceBuilder:
        return ReferenceBuilder(
            model.to(self.args.device),
            self.collator,
            self.accelerator,
            self.args.per_device_eval_batch_size,
            self.args.reference_cache_dir,
        )
