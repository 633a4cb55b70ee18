"""PUBG: the two terms by hand, where p* comes from, and what is said of missing answers."""

import pytest
import torch
from datasets import Dataset

from biasunlearn_trainer import PUBGConfig
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.trainers.pubg import answer_text, with_guidance

ANSWERS = ["A red hat.", "Blue shoes, and a long grey coat.", "A tree."]
GUIDED = ["See! Who was f0?", None, "Only what is seen. Who was f2?"]


@pytest.fixture
def forget(text_rows):
    rows = text_rows(3, "f")
    return [
        {**row, "guidance": answer, "guidance_prompt": prompt}
        for row, answer, prompt in zip(rows, ANSWERS, GUIDED, strict=True)
    ]


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[draw] for draw in range(3)])


def outputs(model, processing_class, rows):
    with torch.no_grad():
        return [forward_completions(model, CompletionCollator(processing_class)([row])) for row in rows]


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_both_terms_by_hand(forget, reduction, make_trainer):
    """The KL is taken row by row here, from the whole distributions, without the trainer's batches."""
    trainer = make_trainer("pubg", datasets={"forget_dataset": forget}, guidance_weight=0.5, reduction=reduction)
    trainer.prepare_reference()
    trainer.model.eval()
    guided = [{**row, "prompt": row["guidance_prompt"] or row["prompt"]} for row in forget]
    answered, asked = ([{**row, "completion": f" {row['guidance']}"} for row in rows] for rows in (forget, guided))
    reference = outputs(trainer.model, trainer.processing_class, asked)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3.0)
    policy = outputs(trainer.model, trainer.processing_class, answered)
    private = outputs(trainer.model, trainer.processing_class, forget)
    lengths = torch.tensor([float(out.lengths) for out in policy])
    kls = []
    for i, (p, q) in enumerate(zip(reference, policy, strict=True)):
        q_log = q.logits.double().log_softmax(-1)
        if GUIDED[i] is None:  # a point mass on the answer
            kls.append(-q_log.gather(-1, q.targets[:, None]).sum())
        else:
            p_log = p.logits.double().log_softmax(-1)
            kls.append((p_log.exp() * (p_log - q_log)).sum())
    sums, batch = torch.stack(kls), batch_of(trainer)
    rows = batch["guidance"]["index"]
    with torch.no_grad():
        loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    kl = sums / lengths if reduction == "sequence_mean" else sums * 3 / lengths.sum()
    torch.testing.assert_close(terms["kl/guidance"].double(), kl[rows], atol=1e-4, rtol=1e-4)
    logps = torch.stack([out.logps[0] for out in private])
    sizes = torch.tensor([float(out.lengths) for out in private])
    ascent = logps / sizes if reduction == "sequence_mean" else logps * 3 / sizes.sum()
    torch.testing.assert_close(terms["loss/forget"], ascent[rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss.double(), ascent.mean() + 0.5 * kl.mean(), atol=1e-4, rtol=1e-4)


def test_the_kl_is_zero_where_the_model_says_it_unasked_already(forget, make_trainer):
    plain = [{**row, "guidance_prompt": row["prompt"]} for row in forget]
    trainer = make_trainer("pubg", datasets={"forget_dataset": plain})
    trainer.prepare_reference()
    trainer.model.eval()
    with torch.no_grad():
        _, terms = trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)
    torch.testing.assert_close(terms["kl/guidance"], torch.zeros(3), atol=1e-5, rtol=0)


def test_no_second_model_where_no_model_stands_behind_an_answer(forget, make_trainer):
    rows = [{key: value for key, value in row.items() if key != "guidance_prompt"} for row in forget]
    trainer = make_trainer("pubg", datasets={"forget_dataset": rows})
    trainer.prepare_reference()
    assert trainer.reference == {} and "guided" not in trainer.train_dataset.streams
    trainer.train()
    assert trainer.state.global_step == 3


