"""Completion masks, against ids put together by hand; truncation; what is refused."""

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from biasunlearn_trainer.collators import CompletionCollator, StreamCollator
from biasunlearn_trainer.models import image_placeholder, load_processor


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_processor(str(tiny_llama))


@pytest.fixture(scope="module")
def processor(tiny_llava):
    return load_processor(str(tiny_llava))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def completion(tokenizer, batch, i=0):
    return tokenizer.decode(batch["input_ids"][i][batch["completion_mask"][i]])


def test_plain_rows_by_hand(tokenizer):
    batch = CompletionCollator(tokenizer)(
        [{"prompt": "ab", "completion": " c"}, {"prompt": "a", "completion": " long"}]
    )
    bos, eos, pad = 1, 2, 0
    first, second = [bos, *ids(tokenizer, "ab c"), eos], [bos, *ids(tokenizer, "a long"), eos]
    assert batch["input_ids"].tolist() == [first + [pad] * (len(second) - len(first)), second]
    assert batch["completion_mask"].int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]


def test_without_eos_and_with_an_empty_prompt(tokenizer):
    batch = CompletionCollator(tokenizer, append_eos=False)([{"prompt": "", "completion": "ab"}])
    assert batch["input_ids"].tolist() == [[1, *ids(tokenizer, "ab")]]
    assert batch["completion_mask"].tolist() == [[False, True, True]]


def test_an_eos_that_is_there_is_not_doubled(tokenizer):
    batch = CompletionCollator(tokenizer)([{"prompt": "a", "completion": "b</s>"}])
    assert batch["input_ids"].tolist() == [[1, *ids(tokenizer, "ab"), 2]]


