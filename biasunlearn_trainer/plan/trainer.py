"""The recipe's trainer on a model without values: what would have to be computed first is only as large as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from trl import get_peft_config

from biasunlearn_trainer.completions import completion_tokens
from biasunlearn_trainer.plan.batch import image_token
from biasunlearn_trainer.plan.model import empty_model, reference_config
from biasunlearn_trainer.plan.shadow import Shadow
from biasunlearn_trainer.recipe import Recipe
from biasunlearn_trainer.reference_states import StatesOutput, StatesReference, frozen_head
from biasunlearn_trainer.saliency import SaliencyMask


class UnknownMask:
    """Stands for a mask that has not been made: one truth value for each weight, which nobody knows.

    Attributes:
        density: the share that is assumed to be salient. Fisher values of two sets, compared one by one with a
            threshold of 1, are larger on either about as often.
    """

    density = 0.5

    def __init__(self, shadow: Shadow, shapes: Mapping[str, Sequence[int]]):
        self.shadow, self.shapes = shadow, shapes

    def get(self, name: str) -> Tensor:
        """bool, in the weight's shape."""
        return self.shadow.empty(*self.shapes[name], dtype=torch.bool)


class _UnknownStates(StatesReference):
    """Stands for hidden states that lie on disk; those of a batch are read at every step."""

    def __init__(self, shadow: Shadow, head: nn.Module, dtype: torch.dtype):
        super().__init__(None, head, dtype)
        self.shadow = shadow

    def logps(self, index: Tensor) -> Tensor:
        return self.shadow.empty(len(index), dtype=torch.float32)

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> StatesOutput:
        targets, mask = completion_tokens(batch)
        states = self.shadow.empty(len(targets), self.head.weight.shape[-1], dtype=self.dtype)
        return StatesOutput(states, self.head, targets, mask)


class _Tables:
    """Stands for what is kept of a precomputed reference: one number a row, or hidden states on disk."""

    def __init__(self, shadow: Shadow, model: nn.Module):
        self.shadow, self.model = shadow, model

    def table(self, stream: str, rows: Sequence[Any]) -> Tensor:
        return torch.tensor([0] * len(rows)).float()

    def states(self, stream: str, rows: Sequence[Any], positions: str, dtype: torch.dtype | None) -> StatesReference:
        return _UnknownStates(self.shadow, frozen_head(self.model), self.model.dtype)


class _Planned:
    """What a trainer does otherwise when nothing has a value."""

    shadow: Shadow
    recipe: Recipe

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model  # which has no place

    def _finds_fresh_adapter(self) -> bool:
        return self.recipe.model.use_peft  # an adapter that was loaded has been trained

    def _load_reference(self, name_or_path: str) -> nn.Module:
        return empty_model(self.shadow, reference_config(self.recipe), self.model.dtype, self.recipe)

    def _reference_builder(self, model: nn.Module) -> _Tables:
        return _Tables(self.shadow, model)

    def _feature_cache(self) -> None:
        return None  # the step that first sees a picture runs the encoder, and is the largest

    def _made_mask(self) -> SaliencyMask | UnknownMask:
        if isinstance(self._given_mask, SaliencyMask):
            return self._given_mask
        trainable = {name: value.shape for name, value in self.model.named_parameters() if value.requires_grad}
        return UnknownMask(self.shadow, trainable)


def build_trainer(
    shadow: Shadow,
    recipe: Recipe,
    model: nn.Module,
    sets: Mapping[str, Any],
    processing_class: Any | None,
    config: PreTrainedConfig,
) -> Any:
    """The recipe's trainer around a model without values; adapter, frozen groups and reference are its own doing.

    Args:
        shadow: where the model was built.
        recipe: the recipe.
        model: what `build_model` returned.
        sets: rows by stream.
        processing_class: the model's tokenizer or processor; None for one that knows nothing.
        config: the model's configuration.

    Raises:
        ValueError: where model, settings and data do not go together, as in training.
    """
    planned = type(
        recipe.trainer_class.__name__, (_Planned, recipe.trainer_class), {"shadow": shadow, "recipe": recipe}
    )
    steering = {"bias_probe": lambda _: {}} if recipe.run.bias_probe is not None else {}
    with shadow:
        trainer = planned(
            model=model,
            args=recipe.training,
            processing_class=processing_class or _no_tokenizer(),
            peft_config=get_peft_config(recipe.model),
            **{f"{stream}_dataset": rows for stream, rows in sets.items()},
            **steering,
        )
        trainer.collator.image_token_id = image_token(config)
        trainer.prepare_reference()
    return trainer


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that turns nothing into tokens: stand-in batches are not made of text."""
    words = Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
