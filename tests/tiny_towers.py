"""Tiny random models for text and images, whose language model is one tower, and what the tests feed them."""

from __future__ import annotations

import torch
import transformers

# Tokens that stand for an image, each for one of its features; the texts of the tests may hold them too.
IMAGE = 60
PIXELS, PATCH = 16, 4
_VISION = {"hidden_size": 16, "intermediate_size": 24, "patch_size": PATCH}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": PIXELS}


def gemma3(text):
    """Gemma 3 with its image tower, around a text configuration."""
    vision = {**_VISION, **_LAYERS}
    ids = {"image_token_index": IMAGE, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4(text):
    """Gemma 4 with its image tower, around a text configuration."""
    vision = {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision |= {"pooling_kernel_size": 2, "position_embedding_size": 16}
    ids = {"image_token_id": IMAGE, "video_token_id": 59, "audio_token_id": 58, "boi_token_id": 61, "eoi_token_id": 62}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)
    return transformers.Gemma4ForConditionalGeneration(config)


def mistral3(text):
    """Mistral 3 with its image tower, around a text configuration."""
    vision = {**_VISION, **_LAYERS, "model_type": "pixtral", "head_dim": 8}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen3_vl(text):
    """Qwen3-VL, which hands features of the image to its first block too, around a text configuration."""
    vision = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": text["hidden_size"]}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": 61, "vision_end_token_id": 62}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen3_5(text, name="Qwen3_5"):
    """Qwen 3.5 with its image tower, around a text configuration, which may be one with experts."""
    vision = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": text["hidden_size"]}
    vision["num_position_embeddings"] = 16
    ids = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": 61, "vision_end_token_id": 62}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def image_inputs(model):
    """Arguments of a call with a text around one image."""
    pixels = torch.randn(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8, 9]])
    kinds = (ids == IMAGE).long()
    if model.config.model_type.endswith("gemma3"):
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": kinds}
    if model.config.model_type.endswith("gemma4"):
        rows = torch.rand(1, 16, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        return {"input_ids": ids, "pixel_values": rows, "image_position_ids": places, "mm_token_type_ids": kinds}
    if model.config.model_type.endswith("mistral3"):
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[PIXELS, PIXELS]])}
    # Rows of patches, each twice in time.
    patches = torch.randn(16, 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, PIXELS // PATCH, PIXELS // PATCH]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
