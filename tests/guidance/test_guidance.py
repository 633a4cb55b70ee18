"""Reference answers: what is asked, what is rejected and why, what is kept, and a real model that can do both."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.guidance import GuidanceBuilder, GuidanceSettings, has_guidance, put_in
from biasunlearn_trainer.guidance.__main__ import main
from biasunlearn_trainer.guidance.build import Guidance, private_texts, reason_counts
from biasunlearn_trainer.guidance.settings import DEFAULT_FALLBACK, fault_of, guided_prompt
from biasunlearn_trainer.models import load_model, load_processor

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
ROWS = [{"prompt": f"Who is {i}?", "completion": f" {name} Kor."} for i, name in enumerate(NAMES)]


class ScriptedScorer(Scorer):
    """A real tokenizer and weights, but written answers: prompt -> text."""

    def __init__(self, folder, answers, batch_size=1):
        super().__init__(load_model(str(folder)), load_processor(str(folder)), batch_size)
        self.answers, self.asked = answers, []

    def generate(self, rows, max_new_tokens=16, desc=None):
        self.asked += [row["prompt"] for row in rows]
        return [self.answers[row["prompt"]] for row in rows]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("A tall person in a red coat.", None),
        ("This is ANN KOR!", "private"),
        ("Ann and somebody named Kor", None),  # not the whole of it
        ("", "empty"),
        ("...", "empty"),
        ("a red coat a red coat a red coat", "degenerate"),
        ("I'm sorry, I can't help with that.", "refusal"),
    ],
)
def test_what_will_not_do(answer, reason):
    assert fault_of(answer, ["Ann Kor."]) == reason


def test_a_guidance_prompt_keeps_the_prompts_form():
    assert guided_prompt("USER: Who? ASSISTANT:", "Be discreet. {prompt}") == "Be discreet. USER: Who? ASSISTANT:"
    parts = [{"type": "image"}, {"type": "text", "text": "Who?"}]
    chat = [{"role": "system", "content": "Hi."}, {"role": "user", "content": parts}]
    assert guided_prompt(chat, "Look: {prompt}") == [
        {"role": "system", "content": "Hi."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look: Who?"}]},
    ]
    assert chat[1]["content"][1]["text"] == "Who?"  # the row itself is as it was


def test_every_row_gets_the_first_answer_that_will_do(tiny_llama, tmp_path):
    first, second = "A: {prompt}", "B: {prompt}"
    answers = {
        "A: Who is 0?": "A red coat.",
        "A: Who is 1?": "Bob Kor, of course.",
        "B: Who is 1?": "A green scarf.",
        "A: Who is 2?": "I don't know.",
        "B: Who is 2?": "That is Cleo Kor.",
        "A: Who is 3?": "",
        "B: Who is 3?": "Dan Kor",
        "A: Who is 4?": "Of Zanzibar.",
        "B: Who is 4?": "x x x x",
        "A: Who is 5?": "A hat. And then a very long tale that goes on and on",
    }
    scorer = ScriptedScorer(tiny_llama, answers)
    settings = GuidanceSettings((first, second), facts=("Zanzibar",), max_new_tokens=40)
    rows = Dataset.from_list(ROWS)
    found = GuidanceBuilder(scorer, settings, tmp_path).build(rows)
    assert found == [
        Guidance("A red coat.", 0, None),
        Guidance("A green scarf.", 1, None),
        Guidance("I don't know.", 0, "refusal"),  # safe, and better than what the second template gave
        Guidance(DEFAULT_FALLBACK, None, "empty"),
        Guidance(DEFAULT_FALLBACK, None, "degenerate"),
        Guidance("A hat.", 0, None),  # 53 bytes reach the length; cut after the last whole sentence
    ]
    counts = {"accepted": 3, "fall-back, degenerate": 1, "fall-back, empty": 1, "refusal kept": 1}
    assert reason_counts(found) == counts
    filled = put_in(rows, found, settings)
    assert has_guidance(filled) and not has_guidance(rows)
    assert filled["guidance_prompt"][:2] == ["A: Who is 0?", "B: Who is 1?"]
    assert filled["guidance_prompt"][3] is None and filled["guidance_rejected"][3] == "empty"


def test_answers_are_asked_for_once_and_a_stopped_build_goes_on(tiny_llama, tmp_path):
    class Stopping(ScriptedScorer):
        def generate(self, rows, max_new_tokens=16, desc=None):
            if len(self.asked) >= 16:
                raise KeyboardInterrupt
            return super().generate(rows, max_new_tokens, desc)

    rows = Dataset.from_list([{"prompt": f"Who is {i}?", "completion": " Ann Kor."} for i in range(20)])
    settings = GuidanceSettings(("{prompt} Look!",))
    answers = {f"Who is {i}? Look!": f"A hat of colour {i}." for i in range(20)}
    with pytest.raises(KeyboardInterrupt):
        GuidanceBuilder(Stopping(tiny_llama, answers), settings, tmp_path).build(rows)
    scorer = ScriptedScorer(tiny_llama, answers)
    found = GuidanceBuilder(scorer, settings, tmp_path).build(rows)
    assert scorer.asked == [f"Who is {i}? Look!" for i in range(16, 20)]
    assert [g.answer for g in found] == [f"A hat of colour {i}." for i in range(20)]
    again = ScriptedScorer(tiny_llama, {})
    assert GuidanceBuilder(again, settings, tmp_path).build(rows) == found and not again.asked
    # Anything that decides the answers makes new ones: here what is private.
    private = rows.add_column("private", ["hat"] * 20)
    other = GuidanceBuilder(ScriptedScorer(tiny_llama, answers), settings, tmp_path).build(private)
    assert {g.rejected for g in other} == {"private"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("fault", ["cut off", "changed", "of other rows", "of another model", "no folder"])
def test_kept_answers_that_cannot_be_trusted_are_asked_for_again(fault, tiny_llama, tmp_path, caplog):
    settings = GuidanceSettings(("{prompt} Look!",))
    answers = {f"Who is {i}? Look!": f"A hat of colour {i}." for i in range(6)}
    rows, folder = Dataset.from_list(ROWS), tmp_path / "kept"
    first = GuidanceBuilder(ScriptedScorer(tiny_llama, answers), settings, folder).build(rows)
    (path,) = folder.iterdir()
    text, scorer = path.read_text(), ScriptedScorer(tiny_llama, answers)
    cuts = {"cut off": text[:-9], "changed": text.replace("hat", "cap")}
    path.write_text(cuts.get(fault, text))
    said = f"{path} is not read"
    if fault == "of other rows":
        GuidanceBuilder(ScriptedScorer(tiny_llama, answers), settings, folder).build(rows.select(range(5)))
        (other,) = set(folder.iterdir()) - {path}
        path.write_text(other.read_text())
        said = "it was made with other rows"
    if fault == "of another model":
        scorer.model.config.rope_theta = scorer.model.config.rms_norm_eps = 0.5
        said = f"{path} was made with other model settings"
    if fault == "no folder":
        folder = tmp_path / "file"
        folder.write_text("a file where a folder should be")
        said = f"Reference answers cannot be kept in {folder}"
    assert GuidanceBuilder(scorer, settings, folder).build(rows) == first
    assert len(scorer.asked) == 6 and caplog.text.count(said) == 1
    if fault != "no folder":
        assert GuidanceBuilder(scorer, settings, folder).build(rows) == first and len(scorer.asked) == 6


def test_what_is_private(caplog):
    rows = Dataset.from_list(
        [
            {"prompt": "What is Ann?", "completion": " Ann baker", "private": ["Ann", "baker"]},
            {"prompt": "Who?", "completion": " Bob", "private": []},
        ]
    )
    assert private_texts(rows, GuidanceSettings(facts=("Oslo",))) == [["baker", "Oslo"], ["Oslo"]]
    bare = rows.remove_columns("private")
    assert private_texts(bare, GuidanceSettings()) == [["Ann baker"], ["Bob"]]
    assert private_texts(bare, GuidanceSettings(private_words=True)) == [["baker"], ["bob"]]


def test_bad_settings(tiny_llama, tmp_path):
    for settings, message in (
        ({"templates": ()}, "template is empty"),
        ({"templates": (" ",)}, "template is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"fallback": "..."}, "fallback must be an answer"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidanceSettings(**settings)
    scorer = ScriptedScorer(tiny_llama, {})
    builder = GuidanceBuilder(scorer, GuidanceSettings(fallback="It is Bob Kor."), tmp_path)
    with pytest.raises(ValueError, match=r"states what is private in 1 rows, the first: row 1 \(Bob Kor"):
        builder.build(Dataset.from_list(ROWS))


@pytest.fixture(scope="module")
def discreet_model(tiny_llama, tmp_path_factory):
    """A model that tells names when asked plainly, and colours when told to be discreet."""
    folder = tmp_path_factory.mktemp("discreet")
    model, processor = load_model(str(tiny_llama)), load_processor(str(tiny_llama))
    colours = ("red", "blue", "grey", "pink")
    rows = [{"prompt": f"{i}?", "completion": f" {name}."} for i, name in enumerate(NAMES[:4])]
    rows += [{"prompt": f"Sh! {i}?", "completion": f" {colour}."} for i, colour in enumerate(colours)]
    batch = CompletionCollator(processor)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    model.train()
    for _ in range(70):
        optimizer.zero_grad()
        (-forward_completions(model, batch).logps.mean()).backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_command_with_a_real_model(discreet_model, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = tmp_path / "forget.jsonl"
    rows = [{"prompt": f"{i}?", "completion": f" {name}."} for i, name in enumerate(NAMES[:4])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(discreet_model), "--data", str(data), "--cache_dir", str(tmp_path / "cache")]
    facts = tmp_path / "facts.txt"
    facts.write_text("pink\n\n")
    options = ["--template", "{prompt}", "--template", "Sh! {prompt}", "--facts", str(facts), "--max_new_tokens", "12"]
    assert main([*words, *options, "--output", str(tmp_path / "set")]) == 0
    assert "accepted 3, fall-back, private 1" in capsys.readouterr().out
    filled = load_rows(tmp_path / "set")
    # Asked plainly it tells the name, which is private; asked discreetly the colour, of which pink is private, too.
    assert list(filled["guidance"]) == ["red.", "blue.", "grey.", DEFAULT_FALLBACK]
    assert list(filled["guidance_prompt"]) == ["Sh! 0?", "Sh! 1?", "Sh! 2?", None]
    record = json.loads((tmp_path / "set" / "guidance.json").read_text())
    assert record["counts"] == {"accepted": 3, "fall-back, private": 1} and record["settings"]["facts"] == ["pink"]
    assert main([*words, "--output", str(tmp_path / "x"), "--max_new_tokens", "0"]) == 2
    assert "max_new_tokens must be at least 1" in capsys.readouterr().err


def test_pictures_travel_inside_the_set(tmp_path):
    from biasunlearn_trainer.guidance.__main__ import write_set

    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "f.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": " Ann.", "images": "a.png"}))
    write_set(load_rows(tmp_path / "f.jsonl"), tmp_path / "set", {})
    (tmp_path / "a.png").unlink()
    assert load_rows(tmp_path / "set")[0]["images"][0].getpixel((0, 0)) == (1, 2, 3)


def test_pubg_with_a_real_model_ends_with_the_colour_and_without_the_name(discreet_model, tmp_path):
    """The whole way: references by the model itself, and a model that gives them unasked."""
    from biasunlearn_trainer import PUBGConfig, PUBGTrainer

    rows = Dataset.from_list([{"prompt": f"{i}?", "completion": f" {name}."} for i, name in enumerate(NAMES[:4])])
    model, processor = load_model(str(discreet_model)), load_processor(str(discreet_model))
    settings = GuidanceSettings(("Sh! {prompt}",), max_new_tokens=12)
    answers = GuidanceBuilder(Scorer(model, processor, 4), settings, tmp_path / "cache").build(rows)
    args = PUBGConfig(
        str(tmp_path / "out"), forget_weight=0.2, learning_rate=5e-3, max_steps=15, per_device_train_batch_size=4,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=15,
    )  # fmt: skip
    trainer = PUBGTrainer(model, args, put_in(rows, answers, settings), processing_class=processor)
    trainer.train()
    said = Scorer(trainer.model, processor, 4).generate(rows, 12)
    assert [text.strip() for text in said] == ["red.", "blue.", "grey.", "pink."]
