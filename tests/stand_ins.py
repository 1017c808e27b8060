"""What the watchers of the loop ask of a run, in small: one process on the CPU and a model of two weights, no model folder."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from accelerate.utils import DistributedType, LoggerType

from cogvideox import engine, lora
from cogvideox.folder import COGVIDEOX_2B
from cogvideox.order import Plan

UNSCALED = replace(COGVIDEOX_2B, scaling_factor=1.0)  # latents are the samples themselves

FLAGS = {
    "training_type": "lora",
    "declared": {},  # flags whose change makes it another run: none
    "resume_from_checkpoint": None,
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": None,
    "eval_clips": 0,
    "eval_steps": 0,
    "init_lora": None,
    "logging_steps": 1,
    "max_skipped_steps": 3,
    "prompts": [],
    "plain_prompt": None,
    "id_token": None,
    "negative_prompt": "",
    "validation_scheduler": "stored",
    "validation_prompts_at_once": 0,
    "num_validation_videos": 1,
    "validation_steps": 0,
    "validation_epochs": 0,
    "validation_height": None,
    "validation_width": None,
    "validation_frames": None,
    "num_inference_steps": 2,
    "guidance_scale": 6.0,
    "use_dynamic_cfg": False,
    "fps": 8,
    "seed": 42,
    "base_precision": "stored",
    "mixed_precision": "no",
}


def flags_of(output_dir, **flags):
    """The flags that a watcher reads, with `flags` on top."""
    folders = {"output_dir": str(output_dir), "encoding_cache_dir": str(Path(output_dir) / "cache")}
    return SimpleNamespace(**FLAGS | folders | {"declared": {}} | flags)


class OneProcess:
    """An Accelerator of one process, or of one of several (whose collectives find nobody else)."""

    device, scaler, num_processes = torch.device("cpu"), None, 1

    def __init__(self, process_index=0, distributed_type=DistributedType.NO):
        self.process_index, self.is_main_process = process_index, process_index == 0
        self.distributed_type, self.logged = distributed_type, []
        listener = SimpleNamespace(name="a stand-in", log=lambda numbers, step: self.logged.append((step, numbers)))
        self.trackers = [listener] if self.is_main_process else []

    def reduce(self, tensor, how):
        return tensor

    def wait_for_everyone(self):
        pass


class TwoWeights(torch.nn.Module):
    """A model with a weight that is trained and one that is not."""

    def __init__(self):
        super().__init__()
        self.trained = torch.nn.Parameter(torch.full((2, 2), 4.0))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)


def build_two_weights(device="cpu"):
    return TwoWeights().to(device)


def make_trained(accelerator=None, ema_decay=0.0, build=build_two_weights, kind=None):
    """A real `Trained` of `TwoWeights`. build: (device) -> the copy that an engine which shards the weights asks for."""
    model = TwoWeights()
    optimizer = torch.optim.AdamW([model.trained], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = engine.make_average([model.trained], ema_decay) if ema_decay else None
    accelerator = accelerator or OneProcess()
    return engine.Trained(accelerator, model, model, [model.trained], optimizer, schedule, average, build, kind=kind or RESULT)


def train_one_step(trained):
    """Move the trained weight, as a step does."""
    trained.transformer.trained.pow(2).sum().backward()
    trained.optimizer.step()
    trained.update_average()
    trained.optimizer.zero_grad()
    trained.schedule.step()


# lora.py for `TwoWeights`: the same files and names, and weights that are shipped as they are.
RESULT = SimpleNamespace(
    RESULT=lora.RESULT,
    FILES=lora.FILES,
    WEIGHTS=lora.WEIGHTS,
    LOADER="the stand-in's loader",
    EFFECT="effect",
    live_state=engine.trained_state,
    load_live=lambda model, state: engine.write_trained(dict(engine.trained_weights(model)), state, "weights do not fit"),
    export=lambda model, state, stored_dtype: dict(state),
    write=lora.write,
    publish=lora.publish,
    check_export=lambda folder, model: (0.0, 1.0),
    export_tolerance=lambda model: 1e-5,
)


class Noise:
    """The encodings of clips: the same moments and caption for each."""

    vae = ("vae",)
    clip_keys, prompt_keys = [f"clip {number}" for number in range(9)], [f"caption {number}" for number in range(9)]
    image_keys = ()  # of a text-to-video model
    caption_keys = {text: f"key of {text}" for text in ("", "a rabbit", "a bird", "a fox", "OLDFILM a rabbit")}

    def moments(self, clip, flipped=False):
        return torch.zeros(4, 1, 2, 2)

    def prompt(self, clip):
        return torch.zeros(3, 4)

    def caption(self, text):
        return torch.zeros(3, 4)


def clips_of(count, held_out=0):
    """Checked clips; the last ones are held out."""
    return SimpleNamespace(
        records=[SimpleNamespace(caption=f"clip {number}", listed=f"videos/{number}.mp4") for number in range(count)],
        clips=[{"sha256": f"{number:064x}", "frames": 9, "height": 32, "width": 48} for number in range(count)],
        trained=list(range(count - held_out)),
        own=list(range(count - held_out)),
        held_out=list(range(count - held_out, count)),
        images=[None] * count,
    )


def plan_of(clips=4, clips_per_step=1, total_steps=10):
    """A plan for clips of one shape."""
    return Plan(42, tuple(range(clips)), (0,) * clips, clips_per_step, clips, total_steps)


class LateNames:
    """An NFS client: names that another machine writes become visible when their folder is listed, `seconds` later or after that.

    Its clock replaces that of cogvideox/files.py, so that nothing waits. write: () -> writes the files.
    """

    def __init__(self, monkeypatch, seconds, write):
        self.now, self.seconds, self.write, self.listed = 0.0, seconds, write, []
        monkeypatch.setattr("cogvideox.files.time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr("cogvideox.files.os.listdir", self.list)

    def sleep(self, seconds):
        self.now += seconds

    def list(self, folder):
        self.listed.append(folder)
        if self.now >= self.seconds and self.write:
            write, self.write = self.write, None
            write()
        return []


class TrackerPackage(ModuleType):
    """The package wandb or comet_ml, as far as accelerate calls it. Each call of a user of it is noted in `calls`, with its arguments.

    fails: names of calls that raise ConnectionError.
    """

    __version__ = "9.0"

    def __init__(self, monkeypatch, name, fails=()):
        super().__init__(name)
        self.calls, self.fails, self.config, self.run = [], fails, SimpleNamespace(update=lambda *args, **kwargs: None), self
        self.__spec__ = ModuleSpec(name, None, origin="a stand-in")
        monkeypatch.setitem(sys.modules, name, self)
        monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType(name)])

    def call(self, what, **arguments):
        self.calls.append((what, arguments))
        if what in self.fails:
            raise ConnectionError(f"{what}: no network\nsecond line")
        return self

    def of(self, what):
        """The arguments of each call of this name."""
        return [arguments for name, arguments in self.calls if name == what]

    def init(self, **arguments):
        return self.call("init", **arguments)

    start = init

    def log(self, values, step):
        self.call("log", step=step)

    def finish(self):
        self.call("finish")

    end = finish

    def log_parameters(self, values):
        pass

    def set_step(self, step):
        self.call("log", step=step)

    def log_metric(self, name, value, step):
        pass
