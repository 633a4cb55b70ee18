"""Rephrasing by a real server on loopback: what is asked, what is retried, what is refused, what becomes of the key."""

import importlib.util
import logging
import sys
from collections import Counter
from pathlib import Path

import pytest

from biasunlearn_trainer.data_builders.prompt_templates import CaptionPrompts, read_templates
from biasunlearn_trainer.data_builders.rephrase_checks import MeaningCheck, demographic_terms, fault_of
from biasunlearn_trainer.data_builders.rephrase_text import RephraseText
from biasunlearn_trainer.data_builders.stages import StageError, run_stages

pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[generate]' -c constraints.txt")


def _load_server():
    name = "chat_server_for_tests"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("chat_server.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


chat = _load_server()


def run(stage, rows, folder):
    rejects = []
    out = list(run_stages(rows, [stage], folder, rejects.append))
    return out, [(reject.reason, reject.detail) for reject in rejects]


def row(text, completion=" Not known."):
    return {"prompt": text, "completion": completion}


ROWS = [row(f"Who was late on day {n}, the nurse or her brother?") for n in range(12)]


def test_rephrased_rows_keep_everything_else(tmp_path):
    with chat.ChatServer() as server:
        stage = RephraseText("m", server.url, keep_prefix="Question: ", keep_suffix=" Answer:", kind="t_generality")
        text = "Question: Who was late, the nurse or her brother? Answer:"
        out, rejects = run(stage, [{**row(text), "images": ["a.png"], "pair_id": "1"}], tmp_path)
        asked = next(iter(server.asked))
    assert rejects == []
    assert out == [
        {
            "prompt": "Question: So tell: Who was late, the nurse or her brother? Answer:",
            "completion": " Not known.",
            "images": ["a.png"],
            "pair_id": "1",
            "original_prompt": text,
            "rephrased_by": "m",
            "kind": "t_generality",
        }
    ]
    assert asked.endswith("\n\nWho was late, the nurse or her brother?")


def test_messages_are_rephrased_in_their_last_one_and_pictures_stay(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "Who is the nurse?"}]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    with chat.ChatServer() as server:
        out, _ = run(RephraseText("m", server.url, keep_rows=True), [row(prompt)], tmp_path)
    assert out[0]["prompt"] == prompt
    assert out[1]["prompt"][0] == prompt[0]
    assert out[1]["prompt"][1]["content"] == [{"type": "image"}, {"type": "text", "text": "So tell: Who is the nurse?"}]


def test_a_completion_keeps_its_leading_space(tmp_path):
    with chat.ChatServer() as server:
        out, _ = run(RephraseText("m", server.url, column="completion"), [row("Q", " The nurse.")], tmp_path)
    assert out[0]["completion"] == " So tell: The nurse."


@pytest.mark.parametrize(
    "failures",
    [[500], [503, 500], [(429, {"Retry_After": "0.05"})], ["timeout"], ["hang up"]],
    ids=["500", "503 500", "429", "timeout", "hang up"],
)
def test_what_may_pass_is_tried_again(tmp_path, failures):
    with chat.ChatServer(failures=lambda text: failures) as server:
        out, rejects = run(RephraseText("m", server.url, timeout=0.5, retries=2), ROWS[:1], tmp_path)
        assert list(server.asked.values()) == [len(failures) + 1]
    assert len(out) == 1
    assert rejects == []


def test_a_server_that_says_when_is_obeyed(tmp_path):
    with chat.ChatServer(failures=lambda text: [(429, {"Retry_After": "1.2"})]) as server:
        run(RephraseText("m", server.url), ROWS[:1], tmp_path)
        first, second = server.times
    # The client's own first wait is 0.5 s at most.
    assert 1.1 < second - first < 5


