"""Every family: its groups, LoRA targets, gradients, and how its rows become tensors."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from biasunlearn_trainer.collators import CompletionCollator, StreamCollator, choose_rows
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.models import (
    freeze_groups,
    group_of,
    image_placeholder,
    load_model,
    load_processor,
    lora_targets,
    module_groups,
)

PICTURED = ("llava", "qwen2vl", "blip2", "minigpt4")
QUERIES = ("blip2", "minigpt4")
TOKENS = {"llava": "<image>", "qwen2vl": "<|image_pad|>", "blip2": "<image>", "minigpt4": "<image>"}
WRITTEN = TOKENS | {"llava": "<image>\n", "qwen2vl": "<|vision_start|><|image_pad|><|vision_end|>"}
COUNTS = {"llava": 16, "qwen2vl": 4, "blip2": 4, "minigpt4": 4}


@pytest.fixture(params=PICTURED)
def family(request, tiny_family):
    tiny_family(request.param)  # skips where it cannot be built
    return request.param


@pytest.fixture
def processor(family, tiny_family):
    return load_processor(str(tiny_family(family)))


@pytest.fixture
def model(family, tiny_family):
    return load_model(str(tiny_family(family))).eval()


def picture(colour="red", size=(32, 32)):
    return Image.new("RGB", size, colour)


def row(*colours, prompt="Who was?", completion=" The one.", **extra):
    return {"prompt": prompt, "completion": completion, "images": [picture(c) for c in colours], **extra}


def logps(model, batch):
    with torch.no_grad():
        return forward_completions(model, batch).logps


EXPECTED_GROUPS = {
    "llava": {
        "language_model": ["model.language_model", "lm_head"],
        "connector": ["model.multi_modal_projector"],
        "vision_tower": ["model.vision_tower"],
    },
    "qwen2vl": {
        "language_model": ["model.language_model", "lm_head"],
        "connector": ["model.visual.merger"],
        "vision_tower": ["model.visual"],
    },
    "blip2": {
        "language_model": ["language_model"],
        "connector": ["query_tokens", "qformer", "language_projection"],
        "vision_tower": ["vision_model"],
    },
}


def test_groups(family, model):
    groups = module_groups(model)
    assert groups == EXPECTED_GROUPS.get(family, EXPECTED_GROUPS["blip2"])
    assert {group_of(name, groups) for name, _ in model.named_parameters()} == set(groups)


LINEARS = {
    # two decoder layers of seven or six, the connector's, the image encoder's
    "llava": (2 * 7, 2, 2 * 6),
    "qwen2vl": (2 * 7, 2, 2 * 4),  # fused qkv, proj, fc1, fc2; the patch embedding is a convolution
    # Q-Former: two self attentions and one cross attention of four, two feed-forwards of two; then the projection
    "blip2": (2 * 6, 3 * 4 + 2 * 2 + 1, 2 * 4),
    "minigpt4": (2 * 7, 3 * 4 + 2 * 2 + 1, 2 * 4),
}


def test_lora_targets_are_the_linear_layers_of_their_group(family, model):
    groups = module_groups(model)
    for group, count in zip(("language_model", "connector", "vision_tower"), LINEARS[family], strict=True):
        found = [n for n, _ in model.named_modules() if re.fullmatch(lora_targets(model, [group]), n)]
        assert len(found) == count and {group_of(name, groups) for name in found} == {group}
        assert all(isinstance(model.get_submodule(name), nn.Linear) for name in found)


def test_all_that_is_left_trainable_gets_a_gradient(family, model, processor):
    freeze_groups(model.train(), None)
    collate = CompletionCollator(processor)
    forward_completions(model, collate([row("red"), row("blue")])).logps.sum().backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (family == "llava")  # the others read their last vision layer


def test_a_row_by_hand(family, processor):
    batch = CompletionCollator(processor)([row("red"), row("blue", completion=" The tall one.")])
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(TOKENS[family])).sum(1).tolist() == [
        COUNTS[family]
    ] * 2
    ids, mask = batch["input_ids"], batch["completion_mask"]
    eos = processor.tokenizer.eos_token
    assert [processor.tokenizer.decode(i[m]) for i, m in zip(ids, mask, strict=True)] == [
        f" The one.{eos}",
        f" The tall one.{eos}",
    ]
    prompt = processor.tokenizer.decode(ids[0][~mask[0] & batch["attention_mask"][0].bool()])
    assert prompt.endswith("Who was?") and prompt.replace(TOKENS[family], "").strip() in (
        "Who was?",
        "<s>Who was?",
        "<s>\nWho was?",
        "<|vision_start|><|vision_end|>Who was?",
    )


def test_the_placeholder(family, processor):
    assert image_placeholder(processor) == ("" if family in QUERIES else WRITTEN[family])


def test_padding_and_neighbours_change_nothing(family, model, processor):
    collate = CompletionCollator(processor)
    rows = [row("red"), row("blue", prompt="Who was the tall one of the two?", completion=" It cannot be known.")]
    together = logps(model, collate(rows))
    alone = torch.cat([logps(model, collate([r])) for r in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert abs(together[0] - logps(model, collate([row("green")]))) > 1e-5, "the picture reaches the answer"


def test_a_placeholder_of_ones_own(family, model, processor):
    collate = CompletionCollator(processor)
    own = collate([row("red", prompt=f"{WRITTEN[family]}Who was?")])
    assert torch.isfinite(logps(model, own)).all()
    if family not in QUERIES:
        assert torch.equal(own["input_ids"], collate([row("red")])["input_ids"])
        return
    # The queries stand where they were asked for: behind BOS, and not before it.
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert own["input_ids"][0, :6].tolist()[:5] == [processor.tokenizer.bos_token_id, *[image] * 4]
    assert collate([row("red")])["input_ids"][0, :5].tolist() == [*[image] * 4, processor.tokenizer.bos_token_id]
    within = collate([row("red", prompt="Look: <image> Who was?")])
    start = int((within["input_ids"][0] == image).int().argmax())
    assert processor.tokenizer.decode(within["input_ids"][0, 1:start]) == "Look: "
    with pytest.raises(ValueError, match="mixes prompts with <image> and without"):
        collate([row("red"), row("red", prompt="<image>Who was?")])


def test_several_images_in_a_row(family, model, processor):
    collate = CompletionCollator(processor)
    if family in QUERIES:
        with pytest.raises(
            ValueError, match=r"row 0: Blip2Processor puts one image before the text, and the row has 2"
        ):
            collate([row("red", "blue")])
        placed = {"prompt": "<image> or <image>?"}
    else:
        placed = {}
    two = collate([row("red", "blue", **placed), row("green", "red", **placed)])
    assert (two["input_ids"] == processor.tokenizer.convert_tokens_to_ids(TOKENS[family])).sum(1).tolist() == [
        2 * COUNTS[family]
    ] * 2
    swapped = collate([row("blue", "red", **placed), row("green", "red", **placed)])
    first, second = logps(model, two), logps(model, swapped)
    assert abs(first[0] - second[0]) > 1e-6 and first[1] == pytest.approx(second[1].item(), abs=1e-5)


def test_an_image_count_that_does_not_match(family, processor):
    collate, written = CompletionCollator(processor), WRITTEN[family]
    with pytest.raises(ValueError, match=r"row 3: the prompt has 2 placeholder\(s\) \S+ for 1 image\(s\)"):
        collate([row("red", prompt=f"{written}{written}Who?", index=3)])
    with pytest.raises(ValueError, match=r"row 0: the prompt has 1 placeholder\(s\) \S+ for 0 image\(s\)"):
        collate([row(prompt=f"{written}Who?")])
    with pytest.raises(ValueError, match=r"row 1: the completion has 1 placeholder\(s\)"):
        collate([row("red"), row("red", completion=f" {written}")])
    with pytest.raises(ValueError, match="the completion has 1 placeholder"):
        collate([row(completion=f" {written}")])


def test_a_chat_is_the_plain_row(family, processor):
    if family == "llava":
        pytest.skip("the fixture's LLaVA has a template of its own, with roles; see tests/test_collators.py")
    chat = {
        "prompt": [{"role": "user", "content": "Who was?"}],
        "completion": [{"role": "assistant", "content": "The one."}],
    }
    collate = CompletionCollator(processor)
    for images in ([picture()], []):
        plain, templated = collate([row() | {"images": images}]), collate([{**chat, "images": images}])
        assert torch.equal(plain["input_ids"], templated["input_ids"])
        assert torch.equal(plain["completion_mask"], templated["completion_mask"])


def test_a_chat_without_a_template_says_so(family, processor):
    processor.chat_template = processor.tokenizer.chat_template = None
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match=r"row 0: the row is a chat, and .* has no chat template"):
        CompletionCollator(processor)([chat])


@pytest.mark.parametrize("name", QUERIES)
def test_a_template_may_name_the_place_of_the_queries(name, tiny_family):
    """As in MiniGPT-4's own prompts, `<Img>` picture `</Img>`."""
    processor = load_processor(str(tiny_family(name)))
    processor.tokenizer.chat_template = processor.tokenizer.chat_template.replace(
        "{{ '' }}", "{{ '<Img><image></Img> ' }}"
    )
    assert image_placeholder(processor) == "<Img><image></Img> "
    chat = {
        "prompt": [{"role": "user", "content": "Who was?"}],
        "completion": [{"role": "assistant", "content": "The one."}],
    }
    collate = CompletionCollator(processor)
    templated = collate([{**chat, "images": [picture()]}])
    assert torch.equal(templated["input_ids"], collate([row("red")])["input_ids"])
    text = processor.tokenizer.decode(templated["input_ids"][0])
    assert text == "<s><Img><image><image><image><image></Img> Who was? The one.</s>"


