"""Packed weights against those that bitsandbytes really keeps, on the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.plan.quantised import PackedLinear, pack_linears

SHAPE = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose linear layers are large enough for the scales to count."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_attention_heads=8)).save_pretrained(folder)
    return folder


def scales(state):
    """Bytes of the scales in a `QuantState`, those of the scales' own scales too."""
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_those_of_bitsandbytes(nested, folder):
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    real = load_model(str(folder), dtype="bfloat16", quantization_config=quantised, device_map={"": "cpu"})
    planned = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_attention_heads=8), dtype=torch.bfloat16)
    pack_linears(planned, 4, nested, torch.bfloat16)

    layers = {name: layer for name, layer in real.named_modules() if type(layer).__name__ == "Linear4bit"}
    packed = {name: layer for name, layer in planned.named_modules() if isinstance(layer, PackedLinear)}
    assert layers.keys() == packed.keys() and len(layers) == 2 * 7
    for name, layer in layers.items():
        held = layer.weight.nbytes + scales(layer.weight.quant_state)
        assert sum(value.nbytes for value in packed[name].state_dict().values()) == held, name
    # All else stays as it was, and in the same precision.
    others = [
        {name: value.dtype for name, value in model.named_parameters() if value.dtype != torch.uint8}
        for model in (real, planned)
    ]
    assert others[0] == others[1]