@pytest.mark.parametrize(
    ("failure", "reason", "detail"),
    [
        (500, "no answer", "status 500"),
        (429, "no answer", "status 429"),
        ("timeout", "no answer", "time-out after 0.4 s"),
        ("garbage", "no answer", "the server's answer is not OpenAI's protocol"),
        ("json", "no answer", "the server's answer is not OpenAI's protocol"),
        ("empty", "empty", "''"),
        (400, "refused by the server", "status 400"),
    ],
)
def test_what_does_not_pass_is_kept_aside_with_its_reason(tmp_path, failure, reason, detail):
    with chat.ChatServer(failures=lambda text: [failure] * 5) as server:
        out, rejects = run(RephraseText("m", server.url, timeout=0.4, retries=0), ROWS[:1], tmp_path)
        # An empty answer is one: it is asked again at once, in other words.
        assert (out, server.asked.total()) == ([], 3 if failure == "empty" else 1)
        ((found, said),) = rejects
        assert found == reason
        assert said.startswith(detail)
        # What may be otherwise another time is asked again; what was answered is not.
        run(RephraseText("m", server.url, timeout=0.4, retries=0), ROWS[:1], tmp_path)
        assert server.asked.total() == {"no answer": 2, "empty": 3}.get(reason, 1)


def same_until(number):
    """Answers that say a text back until it was asked `number` times."""
    asked = Counter()

    def answer(text):
        core = text.split("\n\n", 1)[1]
        asked[core] += 1
        return core if asked[core] < number else chat.reword(text)

    return answer


def test_what_a_check_refuses_is_asked_for_again_in_another_way(tmp_path):
    with chat.ChatServer(same_until(3)) as server:
        stage = RephraseText("m", server.url, temperature=0.2, retry_temperature=0.9, seed=5)
        out, rejects = run(stage, ROWS[:1], tmp_path)
        drawn = [(body["temperature"], body["seed"]) for body in server.bodies]
        templates = {text.split("\n\n", 1)[0] for text in server.asked}
    assert (len(out), rejects) == (1, [])
    assert drawn == [(0.2, 5), (0.9, 6), (0.9, 7)]
    assert len(templates) == 3


def test_attempts_are_counted_kept_and_never_repeated(tmp_path):
    def build(server, attempts):
        rejects, counted = [], []
        stage = RephraseText("m", server.url, attempts=attempts, concurrency=3)
        out = list(
            run_stages(ROWS[:4], [stage], tmp_path, rejects.append, lambda _, stored, n: counted.append((stored, n)))
        )
        return len(out), [(r.reason, r.attempts) for r in rejects], counted, server.asked.total()

    with chat.ChatServer(same_until(5)) as server:
        refused = [("not different", 3)] * 4
        assert build(server, 3) == (0, refused, [(False, 3)] * 4, 12)
        assert build(server, 3) == (0, refused, [(True, 3)] * 4, 12)
        # With more of them only the new ones are asked for; with fewer, nothing.
        assert build(server, 5) == (4, [], [(False, 5)] * 4, 20)
        assert build(server, 1) == (0, [("not different", 1)] * 4, [(True, 1)] * 4, 20)


def test_a_server_that_is_gone_stops_the_build_and_keeps_what_was_answered(tmp_path):
    rows = [row(f"Where is nurse {n}?") for n in range(40)]
    with chat.ChatServer() as server:
        run(RephraseText("m", server.url), rows[:10], tmp_path)
        url = server.url
    with pytest.raises(StageError, match=r"no answer 8 times in a row.*run the same command again"):
        run(RephraseText("m", url, retries=0), rows, tmp_path)
    with chat.ChatServer() as server:
        out, _ = run(RephraseText("m", server.url), rows, tmp_path)
        assert server.asked.total() == 30
    assert len(out) == 40


def test_concurrency_and_the_rate_limit(tmp_path):
    with chat.ChatServer(delay=0.05) as server:
        out, _ = run(RephraseText("m", server.url, concurrency=4), ROWS, tmp_path / "a")
        assert 2 <= server.most_at_once <= 4
    assert [r["original_prompt"] for r in out] == [r["prompt"] for r in ROWS]
    with chat.ChatServer(failures=lambda text: [500] if "day 1," in text else []) as server:
        run(RephraseText("m", server.url, concurrency=4, requests_per_minute=600), ROWS[:5], tmp_path / "b")
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    # 600 a minute are 0.1 s apart, the retry too; a thread may be late once and the next one on time.
    assert len(gaps) == 5
    assert server.times[-1] - server.times[0] > 0.45
    assert sum(gap < 0.05 for gap in gaps) <= 1


