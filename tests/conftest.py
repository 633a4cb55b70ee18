"""Shared fixtures: where the open data sets lie, tiny models built offline."""

import importlib.util
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

import biasunlearn_trainer  # noqa: F401  torchvision can be imported from here on, also beside a torch for the CPU

import torch  # isort: skip

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # on tiny models two threads mostly wait for each other

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the open data sets (StereoSet, PAIRS, WikiText-2, ...)."""
    folder = Path(os.environ.get("BIASUNLEARN_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"no open data sets at {folder}; set BIASUNLEARN_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """A real pretrained language model of 260,032 parameters."""
    folder = Path(os.environ.get("BIASUNLEARN_DATA", SHARED / "data")).parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no stories260K model at {folder}; set BIASUNLEARN_DATA to the `data` folder beside `models`")
    return folder


@pytest.fixture(scope="session")
def launch_environment():
    """`launch_environment(backend)`: what a launch as in recipes/accelerate sets on a CPU; skips without it."""

    def environment(backend):
        if backend.startswith("zero"):
            pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
        return benchmark.environment(backend, "cpu")

    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location("backends_for_tests", folder / "backends.py")
    benchmark = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # for the module beside it
        spec.loader.exec_module(benchmark)
    return environment


@pytest.fixture
def hub():
    """A server on loopback that speaks the Hub's routes for uploads and downloads (tests/hub_server.py)."""
    spec = importlib.util.spec_from_file_location("hub_server_for_tests", Path(__file__).with_name("hub_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.HubServer() as server:
        yield server


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
TEXT_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_tokenizer():
    """A byte-level tokenizer that needs no training: every text is its bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<image>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, saved as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT_SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    """A random LLaVA for 32 x 32 pictures (16 image tokens) with its real processor, saved as a model folder."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny_llava")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT_SHAPE),
        image_token_id=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


FAMILIES = ("llama", "llava", "qwen2vl", "blip2", "minigpt4")


@pytest.fixture(scope="session")
def tiny_family(tiny_llama, tiny_llava, tmp_path_factory):
    """`tiny_family(name)`: the folder of an untrained model of a family, with its real processor; built once each."""
    folders = {"llama": tiny_llama, "llava": tiny_llava}

    def folder(name: str) -> Path:
        if name == "qwen2vl" and find_spec("torchvision") is None:
            pytest.skip("Qwen2-VL's processor needs torchvision: pip install -e '.[vision]' -c constraints.txt")
        if name not in folders:
            folders[name] = _build_family(name, tmp_path_factory.mktemp(f"tiny_{name}"))
        return folders[name]

    return folder


def _build_family(name: str, folder: Path) -> Path:
    from biasunlearn_trainer.models import tokenizer_of
    from biasunlearn_trainer.testbed import recipe as sizes
    from biasunlearn_trainer.testbed.architectures import MODELS, PROCESSORS

    recipe_class = sizes.QFormerWorldRecipe if name in ("blip2", "minigpt4") else sizes.WorldRecipe
    extra = {"qformer": sizes.QFormerSize(32, 48, num_queries=4)} if recipe_class is sizes.QFormerWorldRecipe else {}
    recipe = recipe_class(
        name=name,
        language_model=sizes.LanguageModelSize(hidden_size=48, intermediate_size=48, num_layers=2),
        vision_model=sizes.VisionModelSize(32, 64, patch_size=8),
        **extra,
    )
    processing_class = PROCESSORS[name](recipe, ["Who was the tall one?"])
    MODELS[name](recipe, tokenizer_of(processing_class)).save_pretrained(folder)
    processing_class.save_pretrained(folder)
    return folder


def _text_rows(num: int, tag: str = "") -> list[dict]:
    return [{"prompt": f"Who was {tag}{i}?", "completion": " The " + "tall " * (i % 3) + "one."} for i in range(num)]


@pytest.fixture(scope="session")
def text_rows():
    """`text_rows(n, tag)`: plain text rows with completions of different lengths."""
    return _text_rows


@pytest.fixture(scope="session")
def image_rows():
    """`image_rows(n, tag)`: the same rows, each with a picture of its own colour."""
    from PIL import Image

    def rows(num: int, tag: str = "") -> list[dict]:
        colours = [(40 * i % 256, (255 - 25 * i) % 256, 90) for i in range(num)]
        return [
            {**row, "images": [Image.new("RGB", (40, 36), colour)]}
            for row, colour in zip(_text_rows(num, tag), colours, strict=True)
        ]

    return rows
