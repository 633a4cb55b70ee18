"""What a trainer sends to the Hub: what a recipe's run sends, never a checkpoint or the pickled settings."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

logger = logging.getLogger(__name__)


class HubPublishing:
    """Mixed into a `transformers.Trainer`; replaces its own uploads and its draft of a card."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of `args.hub_model_id`, or find it."""
        from biasunlearn_trainer.hub.upload import reserve

        if not self.is_world_process_zero():
            return
        private = private if private is not None else self.args.hub_private_repo
        self.hub_model_id = reserve(self._repository(), private, token, self.args.output_dir)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | Future | None:
        """Publish adapter or model, processor and card; numbers only where `output_dir` has results of these weights.

        Args:
            commit_message: of the commit.
            blocking: wait for the upload; else a `Future` is returned.
            token: a token of the Hub; None: the one that `hf auth login` or `HF_TOKEN` gives.
            revision: branch; None: `args.hub_revision`.
            private: make the repository private; None: `args.hub_private_repo`.
            **card: `license`, `language`, `tags` of the card, and `base_model`, the base's Hub id where the model came
                from a folder.

        Returns:
            The commit's address; None on other processes than the first.

        Raises:
            PublishError: the folder's results are not those of these weights.
            HubError: the Hub refused or was not reached.
        """
        from biasunlearn_trainer.hub.upload import push

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # collective where weights are sharded
        if not self.is_world_process_zero():
            return None
        options = {
            "private": private if private is not None else self.args.hub_private_repo,
            "revision": revision or self.args.hub_revision,
            "token": token,
            "commit_message": commit_message,
            "needs_results": False,
            "method": self._method(),
            **card,
        }
        name = self.hub_model_id or self._repository()
        if blocking:
            return push(self.args.output_dir, name, **options)
        return HfApi().run_as_future(push, self.args.output_dir, name, **options)

    def create_model_card(self, **card: Any) -> None:
        """Write the card that `push_to_hub` would send to `output_dir`; takes the same `**card`."""
        from biasunlearn_trainer.hub.card import write_card
        from biasunlearn_trainer.hub.finished import read_run

        if not self.is_world_process_zero():
            return
        run = read_run(self.args.output_dir, needs_results=False)
        kind = "adapter" if run.is_adapter else "model"
        text: ModelCard = write_card(run, self._repository(), kind=kind, **{"method": self._method(), **card})
        text.save(Path(self.args.output_dir, "README.md"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A half-finished run is not published, whatever `hub_strategy` says."""

    def _repository(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _method(self) -> str | None:
        """The name that recipes have for this class; its own name for a class that they do not know."""
        from biasunlearn_trainer.trainers.registry import METHODS

        known = (name for name, (_, trainer) in METHODS.items() if trainer == type(self).__name__)
        return next(known, type(self).__name__)
