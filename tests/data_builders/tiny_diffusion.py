"""Pipelines of Stable Diffusion with tiny random weights, built from configurations and saved: seconds, no download."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

SIDE = 32
"""Pixels of the pictures."""
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "projection_dim": 16,
}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
LIMIT = 77


def tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter, as CLIP's limit has it: at most 77 with begin and end."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LIMIT)


def text_config(made: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        **TEXT,
        vocab_size=len(made),
        max_position_embeddings=LIMIT,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.eos_token_id,
    )


def clip_config(made: CLIPTokenizer) -> CLIPConfig:
    return CLIPConfig(text_config=text_config(made).to_dict(), vision_config=VISION, projection_dim=16)


def save_pipeline(folder: Path, flags: bool | None = False, edits: bool = False) -> Path:
    """Saves a pipeline.

    Args:
        folder: where to.
        flags: whether its safety checker flags everything, or nothing; None: it has none.
        edits: InstructPix2Pix, whose network gets the picture's latents, too.
    """
    torch.manual_seed(0)
    made = tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=SIDE // 2,
        in_channels=8 if edits else 4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT["hidden_size"],
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    checker = None
    if flags is not None:
        checker = StableDiffusionSafetyChecker(clip_config(made))
        # A concept is found where the similarity, in -1..1, is over its threshold.
        with torch.no_grad():
            checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
            checker.special_care_embeds_weights.fill_(2.0)
    pipeline = (StableDiffusionInstructPix2PixPipeline if edits else StableDiffusionPipeline)(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(made)),
        tokenizer=made,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        requires_safety_checker=checker is not None,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """Saves a CLIP model with its processor."""
    torch.manual_seed(1)
    made = tokenizer(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=made).save_pretrained(folder)
    CLIPModel(clip_config(made)).save_pretrained(folder)
    return folder
