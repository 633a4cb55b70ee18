"""Runs that must be the same are the same: cut of the batch, workers, processes, interruption."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer.trainers.registry import METHODS

CUTS = ((4, 1), (2, 2), (1, 4))


def losses(trainer):
    trainer.train()
    return [
        {k: v for k, v in entry.items() if k == "loss" or "/" in k}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_same(first, second, tolerance=2e-5):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("method", METHODS)
def test_the_cut_of_a_batch_changes_no_loss(method, reduction, make_trainer):
    """Ten rows by four: the last batch of an epoch is incomplete, and completions differ in length."""
    runs = [
        losses(
            make_trainer(
                method,
                "text",
                num_forget=10,
                max_steps=6,
                reduction=reduction,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
            )
        )
        for batch, steps in CUTS
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("method", ["npo", "kl_min"])
def test_the_cut_of_a_batch_changes_no_loss_on_images(method, make_trainer):
    runs = [
        losses(
            make_trainer(
                method, "image", num_forget=6, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
            )
        )
        for batch, steps in CUTS
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_token_mean_is_the_mean_over_all_tokens_of_the_batch(make_trainer):
    from biasunlearn_trainer.completions import forward_completions

    trainer = make_trainer("ga", reduction="token_mean", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    batches = [trainer.data_collator([trainer.train_dataset[d] for d in draws]) for draws in ((0, 1), (2, 3))]
    counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.model.eval()
    total = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts) for batch in batches)
    outputs = [forward_completions(trainer.model, batch["forget"]) for batch in batches]
    expected = sum(o.logps.sum() for o in outputs) / sum(o.lengths.sum() for o in outputs)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_workers_change_nothing(modality, make_trainer):
    settings = {"num_forget": 6, "max_steps": 4}
    alone = losses(make_trainer("npo", modality, **settings))
    helped = losses(
        make_trainer("npo", modality, dataloader_num_workers=2, dataloader_persistent_workers=True, **settings)
    )
    assert alone == helped


def test_two_seeds_differ(make_trainer):
    first, second = (losses(make_trainer("npo", seed=seed)) for seed in (0, 1))
    assert first != second
    assert losses(make_trainer("npo", seed=0)) == first


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_bit_identical(method, make_trainer, tmp_path):
    def run(folder, resume=None, max_steps=5):
        torch.manual_seed(0)
        trainer = make_trainer(
            method, "text", LoraConfig(r=2, lora_dropout=0.1), num_forget=6, max_steps=max_steps,
            output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=2, save_total_limit=9,
            reference="auto",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}

    whole = run("whole")
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_full_fine_tuning_resumes_with_its_first_reference(make_trainer, tmp_path):
    """The reference is the model before unlearning, also when training goes on from a checkpoint."""

    def run(resume=None):
        trainer = make_trainer("npo", num_forget=6, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    table = whole.reference["forget"].table
    weights = {name: value.clone() for name, value in whole.model.named_parameters()}
    for cached in (True, False):
        if not cached:
            for file in (tmp_path / "references").iterdir():
                file.unlink()
        again = run(resume=str(tmp_path / "out" / "checkpoint-2"))
        assert torch.equal(again.reference["forget"].table, table)
        assert all(torch.equal(weights[name], value) for name, value in again.model.named_parameters())


def test_a_model_that_was_loaded_elsewhere_resumes_too(make_trainer, tiny_llava, tmp_path):
    """LLaVA is saved under other names than its own; the Trainer alone would go on from the weights of the start."""
    from transformers import AutoModelForImageTextToText

    def run(resume=None):
        model = AutoModelForImageTextToText.from_pretrained(str(tiny_llava))
        trainer = make_trainer("npo", "image", model=model, max_steps=3, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.model.named_parameters()}

    whole = run()
    resumed = run(str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


TWO_PROCESSES = """
import json, os, sys
from biasunlearn_trainer import NPOConfig, NPOTrainer
from biasunlearn_trainer.models import load_model
model, output, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = [{"prompt": f"Who was {i}?", "completion": " The " + "tall " * (i % 3) + "one."} for i in range(8)]
args = NPOConfig(output, per_device_train_batch_size=batch, num_train_epochs=2, learning_rate=1e-3, logging_steps=1,
    save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, reference_cache_dir=output + "/references",
    lr_scheduler_type="constant")
seen = []
class Seeing(NPOTrainer):
    def loss_terms(self, model, batch):
        if model.training: seen.append({name: part["index"].tolist() for name, part in batch.items()})
        return super().loss_terms(model, batch)
trainer = Seeing(model=load_model(model), args=args, forget_dataset=rows, retain_dataset=rows[:5])
trainer.train()
log = [{k: v for k, v in e.items() if k == "loss" or "/" in k} for e in trainer.state.log_history if "loss" in e]
with open(f"{output}/{args.process_index}.json", "w") as file:
    json.dump({"world": args.world_size, "seen": seen, "log": log}, file)
trainer.accelerator.end_training()
os._exit(0)  # all is written; on a busy machine a thread of gloo may abort the interpreter's own way out
"""


def test_two_processes_see_the_same_pairs_and_losses(tiny_llama, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    results = {}
    for processes, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(processes)
        output.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        command = [*(launch if processes > 1 else [sys.executable]), script, tiny_llama, output, batch]
        done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]
    (alone,), both = results[1], results[2]
    assert [part["world"] for part in both] == [2, 2] and both[0]["log"] == both[1]["log"]
    assert_same(alone["log"], both[0]["log"])
    for step, batch in enumerate(alone["seen"]):
        for stream, rows in batch.items():
            assert sorted(rows) == sorted(part["seen"][step][stream][k] for part in both for k in range(2))
