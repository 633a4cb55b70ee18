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
)
from biasunlearn_trainer.reference_building import ReferenceBuilder
from biasunlearn_trainer.reference_states import STATES_DTYPES, StatesReference, StatesUnavailable
from biasunlearn_trainer.sharding import is_fsdp, is_sharded, whole_weights

logger = logging.getLogger(__name__)


class ReferencePolicy:
    """What `UnlearnTrainer` does about the model that the policy is compared with.

    Attributes:
        reference: by stream, the reference policy; empty until `prepare_reference`.
        known_weights: `model_hash` of the model before unlearning, where whoever built the trainer has taken it and
            changes nothing before `train`: it reads every weight, a second a gigabyte.
    """

    known_weights: str | None = None
    reference: dict[str, AdapterReference | ModelReference | PrecomputedReference | StatesReference]

    def _begin_reference(self, reference_model: str | PreTrainedModel | None) -> None:
        """Check the choice while the model is as it was given."""
        self._reference_model = reference_model
        self._has_fresh_adapter = self._finds_fresh_adapter()
        self.reference = {}
        self._without_states: set[str] = set()
        self._check_reference()

    @property
    def has_reference_model(self) -> bool:
        """Whether the reference is another model than the policy before unlearning."""
        return self._reference_model is not None or self.args.reference_model_name_or_path is not None

    def reference_mode(self, stream: str) -> str:
        """`adapter`, `precomputed` or `model`: what `args.reference` comes to on a stream."""
        mode = self._wished_mode(stream)
        is_whole = self.references(self.args)[stream] == "logits"
        if mode == "precomputed" and is_whole and (is_sharded() or stream in self._without_states):
            return "adapter" if self._has_own_adapter else "model"
        return mode

    @property
    def _has_own_adapter(self) -> bool:
        return self._has_fresh_adapter and not self.has_reference_model

    def _wished_mode(self, stream: str) -> str:
        """What would be best for a stream, if hidden states can be kept."""
        if self.args.reference != "auto":
            return self.args.reference
        is_whole = self.references(self.args)[stream] == "logits"
        if self._has_own_adapter:
            return "adapter"
        return "model" if is_whole and not self._reads_every_row(stream) else "precomputed"

    def positions(self, stream: str) -> str:
        """The positions of a stream that the loss reads: `completion`, or `all_text` for a KL that is taken there."""
        is_whole = self.references(self.args).get(stream) == "logits"
        return getattr(self.args, "kl_positions", "completion") if is_whole else "completion"

    def _reads_every_row(self, stream: str) -> bool:
        """Whether the run is long enough to come by each of a stream's rows.

        One that is not would run more of them through the reference beforehand than a second model does on the way.
        """
        args, sets = self.args, self.train_dataset
        draws = args.max_steps * sets.rows_per_step if args.max_steps > 0 else args.num_train_epochs * len(sets)
        return draws * sets.rows_per_draw[stream] >= len(sets.streams[stream].rows)

    def _needs(self) -> dict[str, str]:
        """What the method needs of the reference, by stream; without streams that these sets do not make."""
        return {name: need for name, need in self.references(self.args).items() if name in self.train_dataset.streams}

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
        without = [
            name
            for name, need in self._needs().items()
            if need == "logits" and self._wished_mode(name) == "precomputed"
        ]
        if without and is_sharded():
            logger.warning(
                "Hidden states are not kept under ZeRO-3 and FSDP: the reference of the KL on %s is run at every step, "
                "reference=%r is used instead.",
                " and ".join(without),
                self.reference_mode(without[0]),
            )
        if self.args.reference_dtype is not None and (
            "logits" not in needs.values() or self.args.reference not in ("auto", "precomputed")
        ):
            raise ValueError(
                "`reference_dtype` is that of the hidden states that a KL's precomputed reference is kept as; here "
                "there are none. Leave it out, or set reference to 'precomputed'."
            )

    def prepare_reference(self) -> None:
        """Makes the reference policy of each stream that needs one, from the model as it is now; once."""
        modes = {stream: self.reference_mode(stream) for stream in self._needs()}
        if not modes or self.reference:
            return
        kept = {name: ref for name, ref in self._kept_reference().items() if modes.get(name) == "precomputed"}
        other = self._reference_model or self.args.reference_model_name_or_path
        if isinstance(other, str) and modes.keys() - kept.keys():
            other = self._load_reference(other)
        if other is None and is_fsdp() and {"precomputed", "model"} & set(modes.values()):
            other = self._policy_loaded_whole()
        made: dict[str, Any] = {}
        precomputed = [stream for stream, mode in modes.items() if mode == "precomputed" and stream not in kept]
        if precomputed:
            builder = self._reference_builder(other if other is not None else self.model)
            made = {stream: self._precomputed(builder, stream) for stream in precomputed}
        models: dict[str, AdapterReference | ModelReference] = {}
        for stream in modes.keys() - kept.keys():
            if made.get(stream) is None:
                mode = self.reference_mode(stream)
                if mode not in models:
                    models[mode] = AdapterReference() if mode == "adapter" else self._second_model(other)
                made[stream] = models[mode]
        self.reference = {stream: (kept | made)[stream] for stream in modes}

    def _precomputed(self, builder: ReferenceBuilder, stream: str) -> PrecomputedReference | StatesReference | None:
        """A stream's table or hidden states; None where it cannot be kept, which is said."""
        rows = self.reference_rows(stream)
        if self.references(self.args)[stream] == "logps":
            return PrecomputedReference(builder.table(stream, rows))
        try:
            dtype = STATES_DTYPES.get(self.args.reference_dtype)
            return builder.states(stream, rows, self.positions(stream), dtype)
        except StatesUnavailable as why:
            self._without_states.add(stream)
            logger.warning("%s: reference=%r is used instead.", why, self.reference_mode(stream))
            return None

    def _second_model(self, other: PreTrainedModel | None) -> ModelReference:
        return ModelReference(other) if other is not None else ModelReference.of(self.model)

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

    def _weights_before(self) -> str | None:
        """`known_weights` where building the trainer cannot have changed them, as some adapters and casts do."""
        has_own = not isinstance(self.model, PeftModel) or self._has_fresh_adapter
        return self.known_weights if has_own and not getattr(self.model, "is_quantized", False) else None

    def _reference_builder(self, model: nn.Module) -> ReferenceBuilder:
        return ReferenceBuilder(
            model.to(self.args.device),
            self.collator,
            self.accelerator,
            self.args.per_device_eval_batch_size,
            self.args.reference_cache_dir,
            self._weights_before() if model is self.model else None,
        )
