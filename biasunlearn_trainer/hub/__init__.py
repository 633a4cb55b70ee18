"""A run on the Hub: adapter or merged model, processor, card, recipe and results; nothing else leaves the machine.

    python -m biasunlearn_trainer.hub push outputs/demo me/unbiased-llava --private
    python -m biasunlearn_trainer.hub merge outputs/demo merged

docs/publishing.md says what is sent and how it loads.
"""

from biasunlearn_trainer.hub.finished import PublishError
from biasunlearn_trainer.hub.merging import merge
from biasunlearn_trainer.hub.upload import push

__all__ = ["PublishError", "merge", "push"]
