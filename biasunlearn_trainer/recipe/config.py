"""The settings around the training: data, evaluation, probes, the collapse guard, the output folder."""

from __future__ import annotations

import dataclasses
from typing import Literal

TESTBED_PREFIX = "testbed:"
"""Before the name of a testbed's set, which so stands for another stream: `utility_dataset: testbed:retain`."""

TRANSFER_KEYS = (
    "transfer_adapter_from",
    "testbed",
    "testbed_model",
    "testbed_seed",
    "testbed_split",
    "tasks",
    "eval_batch_size",
    "share_prefixes",
    "oracle_model",
    "case_studies",
    "trust_remote_code",
    "overwrite_output_dir",
    "dry_run",
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
    "output_dir",
    "append_eos",
    "seed",
    "use_cpu",
)
"""What a recipe with `transfer_adapter_from` may set; every other key is about training."""


@dataclasses.dataclass
class RunConfig:
    """What surrounds the training: data, evaluation, probes, the collapse guard and the output folder."""

    method: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Unlearning method: ga, ga_diff, kl_min, npo, simnpo, dpo, biasunlearn, pubg, mmunlearner. "
            "Required."
        },
    )
    testbed: Literal["llava", "qwen2vl", "blip2", "minigpt4", "llama", "traits", "stereoset", "entities"] | None = (
        dataclasses.field(
            default=None,
            metadata={
                "help": "Planted-bias world that gives the model, oracle, datasets and tasks that the recipe leaves "
                "out. Default none: the recipe names its own."
            },
        )
    )
    testbed_model: Literal["planted", "instruct"] = dataclasses.field(
        default="planted",
        metadata={
            "help": "Which of the testbed's models: the one with the planted bias, or its instruction-tuned sibling, "
            "with the tasks for that one added (traits has one). Default the planted one, which all testbeds have."
        },
    )
    testbed_seed: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Another seed of the testbed: another world and other weights, built and kept beside the others. "
            "Default none: the testbed's own, 0."
        },
    )
    testbed_split: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Which forget split of the testbed gives the datasets and tasks (entities: forget05_0 to "
            "forget15_3, percent of the people and number of the draw). Default none: the testbed's first."
        },
    )
    transfer_adapter_from: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Instead of training: the folder or Hub id of an adapter trained on this model's base, which is "
            "put on the model and evaluated. Default none."
        },
    )
    forget_dataset: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "What to unlearn: a .jsonl, .json, .csv or .parquet file, a dataset folder, a Hub id, or "
            "testbed:NAME for a set of the testbed."
        },
    )
    retain_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "What to keep, in the same forms as forget_dataset."}
    )
    preferred_dataset: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The answers to prefer, row for row beside forget_dataset; for methods with a preference term."
        },
    )
    utility_dataset: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Text that has nothing to do with the bias, on which biasunlearn keeps the model as it is."},
    )
    preserve_dataset: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "What a saliency mask that the run builds protects, in the same forms as forget_dataset. Default: "
            "the testbed's own, or else the retain set, or else the utility set."
        },
    )
    guidance_dataset: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "pubg: what to say instead, rows beside forget_dataset. Default: the forget set's own column "
            "`guidance`; without that column the original model is asked, once."
        },
    )
    guidance_templates: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "pubg: how the original model is asked what to say instead, {prompt} standing for the row's own; "
            "several are tried in turn. Default: describe what is seen, name nobody."
        },
    )
    guidance_private_words: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "pubg: reject such answers for every content word of what is private, not for the whole of it "
            "only. For private answers of a word or two."
        },
    )
    guidance_max_new_tokens: int = dataclasses.field(
        default=64, metadata={"help": "pubg: longest such answer in tokens; 64 are two or three sentences."}
    )
    tasks: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Evaluations before and after, each NAME[@LABEL][=PATH]; with the label `train` one measures "
            "trained rows on purpose, unchecked for leakage. Default: the testbed's own, or the training sets."
        },
    )
    eval_batch_size: int = dataclasses.field(
        default=64,
        metadata={"help": "Rows scored at once on each process; 64 tiny rows fit anywhere, lower it for 7B models."},
    )
    share_prefixes: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "Compute once what rows of an evaluation batch begin with, pictures included; scores are the same, "
            "and models for which they are not are found out and run row by row."
        },
    )
    keep_records: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "Keep what the model before unlearning and the oracle made of every task's rows in the library's "
            "cache folder, so that the next run from the same model does not measure it again."
        },
    )
    probes: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Tasks measured during training; a name without =PATH takes the path of the task of that name. "
            "Default none."
        },
    )
    bias_probe: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The task by whose stereotype scores biasunlearn swaps roles, stops and keeps the best weights, "
            "stereoset[@LABEL][=PATH], measured whole every probe_steps. Its terms should not be those of the report."
        },
    )
    probe_limit: int | None = dataclasses.field(
        default=200,
        metadata={
            "help": "Items that a probe measures, drawn evenly over the kinds of a task; 200 take a second on a small "
            "model. null measures all."
        },
    )
    guard_min_retained: float | None = dataclasses.field(
        default=0.9,
        metadata={
            "help": "The guard speaks when a retained accuracy falls below this share of its value at step 0 (0 to 1). "
            "0.9 lets the sampling noise of small probes pass; null switches it off."
        },
    )
    guard_max_loss: float | None = dataclasses.field(
        default=50.0,
        metadata={
            "help": "The guard speaks when the size of the loss or of one of its parts exceeds this many nats. "
            "A uniform guess among 32,000 tokens costs 10.4 and NPO starts at 13.9: 50 is past any healthy run; null "
            "switches it off."
        },
    )
    guard_max_perplexity: float | None = dataclasses.field(
        default=2.0,
        metadata={
            "help": "The guard speaks when a probed perplexity exceeds this many times its value at step 0. Where it "
            "has doubled, language is being lost; null switches it off."
        },
    )
    guard_max_grad_growth: float | None = dataclasses.field(
        default=100.0,
        metadata={
            "help": "The guard speaks when the gradient's norm, before clipping, exceeds this many times the median of "
            "the logged norms before it (five at least). Rows differ by a factor of ten; null switches it off."
        },
    )
    guard_action: Literal["warn", "stop"] = dataclasses.field(
        default="warn",
        metadata={"help": "What the guard does beside its message; a loss that is not a number always stops the run."},
    )
    oracle_model: str | None = dataclasses.field(
        default=None, metadata={"help": "A model that never had the bias, evaluated beside the others. Default none."}
    )
    case_studies: int = dataclasses.field(
        default=10,
        metadata={"help": "Examples in the report with the answers before, after and of the oracle; 0 for none."},
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run modelling code that a model's repository brings. Off for safety."}
    )
    allow_leakage: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Warn instead of raising when a row is both in the forget set and in the retain set or a task."
        },
    )
    overwrite_output_dir: bool = dataclasses.field(
        default=False, metadata={"help": "Delete an earlier run's results in output_dir. Default: refuse to start."}
    )
    dry_run: bool = dataclasses.field(
        default=False,
        metadata={"help": "Check the recipe, the data and the model's config, print the plan, train nothing."},
    )
    plan: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Say what the run needs (parameters, memory on each GPU, steps, time) from the model's config "
            "alone; load and train nothing. The data are used where they can be read."
        },
    )
    plan_backend: Literal["none", "ddp", "zero2", "zero3", "fsdp2"] | None = dataclasses.field(
        default=None, metadata={"help": "plan: the backend to plan for. Default: the one that this process is in."}
    )
    plan_processes: int | None = dataclasses.field(
        default=None, metadata={"help": "plan: the number of GPUs. Default: as many processes as were launched."}
    )
    plan_gpu_memory: float | None = dataclasses.field(
        default=None, metadata={"help": "plan: GiB of one GPU. Default: those of the GPU that is seen, if any."}
    )
    plan_throughput: float | None = dataclasses.field(
        default=None,
        metadata={"help": "plan: tokens that one process reads a second, all streams together. Default: unknown."},
    )
    plan_row_tokens: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "plan: length of a row, pictures included, where the data cannot be read. Default: max_length, or "
            "512 tokens beside the picture."
        },
    )
    plan_completion_tokens: int = dataclasses.field(
        default=64, metadata={"help": "plan: length of its completion; 64 are two or three sentences."}
    )

    def __post_init__(self):
        bounds = {
            "eval_batch_size": (1, None),
            "guidance_max_new_tokens": (1, None),
            "probe_limit": (1, None),
            "plan_processes": (1, None),
            "plan_gpu_memory": (0, None),
            "plan_throughput": (0, None),
            "plan_row_tokens": (2, None),
            "plan_completion_tokens": (1, None),
            "case_studies": (0, None),
            "guard_min_retained": (0, 1),
            "guard_max_loss": (0, None),
            "guard_max_perplexity": (1, None),
            "guard_max_grad_growth": (1, None),
        }
        faults = []
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                limit = f"at least {low}" if high is None else f"between {low} and {high}"
                faults.append(f"`{name}` must be {limit}, got {value}.")
        if self.testbed_model != "planted" and self.testbed is None:
            faults.append(f"`testbed_model` is {self.testbed_model}, but no `testbed` is set. Set one, or drop it.")
        for name in ("testbed_seed", "testbed_split"):
            if getattr(self, name) is not None and self.testbed is None:
                faults.append(f"`{name}` is {getattr(self, name)}, but no `testbed` is set. Set one, or drop it.")
        if faults:
            raise ValueError("\n".join(faults))