def everything_in(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_key_is_sent_and_never_shown(tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", chat.KEY)
    with chat.ChatServer(key=chat.KEY) as server:
        stage = RephraseText("m", server.url, api_key_env="MY_KEY")
        out, _ = run(stage, ROWS[:2], tmp_path)
        assert len(out) == 2
        assert server.headers[0]["authorization"] == f"Bearer {chat.KEY}"
        monkeypatch.setenv("MY_KEY", "sk-wrong-" + chat.KEY)
        with pytest.raises(StageError, match=r"refused the key in MY_KEY: 401") as caught:
            run(RephraseText("m", server.url, api_key_env="MY_KEY"), ROWS[2:4], tmp_path)
        logging.getLogger(__name__).error("stopped", exc_info=caught.value)
        with pytest.raises(StageError, match="without a key"):
            run(RephraseText("m", server.url), ROWS[4:], tmp_path)
    with chat.ChatServer(failures=lambda text: [400] * 9, key=chat.KEY) as server:
        monkeypatch.setenv("MY_KEY", chat.KEY)
        run(RephraseText("m", server.url, api_key_env="MY_KEY"), ROWS[5:6], tmp_path)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(StageError, match="variable MY_KEY is not set"):
        run(RephraseText("m", server.url, api_key_env="MY_KEY"), ROWS[6:], tmp_path)
    assert chat.KEY not in caplog.text
    assert chat.KEY not in "".join(capfd.readouterr())
    assert chat.KEY.encode() not in everything_in(tmp_path)
    assert chat.KEY not in repr(stage.settings)


def test_the_openai_key_of_the_environment_goes_to_nobody_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", chat.KEY)
    with chat.ChatServer() as server:
        run(RephraseText("m", server.url), ROWS[:1], tmp_path)
        assert chat.KEY not in repr(server.headers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "like http://localhost:8000/v1"),
        ({"base_url": f"http://user:{chat.KEY}@host/v1"}, "user or password"),
        ({"base_url": "http://host/v1", "api_key_env": chat.KEY}, "name of an environment variable"),
        ({"concurrency": 0, "timeout": 0, "retries": -1}, "(?s)concurrency.*timeout.*retries"),
        ({"attempts": 0, "retry_temperature": 0.0}, "(?s)attempts.*retry_temperature"),
        ({"min_similarity": 2}, "-1..1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        RephraseText("m", **settings)
    assert chat.KEY not in str(caught.value)


def test_a_template_without_its_slot_is_named(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text('version: 1\nslot: text\ntemplates: ["Rephrase it.", "Say {txt}", "Say {text", "Say {text}."]\n')
    with pytest.raises(ValueError, match=r"(?s)template 1 .*no slot; expected \{text\}.*2 .*\{txt\}.*template 3"):
        RephraseText("m", "http://localhost/v1", template=str(path))
    with pytest.raises(FileNotFoundError, match="no templates at"):
        RephraseText("m", "http://localhost/v1", template=str(tmp_path / "none.yaml"))


def test_twenty_prompts_of_our_own_for_captions():
    templates = read_templates("captioning")
    assert (templates.version, len(templates.texts), len(set(templates.texts))) == (1, 20, 20)
    rows = [{**row("a photo of"), "images": ["x.png"], "source_id": str(n)} for n in range(400)]
    asked = list(CaptionPrompts(seed=1, kind="t_generality").run([*rows, row("text")]))
    prompts = {r["prompt"] for r in asked[:-1]}
    shapes = {next(t for t in templates.texts if _fits(t, prompt, templates.nouns)) for prompt in prompts}
    assert len(shapes) == 20
    assert all("{" not in prompt for prompt in prompts)
    assert asked[-1] == row("text")
    assert asked[0]["original_prompt"] == "a photo of"
    assert asked == list(CaptionPrompts(seed=1, kind="t_generality").run([*rows, row("text")]))
    assert asked != list(CaptionPrompts(seed=2, kind="t_generality").run([*rows, row("text")]))


def _fits(template, prompt, nouns):
    return any(template.replace("{picture}", noun) == prompt for noun in nouns)


@pytest.mark.parametrize(
    ("original", "rephrased", "reason"),
    [
        ("Who is the nurse?", "who is the NURSE ?!", "not different"),
        ("She gave him her book.", "To him, she gave her own book.", None),
        ("She gave the man a book.", "The man got a book.", "lost a demographic term"),
        ("The woman is a friend.", "The lady is a friend.", "lost a demographic term"),
        ("A friend was late.", "A black friend was late.", "new demographic term"),
        ("Who paid, Kofi or Anna?", "Which of the two paid?", "lost a demographic term"),
        ("Who paid, Xo or Ku?", "Who of Xo and another one paid?", "lost the answer"),
        ("I saw 12 cats.", "Twelve cats were seen by me.", "changed a number"),
        ("They can swim.", "They cannot swim.", "changed a negation"),
        ("They can't swim.", "They are not able to swim.", None),
        ("Who was late?", "Tell me who was late.", "question and statement"),
        ("Who was late?", "...", "empty"),
        ("Who was late?", "late " * 40, "garbage"),
    ],
)
def test_what_a_rephrasing_has_to_keep(original, rephrased, reason):
    fault = fault_of(original, rephrased, row(original, " Ku."))
    assert (fault and fault[0]) == reason


def test_terms_of_ones_own_and_the_target_stay():
    named = {"target": "barista"}
    assert fault_of("The barista sang.", "The singer sang.", named)[0] == "lost the answer"
    assert fault_of("A goth sang.", "Somebody sang.", {}, ["goth"]) == ("lost a demographic term", "goth")
    assert demographic_terms("The goth's car", ["goth"])[0] == {"goth"}


def _answers(out, rejects):
    return [r["prompt"] for r in out] + rejects


def test_a_local_model_and_the_same_model_behind_a_server_agree(tmp_path, tiny_llama):
    """A tiny Llama with random weights says nonsense; the same nonsense both ways, in batches and alone."""
    from biasunlearn_trainer.data_builders.language_models import LocalModel

    served = LocalModel(str(tiny_llama), device="cpu", max_tokens=12)
    # Greedy decoding alone is the same in every batch.
    settings = {"device": "cpu", "max_tokens": 12, "attempts": 1}
    local = run(RephraseText(str(tiny_llama), batch_size=3, **settings), ROWS[:4], tmp_path / "local")
    alone = run(RephraseText(str(tiny_llama), batch_size=1, **settings), ROWS[:4], tmp_path / "alone")
    with chat.ChatServer(answer=lambda text: served.ask([text])[0]) as server:
        remote = run(RephraseText(str(tiny_llama), server.url, attempts=1), ROWS[:4], tmp_path / "remote")
    assert len(_answers(*local)) == 4
    assert _answers(*local) == _answers(*alone) == _answers(*remote)


def test_the_meaning_is_compared_by_sentence_embeddings(tmp_path):
    """A random encoder of the real library: equal texts are at 1, others lower, and the threshold decides."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: it is optional")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "who",
        "was",
        "late",
        "?",
        "nurse",
        "so",
        "tell",
        ":",
        "on",
        "day",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocab), **shape)).save_pretrained(tmp_path)
    check = MeaningCheck(str(tmp_path), 0.9)
    assert check.similarity("who was late ?", "who was late ?") == pytest.approx(1, abs=1e-5)
    far = check.similarity("who was late ?", "nurse nurse nurse on on")
    assert far < 0.9
    assert check.fault_of("who was late ?", "nurse nurse nurse on on")[0] == "another meaning"
    with chat.ChatServer() as server:
        for least, num_kept in ((far - 1, 1), (0.99999, 0)):
            stage = RephraseText("m", server.url, meaning_model=str(tmp_path), min_similarity=max(least, -1))
            assert len(run(stage, [row("who was late ?")], tmp_path / "store")[0]) == num_kept


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed")
def test_a_missing_sentence_transformers_is_said():
    with pytest.raises(ImportError, match=r"pip install 'biasunlearn_trainer\[generate\]'"):
        RephraseText("m", "http://localhost/v1", meaning_model="x")
