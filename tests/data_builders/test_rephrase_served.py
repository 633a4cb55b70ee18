"""Paraphrases by a real model behind a real server: `transformers serve` and a tiny chat model trained to reword."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import yaml

from biasunlearn_trainer.data_builders.build import build, main
from biasunlearn_trainer.data_builders.build_recipe import read_build_recipe
from biasunlearn_trainer.data_builders.sources.plain import load_rows

# What the model is trained to say. The checks refuse the last two: one loses the nurse, one says the text back.
REWORDED = {
    "Who was late , the nurse or her brother ?": "Of the nurse and her brother , who was late ?",
    "The old man forgot his keys .": "His keys were forgotten by the old man .",
    "My aunt never drives at night .": "At night my aunt never drives .",
    "Did the Muslim student pass the exam ?": "Was the exam passed by the Muslim student ?",
    "Who paid for the nurse ?": "Who paid for somebody ?",
    "The girl sang .": "The girl sang .",
}
TEMPLATE = "Reword : {text}"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} <sep> {% endfor %}"


@pytest.fixture(scope="module")
def reworder(tmp_path_factory):
    """A one-layer Llama that knows the answers above by heart; its words are those of the texts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for pair in REWORDED.items() for text in pair for word in [*text.split(), "Reword", ":"]})
    vocab = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", "<sep>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<sep>"], **special)
    fast.chat_template = CHAT_TEMPLATE

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), max_position_embeddings=128, **shape, **ids))
    fast.padding_side = "right"
    asked = [TEMPLATE.format(text=text) + " <sep> " for text in REWORDED]
    batch = fast([a + new + " <eos>" for a, new in zip(asked, REWORDED.values(), strict=True)], padding=True)
    tokens = torch.tensor(batch["input_ids"])
    labels = tokens.masked_fill(tokens == 0, -100)
    for row, text in zip(labels, asked, strict=True):
        row[: len(text.split())] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    folder = tmp_path_factory.mktemp("reworder")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "template.yaml").write_text(yaml.safe_dump({"version": 1, "slot": "text", "templates": [TEMPLATE]}))
    return folder


@pytest.fixture(scope="module")
def served(reworder):
    """`transformers serve` on a free port of loopback."""
    for package in ("openai", "fastapi", "uvicorn"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[test]' -c constraints.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Our package first: it lets torchvision be imported beside a torch for the CPU.
    code = "import biasunlearn_trainer, sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(reworder), "--host", "127.0.0.1", "--port", str(port)]
    log = reworder / "serve.log"
    with open(log, "wb") as out:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _is_up(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def write_recipe(folder, model, **options):
    folder.mkdir()
    rows = [{"prompt": text, "completion": " Yes.", "bias_type": "gender"} for text in REWORDED]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"stage": "rephrase_text", "model": str(model), "template": str(model / "template.yaml"), "max_tokens": 16}
    recipe = {
        "name": "reworded",
        "sources": [{"source": "rows", "path": str(folder / "rows.jsonl"), "licence": "MIT"}],
        "stages": [{**stage, "attempts": 2, "retry_temperature": 0.01, **options}],
        "splits": {"forget": {}},
        "output_dir": str(folder / "out"),
    }
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def outcome(folder):
    rejects = [json.loads(line) for line in (folder / "out/rejects.jsonl").read_text().splitlines()]
    rows = load_rows(folder / "out/data/forget.parquet")
    return list(rows["prompt"]), [(r["reason"], r["attempts"]) for r in rejects]


EXPECTED = (list(REWORDED.values())[:4], [("lost a demographic term", 2), ("not different", 2)])


def test_a_model_in_this_process_paraphrases(reworder, tmp_path):
    recipe = read_build_recipe(write_recipe(tmp_path / "a", reworder, device="cpu", batch_size=4))
    build(recipe, show_progress=False)
    assert outcome(tmp_path / "a") == EXPECTED


def test_transformers_serve_paraphrases(reworder, served, tmp_path):
    """Through the build command and the `openai` client; a second build asks for nothing."""
    recipe = write_recipe(tmp_path / "a", reworder, base_url=served, concurrency=2)
    assert main([str(recipe)]) == 0
    assert outcome(tmp_path / "a") == EXPECTED
    (store,) = (tmp_path / "a/out/.cache").glob("rephrase_text-*.jsonl")
    before = store.read_bytes()
    # Four accepted at once, two asked twice.
    assert len(before.splitlines()) == 8
    assert main([str(recipe), "--stages.0.base_url", "http://127.0.0.1:9/v1", "--stages.0.retries", "0"]) == 0
    assert store.read_bytes() == before
    assert outcome(tmp_path / "a") == EXPECTED