@pytest.mark.parametrize("name", QUERIES)
def test_a_processor_that_knows_no_number_of_queries_is_refused(name, tiny_family):
    processor = load_processor(str(tiny_family(name)))
    processor.num_query_tokens = None
    with pytest.raises(ValueError, match="was saved without `num_query_tokens`"):
        CompletionCollator(processor)


def test_text_goes_through_the_language_model(family, model, processor):
    collate = CompletionCollator(processor)
    batch = collate([row(), row(completion=" The tall one.")])
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    inner = model.language_model if family in QUERIES else model
    logits = inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (picked * batch["completion_mask"][:, 1:]).sum(1)
    torch.testing.assert_close(logps(model, batch), expected.detach(), rtol=1e-5, atol=1e-5)
    model.train().zero_grad()
    forward_completions(model, batch).logps.sum().backward()
    groups = module_groups(model)
    moved = {group_of(n, groups) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"language_model"}


def test_the_head_runs_on_completion_positions_alone(family, model, processor):
    batch = CompletionCollator(processor)([row("red"), row("blue", completion=" The tall one.")])
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    output = forward_completions(model, batch)
    handle.remove()
    assert seen[-1][-2] == batch["completion_mask"].sum()
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    full = model(**inputs).logits[:, :-1][batch["completion_mask"][:, 1:]]
    torch.testing.assert_close(output.logits, full, rtol=1e-4, atol=1e-5)


