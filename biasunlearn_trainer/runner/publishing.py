"""`push_to_hub: true`: the name is tried before the model is loaded, and the run is sent when it is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from biasunlearn_trainer.hub.finished import PublishError
from biasunlearn_trainer.hub.upload import again_command, check_name, check_token, push, reserve
from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.runner.failures import RunError

WITHOUT_EFFECT = {
    "hub_strategy": "a run is published once, when it is measured; leave it out",
    "hub_always_push": "a run is published once, when it is measured; leave it out",
}


def check_publishing(recipe: Recipe) -> None:
    """Refuses what could not be published, without a network.

    Raises:
        RecipeError: the name is none of the Hub's, there is no token, or a key would have no effect.
    """
    if not recipe.training.push_to_hub:
        return
    faults = [f"`{key}`: {why}." for key, why in WITHOUT_EFFECT.items() if key in recipe.given]
    for check in (lambda: check_name(repository(recipe)), check_token):
        try:
            check()
        except PublishError as err:
            faults.append(f"push_to_hub: {err}")
    if faults:
        raise RecipeError(faults, recipe.source)


def begin_publishing(recipe: Recipe) -> Callable[[], None]:
    """Makes the repository, or finds it, so that a name that is taken or forbidden is known before hours of training.

    The Trainer's own uploads (at every save, with a card and settings of their own) are switched off.

    Args:
        recipe: changed in place; every process has to call this.

    Returns:
        What publishes the run when it is done, on the main process; it does nothing where nothing was asked for.

    Raises:
        RecipeError: the Hub refuses the name, or is not reached.
    """
    args = recipe.training
    if not args.push_to_hub:
        return lambda: None
    args.push_to_hub = False
    said: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            reserve(repository(recipe), args.hub_private_repo, None, args.output_dir)
        except PublishError as err:
            said = [str(err)]
    broadcast_object_list(said)
    if said[0]:
        raise RecipeError([f"push_to_hub: {said[0]}"], recipe.source)
    return lambda: _publish(recipe)


def repository(recipe: Recipe) -> str:
    """OWNER/NAME, or the folder's name under the token's own account, as transformers has it."""
    return recipe.training.hub_model_id or Path(recipe.training.output_dir).absolute().name


def _publish(recipe: Recipe) -> None:
    args = recipe.training
    try:
        address = push(
            args.output_dir,
            repository(recipe),
            private=args.hub_private_repo,
            revision=args.hub_revision,
            trust_remote_code=recipe.run.trust_remote_code,
        )
    except PublishError as err:
        again = again_command(
            args.output_dir, repository(recipe), private=args.hub_private_repo, revision=args.hub_revision
        )
        text = str(err) if again in str(err) else f"{err}\nTo repeat it:\n    {again}"
        raise RunError(f"The run is finished and measured, but was not published. {text}") from err
    print(f"Published: {address}")
