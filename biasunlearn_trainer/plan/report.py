"""A plan as text."""

from __future__ import annotations

from dataclasses import dataclass, field

from biasunlearn_trainer.plan.backends import Memory

MEANINGS = {
    "weights": "of the model, adapter included",
    "gathered": "weights of the other processes, for a moment",
    "gradients": "at the fullest moment",
    "optimizer": "state",
    "reference": "",
    "mask": "saliency mask, one byte a trainable weight",
    "kept": "copy of the weights that the mask puts back",
    "activations": "forward and backward pass, at the fullest moment",
    "buffers": "communication",
}


@dataclass
class Plan:
    """What a run needs.

    Attributes:
        model: architecture and precision, in words.
        parameters: elements of all weights; where they are packed, of what is unpacked from them.
        trainable: elements of those that are trained.
        rows: what a micro-batch is made of, in words.
        reference: what the reference policy is, in words.
        optim: the optimizer, in words.
        backend: name of the backend.
        processes: number of processes.
        memory: bytes on each of them.
        steps: optimizer steps; None where no data say.
        tokens: that the policy reads in a step on one process.
        throughput: tokens a second of a process; None where nobody knows.
        gpu: bytes of a GPU; None where nobody knows.
        gpu_name: whose these are.
        building: bytes while the saliency mask is made, before training; 0 without one.
        notes: what else a reader has to know.
    """

    model: str
    parameters: int
    trainable: int
    rows: str
    reference: str
    optim: str
    backend: str
    processes: int
    memory: Memory
    steps: int | None
    tokens: int
    throughput: float | None = None
    gpu: int | None = None
    gpu_name: str = ""
    building: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes at the fullest moment of the run."""
        return max(self.memory.total, self.building)

    @property
    def fits(self) -> bool | None:
        """Whether the memory is enough; None where the GPU is not known."""
        return None if self.gpu is None else self.needed <= self.gpu

    @property
    def seconds(self) -> float | None:
        """Of the training alone; None where steps or throughput are not known."""
        if self.steps is None or not self.throughput:
            return None
        return self.steps * self.tokens / self.throughput


def describe(plan: Plan) -> str:
    """The plan in lines: what is trained, memory by part, steps, time, and a warning where it does not fit."""
    share = 100 * plan.trainable / max(1, plan.parameters)
    lines = [
        f"model        {plan.model}",
        f"parameters   {plan.parameters:,}, trainable {plan.trainable:,} ({share:.2f} %)",
        f"micro-batch  {plan.rows}",
        f"memory       per GPU, {plan.backend} on {plan.processes} process(es), GiB:",
        *_memory_lines(plan),
        f"steps        {_steps(plan)}",
        f"time         {_time(plan)}",
    ]
    return "\n".join([*lines, *(f"note         {note}" for note in plan.notes), _verdict(plan)])


def gib(size: int) -> str:
    """Bytes in GiB, with as many digits as a decision needs."""
    return f"{size / 2**30:.2f}" if size >= 2**30 / 10 else f"{size / 2**30:.4f}"


def _memory_lines(plan: Plan) -> list[str]:
    meanings = {**MEANINGS, "reference": plan.reference, "optimizer": plan.optim}
    always = ("weights", "gradients", "optimizer", "reference", "activations")
    lines = []
    for name, meaning in meanings.items():
        size = getattr(plan.memory, name)
        if size or name in always:
            lines.append(f"  {name:<12}{gib(size):>9}  {meaning}".rstrip())
    lines.append(f"  {'together':<12}{gib(plan.memory.total):>9}")
    if plan.building:
        lines.append(f"  {'(before)':<12}{gib(plan.building):>9}  while the saliency mask is made")
    return lines


def _steps(plan: Plan) -> str:
    read = f"{plan.tokens:,} tokens each on every process"
    return f"{plan.steps:,} of {read}" if plan.steps is not None else f"not known without the data; {read}"


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "not known; give plan_throughput (tokens a second on one process), and the data or max_steps"
    minutes = round(plan.seconds / 60)
    spent = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{plan.seconds / 60:.1f} min"
    return f"{spent} of training at {plan.throughput:,g} tokens a second on each process, without evaluation"


def _verdict(plan: Plan) -> str:
    if plan.fits is None:
        return "No GPU is seen and none was given: set plan_gpu_memory (GiB) to hear whether it fits."
    has = f"{gib(plan.gpu)} GiB of {plan.gpu_name}"
    if not plan.fits:
        return (
            f"WARNING: it will not fit: {gib(plan.needed)} GiB are needed and there are {has}. What helps: a "
            "smaller per_device_train_batch_size with more gradient_accumulation_steps, activation_checkpointing, "
            "use_peft, load_in_4bit, another optim, or plan_backend zero3 or fsdp2 on more GPUs."
        )
    return f"It fits: {gib(plan.needed)} GiB are needed and there are {has}; kernels and fragments take some too."
