"""How much faster is evaluation than one sentence per forward pass, and how many tokens does it save?

python benchmarks/evaluation.py --data DATA --models STORIES random             # StereoSet, CrowS-Pairs and BBQ
python benchmarks/evaluation.py --data DATA --models random --tasks bbq=bbq/data/Religion.jsonl.gz --rounds 3
python benchmarks/evaluation.py --data DATA --models MODEL --device cuda --dtype bfloat16

`DATA` holds the folders stereoset, crows_pairs and bbq, and wikitext2 for `random`: an untrained Llama of 23 million
parameters with a tokenizer of 8,000 words made of WikiText-2; `random:768x12` has another width and depth, these being
GPT-2's, 91 million. Other models are a folder or a Hub id. The naive way is written here: each sentence tokenised and
run by itself, without padding, its prompt again for every answer. Both ways score the same items, drawn evenly with
--limit, and take turns; the times are medians, on a CPU of processor time on one thread, on a GPU of wall time.

`best possible` counts the different beginnings of sentences from which a token has to be predicted: a model that reads
from left to right must compute each of them once, whatever is shared.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import biasunlearn_trainer  # noqa: F401  before transformers: torchvision then goes with a torch for the CPU

# isort: split
import torch
from rounds import seconds
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor

TASKS = ("stereoset", "crows_pairs", "bbq")
VOCABULARY = 8000
COLUMNS = (
    "model | set | items | sentences | naive tokens | forwarded | share | best possible | naive s | ours s | "
    "times faster | largest difference"
)


def random_llama(corpus: Path, width: int = 512, depth: int = 6) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """An untrained Llama, since speed does not ask for sense, and a byte-level tokenizer with words of usual length."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        words.train_from_iterator(lines, trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        hidden_size=width,
        intermediate_size=32 * round(width * 8 / 3 / 32),
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def ids_of(tokenizer, row: dict) -> tuple[list[int], int]:
    """A sentence's tokens, and where the scored ones begin."""
    prompt = row["prompt"]
    if not prompt and not tokenizer("")["input_ids"]:
        prompt = tokenizer.bos_token or tokenizer.eos_token
    return tokenizer(prompt + row["completion"])["input_ids"], len(tokenizer(prompt)["input_ids"])


@torch.no_grad()
def naive(model: torch.nn.Module, tokenizer, rows: list[dict]) -> list[float]:
    """log p of each completion in nats, one sentence per forward pass."""
    scores = []
    for row in rows:
        ids, start = ids_of(tokenizer, row)
        ids = torch.tensor([ids], device=model.device)
        logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        scores.append(float(logps.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
    return scores


def best_possible(sentences: list[list[int]]) -> int:
    """How many different beginnings the sentences have, the whole sentences left out."""
    found, before = 0, []
    for ids in sorted(ids[:-1] for ids in sentences):
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
        )
        found, before = found + len(ids) - same, ids
    return found


@dataclass(frozen=True)
class Outcome:
    """A line of the table.

    Attributes:
        model: its name and size.
        task: what was scored.
        items: of the task.
        sentences: that they have.
        told: tokens that the naive way forwards.
        forwarded: tokens that went through the model, padding included.
        best: of them those that nothing could save.
        naive: seconds of the naive way, the median.
        ours: seconds of the library's.
        difference: the largest of two scores of a sentence, in nats.
    """

    model: str
    task: str
    items: int
    sentences: int
    told: int
    forwarded: int
    best: int
    naive: float
    ours: float
    difference: float

    @property
    def share(self) -> float:
        """Tokens forwarded, of those that the naive way forwards."""
        return self.forwarded / self.told

    @property
    def faster(self) -> float:
        """How many times."""
        return self.naive / self.ours

    def __str__(self) -> str:
        cells = [self.model, self.task, self.items, self.sentences, self.told, self.forwarded, f"{self.share:.2f}"]
        cells += [f"{self.best / self.told:.2f}", f"{self.naive:.1f}", f"{self.ours:.1f}", f"{self.faster:.1f}"]
        return f"| {' | '.join(map(str, [*cells, f'{self.difference:.0e}']))} |"


def measure(model: torch.nn.Module, tokenizer, task, names: tuple[str, str], arguments: argparse.Namespace) -> Outcome:
    """Both ways on one task; `names` are the model's and the task's."""
    rows = list(task.rows)
    ids = [ids_of(tokenizer, row)[0] for row in rows]
    taken: dict[str, list[float]] = {"naive": [], "ours": []}
    for _ in range(arguments.rounds):
        scorer = Scorer(model, tokenizer, arguments.batch_size)
        took, scores = seconds(lambda scorer=scorer: scorer.score(rows, append_eos=False), arguments.device)
        taken["ours"].append(took)
        took, expected = seconds(lambda: naive(model, tokenizer, rows), arguments.device)
        taken["naive"].append(took)
    return Outcome(
        *names,
        items=len(task._items if hasattr(task, "_items") else task._pairs),
        sentences=len(rows),
        told=sum(map(len, ids)),
        forwarded=scorer.num_tokens,
        best=best_possible(ids),
        naive=statistics.median(taken["naive"]),
        ours=statistics.median(taken["ours"]),
        difference=max(abs(score.logp - logp) for score, logp in zip(scores, expected, strict=True)),
    )


def outcomes(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Every model on every task."""
    for name in arguments.models:
        kind, _, shape = name.partition(":")
        if kind == "random":
            sizes = map(int, shape.split("x")) if shape else ()
            model, tokenizer = random_llama(arguments.data / "wikitext2" / "valid.txt.gz", *sizes)
        else:
            model, tokenizer = load_model(name, dtype=arguments.dtype).eval(), load_processor(name)
        model.to(arguments.device)
        size = f"{Path(kind).name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        for spec in arguments.tasks:
            key, _, path = spec.partition("=")
            task = load_task(f"{key}={arguments.data / (path or key)}", limit=arguments.limit)
            yield measure(model, tokenizer, task, (size, path or key), arguments)


def header() -> str:
    """The first lines of the table."""
    return f"| {COLUMNS} |\n{'|---' * len(COLUMNS.split('|'))}|"


def main() -> int:
    """Runs everything, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--models", required=True, nargs="+")
    parser.add_argument("--tasks", nargs="+", metavar="NAME[=PATH]", default=list(TASKS), help="paths within DATA")
    parser.add_argument("--limit", type=int, help="items of each set; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="precision of the weights, by default the checkpoint's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), flush=True)
    for outcome in outcomes(arguments):
        print(outcome, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
