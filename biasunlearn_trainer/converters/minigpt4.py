"""MiniGPT-4 from its three published parts, as one folder of the class `Blip2ForConditionalGeneration`.

    python -m biasunlearn_trainer.converters.minigpt4 --projection pretrained_minigpt4_7b.pth \\
        --llama PATH_TO_VICUNA_7B --output minigpt4-7b

MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592) trained a single linear layer between the frozen image half of BLIP-2
(ViT-g, its last norm, query tokens, Q-Former) and a frozen Vicuna, and published that layer alone. The image half must
be the one it was trained behind, that of BLIP-2 FlanT5-XXL; its language model is not read.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

BLIP2 = "Salesforce/blip2-flan-t5-xxl"
PROJECTION = {"llama_proj.weight": "language_projection.weight", "llama_proj.bias": "language_projection.bias"}
# What a checkpoint of the training code holds beside trained weights: buffers, which the model makes for itself.
BUFFERS = ("inv_freq", "position_ids", "relative_position_index")
IMAGE_HALF = ("vision_model.", "qformer.", "query_tokens")
IN_FLOAT32 = ("qformer.", "query_tokens")  # as transformers keeps them beside a float16 rest
IMAGE = "<image>"
# The prompts that the projection was trained with (`prompt_template` of its evaluation configs), the image as in its
# training prompts.
PROMPTS = {"vicuna": ("###Human: ", " ###Assistant:", "###"), "llama2": ("[INST] ", " [/INST]", "{{ eos_token }}")}


class ConversionError(ValueError):
    """Parts that do not make one model; `faults` holds one sentence each."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def convert(
    projection: str,
    llama: str,
    output: str,
    blip2: str = BLIP2,
    dtype: torch.dtype = torch.float16,
    prompt: str = "vicuna",
) -> None:
    """Write the model and its processor.

    Args:
        projection: the published checkpoint, a `.pth` with `model` -> `llama_proj.weight` and `llama_proj.bias`.
        llama: folder or Hub id of the Vicuna or LLaMA that the projection was trained for.
        output: a folder that is not there yet, or is empty.
        blip2: folder or Hub id of the BLIP-2 whose image half is taken, in safetensors.
        dtype: precision of the weights, but for the Q-Former's.
        prompt: whose chat template to write, `vicuna` or `llama2`.

    Raises:
        ConversionError: with every name and shape that does not fit.
        FileExistsError: where there is something in `output`.
    """
    target = Path(output)
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{output} is not empty. Name a new folder, or clear that one.")
    weights = read_projection(projection)
    base = AutoConfig.from_pretrained(blip2)
    if base.model_type != Blip2Config.model_type:
        raise ConversionError([f"{blip2} is a {base.model_type!r} model, expected {Blip2Config.model_type!r}."])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    # The processor gives the tokenizer its image token.
    processor = Blip2Processor(
        AutoImageProcessor.from_pretrained(blip2), tokenizer, num_query_tokens=base.num_query_tokens
    )
    tokenizer.chat_template = chat_template(prompt)
    language_model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, use_safetensors=True)
    _make_room(language_model, tokenizer)
    model = _empty_model(base, language_model, tokenizer)
    weights |= read_image_half(blip2)
    weights |= {f"language_model.{name}": value for name, value in language_model.state_dict().items()}
    _check(model, weights)
    cast = {name: value.to(torch.float32 if name.startswith(IN_FLOAT32) else dtype) for name, value in weights.items()}
    model.load_state_dict(cast, assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    model.config.dtype = dtype  # which saving takes from the first weight, a float32 one
    model.config.save_pretrained(target)
    processor.save_pretrained(target)


def read_projection(path: str) -> dict[str, Tensor]:
    """The projection's weights under the names of the class.

    Raises:
        ConversionError: where the file holds anything else than the projection, or a pickle with code in it.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise ConversionError(
            [f"{path} holds more than tensors and plain values, so it is not read: {str(err).splitlines()[0]}"]
        ) from err
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        found = list(checkpoint)[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ConversionError([f"{path} has no `model` with weights in it; found: {found}."])
    state = {name: value for name, value in checkpoint["model"].items() if not name.endswith(BUFFERS)}
    faults = [f"{path} lacks {name!r}." for name in PROJECTION if name not in state]
    faults += [f"{path} has {name!r}, for which MiniGPT-4 has no place." for name in state if name not in PROJECTION]
    if faults:
        raise ConversionError(faults)
    return {PROJECTION[name]: value for name, value in state.items()}


def read_image_half(name_or_path: str) -> dict[str, Tensor]:
    """Image encoder, query tokens and Q-Former of a BLIP-2; of its language model nothing is read."""
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {SAFE_WEIGHTS_NAME}
    weights = {}
    for file in sorted(files):
        if Path(file).name != file:
            raise ConversionError([f"{name_or_path}: its index names {file!r}, which leads out of its folder."])
        with safe_open(cached_file(name_or_path, file), framework="pt") as shard:
            weights |= {name: shard.get_tensor(name) for name in shard.keys() if name.startswith(IMAGE_HALF)}  # noqa: SIM118
    return weights


def chat_template(prompt: str) -> str:
    """MiniGPT-4's prompt as a chat template: `###Human: <Img><image></Img> question ###Assistant: answer###`."""
    human, assistant, end = PROMPTS[prompt]
    end = end if end.startswith("{{") else f"{{{{ '{end}' }}}}"
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] if message['content'] is string else "
        "message['content'] | map(attribute='text') | join }}"
        f"{{% elif message['role'] == 'user' %}}{{{{ '{human}' }}}}"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ '<Img>{IMAGE}</Img> ' }}}}"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
        f"{{{{ '{assistant}' }}}}"
        "{% else %}{{ ' ' }}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}"
        f"{{% if not (loop.last and continue_final_message) %}}{end}{{% endif %}}"
        "{% endif %}{% endfor %}"
    )


