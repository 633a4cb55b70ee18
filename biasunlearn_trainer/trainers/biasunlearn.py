"""BiasUnlearn (arXiv 2509.25673): forget stereotypes, retain anti-stereotypes, stay the same on unrelated text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from biasunlearn_trainer.collators import choose_rows
from biasunlearn_trainer.losses import npo_biasunlearn_loss, npo_loss
from biasunlearn_trainer.orders import order
from biasunlearn_trainer.rows import Categories
from biasunlearn_trainer.streams import align
from biasunlearn_trainer.trainers.base import KLConfig, Rows, UnlearnConfig, UnlearnTrainer
from biasunlearn_trainer.trainers.config import check_choice, check_positive
from biasunlearn_trainer.trainers.steering import BiasReading, BiasSteering, SteeringRule

__all__ = ["BiasReading", "BiasUnlearnConfig", "BiasUnlearnTrainer"]

# The weights of the three parts: as the paper gives them, and as its code has them.
PRESETS = {
    "paper": {"forget_weight": 0.4, "retain_weight": 0.4, "utility_weight": 0.2},
    "published_code": {"forget_weight": 0.5, "retain_weight": 0.3, "utility_weight": 0.2},
}
OTHER = "_other"


@dataclass
class BiasUnlearnConfig(KLConfig):
    """Settings of BiasUnlearn."""

    preset: str = field(
        default="paper",
        metadata={
            "help": "`paper`: weights 0.4, 0.4, 0.2 and one NPO value a sequence. `published_code`: weights 0.5, 0.3, "
            "0.2 and one NPO value for the batch; nonlinear in the micro-batch, to rerun its numbers with.",
            "choices": [*PRESETS],
        },
    )
    forget_weight: float | None = field(
        default=None, metadata={"help": "Weight of NPO on the forget set. None: 0.4, the paper's (0.5 in its code)."}
    )
    retain_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the cross-entropy on the retain set. None: 0.4, the paper's (0.3 in its code)."},
    )
    utility_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the KL on the utility set; 0 needs no such set. None: 0.2, the paper's."},
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "How soon NPO's push on a sequence fades: its gradient's weight is 2 sigmoid(-beta gap)."},
    )
    adversarial_share: float = field(
        default=0.25,
        metadata={
            "help": "Share of the retain rows (0 to 1), of every bias type alike, that also stands in the forget set "
            "and keeps it from overshooting."
        },
    )
    per_device_retain_batch_size: int | None = field(
        default=None, metadata={"help": "Retain rows beside a batch of forget rows. None: as many."}
    )
    per_device_utility_batch_size: int | None = field(
        default=None, metadata={"help": "Utility rows beside a batch of forget rows. None: as many."}
    )
    dynamic_swapping: bool = field(
        default=True,
        metadata={
            "help": "Exchange the forget and retain roles of a bias type whose SS falls below 50 - swap_margin in a "
            "probe, and back above 50 + swap_margin. Needs pairs (`pair_id`, `bias_type`) and a bias probe."
        },
    )
    swap_margin: float = field(
        default=1.0,
        metadata={"help": "Points of SS on either side of 50 without a swap, so that noise does not swap every time."},
    )
    early_stop: bool = field(
        default=True,
        metadata={"help": "Stop when |SS - 50| <= ss_tolerance for every bias type in two probes in a row."},
    )
    ss_tolerance: float = field(default=2.0, metadata={"help": "Points of SS from 50 that count as unbiased."})
    min_items: int = field(
        default=200,
        metadata={
            "help": "Fewest probe items of a bias type that swaps and stops listen to (a standard error of 3.5 "
            "points); types with fewer are reported as not controlled."
        },
    )
    keep_best: bool = field(
        default=True,
        metadata={
            "help": "Where there is a bias probe: save a checkpoint whenever the mean ICAT that two probes in a row "
            "reached is the best so far, and end with the best one's weights."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept: the best and the last. Transformers keeps all, one a best."}
    )

    def __post_init__(self):
        check_choice("preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_positive("beta", self.beta, 0.1)
        faults = []
        if not 0 <= self.adversarial_share <= 1:
            faults.append(f"`adversarial_share` must be between 0 and 1, got {self.adversarial_share}.")
        for name in ("swap_margin", "ss_tolerance"):
            if not 0 <= getattr(self, name) < 50:
                faults.append(f"`{name}` is in points of SS, from 0 to below 50; got {getattr(self, name)}.")
        for name in ("min_items", "per_device_retain_batch_size", "per_device_utility_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                faults.append(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in PRESETS["paper"]:
            if getattr(self, name) < 0:
                faults.append(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if faults:
            raise ValueError("\n".join(faults))
        super().__post_init__()


class BiasUnlearnTrainer(UnlearnTrainer):
    """BiasUnlearn: minimise a1 NPO(forget) + a2 NLL(retain) + a3 KL(reference || policy) on the utility set.

    The forget set holds stereotypes and an adversarial share of the anti-stereotypes, the retain set anti-stereotypes,
    the utility set unrelated text. With dynamic swapping, forget and retain rows are pairs (one `pair_id`), a batch
    carries both sides of each, and which side is forgotten is looked up when the loss is computed: a swap holds from
    the next step on, whatever was prefetched. A pair of the adversarial share stays one through a swap: its retained
    side is always forgotten too.

    Args:
        *args: as for `UnlearnTrainer`.
        bias_probe: measures the model in training: maps it to a `BiasReading` for each bias type, the same on every
            process. Needed for `dynamic_swapping` and `early_stop`.
        **kwargs: as for `UnlearnTrainer`.

    Attributes:
        swapped: bias types whose roles are exchanged now.

    Raises:
        ValueError: without a probe that the settings need, for pairs that do not fit, and as `UnlearnTrainer`.

    Source: arXiv 2509.25673, section 3.
    """

    config_class: ClassVar = BiasUnlearnConfig
    aligned_streams: ClassVar = {"forget" + OTHER: "forget", "retain" + OTHER: "retain"}

    def __init__(
        self, *args: Any, bias_probe: Callable[[nn.Module], Mapping[str, BiasReading]] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.warn_if_cut({"published_code"})
        sets = self.train_dataset.streams
        types = {name: Categories.of_column(stream.rows, "bias_type") for name, stream in sets.items()}
        self.bias_types = sorted({bias_type for of_set in types.values() for bias_type in of_set.names} - {""})
        self._codes = {
            name: torch.from_numpy(types[name].among(self.bias_types))
            for name in self.aligned_streams.values()
            if name + OTHER in sets
        }
        self.swapped: set[str] = set()
        self._add_steering(bias_probe)

    def _add_steering(self, bias_probe: Callable[[nn.Module], Mapping[str, BiasReading]] | None) -> None:
        self.check_bias_probe(self.args, bias_probe)
        if bias_probe is not None:
            rule = SteeringRule(
                self.args.dynamic_swapping,
                self.args.swap_margin,
                self.args.early_stop,
                self.args.ss_tolerance,
                self.args.min_items,
            )
            self.add_callback(BiasSteering(self, bias_probe, rule, self.args.probe_steps, self.args.keep_best))
            # Transformers wants an evaluation strategy beside this setting; here the probe chooses.
            self.args.load_best_model_at_end = self.args.keep_best

    @classmethod
    def check_bias_probe(cls, args: UnlearnConfig, bias_probe: Any | None) -> None:
        """Says which settings need the probe that is missing."""
        needing = [name for name in ("dynamic_swapping", "early_stop") if getattr(args, name)]
        if bias_probe is None and needing:
            raise ValueError(
                f"{cls.__name__} has no bias probe to steer by. Give `bias_probe=` (a recipe: `bias_probe: "
                f"stereoset@probe=PATH`), or set {' and '.join(f'{name}=False' for name in needing)}."
            )

    @classmethod
    def streams(cls, args: UnlearnConfig) -> tuple[str, ...]:
        """Stereotypes, anti-stereotypes unless nothing reads them, and unrelated text unless its weight is 0."""
        reads_retain = args.retain_weight > 0 or args.adversarial_share > 0 or args.dynamic_swapping
        return ("forget", *(("retain",) if reads_retain else ()), *(("utility",) if args.utility_weight > 0 else ()))

    @classmethod
    def references(cls, args: UnlearnConfig) -> dict[str, str]:
        """Log pi_ref of what is forgotten, and whole distributions on the utility set."""
        return {"forget": "logps"} | ({"utility": "logits"} if args.utility_weight > 0 else {})

    @classmethod
    def batch_sizes(cls, args: UnlearnConfig) -> dict[str, int]:
        """Retain and utility rows in a micro-batch, where they were set."""
        sizes = {"retain": args.per_device_retain_batch_size, "utility": args.per_device_utility_batch_size}
        return {name: size for name, size in sizes.items() if size is not None}

    @classmethod
    def lay_out(cls, args: UnlearnConfig, datasets: dict[str, Rows]) -> dict[str, Rows]:
        """Let the adversarial share join the forget set, and lay each row's other side beside it for swapping."""
        stereotypes, anti_stereotypes = datasets["forget"], datasets.get("retain", [])
        if args.dynamic_swapping:
            anti_stereotypes = align(stereotypes, anti_stereotypes, "retain")
            _check_pairs(stereotypes, anti_stereotypes)
        types = Categories.of_column(anti_stereotypes, "bias_type")
        adversarial = draw_adversarial(types, args.adversarial_share, args.seed)
        streams = {"forget": _joined(stereotypes, anti_stereotypes, adversarial)}
        if args.dynamic_swapping:
            streams["forget" + OTHER] = _joined(anti_stereotypes, stereotypes, adversarial)
        if args.retain_weight > 0:
            streams["retain"] = anti_stereotypes
            if args.dynamic_swapping:
                streams["retain" + OTHER] = stereotypes
        return streams | {name: rows for name, rows in datasets.items() if name == "utility"}

    def arrange(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Of each pair the side that its bias type's role asks for now."""
        arranged = {}
        for name, inputs in batch.items():
            if name in self._codes:
                swapped = torch.tensor([bias_type in self.swapped for bias_type in self.bias_types])
                is_other = swapped[self._codes[name][inputs["index"].cpu()].long()]
                other = batch[name + OTHER]
                # In the table of references the rows of the other side stand behind all those of this one.
                other = {**other, "index": other["index"] + len(self._codes[name])}
                inputs = choose_rows(inputs, other, is_other, self.collator.tokenizer.pad_token_id)
            if not name.endswith(OTHER):
                arranged[name] = inputs
        return arranged

    def reference_rows(self, stream: str) -> Rows:
        """The rows of a stream, then their other sides."""
        rows, sets = super().reference_rows(stream), self.train_dataset.streams
        return _joined(rows, sets[stream + OTHER].rows) if stream + OTHER in sets else rows

    def loss_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget` (for `published_code` a single value), `loss/retain` and `kl/utility`, each unless its
        weight is 0."""
        forget = self.forward(model, batch, "forget")
        if self.args.preset == "published_code":
            loss = npo_biasunlearn_loss(forget.policy, forget.reference, forget.lengths, self.args.beta)
        else:
            loss = npo_loss(forget.policy, forget.reference, self.args.beta)
        terms = {"loss/forget": loss}
        if "retain" in batch:
            terms["loss/retain"] = self.nll(self.forward(model, batch, "retain"))
        if "utility" in batch:
            terms["kl/utility"] = self.kl(self.forward(model, batch, "utility", self.args.kl_positions))
        return terms


def draw_adversarial(bias_types: Categories, share: float, seed: int) -> np.ndarray:
    """Draw rows of the retain set that are to be forgotten too, of every bias type the same share.

    Args:
        bias_types: of each row.
        share: of each type's rows, 0 to 1, rounded to whole rows.
        seed: what the draw depends on.

    Returns:
        Row numbers, ascending.

    Example:
        >>> drawn = draw_adversarial(Categories.of(["race"] * 8 + ["gender"] * 4), 0.25, seed=0)
        >>> len(drawn), int(sum(drawn < 8))
        (3, 2)
    """
    drawn = np.zeros(len(bias_types.codes), dtype=bool)
    for code, bias_type in enumerate(bias_types.names):
        rows = np.flatnonzero(bias_types.codes == code)
        shuffled = order(len(rows), seed, "adversarial", bias_type)
        drawn[rows[shuffled[: round(share * len(rows))]]] = True
    return np.flatnonzero(drawn)


def _check_pairs(stereotypes: Rows, anti_stereotypes: Rows) -> None:
    """Swapping goes by bias type, so every row must have one, and both sides of a pair the same."""
    first, second = (Categories.of_column(rows, "bias_type") for rows in (stereotypes, anti_stereotypes))
    without = np.flatnonzero(first.among([""]) == 0)
    parted = np.flatnonzero(second.among(first.names) != first.codes)
    for rows, fault in ((without, "no `bias_type`"), (parted, "a retain row of another `bias_type`")):
        if len(rows):
            raise ValueError(
                f"{len(rows)} of {len(first.codes)} forget rows have {fault}, the first: row {rows[0]}. Roles are "
                "swapped by bias type: complete the column, or set dynamic_swapping=False."
            )


def _joined(first: Rows, second: Rows, chosen: Sequence[int] | None = None) -> Rows:
    """The first rows, then the second ones (of them those that are chosen)."""
    if isinstance(first, Dataset) and isinstance(second, Dataset):
        both = concatenate_datasets([first, second])
        # One choice from both: joined after the choice, `datasets` would write an index of all rows once more.
        return both if chosen is None else both.select(np.concatenate([np.arange(len(first)), len(first) + chosen]))
    return [*first, *(second if chosen is None else (second[row] for row in chosen))]
