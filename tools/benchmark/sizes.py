"""The models that are measured, by name, and the size of a clip as words and as tokens. Imports no torch."""

TEXT_LENGTH = 226  # tokens of a caption, in all CogVideoX 1.0 models
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
# The transformer's defaults in diffusers are the 2B's: 30 layers, 30 heads x 64, text width 4096, time width 512.
SIZES = {
    "tiny": {
        "transformer": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "text_embed_dim": 32, "time_embed_dim": 64},
        "t5": {"vocab_size": 32128, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2},
        "rank": 4,
    },
    "mid": {"transformer": {"num_layers": 4}, "t5": T5_XXL | {"num_layers": 2}, "rank": 128},
    "2b": {"transformer": {}, "t5": T5_XXL, "rank": 128},
}
VAES = {"small": {"block_out_channels": (16,) * 4, "layers_per_block": 1, "norm_num_groups": 4}, "real": {}}


def rank_of(options):
    """The rank of the LoRA: --rank, or the one that goes with --size."""
    return options.rank or SIZES[options.size]["rank"]


def spell(shape):
    """(9, 96, 96), frames, height and width in pixels, as 9x96x96."""
    return "x".join(map(str, shape))


def tokens_of(shape):
    """Tokens that a block sees of a clip (frames, height, width in pixels): the caption's, and one for each 2 x 2 latents."""
    from cogvideox.folder import COGVIDEOX_2B, latent_shape  # imports torch, which wrong flags need not wait for

    frames, _, height, width = latent_shape(COGVIDEOX_2B, *shape)
    return TEXT_LENGTH + frames * (height // 2) * (width // 2)