def _make_room(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Widen the vocabulary by the image token; its rows are zero, so it is next to never answered."""
    old = language_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= old:
        return
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            layer.weight[old:] = 0


def _empty_model(
    base: Blip2Config, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Blip2ForConditionalGeneration:
    config = Blip2Config(
        vision_config=base.vision_config.to_dict(),
        qformer_config=base.qformer_config.to_dict(),
        text_config=language_model.config.to_dict(),
        num_query_tokens=base.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with init_empty_weights():
        model = Blip2ForConditionalGeneration(config)
    model.generation_config = language_model.generation_config
    return model


def _check(model: Blip2ForConditionalGeneration, weights: dict[str, Tensor]) -> None:
    """Raise a ConversionError with every name and shape in which the parts and the model differ."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in weights]
    faults += [f"no place for: {name} {tuple(value.shape)}" for name, value in weights.items() if name not in expected]
    faults += [
        f"shape of {name}: got {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if faults:
        if any("language_projection" in fault for fault in faults):
            faults.append("The projection belongs to a language model of another width: 4096 is 7B, 5120 is 13B.")
        raise ConversionError(faults)


def main(argv: Sequence[str] | None = None, write: Callable[[str], None] = print) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.converters.minigpt4", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--projection", required=True, help="the published .pth with llama_proj.weight and .bias")
    parser.add_argument("--llama", required=True, help="folder or Hub id of the Vicuna or LLaMA it was trained for")
    parser.add_argument("--output", required=True, help="folder to write; new or empty")
    parser.add_argument("--blip2", default=BLIP2, help=f"whose image half to take; default {BLIP2}, MiniGPT-4's own")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--prompt", default="vicuna", choices=sorted(PROMPTS), help="chat template; default vicuna")
    args = parser.parse_args(argv)
    try:
        convert(args.projection, args.llama, args.output, args.blip2, getattr(torch, args.dtype), args.prompt)
    except (ConversionError, OSError) as err:
        parser.error(str(err))
    write(f"wrote {args.output}")


if __name__ == "__main__":
    main()
