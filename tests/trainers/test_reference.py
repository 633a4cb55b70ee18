"""Three forms of one reference policy."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.models import evaluating, load_model
from biasunlearn_trainer.reference import AdapterReference, PrecomputedReference
from biasunlearn_trainer.reference_states import StatesReference


def terms(trainer):
    """The terms of the first batch, after the adapter was moved away from the base."""
    trainer.prepare_reference()
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.add_(0.05)
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in range(2)])
    trainer.model.eval()
    trainer._batch_counts = trainer._count([batch])
    return trainer.loss_terms(trainer.model, batch)


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("method", ["npo", "dpo"])
def test_the_three_forms_agree(method, modality, make_trainer):
    results = []
    for form in ("adapter", "precomputed", "model"):
        torch.manual_seed(0)
        results.append(terms(make_trainer(method, modality, LoraConfig(r=2), reference=form)))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-5)
    assert results[0]["loss/forget"].std() > 0


@pytest.mark.parametrize("method", ["kl_min", "npo"])
def test_a_kl_is_the_same_for_adapter_and_model(method, make_trainer):
    settings = {"retain_loss": "kl"} if method == "npo" else {}
    results = []
    for form in ("adapter", "model"):
        torch.manual_seed(0)
        results.append(terms(make_trainer(method, "image", LoraConfig(r=2), reference=form, **settings)))
    torch.testing.assert_close(results[0]["kl/retain"], results[1]["kl/retain"], atol=1e-5, rtol=1e-5)
    assert (results[0]["kl/retain"] > 1e-4).all()


@pytest.mark.parametrize(
    ("method", "lora", "expected"),
    [
        ("npo", True, AdapterReference),
        ("npo", False, PrecomputedReference),
        ("kl_min", False, StatesReference),
        ("kl_min", True, AdapterReference),
        ("dpo", False, PrecomputedReference),
        ("ga", False, None),
    ],
)
def test_auto_takes_the_cheapest(method, lora, expected, make_trainer):
    trainer = make_trainer(method, peft_config=LoraConfig(r=2) if lora else None, max_steps=3)
    trainer.train()
    assert {type(source) for source in trainer.reference.values()} == ({expected} if expected else set())


def test_an_adapter_that_is_trained_already_belongs_to_the_reference(make_trainer, tiny_llama, caplog):
    """Unlearning goes on from an adapter: the model before unlearning is base plus adapter, not the base alone."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trained = get_peft_model(load_model(str(tiny_llama)), config)
    trainer = make_trainer("npo", model=trained, max_steps=1)
    assert trainer.reference_mode("forget") == "precomputed"
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss/forget"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)  # policy == reference
    assert model_hash(trained) != model_hash(load_model(str(tiny_llama)))
    assert make_trainer("npo", model=trained, reference="adapter").reference_mode("forget") == "adapter"
    assert "is trained already" in caplog.text
    with pytest.raises(ValueError, match="The adapter is frozen"):
        make_trainer("npo", model=trained.requires_grad_(False))


def test_the_table_is_kept_and_remade_for_another_model_or_set(make_trainer, tmp_path, tiny_llama):
    def files():
        return set((tmp_path / "references").glob("*.safetensors"))

    make_trainer("npo", max_steps=1).train()
    first = files()
    make_trainer("npo", max_steps=1).train()
    assert files() == first and len(first) == 1
    model = load_model(str(tiny_llama))
    model.lm_head.weight.data += 0.01
    make_trainer("npo", max_steps=1, model=model).train()
    assert len(files()) == 2
    make_trainer("npo", max_steps=1, num_forget=5).train()
    assert len(files()) == 3
    make_trainer("npo", max_steps=1, append_eos=False).train()
    assert len(files()) == 4


def test_a_digest_of_the_weights_is_handed_on_where_they_are_still_those(make_trainer, tiny_llama):
    """Whoever took it spares the run a second reading of all weights; an adapter that is no fresh one counts itself."""
    trained = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    cases = {"full": None, "fresh": LoraConfig(r=2), "trained": trained}
    for name, adapter in cases.items():
        for known in (None, "taken before"):
            trainer = make_trainer("npo", peft_config=adapter, reference="precomputed", saliency_mask="fisher")
            trainer.known_weights = known
            reference = trainer._reference_builder(trainer.model)._parts["model weights"]
            is_handed_on = known is not None and name != "trained"
            assert reference == (known if is_handed_on else model_hash(trainer.model))
            # A mask is made of gradients, which a fresh adapter changes.
            whole = model_hash(trainer.model, skip_fresh_adapter=False)
            assert trainer._counted_weights() == (known if is_handed_on and name == "full" else whole)
    trainer = make_trainer("npo", max_steps=1)
    trainer.known_weights = "taken before"
    trainer.train()
    assert trainer.known_weights is None


def test_another_model_as_the_reference(make_trainer, tiny_llama, tmp_path):
    other = load_model(str(tiny_llama))
    other.lm_head.weight.data.mul_(2.0)
    other.save_pretrained(tmp_path / "other")
    make = lambda **more: terms(make_trainer("npo", **more))["loss/forget"]  # noqa: E731
    named = {"reference_model_name_or_path": str(tmp_path / "other")}
    torch.testing.assert_close(
        make(reference="model", **named), make(reference="precomputed", **named), atol=1e-4, rtol=0
    )
    assert not torch.allclose(make(**named), make())


def test_no_gradient_reaches_the_reference_and_dropout_is_off_in_it(make_trainer):
    trainer = make_trainer("npo", peft_config=LoraConfig(r=2, lora_dropout=0.5), reference="adapter")
    trainer.prepare_reference()
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])["forget"]
    first, second = (trainer.reference["forget"].output(trainer.model, batch) for _ in range(2))
    assert torch.equal(first.logps, second.logps) and not first.logps.requires_grad


def test_evaluating_restores_every_module(tiny_llama):
    model = load_model(str(tiny_llama)).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_what_cannot_be_is_said_before_training(make_trainer):
    with pytest.raises(ValueError, match=r"reference='adapter' switches the model's own PEFT adapter off"):
        make_trainer("npo", reference="adapter")
    with pytest.raises(ValueError, match="`reference_dtype` is that of the hidden states"):
        make_trainer("npo", reference_dtype="bfloat16")
    with pytest.raises(ValueError, match="`reference_dtype` must be one of"):
        make_trainer("kl_min", reference_dtype="bf16")
    with pytest.raises(ValueError, match="uses no reference policy"):
        make_trainer("ga", reference_model_name_or_path="x")
