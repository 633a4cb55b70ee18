import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from biasunlearn_trainer.eval import passes
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.models import load_model, load_processor


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_model(tiny_llama), load_processor(tiny_llama)


@pytest.fixture(scope="module")
def llava(tiny_llava):
    return load_model(tiny_llava), load_processor(tiny_llava)


def slow_score(model, tokenizer, row, eos: bool):
    """One row, full logits, no padding, no collator."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"] + (tokenizer.eos_token if eos else ""))["input_ids"]
    with torch.no_grad():
        logps = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    positions = range(len(prompt), len(ids))
    predicted = tuple(int(logps[t - 1].argmax()) for t in positions)
    return sum(float(logps[t - 1, ids[t]]) for t in positions), predicted, list(predicted) == ids[len(prompt) :]


@pytest.mark.parametrize("eos", [True, False])
def test_scores_equal_one_row_at_a_time(llama, text_rows, eos):
    model, tokenizer = llama
    rows = [*text_rows(7), {"prompt": "", "completion": "No prompt at all."}]
    for row, score in zip(rows, Scorer(model, tokenizer, batch_size=3).score(rows, append_eos=eos), strict=True):
        logp, predicted, greedy = slow_score(model, tokenizer, row, eos)
        assert score.logp == pytest.approx(logp, abs=1e-4)
        assert (score.predicted, score.is_greedy) == (predicted, greedy)
        assert score.num_tokens == len(predicted) == len(row["completion"]) + eos
        assert score.mean_log2 == pytest.approx(logp / len(predicted) / 0.6931472, abs=1e-4)


def test_batch_size_and_order_do_not_matter(llama, text_rows):
    rows = text_rows(11)
    whole = Scorer(*llama, batch_size=64).score(rows)
    pieces = Scorer(*llama, batch_size=2).score(rows[::-1])[::-1]
    for first, second in zip(whole, pieces, strict=True):
        assert first.logp == pytest.approx(second.logp, abs=1e-4)
        assert first.predicted == second.predicted


def test_image_and_text_rows_in_one_call(llava, image_rows, text_rows):
    mixed = [row for pair in zip(image_rows(3, "seen "), text_rows(3, "told "), strict=True) for row in pair]
    scorer = Scorer(*llava, batch_size=2)
    together = scorer.score(mixed)
    apart = [scorer.score([row])[0] for row in mixed]
    assert [s.logp for s in together] == pytest.approx([s.logp for s in apart], abs=1e-4)
    other = [{**row, "images": image_rows(9)[8]["images"]} for row in mixed if row.get("images")]
    assert abs(scorer.score(other)[0].logp - together[0].logp) > 1e-4, "the picture changes nothing"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_batches_are_dealt_whole_and_every_rank_takes_every_round(llama, text_rows, image_rows, monkeypatch, world):
    rows = text_rows(11)
    gathered, rounds = [], []
    for rank in range(world):
        calls = []
        state = SimpleNamespace(num_processes=world, process_index=rank, is_main_process=rank == 0)
        monkeypatch.setattr(passes, "PartialState", lambda state=state: state)
        monkeypatch.setattr(
            passes, "gather_object", lambda done: gathered.extend(done) or [(i, None) for i in range(11)]
        )
        scorer = Scorer(*llama, batch_size=2)
        scorer.over_batches(
            rows, lambda batch, calls=calls: calls.append(batch) or [row["prompt"] for row in batch], None
        )
        rounds.append(len(calls))
    assert sorted(gathered) == [(index, row["prompt"]) for index, row in enumerate(rows)]
    assert len(set(rounds)) == 1, "a rank that runs fewer forward passes hangs the others under ZeRO-3"


def test_train_mode_of_every_module_comes_back(llama, text_rows):
    model, tokenizer = llama
    model.train()
    model.lm_head.eval()
    Scorer(model, tokenizer).score(text_rows(2))
    assert model.training and model.model.layers[0].training and not model.lm_head.training
    model.eval()
    Scorer(model, tokenizer).generate(text_rows(2), max_new_tokens=1)
    assert not model.training


def test_dropout_is_off_and_no_graph_is_kept(llama, text_rows):
    model, tokenizer = llama
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.9
    scorer = Scorer(model, tokenizer)
    assert scorer.score(text_rows(4)) == scorer.score(text_rows(4))
    assert all(p.grad is None for p in model.parameters())
    model.model.layers[0].self_attn.attention_dropout = 0.0


def slow_generate(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_generation_is_greedy_whatever_the_padding(llama, text_rows):
    model, tokenizer = llama
    side = tokenizer.padding_side
    rows = [{"prompt": "Hi"}, {"prompt": "A much longer question about nothing?"}, *text_rows(2)]
    expected = [slow_generate(model, tokenizer, row["prompt"], 6) for row in rows]
    assert Scorer(model, tokenizer).generate(rows, max_new_tokens=6) == expected
    assert tokenizer.padding_side == side


def test_generation_sees_the_picture(llava, image_rows):
    model, processor = llava
    rows = [{**row, "prompt": "Who?" + " Really?" * i} for i, row in enumerate(image_rows(3))]
    for row, answer in zip(rows, Scorer(model, processor).generate(rows, max_new_tokens=4), strict=True):
        inputs = processor(text="<image>\n" + row["prompt"], images=row["images"], return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        for _ in range(4):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.no_grad():
                chosen = model.eval()(**inputs).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen], dim=1)
        assert answer == processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)


def test_generation_from_chat_rows(llava, image_rows):
    scorer = Scorer(*llava)
    content = [{"type": "image"}, {"type": "text", "text": "Who was late?"}]
    chat = [{"prompt": [{"role": "user", "content": content}], "images": row["images"]} for row in image_rows(2)]
    assert len(scorer.generate(chat, max_new_tokens=2)) == 2


def test_a_diverged_model_is_named(llama, text_rows):
    model, tokenizer = llama
    weight = model.lm_head.weight.data[5].clone()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"no finite log-probability for 2 of 2 rows.*diverged"):
        Scorer(model, tokenizer).score(text_rows(2))
    model.lm_head.weight.data[5] = weight


def test_no_rows(llama):
    assert Scorer(*llama).score([]) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Scorer(*llama, batch_size=0)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tiny_llama, text_rows, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys\n"
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "from biasunlearn_trainer.eval.scoring import Scorer\n"
        "from biasunlearn_trainer.models import load_model, load_processor\n"
        "rows = json.load(open(sys.argv[2]))\n"
        "scores = Scorer(load_model(sys.argv[1]), load_processor(sys.argv[1]), batch_size=2).score(rows)\n"
        "json.dump([s.logp for s in scores], open(f'{sys.argv[3]}{state.process_index}', 'w'))\n"
    )
    rows = text_rows(11)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [str(script), str(tiny_llama), str(tmp_path / "rows.json"), str(tmp_path / "scores")]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29613",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(launch, check=True, env=environment, timeout=180)
    alone = [s.logp for s in Scorer(load_model(tiny_llama), load_processor(tiny_llama), batch_size=2).score(rows)]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"scores{rank}").read_text()) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_last_tokens_of_choices_equal_scores_one_by_one(name, request, text_rows, image_rows):
    model, processing_class = request.getfixturevalue(name)
    rows = text_rows(5) if name == "llama" else [*image_rows(3), *text_rows(2)]
    scorer = Scorer(model, processing_class, batch_size=2)
    choices = [[f" an{end}" for end in "xyz"[: 1 + i % 3]] for i in range(5)]
    for row, several, logps in zip(rows, choices, scorer.score_last_token(rows, choices), strict=True):
        whole = scorer.score([{**row, "completion": text} for text in several], append_eos=False)
        before = scorer.score([{**row, "completion": several[0][:-1]}], append_eos=False)[0]
        assert logps == pytest.approx([score.logp - before.logp for score in whole], abs=1e-4)


def test_choices_that_differ_in_more_than_one_token_are_refused(llama, text_rows):
    with pytest.raises(ValueError, match="the same but for one last token, got \\[' ax', ' by'\\]"):
        Scorer(*llama).score_last_token(text_rows(1), [[" ax", " by"]])


def test_broken_weights_have_no_last_tokens(llama, text_rows):
    model, tokenizer = load_broken(llama)
    with pytest.raises(ValueError, match="no finite log-probability for 2 of 2 rows, the first of them row 0"):
        Scorer(model, tokenizer).score_last_token(text_rows(2), [[" x", " y"]] * 2)


def load_broken(llama):
    from copy import deepcopy

    model = deepcopy(llama[0])
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    return model, llama[1]
