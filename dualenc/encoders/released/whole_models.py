"""transformers' dual encoders: which are loaded whole, and why the others are not."""

from __future__ import annotations

from dualenc.encoders.adapters.hf_halves import VISION_TEXT

FAMILIES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "altclip": "AltCLIPModel",
    "chinese_clip": "ChineseCLIPModel",
    "clap": "ClapModel",
    "metaclip_2": "MetaClip2Model",
    "aimv2": "Aimv2Model",
    "align": "AlignModel",
    "tipsv2": "Tipsv2Model",
    VISION_TEXT: "VisionTextDualEncoderModel",
}
"""transformers' model_type of a whole dual encoder → its class."""
REFUSED = {
    "blip": "its text encoder cross-attends to the image, and the contrastive heads are in another class",
    "blip-2": "it gives 32 query vectors for an image, not one",
    "bridgetower": "it fuses image and text in one encoder",
    "clipseg": "it segments images; the CLIP in it can be loaded from its own repository",
    "clvp": "it ranks speech tokens of a generator",
    "flava": "its features are those of a multimodal encoder above both towers",
    "groupvit": "its image tower draws Gumbel noise in training, which depends on how a batch is cut",
    "omdet-turbo": "it detects objects",
    "owlv2": "it detects objects; the CLIP in it can be loaded from its own repository",
    "owlvit": "it detects objects; the CLIP in it can be loaded from its own repository",
    "pe_audio": "it compares features of any length, these are normalised",
    "pe_audio_video": "it compares features of any length, these are normalised, and there is no video modality",
    "pe_video": "it compares features of any length, these are normalised, and there is no video modality",
    "sam3": "it segments images",
    "sam3_lite_text": "it segments images",
    "sam3_video": "it segments videos",
    "videoprism": "it encodes videos, and there is no video modality",
    "xclip": "its text features depend on the video they are compared with",
}
"""model_type of models with an image or audio half and a text half that cannot be loaded whole, and why."""