def test_a_real_eos_stays_visible_where_pad_is_eos(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    batch = CompletionCollator(tokenizer)([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcd"}])
    assert batch["completion_mask"].sum(1).tolist() == [2, 4]  # b EOS, b c d EOS
    assert batch["input_ids"][0, 3] == tokenizer.eos_token_id and batch["attention_mask"][0].tolist() == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]


def test_a_tokenizer_without_bos_starts_an_empty_prompt_with_one(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("")["input_ids"] == []
    batch = CompletionCollator(tokenizer)([{"prompt": "", "completion": "a"}, {"prompt": "p", "completion": "a"}])
    assert batch["input_ids"].tolist() == [[1, *ids(tokenizer, "a"), 2], [*ids(tokenizer, "pa"), 2]]


def test_a_tokenizer_that_ends_everything_with_eos(tiny_llama):
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    batch = CompletionCollator(tokenizer)([{"prompt": "a", "completion": "b"}])
    assert batch["input_ids"].tolist() == [[1, *ids(tokenizer, "ab"), 2]]
    assert batch["completion_mask"].tolist() == [[False, False, True, True]]


def test_chat_rows_end_as_the_template_says(tokenizer):
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}
    batch = CompletionCollator(tokenizer)([row])
    assert tokenizer.decode(batch["input_ids"][0]) == "USER: hi\nASSISTANT: yo</s>"
    assert completion(tokenizer, batch) == "yo</s>"


@pytest.mark.parametrize("chat", [False, True])
def test_image_rows_mask_neither_prompt_nor_image_tokens(processor, chat):
    picture = Image.new("RGB", (50, 40), "red")
    row = {"prompt": "Who?", "completion": " Nobody.", "images": [picture]}
    if chat:
        row["prompt"] = [{"role": "system", "content": "Look."}, {"role": "user", "content": "Who?"}]
        row["completion"] = [{"role": "assistant", "content": " Nobody."}]
    batch = CompletionCollator(processor)([row])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert completion(processor.tokenizer, batch) == " Nobody.</s>"
    assert "Look." in processor.tokenizer.decode(batch["input_ids"][0]) or not chat


def test_several_images_and_own_placeholders(processor):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    collate = CompletionCollator(processor)
    added = collate([{"prompt": "Which?", "completion": " One.", "images": pictures}])
    written = collate([{"prompt": "<image>\n<image>\nWhich?", "completion": " One.", "images": pictures}])
    assert torch.equal(added["input_ids"], written["input_ids"]) and len(added["pixel_values"]) == 2
    with pytest.raises(ValueError, match=r"row 0: the prompt has 1 placeholder\(s\) <image> for 2 image"):
        collate([{"prompt": "<image> Which?", "completion": " One.", "images": pictures}])


def test_the_placeholder_is_what_the_template_writes(processor, tiny_llava):
    assert image_placeholder(processor) == "<image>\n"
    other = load_processor(str(tiny_llava))
    other.chat_template = other.chat_template.replace("'<image>\n'", "'[<image>]'")
    assert image_placeholder(other) == "[<image>]"
    other.chat_template = None
    assert image_placeholder(other) == "<image>\n"


def test_prompt_batch_is_left_padded(tokenizer):
    batch = CompletionCollator(tokenizer).prompt_batch(
        [{"prompt": "a", "completion": "x"}, {"prompt": "abc", "completion": "x"}]
    )
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_truncation_cuts_the_prompts_start_then_the_completions_end(tokenizer):
    row = {"prompt": "abcdef", "completion": "xyz"}
    cut = CompletionCollator(tokenizer, max_length=7)([row])
    assert tokenizer.decode(cut["input_ids"][0]) == "<s>efxyz</s>" and completion(tokenizer, cut) == "xyz</s>"
    tight = CompletionCollator(tokenizer, max_length=4)([row])
    assert tokenizer.decode(tight["input_ids"][0]) == "<s>fxy" and completion(tokenizer, tight) == "xy"
    assert CompletionCollator(tokenizer, max_length=11)([row])["input_ids"].shape == (1, 11)


def test_truncation_never_cuts_image_tokens(processor):
    row = {"prompt": "Who?", "completion": " Nobody.", "images": [Image.new("RGB", (32, 32))], "index": 7}
    fits = CompletionCollator(processor, max_length=25)([row])
    assert (fits["input_ids"] == processor.image_token_id).sum() == 16
    assert completion(processor.tokenizer, fits) == " Nobody"
    with pytest.raises(ValueError, match=r"row 7: 31 tokens do not fit max_length=18 without cutting image tokens"):
        CompletionCollator(processor, max_length=18)([row])


def test_refusals_name_the_row(tokenizer, processor):
    collate = CompletionCollator(tokenizer, append_eos=False)
    with pytest.raises(ValueError, match=r"row 1: all labels are masked"):
        collate([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    with pytest.raises(ValueError, match=r"row 0: the row has 1 image\(s\), but .* takes text only"):
        collate([{"prompt": "a", "completion": "b", "images": ["x"]}])
    with pytest.raises(ValueError, match="mixes rows with and without images"):
        CompletionCollator(processor)(
            [
                {"prompt": "a", "completion": "b", "images": [Image.new("RGB", (8, 8))]},
                {"prompt": "a", "completion": "b"},
            ]
        )
    with pytest.raises(ValueError, match="mixes plain-text and chat"):
        chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
        collate([{"prompt": "a", "completion": "b"}, chat])
    with pytest.raises(ValueError, match=r"forget set, row 5: all labels"):
        StreamCollator(collate)([{"forget": [{"prompt": "a", "completion": "", "index": 5}]}])


def test_a_prompt_that_is_no_prefix_is_refused(stories_model):
    """A sentencepiece-like tokenizer joins a blank at the prompt's end with the next word."""
    collate = CompletionCollator(load_processor(str(stories_model)))
    collate([{"prompt": "Once upon a", "completion": " time there was"}])
    with pytest.raises(ValueError, match=r"row 3: the ids of the prompt are no prefix.*space stands at the end"):
        collate([{"prompt": "Once upon a ", "completion": "time there was", "index": 3}])


def test_a_picture_may_be_named_by_its_file(tiny_llava, tmp_path, image_rows):
    collator = CompletionCollator(load_processor(str(tiny_llava)))
    rows = image_rows(2)
    named = []
    for number, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{number}.png")
        named.append({**row, "images": [str(tmp_path / f"{number}.png")]})
    assert torch.equal(collator(rows)["pixel_values"], collator(named)["pixel_values"])


@pytest.mark.parametrize("num_images", [1, 2])
def test_pictures_go_through_the_image_processor_once(num_images, tiny_llava, image_rows, monkeypatch):
    """And what the prompt's own pass would have given is what comes out."""
    processor = load_processor(str(tiny_llava))
    collator = CompletionCollator(processor)
    rows = [
        {**row, "prompt": "<image> and " * num_images + row["prompt"], "images": row["images"] * num_images}
        for row in image_rows(3)
    ]
    calls = []
    process = type(processor.image_processor).preprocess

    def counted(self, images, *args, **kwargs):
        calls.append(len(images))
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", counted)
    once = collator(rows)
    assert len(calls) == 1
    monkeypatch.setattr(collator, "_spell_out", lambda text, ids: None)
    twice = collator(rows)
    assert len(calls) == 3 and once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