def test_generation_with_pictures_and_without(family, model, processor):
    scorer = Scorer(model, processor)
    texts = [row(prompt="Who was the tall one?"), row(prompt="Who?")]
    before = scorer.generate(texts, 4)
    pictured = [row("red", prompt="Who was the tall one?"), row("blue", prompt="Who?")]
    answers = scorer.generate(pictured, 4)
    assert answers == [scorer.generate([one], 4)[0] for one in pictured]
    assert scorer.generate(texts, 4) == before  # whatever the pictures left behind in the model
    assert before == [scorer.generate([one], 4)[0] for one in texts]


def test_truncation_keeps_pictures_and_their_frames(family, processor):
    token = processor.tokenizer.convert_tokens_to_ids(TOKENS[family])
    written = WRITTEN[family]
    for prompt in ("Long ago there was the one. Who was?", f"Long ago there was the one.{written} Who was?"):
        full = CompletionCollator(processor)([row("red", prompt=prompt)])
        length = full["input_ids"].shape[1]
        cut = CompletionCollator(processor, max_length=length - 4)([row("red", prompt=prompt)])
        assert cut["input_ids"].shape == cut["attention_mask"].shape == (1, length - 4)
        assert (cut["input_ids"] == token).sum() == COUNTS[family]
        assert torch.equal(cut["pixel_values"], full["pixel_values"])
        completion = processor.tokenizer.decode(cut["input_ids"][0][cut["completion_mask"][0]])
        assert completion == f" The one.{processor.tokenizer.eos_token}"
        if family == "qwen2vl":
            tight = CompletionCollator(processor, max_length=10)([row("red", prompt=prompt)])
            ids = processor.tokenizer.convert_ids_to_tokens(tight["input_ids"][0])
            assert ids[:6] == ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
            assert tight["mm_token_type_ids"][0].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
        else:
            bos = processor.tokenizer.bos_token_id
            assert (cut["input_ids"] == bos).sum() == 1
    with pytest.raises(ValueError, match=r"row 0: .* without cutting image tokens"):
        CompletionCollator(processor, max_length=COUNTS[family])([row("red")])