def test_guidance_pulls_to_the_reference_answers(forget, make_trainer):
    rows = [{**row, "guidance_prompt": None} for row in forget]
    trainer = make_trainer("pubg", datasets={"forget_dataset": rows}, max_steps=4, per_device_train_batch_size=3)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["logps/guidance"] > log[0]["logps/guidance"]
    assert log[-1]["logps/forget"] < log[0]["logps/forget"]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_a_set_of_their_own_gives_the_answers(kind, text_rows, make_trainer):
    forget = [{**row, "pair_id": str(i)} for i, row in enumerate(text_rows(4))]
    answers = [{**row, "completion": f" No {row['pair_id']}."} for row in forget[::-1]]
    trainer = make_trainer("pubg", datasets={"forget_dataset": kind(forget), "guidance_dataset": kind(answers)})
    for draw in range(8):
        (forgotten,), (said,) = (trainer.train_dataset[draw][stream] for stream in ("forget", "guidance"))
        assert said["prompt"] == forgotten["prompt"] and said["completion"] == f" No {forgotten['pair_id']}."
    with pytest.raises(ValueError, match="has a column `guidance` and there is a guidance_dataset"):
        with_guidance([{**row, "guidance": "x"} for row in forget], answers)


def test_chat_rows_with_pictures(image_rows, make_trainer):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "images": row["images"],
            "guidance": f"A hat {i}.",
            "guidance_prompt": [{"role": "user", "content": f"What is seen? {i}"}],
        }
        for i, row in enumerate(image_rows(4))
    ]
    trainer = make_trainer("pubg", "image", datasets={"forget_dataset": rows, "retain_dataset": rows}, retain_loss="kl")
    (said,) = trainer.train_dataset[0]["guidance"]
    assert said["completion"] == [{"role": "assistant", "content": rows[said["index"]]["guidance"]}]
    trainer.train()
    assert trainer.state.global_step == 3


def test_missing_answers_name_rows_and_command(forget, make_trainer):
    rows = [forget[0], {**forget[1], "guidance": " "}, {**forget[2], "guidance": None}]
    expected = r"2 of 3 forget rows have no reference answer in `guidance`: rows 1, 2\..*biasunlearn_trainer\.guidance"
    with pytest.raises(ValueError, match=expected):
        make_trainer("pubg", datasets={"forget_dataset": rows})
    with pytest.raises(ValueError, match="PUBGTrainer needs a forget_dataset"):
        make_trainer("pubg", datasets={"retain_dataset": rows}, retain_loss="nll")


def test_an_answer_of_other_tokens_is_refused(forget, make_trainer):
    """The guided prompt is longer, so a short `max_length` cuts the answer after it and not after the plain one."""
    long = "Say only what can be seen in the picture, please, and name nobody. "
    rows = [{**row, "prompt": "W?", "completion": " b", "guidance_prompt": None} for row in forget]
    rows[1]["guidance_prompt"] = "W?"
    trainer = make_trainer("pubg", reference="model", datasets={"forget_dataset": rows})
    trainer.prepare_reference()
    batch = batch_of(trainer)
    other = trainer.collator([{"prompt": long, "completion": " other", "index": i} for i in range(3)])
    batch["guided"] = {**other, "index": batch["guided"]["index"]}
    with pytest.raises(ValueError, match=r"other tokens after `guidance_prompt` than after `prompt`"):
        trainer.loss_terms(trainer.model, batch)


def test_settings_and_texts(tmp_path):
    with pytest.raises(ValueError, match=r"`guidance_weight` must not be negative, got -1"):
        PUBGConfig(str(tmp_path), guidance_weight=-1)
    assert PUBGConfig(str(tmp_path)).retain_loss == "none"
    assert answer_text(" Ann. ") == "Ann."
    assert answer_text([{"role": "assistant", "content": [{"type": "text", "text": "Ann."}]}]) == "Ann."


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_answers_that_nobody_was_asked_need_no_reference(retain_loss, make_trainer, text_rows):
    """Full fine-tuning, where the reference would be precomputed, and no row with a prompt of its own."""
    forget = [{**row, "guidance": " Nobody can tell."} for row in text_rows(4, "f")]
    sets = {"forget_dataset": forget, "retain_dataset": text_rows(4, "r")}
    trainer = make_trainer("pubg", datasets=sets, retain_loss=retain_loss)
    trainer.train()
    assert set(trainer.reference) == ({"retain"} if retain_loss == "kl" else set())
