"""The gradient that reaches the optimizer is -m * dL_f + dL_r, however the step is cut, wrapped or recomputed."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.saliency import SaliencyMask
from biasunlearn_trainer.saliency.building import weights_digest


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to step with."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: value for name, value in model.named_parameters() if value.grad is not None}
        self.steps.append({name: value.grad.clone() for name, value in named.items()})


def half_of(model, seed=0):
    """A mask of every trainable weight, half of it drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    mask = SaliencyMask.empty()
    for name, value in model.named_parameters():
        if value.requires_grad:
            mask.put(name, torch.rand(value.shape, generator=generator) < 0.5)
    return mask


def plain_gradients(trainer, draws):
    """(of the forget loss, of the retain loss): two backward passes over a whole step, without any mask."""
    model = trainer.model.eval()
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    parts = []
    for stream in ("forget", "retain"):
        rows = [row for draw in draws for row in trainer.train_dataset[draw][stream]]
        losses = []
        for row in rows:  # one by one: no padding, no batch
            output = forward_completions(model, trainer.collator([row]))
            losses.append(-output.token_logps.sum() / output.mask.sum())
        gradients = torch.autograd.grad(sum(losses) / len(rows), weights.values(), allow_unused=True)
        named = zip(weights, gradients, strict=True)
        parts.append({name: torch.zeros_like(weights[name]) if g is None else g for name, g in named})
    return parts


def check_step(trainer, mask, draws, forget_sign=-1.0):
    forget, retain = plain_gradients(trainer, draws)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    for name, gradient in seen.steps[0].items():
        expected = forget_sign * mask.get(name) * forget[name] + retain[name]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    # What gets no gradient at all has none expected of it.
    for name in forget.keys() - seen.steps[0].keys():
        assert not (mask.get(name) * forget[name]).any() and not retain[name].any()
    return seen.steps[0]


STEP = {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-4}


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cut", [(4, 1), (2, 2), (1, 4)])
def test_the_gradient_is_masked_ascent_plus_plain_descent(cut, checkpointing, modality, make_trainer, tiny_models):
    model = load_model(tiny_models[modality])
    mask = half_of(model)
    trainer = make_trainer(
        "mmunlearner", modality, model=model, saliency_mask=save(mask, model, make_trainer.folder), **STEP,
        per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], activation_checkpointing=checkpointing,
    )  # fmt: skip
    check_step(trainer, mask, range(4))


class Flat(torch.nn.Module):
    """Lays all rows out as one, so that nobody can say which of them a layer inside is called on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden.flatten(0, 1)[None])[0].view(*hidden.shape[:2], -1)


def test_rows_that_cannot_be_told_apart_go_apart(make_trainer, tiny_llama, caplog):
    caplog.set_level(logging.INFO)
    model = load_model(str(tiny_llama))
    model.model.layers[1].mlp.up_proj = Flat(model.model.layers[1].mlp.up_proj)
    mask = half_of(model)
    trainer = make_trainer(
        "mmunlearner", model=model, saliency_mask=save(mask, model, make_trainer.folder), **STEP,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    check_step(trainer, mask, range(4))
    (said,) = [record.getMessage() for record in caplog.records if "passes of their own" in record.getMessage()]
    assert said.endswith("no layout of 4 rows, or more than one, has 1 entries.")
    assert not trainer.mixes_masked


@pytest.fixture
def tiny_models(tiny_llama, tiny_llava):
    return {"text": str(tiny_llama), "image": str(tiny_llava)}


def save(mask, model, folder):
    mask.provenance = {"model": weights_digest(model)}
    mask.save(folder / "half.safetensors")
    return str(folder / "half.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tied_weights(checkpointing, make_trainer, tiny_llama):
    model = load_model(str(tiny_llama))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    mask = half_of(model)
    trainer = make_trainer(
        "mmunlearner", model=model, saliency_mask=save(mask, model, make_trainer.folder), **STEP,
        per_device_train_batch_size=4, activation_checkpointing=checkpointing,
    )  # fmt: skip
    gradients = check_step(trainer, mask, range(4))
    assert "lm_head.weight" not in gradients


def test_lora_is_masked_on_b_and_a_stays(make_trainer):
    torch.manual_seed(0)
    trainer = make_trainer("mmunlearner", "image", LoraConfig(r=2), **STEP, per_device_train_batch_size=4)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    mask = trainer.saliency_mask
    assert mask.shapes and all("lora_B" in name for name in mask.shapes)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)}
    assert moved and moved <= set(mask.shapes)
    torch.manual_seed(0)
    again = make_trainer("mmunlearner", "image", LoraConfig(r=2), **STEP, per_device_train_batch_size=4)
    check_step(again, mask, range(4))


def test_a_masked_model_generates(make_trainer, image_rows):
    """`generate` reads the signature of the model's forward; a probe in training calls it."""
    from biasunlearn_trainer.eval.scoring import Scorer

    trainer = make_trainer("mmunlearner", "image", **STEP)
    before = Scorer(trainer.model, trainer.processing_class).generate(image_rows(2), 4)
    trainer.prepare_saliency()
    assert Scorer(trainer.model, trainer.processing_class).generate(image_rows(2), 4) == before


