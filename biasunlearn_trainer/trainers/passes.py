"""The part of a trainer that runs models: several streams in one pass where that costs less than one pass for each.

Every layer is called once instead of once for each stream, reads its weights once, and multiplies larger matrices; on
sharded weights it is gathered once. What it costs is padding: rows of all streams become as wide as the widest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.collators import form_of, join_batches
from biasunlearn_trainer.completions import CompletionOutput, forward_completions, text_positions
from biasunlearn_trainer.image_features import ImageFeatures
from biasunlearn_trainer.reference import AdapterReference, ModelReference, PrecomputedReference
from biasunlearn_trainer.reference_states import StatesOutput, StatesReference
from biasunlearn_trainer.saliency.rows import InseparableRows
from biasunlearn_trainer.sharding import is_sharded

# Positions, padding included, that a joint pass may have for each of separate ones. On a CPU it takes 0.92 of their
# time at as many positions (20 M parameters, 4 + 4 rows of 256 tokens).
LARGEST_WASTE = 1.05

Batch = Mapping[str, Mapping[str, Tensor]]


@dataclass
class BatchCounts:
    """What an accumulated global batch holds, over micro-batches and processes.

    Attributes:
        streams: for each stream (3,), its sequences, completion tokens and text tokens.
        groups: the streams that go through the model together, each in one group; the same on all processes, since a
            pass that only some of them make would leave them waiting for each other.
    """

    streams: dict[str, Tensor]
    groups: list[tuple[str, ...]]


@dataclass
class SequenceLogps:
    """Policy and reference on the B sequences of a stream.

    Attributes:
        stream: the stream's name.
        positions: `completion` or `all_text`, the positions that were kept.
        output: the policy's completion tokens (`mask`, `token_logps`, `logits`).
        reference: (B,) log pi_ref(y | x) in nats; None where the method needs none.
        reference_output: the reference's completion tokens, where whole distributions are needed and these are the
            positions at which they are compared.
    """

    stream: str
    positions: str
    output: CompletionOutput
    reference: Tensor | None = None
    reference_output: CompletionOutput | StatesOutput | None = None

    @property
    def policy(self) -> Tensor:
        """(B,) log pi(y | x) in nats."""
        return self.output.logps

    @property
    def lengths(self) -> Tensor:
        """(B,) number of completion tokens."""
        return self.output.lengths


class StreamPasses:
    """How `UnlearnTrainer` runs the policy, and the reference where that is a model, on the streams of a batch."""

    def _begin_passes(self) -> None:
        self._groups: Sequence[tuple[str, ...]] = ()
        self._outputs: dict[tuple[str, str], tuple[CompletionOutput, CompletionOutput | None]] = {}
        self._image_features = self._feature_cache() if self.args.cache_image_features else None

    @contextmanager
    def _passes_over(self, groups: Sequence[tuple[str, ...]]) -> Iterator[None]:
        """Inside, a batch's streams go through the model in these groups; what was computed is let go at the end."""
        self._groups = groups
        try:
            yield
        finally:
            self._groups, self._outputs = (), {}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> BatchCounts | None:
        return self._count(batch_samples, device) if batch_samples else None

    def _count(self, batches: Sequence[Batch], device: torch.device | None = None) -> BatchCounts:
        batches = [self.arrange(batch) for batch in batches]
        streams = [*batches[0]]
        # (micro-batches, streams, 7), of all processes: each then comes to the same conclusion.
        table = torch.stack([torch.stack([self._measures(batch[name]) for name in streams]) for batch in batches])
        if self.args.world_size > 1:
            table = self.accelerator.gather(table.to(self.args.device))
        sums = table[:, :, :3].sum(0).float().to(device or table.device)
        return BatchCounts(dict(zip(streams, sums, strict=True)), self._grouped(streams, table[:, :, 3:]))

    def _measures(self, part: Mapping[str, Tensor]) -> Tensor:
        """(7,) of a stream's batch: sequences, completion tokens, text tokens; rows, width, form, pictures or not."""
        mask = part["completion_mask"]
        text = text_positions(part, self.collator.image_token_id)[:, 1:]
        known = mask.new_tensor([len(mask), *mask.shape, form_of(part), "pixel_values" in part], dtype=torch.long)
        return torch.cat([known[:1], torch.stack([mask.sum(), text.sum()]), known[1:]])

    def _grouped(self, streams: list[str], shapes: Tensor) -> list[tuple[str, ...]]:
        """Streams together as long as padding does not eat up what that saves: the widest first, then the next.

        Args:
            streams: those of the batch.
            shapes: (micro-batches, streams, 4) rows, width, form and whether there are pictures.
        """
        mixes = self.mixes_masked and not shapes[:, :, 3].any()
        shapes = shapes[:, :, :3].tolist()
        parts = {name: [batch[i] for batch in shapes] for i, name in enumerate(streams)}
        joinable = [name for name in self.streams(self.args) if name in parts and (mixes or not self.is_masked(name))]
        groups: list[tuple[str, ...]] = []
        for name in sorted(joinable, key=lambda name: -_cost([parts[name]])):
            if groups and self.args.joint_forward:
                members = [parts[member] for member in (*groups[-1], name)]
                if _alike(members) and _cost(members) <= LARGEST_WASTE * sum(_cost([part]) for part in members):
                    groups[-1] += (name,)
                    continue
            groups.append((name,))
        return groups

    def forward(
        self, model: nn.Module, batch: dict[str, dict[str, Tensor]], stream: str, positions: str = "completion"
    ) -> SequenceLogps:
        """What the policy and, where the method needs it, the reference say of one stream.

        The pass may be one over several streams of the batch (`joint_forward`), made when the first is asked for.

        Args:
            model: the policy, wrapped as training needs it.
            batch: collated rows by stream.
            stream: the one to run.
            positions: `completion`, or `all_text` for all but padding and image positions.
        """
        output, reference_output = self._outputs_of(model, batch, stream, positions)
        result = SequenceLogps(stream, positions, output)
        self.record(f"logps/{stream}", result.policy)
        if stream not in self.references(self.args):
            return result
        reference = self.reference[stream]
        if reference_output is not None:
            result.reference, result.reference_output = reference_output.logps, reference_output
        elif isinstance(reference, PrecomputedReference):
            result.reference = reference.logps(batch[stream]["index"])
        elif isinstance(reference, StatesReference) and positions == self.positions(stream):
            result.reference = reference.logps(batch[stream]["index"])
            result.reference_output = reference.output(model, self._reading(batch[stream], positions))
        return result

    def with_features(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """A stream's batch, with kept features in place of its pictures where `cache_image_features` is on."""
        if self._image_features is None:
            return inputs
        return self._image_features.replaced(model, inputs)

    def _outputs_of(
        self, model: nn.Module, batch: Batch, stream: str, positions: str
    ) -> tuple[CompletionOutput, CompletionOutput | None]:
        """The policy's output on a stream, and the reference's where it takes a pass and is compared there."""
        if (stream, positions) not in self._outputs:
            group = {stream: positions}
            if positions == self.positions(stream):
                group |= {name: self.positions(name) for names in self._groups if stream in names for name in names}
            self._run(model, {name: self._reading(batch[name], where) for name, where in group.items()}, group)
        return self._outputs.pop((stream, positions))

    def _run(self, model: nn.Module, inputs: Batch, group: Mapping[str, str]) -> None:
        inputs = {name: inputs[name] for name in sorted(inputs, key=self.is_masked, reverse=True)}
        num_masked = sum(len(batch["input_ids"]) for name, batch in inputs.items() if self.is_masked(name))
        try:
            found = self._joined_run(lambda batch: self._policy_pass(model, batch, num_masked), inputs)
        except InseparableRows as reason:
            # That is how the model is made, so all processes come to it in the same pass.
            self.mask_apart(str(reason))
            found = None
        if found is None:
            for name, positions in group.items():
                self._run(model, {name: inputs[name]}, {name: positions})
            return
        compared: dict[str, CompletionOutput] = {}
        streams = [name for name, where in group.items() if self._takes_reference_pass(name, where)]
        for reference in {id(self.reference[name]): self.reference[name] for name in streams}.values():
            mine = {name: inputs[name] for name in streams if self.reference[name] is reference}
            compared |= self._joined_run(lambda batch, of=reference: self._reference_pass(of, model, batch), mine)
        self._outputs |= {(name, where): (found[name], compared.get(name)) for name, where in group.items()}

    def _policy_pass(self, model: nn.Module, batch: Mapping[str, Tensor], num_masked: int) -> CompletionOutput:
        with self.masking(batch, num_masked):
            return forward_completions(model, self.with_features(model, batch), self.args.fused_losses)

    def _reference_pass(
        self, reference: AdapterReference | ModelReference, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> CompletionOutput:
        is_own = isinstance(reference, AdapterReference)  # another model has another image encoder
        return reference.output(model, self.with_features(model, batch) if is_own else batch)

    def _joined_run(self, run: Callable[[Any], CompletionOutput], inputs: Batch) -> dict[str, CompletionOutput]:
        if len(inputs) == 1:
            return {stream: run(batch) for stream, batch in inputs.items()}
        output = run(join_batches([*inputs.values()], self.collator.tokenizer.pad_token_id))
        return dict(zip(inputs, output.split([len(batch["input_ids"]) for batch in inputs.values()]), strict=True))

    def _takes_reference_pass(self, stream: str, positions: str) -> bool:
        """Whether a model stands for the reference of a stream, and these are the positions that it is asked about."""
        need = self.references(self.args).get(stream)
        if need is None or not isinstance(self.reference[stream], AdapterReference | ModelReference):
            return False
        return need == "logps" or positions == self.positions(stream)

    def _reading(self, batch: Mapping[str, Tensor], positions: str) -> Mapping[str, Tensor]:
        """A stream's batch whose completion mask shows the positions that are read."""
        if positions == "completion":
            return batch
        return {**batch, "completion_mask": text_positions(batch, self.collator.image_token_id)}

    def _feature_cache(self) -> ImageFeatures:
        """Where features of pictures are kept.

        Raises:
            ValueError: the image encoder is trained, spread over processes, or not there.
        """
        if is_sharded():
            raise ValueError(
                "cache_image_features calls the image encoder on its own, which ZeRO-3 and FSDP do not allow. Leave it "
                "out, or launch with ddp.yaml or zero2.yaml."
            )
        return ImageFeatures(self.model, cache_home() / "image_features", self.args.module_groups)


def _alike(parts: Sequence[Sequence[tuple[int, int, int]]]) -> bool:
    """Whether in every micro-batch the streams look alike."""
    return all(len({form for _, _, form in batch}) == 1 for batch in zip(*parts, strict=True))


def _cost(parts: Sequence[Sequence[tuple[int, int, int]]]) -> int:
    """Positions of streams that go together, padding included, over all micro-batches."""
    return sum(
        sum(rows for rows, _, _ in batch) * max(width for _, width, _ in batch) for batch in zip(*parts, strict=True)
    )
