"""The completion-only head equals the plain forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions, scatter_tokens, text_positions
from biasunlearn_trainer.models import load_model, load_processor, lora_targets


def reference_logps(model, batch):
    """Full logits, one row and one token at a time."""
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
        logits = model(**inputs).logits.log_softmax(-1)
    mask, ids = batch["completion_mask"], batch["input_ids"]
    return [[logits[b, t - 1, ids[b, t]].item() for t in range(ids.shape[1]) if mask[b, t]] for b in range(len(ids))]


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("lora", [False, True])
def test_equals_full_logits(modality, lora, tiny_llama, tiny_llava, text_rows, image_rows):
    path = str(tiny_llama if modality == "text" else tiny_llava)
    model = load_model(path)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    batch = CompletionCollator(load_processor(path))((text_rows if modality == "text" else image_rows)(5))
    output = forward_completions(model.eval(), batch)
    expected = reference_logps(model, batch)
    assert output.lengths.tolist() == [len(row) for row in expected]
    for logps, mask, row in zip(output.token_logps, output.mask, expected, strict=True):
        torch.testing.assert_close(logps[mask], torch.tensor(row), atol=1e-5, rtol=0)
        assert (logps[~mask] == 0).all()
    torch.testing.assert_close(output.logps, torch.tensor([sum(row) for row in expected]), atol=1e-4, rtol=0)
    assert output.logits.shape == (sum(map(len, expected)), model.config.get_text_config().vocab_size)


def test_a_model_without_logits_to_keep(text_rows, tiny_llama, monkeypatch):
    import biasunlearn_trainer.completions as completions

    model, processor = load_model(str(tiny_llama)).eval(), load_processor(str(tiny_llama))
    batch = CompletionCollator(processor)(text_rows(3))
    kept = forward_completions(model, batch)
    monkeypatch.setattr(completions, "_takes_logits_to_keep", lambda model_class: False)
    torch.testing.assert_close(forward_completions(model, batch).token_logps, kept.token_logps, atol=1e-6, rtol=0)


def test_scatter_lays_out_by_sequence_and_passes_gradients():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    laid = scatter_tokens(values, torch.tensor([[True, False], [True, True]]))
    assert laid.tolist() == [[1.0, 0.0], [2.0, 3.0]]
    (laid * torch.tensor([[1.0, 9.0], [2.0, 3.0]])).sum().backward()
    assert values.grad.tolist() == [1.0, 2.0, 3.0]


def test_text_positions_leave_out_padding_and_images():
    batch = {"input_ids": torch.tensor([[1, 3, 3, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    assert text_positions(batch, 3).tolist() == [[True, False, False, True, False]]
    assert text_positions(batch, None).tolist() == [[True, True, True, True, False]]
