"""The list of cases, in the order in which they run. Imports no torch."""

# name -> (module with `check_NAME`, a generator of rows; seconds expected on an A100; seconds after which it is ended; the claim)
CASES = {
    "golden": ("exactness", 40, 150, "the losses of a small run in fp32 are the CPU's, in tests/golden_losses.json"),
    "attention": ("exactness", 25, 90, "each attention kernel is exact, and --attention_backend auto takes the fastest"),
    "step": ("steps", 70, 240, "a step of the 2B is no slower than the baseline's and takes less memory"),
    "memory": ("phases", 120, 300, "training, scoring and validation take the predicted memory, for each preset of the README"),
    "flags": ("steps", 150, 360, "offload, compile, 8-bit and 4-bit weights, 8-bit optimizers and every checkpointing train alike"),
    "resume": ("exactness", 90, 240, "a resumed run ends with the same bits, with --deterministic"),
    "overlap": ("steps", 30, 120, "half of the time of copying offloaded weights or more is hidden behind computation"),
    "encode": ("phases", 45, 150, "the VAE, tiled and untiled, and T5 take the predicted memory"),
    "looking": ("phases", 50, 180, "what a video, a score and a checkpoint cost; the size of a checkpoint is the predicted one"),
    "base": ("exactness", 30, 120, "the base's loss on fixed noise, in its stored precision and in bf16"),
    "families": ("families", 200, 420, "the 5B, 1.5 and image-to-video train at their own sizes in the predicted memory"),
    "engines": ("steps", 240, 480, "with two GPUs: DDP, FSDP2, ZeRO-2 and ZeRO-3 train what one process trains"),
}
SHAPES = {"tiny": (9, 32, 48), "mid": (9, 96, 96), "2b": (49, 480, 720)}  # frames, height and width in pixels, by size
SHORT_SHAPES = SHAPES | {"2b": (13, 480, 720)}  # for cases that compare many variants
# name -> variables of the environment: those of both shell scripts, where 18 GiB lay in pieces without them
ENVIRONMENT = {"families": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}
