"""What the Fisher pass holds at its peak, in bytes of tensors."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import nll_loss
from biasunlearn_trainer.models import load_processor
from biasunlearn_trainer.plan.meter import TensorBytes
from biasunlearn_trainer.saliency import SaliencyBuilder, SaliencySettings


@pytest.mark.slow
@pytest.mark.parametrize(("fisher", "batched"), [("per_sample", True), ("per_sample", False), ("per_batch", True)])
def test_the_fisher_pass_holds_weights_one_sum_one_gradient_and_activations(
    fisher, batched, tiny_llama, tmp_path, text_rows
):
    PartialState(cpu=True)
    collator = CompletionCollator(load_processor(str(tiny_llama)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).eval()
    weights = list(model.parameters())
    assert sum(value.numel() for value in weights) >= 50_000_000
    of_weights = sum(value.nbytes for value in weights)
    rows = [{**row, "prompt": row["prompt"] * 20} for row in text_rows(8)]
    settings = SaliencySettings(fisher=fisher, batched=batched, batch_size=4)
    size = settings.rows_at_once

    with TensorBytes(*weights) as meter:  # what one micro-batch's forward pass keeps for its backward
        output = forward_completions(model, collator(rows[:size]))
        loss = nll_loss(output.token_logps, output.mask).mean()
        activations = meter.peak - of_weights
        del output, loss
    allowed = of_weights + of_weights + max(value.nbytes for value in weights) + activations

    builder = SaliencyBuilder(model, collator, Accelerator(cpu=True), settings, tmp_path)
    with TensorBytes(*weights) as meter:
        builder.mask(rows[:4], rows[4:])
    print(
        f"{fisher}, {size} rows at once: peak {meter.peak / 1e6:.0f} MB, {meter.peak / allowed:.3f} of what is needed"
    )
    assert meter.peak <= 1.15 * allowed
