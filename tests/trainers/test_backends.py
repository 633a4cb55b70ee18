"""The same losses on every backend: the command that makes the table in docs/distributed.md, and QLoRA."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import evaluating, load_model, load_processor

BACKENDS = Path(__file__).resolve().parents[2] / "benchmarks" / "backends.py"


def compare(*words):
    done = subprocess.run([sys.executable, BACKENDS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def figures(printed):
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[2:]] for row in rows[1:]}


def test_ddp_learns_what_one_process_learns():
    found = figures(compare("--backends", "ddp", "--methods", "npo", "--cases", "image, full", "text, LoRA"))
    assert float(found["npo"][0]) <= 1e-4


def test_zero_learns_what_one_process_learns():
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    words = ("--methods", "npo", "mmunlearner", "--cases", "image, full")
    found = figures(compare("--backends", "zero2", "zero3", *words))
    assert [float(value) <= 1e-4 for value in found["npo"]] == [True, True]
    assert float(found["mmunlearner"][0]) <= 1e-4 and found["mmunlearner"][1] == "refused"


@pytest.mark.slow
def test_every_method_learns_the_same_on_every_backend():
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    print(compare())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_moves_the_adapter_alone(checkpointing, tiny_llama, make_trainer):
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load_model(str(tiny_llama), quantization_config=quantised, device_map={"": "cpu"})
    base = {name: value.clone() for name, value in model.named_parameters()}
    assert any(value.dtype == torch.uint8 for value in base.values())
    trainer = make_trainer(
        "npo", model=model, peft_config=LoraConfig(r=4), retain_loss="kl", activation_checkpointing=checkpointing
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    # At the start policy and reference are one: NPO is 2/beta ln 2 and the KL is 0.
    assert first["loss/forget"] == pytest.approx(2 / 0.1 * math.log(2), abs=1e-4) and first["kl/retain"] == 0
    assert last["loss/forget"] < first["loss/forget"]
    after = dict(trainer.model.base_model.model.named_parameters())
    assert all(torch.equal(value, after[name.replace("proj.", "proj.base_layer.")]) for name, value in base.items())


def test_gradients_pass_through_quantised_layers_after_an_evaluation(tiny_llama, text_rows):
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load_model(str(tiny_llama), quantization_config=quantised, device_map={"": "cpu"})
    plain = load_model(str(tiny_llama))
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            plain.get_submodule(name).weight.data = values_of(module)
    collator = CompletionCollator(load_processor(str(tiny_llama)))
    batch = collator([{**row, "index": i} for i, row in enumerate(text_rows(3))])
    gradients = []
    for each in (model, plain):
        with evaluating(each):
            forward_completions(each, batch)
        forward_completions(each.train(), batch).logps.sum().backward()
        gradients.append(each.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=1e-3, atol=1e-4)


def values_of(layer):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