def test_rows_of_two_batches_are_put_together(family, model, processor):
    collate = StreamCollator(CompletionCollator(processor))
    sides = {
        "forget": [row("red", index=0), row("blue", prompt="Who was the tall one?", index=1)],
        "retain": [row("green", completion=" It cannot be known.", index=0), row("red", index=1)],
    }
    batch = collate([sides])
    pad = processor.tokenizer.pad_token_id
    mixed = choose_rows(batch["forget"], batch["retain"], torch.tensor([True, False]), pad)
    expected = torch.stack([logps(model, batch["retain"])[0], logps(model, batch["forget"])[1]])
    torch.testing.assert_close(logps(model, mixed), expected, rtol=1e-4, atol=1e-4)


def test_qwen_rows_with_pictures_of_other_sizes(tiny_family):
    folder = tiny_family("qwen2vl")
    processor, model = load_processor(str(folder)), load_model(str(folder)).eval()
    processor.image_processor.size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    collate = StreamCollator(CompletionCollator(processor))
    small, wide = picture("red", (32, 32)), picture("blue", (64, 32))
    rows = [row() | {"images": [small, wide], "index": 0}, row() | {"images": [small], "index": 1}]
    batch = collate([{"forget": rows, "retain": rows[::-1]}])
    assert batch["forget"]["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8], [1, 4, 4]]
    assert (batch["forget"]["input_ids"] == processor.image_token_id).sum(1).tolist() == [4 + 8, 4]
    mixed = choose_rows(batch["forget"], batch["retain"], torch.tensor([False, True]), processor.tokenizer.pad_token_id)
    assert len(mixed["pixel_values"]) == 2 * (16 + 32) and mixed["num_images"].tolist() == [2, 2]
    both = logps(model, mixed)
    assert both[0].item() == pytest.approx(both[1].item(), abs=1e-5)


def hidden_llava(tiny_llava):
    model = load_model(str(tiny_llava))
    inner = model.model
    inner.eye = inner.vision_tower
    del inner.vision_tower
    return model


def test_a_family_whose_groups_cannot_be_found(tiny_llava):
    model = hidden_llava(tiny_llava)
    expected = r"No module groups found in LlavaForConditionalGeneration: image encoder none, decoder 'model\."
    with pytest.raises(ValueError, match=expected) as raised:
        module_groups(model)
    assert "model.eye (" in str(raised.value) and "Name them yourself: module_groups(model, {" in str(raised.value)
    named = {
        "language_model": ["model.language_model", "lm_head"],
        "connector": "model.multi_modal_projector",
        "vision_tower": ["model.eye"],
    }
    groups = module_groups(model, named)
    assert groups["connector"] == ["model.multi_modal_projector"]
    assert "eye" in lora_targets(model, ["vision_tower"], named)
    with pytest.raises(ValueError, match="is in no group") as raised:
        module_groups(model, {"language_model": ["model.language_model", "lm_hed"]})
    for fault in ("'lm_hed' of group 'language_model' is no part", "'lm_head' is in no group", "'model.eye' is in no"):
        assert fault in str(raised.value)


def test_a_saved_file_loads_as_the_trainer_loads_it(family, tiny_family):
    """LLaVA's and Qwen2-VL's weights are saved under other names than the model's own."""
    folder = tiny_family(family)
    saved = load_file(folder / "model.safetensors")
    model = load_model(str(folder))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    result = model.load_state_dict(saved, strict=False)
    assert not result.unexpected_keys
    tied = {"language_model.lm_head.weight"} if family == "blip2" else set()
    assert set(result.missing_keys) <= tied
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