def test_other_streams_and_methods_keep_their_gradients(make_trainer, tiny_llama):
    """An empty mask leaves of NPO + retain the retain part alone, and of NPO alone nothing."""
    model = load_model(str(tiny_llama))
    mask = half_of(model)
    for name in mask.shapes:
        mask.put(name, torch.zeros(mask.shapes[name], dtype=torch.bool))
    trainer = make_trainer(
        "npo", model=model, saliency_mask=save(mask, model, make_trainer.folder), **STEP,
        per_device_train_batch_size=4, retain_loss="nll",
    )  # fmt: skip
    check_step(trainer, mask, range(4))
    model = load_model(str(tiny_llama))
    before = {name: value.clone() for name, value in model.named_parameters()}
    make_trainer("npo", model=model, saliency_mask=mask_path(make_trainer), retain_loss="none", **STEP).train()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def mask_path(make_trainer):
    return str(make_trainer.folder / "half.safetensors")


@pytest.mark.parametrize("modality", ["text", "image"])
def test_update_scope_leaves_the_rest_bit_identical(modality, make_trainer, tiny_models):
    """Fifty AdamW steps with weight decay: momentum and decay included."""
    model = load_model(tiny_models[modality])
    mask = half_of(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(
        "mmunlearner", modality, model=model, saliency_mask=save(mask, model, make_trainer.folder),
        mask_scope="update", max_steps=50, weight_decay=0.1, learning_rate=1e-3, num_forget=3,
    )  # fmt: skip
    trainer.train()
    for name, value in model.named_parameters():
        salient = mask.get(name)
        assert torch.equal(value[~salient], before[name][~salient]), name
        if value.requires_grad and "bias" not in name:
            assert not torch.equal(value[salient], before[name][salient]), name


def test_a_masked_run_resumes_bit_identical(make_trainer):
    def run(resume=None):
        trainer = make_trainer("mmunlearner", max_steps=4, save_strategy="steps", save_steps=2, mask_scope="update")
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.model.named_parameters()}

    whole = run()
    resumed = run(str(make_trainer.folder / "out" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


TWO_PROCESSES = """
import os, sys, torch
from biasunlearn_trainer import MMUnlearnerConfig, MMUnlearnerTrainer
from transformers import TrainerCallback
from biasunlearn_trainer.models import load_model
model, folder, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = [{"prompt": f"Who was {i}?", "completion": " The " + "tall " * (i % 3) + "one."} for i in range(8)]
args = MMUnlearnerConfig(folder, per_device_train_batch_size=batch, max_steps=2, learning_rate=1e-3, max_grad_norm=0.0,
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    saliency_cache_dir=f"{folder}/masks{sys.argv[4]}", gradient_accumulation_steps=2)
seen = []
class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        seen.append({name: value.grad.clone() for name, value in model.named_parameters()})
trainer = MMUnlearnerTrainer(model=load_model(model), args=args, forget_dataset=rows[:4], retain_dataset=rows[4:],
    callbacks=[Gradients()])
trainer.train()
bits = {name: trainer.saliency_mask.get(name) for name in trainer.saliency_mask.shapes}
told = {"world": args.world_size, "gradients": seen, "bits": bits}
torch.save(told, f"{folder}/{sys.argv[4]}-{args.process_index}.pt")
trainer.accelerator.end_training()
os._exit(0)
"""


def test_two_processes_make_the_same_mask_and_gradients(tiny_llama, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    for processes, batch in ((1, 2), (2, 1)):
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        command = [*(launch if processes > 1 else [sys.executable]), script, tiny_llama, tmp_path, batch, processes]
        done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, *both = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert [part["world"] for part in both] == [2, 2]
    for part in both:
        for name, bits in alone["bits"].items():
            assert (part["bits"][name] == bits).float().mean() > 0.999
        for name, gradient in alone["gradients"][0].items():
            # Where rounding puts a weight at the threshold on the other side, its gradient differs.
            same = part["bits"][name] == alone["bits"][name]
            torch.testing.assert_close(part["gradients"][0][name][same], gradient[same], rtol=0, atol=1e-6)
    assert json.dumps(sorted(alone["bits"])) == json.dumps(sorted(both[0]["bits"]))


ZERO2 = """
import json, os, sys, torch
from biasunlearn_trainer import MMUnlearnerConfig, MMUnlearnerTrainer
from biasunlearn_trainer.models import load_model
model, folder, batch, name = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
rows = [{"prompt": f"Who was {i}?", "completion": " The " + "tall " * (i % 3) + "one."} for i in range(8)]
zero2 = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": 0.0}
# Plain gradient descent: a step is the gradient times the rate, and nothing magnifies a difference.
args = MMUnlearnerConfig(folder, per_device_train_batch_size=batch, max_steps=2, learning_rate=0.1, max_grad_norm=0.0,
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", optim="sgd",
    saliency_mask=sys.argv[5], mask_scope=sys.argv[6], gradient_accumulation_steps=2, logging_steps=1,
    deepspeed=zero2 if name == "zero2" else None)
trainer = MMUnlearnerTrainer(model=load_model(model), args=args, forget_dataset=rows[:4], retain_dataset=rows[4:])
trainer.train()
whole = trainer.accelerator.unwrap_model(trainer.model)
weights = {key: value.detach().clone() for key, value in whole.named_parameters()}
torch.save({"world": args.world_size, "weights": weights}, f"{folder}/{name}-{args.process_index}.pt")
trainer.accelerator.end_training()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["forget", "update"])
def test_zero2_steps_as_one_process_does(scope, tiny_llama, tmp_path):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    script = tmp_path / "run.py"
    script.write_text(ZERO2)
    model = load_model(str(tiny_llama))
    mask = half_of(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    file = save(mask, model, tmp_path)
    for name, processes, batch in (("plain", 1, 2), ("zero2", 2, 1)):
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        command = [
            *(launch if processes > 1 else [sys.executable]),
            script,
            tiny_llama,
            tmp_path,
            batch,
            name,
            file,
            scope,
        ]
        done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, *both = (torch.load(tmp_path / name) for name in ("plain-0.pt", "zero2-0.pt", "zero2-1.pt"))
    assert [part["world"] for part in both] == [2, 2]
    moved = {name for name, value in alone["weights"].items() if not torch.equal(value, before[name])}
    assert len(moved) > 10
    for part in both:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(part["weights"][name], value, rtol=0, atol=1e-6)
            if scope == "update":
                assert torch.equal(part["weights"][name][~mask.get(name)], before[name][~mask.get(name)])


def test_what_cannot_be_masked_is_said(make_trainer, text_rows, monkeypatch):
    with pytest.raises(ValueError, match="needs a `saliency_mask`"):
        make_trainer("mmunlearner", saliency_mask=None)
    with pytest.raises(ValueError, match=r"no such set\. Give a preserve_dataset"):
        make_trainer("ga", saliency_mask="fisher").train()
    rows = {"forget_dataset": text_rows(4), "preserve_dataset": text_rows(3, "p")}
    with pytest.raises(ValueError, match="'fisher' or 'random', or leave it out"):
        make_trainer("ga", datasets=rows)
    trainer = make_trainer("ga", datasets=rows, saliency_mask="random")
    trainer.train()
    assert trainer.saliency_mask.provenance["kind"] == "random"
    with pytest.raises(OSError, match="no saliency mask absent"):
        make_trainer("ga_diff", saliency_mask="absent").train()
    with pytest.raises(ValueError, match="kl_stream='forget'"):
        make_trainer("kl_min", kl_stream="forget", saliency_mask="fisher", datasets=rows)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="whole weights on every process"):
        make_trainer("mmunlearner")
