"""How near a picture is to a text or to another picture, by any CLIP model of transformers."""

import logging

import PIL.Image

from biasunlearn_trainer.data_builders.loading import one_at_a_time
from biasunlearn_trainer.data_builders.stages import StageError

logger = logging.getLogger(__name__)


class ClipSimilarity:
    """Cosine similarities in -1..1 of a CLIP model's embeddings; loaded when it is first asked.

    Args:
        model: a path or Hub id whose weights are safetensors (openai/clip-vit-large-patch14).
        device: where it runs.
    """

    def __init__(self, model: str, device: str):
        self._name, self._device, self._model = model, device, None

    @one_at_a_time
    def _load(self) -> None:
        from transformers import AutoModel, AutoProcessor

        if self._model is not None:
            return
        try:
            self._processor = AutoProcessor.from_pretrained(self._name)
            model = AutoModel.from_pretrained(self._name, use_safetensors=True)
        except (OSError, ValueError, KeyError) as err:
            said = " ".join(str(err).split())[:400]
            raise StageError(f"`clip_model` {self._name!r} cannot be loaded: {said}") from err
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise StageError(f"`clip_model` {self._name!r} is a {type(model).__name__}, expected one like CLIPModel.")
        self._model = model.to(self._device).eval()

    def too_long(self, text: str) -> str | None:
        """Says how far a text goes over the limit of the text encoder, or None."""
        self._load()
        tokenizer = self._processor.tokenizer
        count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        limit = tokenizer.model_max_length
        return f"{count} tokens, the CLIP model takes {limit}" if count > limit else None

    def to_text(self, picture: PIL.Image.Image, text: str) -> float:
        """The similarity of a picture and a text."""
        self._load()
        tokens = self._processor(text=[text], return_tensors="pt", padding=True).to(self._device)
        return self._cosine(self._embedded(picture), self._features(self._model.get_text_features, tokens))

    def to_picture(self, picture: PIL.Image.Image, other: PIL.Image.Image) -> float:
        """The similarity of two pictures."""
        self._load()
        return self._cosine(self._embedded(picture), self._embedded(other))

    def _embedded(self, picture: PIL.Image.Image):
        pixels = self._processor(images=[picture], return_tensors="pt").to(self._device)
        return self._features(self._model.get_image_features, pixels)

    def _features(self, ask, inputs):
        import torch

        with torch.inference_mode():
            out = ask(**inputs)
        # transformers 5 wraps the projected embedding, earlier ones return it.
        return getattr(out, "pooler_output", out)[0]

    def _cosine(self, one, other) -> float:
        from torch.nn.functional import cosine_similarity

        return float(cosine_similarity(one.float(), other.float(), dim=0))

    def close(self) -> None:
        """Lets the weights go."""
        self._model = None
