"""Weights that a step leaves out get a gradient of zero, found in the graph of the whole loss."""

import torch
from torch import nn

from biasunlearn_trainer.untouched import UntouchedWeights, reached_leaves


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.image = nn.Linear(2, 2), nn.Linear(2, 2)


def test_what_is_reached_is_found_through_checkpoints_and_views():
    model, x = Two(), torch.ones(1, 2)
    loss = torch.utils.checkpoint.checkpoint(model.text, x, use_reentrant=False).sum()
    assert reached_leaves(loss) == {id(model.text.weight), id(model.text.bias)}
    loss = loss + (model.image.weight.T @ x[0]).sum()
    assert reached_leaves(loss) == {id(model.text.weight), id(model.text.bias), id(model.image.weight)}
    assert reached_leaves(torch.zeros(())) == set()


def test_the_loss_stays_and_every_trainable_weight_gets_a_gradient():
    model, x = Two(), torch.ones(1, 2)
    model.image.bias.requires_grad_(False)
    untouched = UntouchedWeights(model)
    for kind, part in (("text", model.text), ("image", model.image), ("text", model.text)):
        model.zero_grad(set_to_none=True)
        plain = part(x).sum()
        loss = untouched.complete(plain, kind)
        assert loss.item() == plain.item()
        loss.backward()
        others = [model.image.weight] if part is model.text else [model.text.weight, model.text.bias]
        assert all(torch.count_nonzero(weight.grad) == 0 for weight in others) and part.weight.grad.abs().sum() > 0
        assert model.image.bias.grad is None


def test_a_loss_that_reaches_nothing_trains_nothing():
    """Only the image half is trained, and a step has text alone."""
    model = Two()
    UntouchedWeights(model).complete(torch.tensor(3.0), "text").backward()
    assert all(torch.count_nonzero(weight.grad) == 0 for weight in model.parameters())


def test_a_text_step_of_a_model_whose_image_half_alone_is_trained(make_trainer, text_rows, image_rows):
    rows = {"forget_dataset": image_rows(2) + text_rows(2), "retain_dataset": text_rows(4)}
    trainer = make_trainer("mmunlearner", "image", datasets=rows, trainable_groups=["connector"], max_steps=4)
    trainer.train()
    assert {bool(entry["loss/forget"]) for entry in trainer.state.log_history if "loss" in entry} == {True}
