"""Flags: all of them described, read and alive; every mistake told at once, in a second, in words."""

import json
import subprocess
import sys

import pytest

import train_cogvideox_lora as script
from cogvideox import flags, versions
from cogvideox.checkpoint import changed_settings
from tests.conftest import ROOT, environment, lora_of, same, words

UPSTREAM = [
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "cache_dir",
    "dataset_name",
    "dataset_config_name",
    "instance_data_root",
    "video_column",
    "caption_column",
    "id_token",
    "dataloader_num_workers",
    "height",
    "width",
    "fps",
    "max_num_frames",
    "skip_frames_start",
    "skip_frames_end",
    "random_flip",
    "video_reshape_mode",
    "validation_prompt",
    "validation_prompt_separator",
    "num_validation_videos",
    "validation_epochs",
    "guidance_scale",
    "use_dynamic_cfg",
    "seed",
    "rank",
    "lora_alpha",
    "mixed_precision",
    "output_dir",
    "train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "enable_slicing",
    "enable_tiling",
    "optimizer",
    "use_8bit_adam",
    "adam_beta1",
    "adam_beta2",
    "prodigy_beta3",
    "prodigy_decouple",
    "prodigy_use_bias_correction",
    "prodigy_safeguard_warmup",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "tracker_name",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "logging_dir",
    "allow_tf32",
    "report_to",
]

# Each of these changes the trained LoRA: (flag, value, the other flags of both runs).
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "max_train_steps": 4}
WARM = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}
CHANGES_THE_LORA = [
    ("id_token", "BUNNY", {}),
    ("height", 48, {}),
    ("width", 32, {}),
    ("fps", 12, {}),
    ("max_num_frames", 5, {}),
    ("skip_frames_start", 6, {}),
    ("skip_frames_end", 40, {"max_num_frames": 17}),
    ("video_reshape_mode", "random", {"width": 32}),
    ("video_reshape_mode", "none", {"width": 32}),
    ("random_flip", True, {"max_train_steps": 4}),
    ("rank", 8, {}),
    ("lora_alpha", 2, {}),
    ("lora_dropout", 0.5, {}),
    ("target_modules", ["to_q", "ff.net.2"], {}),
    ("caption_dropout", 1.0, {}),
    ("seed", 1, {}),
    ("mixed_precision", "bf16", {}),
    ("train_batch_size", 2, {}),
    ("num_train_epochs", 2, {"max_train_steps": None, "num_train_epochs": 1}),
    ("max_train_steps", 3, {}),
    ("gradient_accumulation_steps", 2, {}),
    ("learning_rate", 1e-3, {}),
    ("scale_lr", True, {"train_batch_size": 2}),
    ("lr_scheduler", "linear", {}),
    ("lr_warmup_steps", 2, {"lr_scheduler": "constant_with_warmup"}),
    ("lr_num_cycles", 2, {"lr_scheduler": "cosine_with_restarts", "max_train_steps": 4}),
    ("lr_power", 3, {"lr_scheduler": "polynomial", "max_train_steps": 3}),
    ("optimizer", "Adam", {"adam_weight_decay": 0.5}),
    ("optimizer", "Prodigy", {"max_train_steps": 3}),
    ("use_8bit_adam", True, {"rank": 128, "max_train_steps": 3}),
    ("base_precision", "int8", {}),
    ("adam_beta1", 0.5, {}),
    ("adam_beta2", 0.5, {}),
    ("adam_weight_decay", 0.9, {}),
    ("adam_epsilon", 1e-2, {}),
    ("prodigy_beta3", 0.5, PRODIGY),
    ("prodigy_decouple", False, PRODIGY | {"adam_weight_decay": 0.5}),
    ("prodigy_use_bias_correction", False, PRODIGY),
    ("prodigy_safeguard_warmup", False, PRODIGY | WARM | {"max_train_steps": 8}),
    ("max_grad_norm", 1e-4, {"adam_epsilon": 1e-2}),
    ("timestep_sampling", "spread", {}),
    ("timestep_sampling", "logit_normal", {"timestep_sampling": "spread"}),
    ("snr_gamma", 1.0, {"adam_epsilon": 1e-2}),
]


def declared():
    return script.build_parser().declared


def test_every_flag_of_the_trainers_before_is_here():
    assert set(UPSTREAM) <= set(declared())


def test_help_tells_every_default_and_fits_on_a_line_or_two():
    text = script.build_parser().format_help()
    assert text.index("--pretrained_model_name_or_path") < text.index("--instance_data_root") < text.index("--prodigy_decouple")
    for name, action in declared().items():
        assert f"--{name}" in text
        assert len(action.help) <= 140, name
        assert action.default in (None, False, "") or "(default" in action.help, name


def test_bounds_stand_where_the_flag_is_declared():
    parser = flags.new_parser("a test")
    flag = flags.flag_group(parser, "group")
    flag("--share", 0.5, "a share", at_least=0, at_most=1)
    flag("--count", None, "a count", type=int, above=2, below=10)
    flag("--free", "text", "has no bounds", free=True)

    def problems(*words):
        return flags.out_of_bounds(parser.parse_args(words))

    assert problems() == problems("--share", "0", "--count", "3") == problems("--share", "1", "--count", "9") == []
    assert problems("--share", "1.5", "--count", "2") == [
        "--share 1.5: must be at least 0 and at most 1",
        "--count 2: must be above 2 and below 10",
    ]
    assert problems("--share", "nan") == ["--share nan: must be at least 0 and at most 1"]
    assert [name for name, action in parser.declared.items() if action.free] == ["free"]


def test_a_flag_that_trains_something_else_may_not_change_on_resume_and_a_free_one_may():
    given = {"rank": "8", "seed": "1", "target_modules": ["to_q"], "ema_decay": "0.5", "snr_gamma": "5", "random_flip": True}
    free = {"output_dir": "x", "validation_steps": "7", "max_train_steps": "9", "gradient_checkpointing": "all", "verbose": True}
    before = script.parse_args(words("m", "d", "o", "c"))
    after = script.parse_args(words("m", "d", "o", "c", **given, **free))
    same_data = dict.fromkeys(("clips", "transformer", "clips_per_step"), "same")
    facts = [{"flags": json.loads(json.dumps(flags.public_flags(args)))} | same_data for args in (before, after)]
    changes = changed_settings(*facts, before.declared)
    alpha = {"--lora_alpha"} if before.lora_alpha != after.lora_alpha else set()  # it follows the rank where it is not given
    assert {sentence.split()[0] for sentence in changes} == {f"--{name}" for name in given} | alpha
    del facts[0]["flags"]["ema_decay"]  # a checkpoint from before there was such a flag: it had the default
    assert "--ema_decay was 0.0 and is 0.5" in changed_settings(*facts, before.declared)
    facts[1]["flags"]["of_another_version"] = 1
    assert changed_settings(facts[1], facts[1], before.declared) == []


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value", "others"), CHANGES_THE_LORA, ids=[f"{f}={v}" for f, v, _ in CHANGES_THE_LORA])
def test_changing_a_flag_changes_the_lora(train, plain_run, flag, value, others):
    before, after = plain_run(**others), train(**(others | {flag: value}))
    assert not same(lora_of(before), lora_of(after))


WRONG = [
    ({"rank": 0}, "--rank 0: must be at least 1"),
    ({"train_batch_size": 0}, "--train_batch_size 0"),
    ({"checkpointing_steps": 0}, "--checkpointing_steps 0"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0"),
    ({"max_num_frames": 0}, "--max_num_frames 0"),
    ({"learning_rate": -1}, "--learning_rate -1"),
    ({"learning_rate": "nan"}, "--learning_rate nan"),
    ({"adam_beta1": "nan"}, "--adam_beta1 nan"),
    ({"adam_beta2": 1}, "--adam_beta2 1"),
    ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit 0"),
    ({"fps": 0}, "--fps 0"),
    ({"lr_warmup_steps": 5}, "--lr_warmup_steps 5: --lr_scheduler constant has no warm-up"),
    ({"optimizer": "prodigy", "learning_rate": 0}, "--learning_rate 0: Prodigy"),
    ({"lr_num_cycles": 3}, "--lr_num_cycles 3: would do nothing, because only --lr_scheduler cosine_with_restarts has cycles"),
    ({"lr_power": 2, "lr_scheduler": "cosine"}, "--lr_power 2.0: would do nothing"),
    ({"prodigy_decouple": False}, "--no-prodigy_decouple: would do nothing, because only --optimizer prodigy reads it"),
    ({"push_to_hub": True, "hub_model_id": "my lora/\u00fc"}, "--hub_model_id my lora/\u00fc: Repo id must use alphanumeric chars"),
    ({"push_to_hub": True, "hub_model_id": "me/\u00fc"}, "--hub_model_id me/\u00fc: Repo id must use alphanumeric chars"),
    ({"push_to_hub": True, "output_dir": "a/my lora"}, "(the name of --output_dir a/my lora; give another one as --hub_model_id)"),
    ({"optimizer": "sgd"}, "--optimizer: invalid choice: 'sgd'"),
    ({"lr_scheduler": "cosinus"}, "--lr_scheduler: invalid choice"),
    ({"gradient_checkpointing": "some"}, "--gradient_checkpointing some"),
    ({"use_8bit_adam": True, "optimizer": "Prodigy"}, "unsupported with Prodigy"),
    ({"logging_dir": "../logs"}, "--logging_dir ../logs"),
    ({"logging_dir": "/var/log"}, "--logging_dir /var/log"),
    ({"logging_dir": ".."}, "--logging_dir .."),
    ({"logging_dir": ""}, "--logging_dir"),
    ({"caption_dropout": 2}, "--caption_dropout 2"),
    ({"instance_data_root": None}, "--instance_data_root"),
    ({"no_such_flag": 1}, "ERROR[2]: --no_such_flag: no such flag; --help lists all flags\n"),
    ({"learnin_rate": 1e-3}, "ERROR[2]: --learnin_rate: no such flag; did you mean --learning_rate?\n"),
    ({"learning-rate": 1e-3}, "ERROR[2]: --learning-rate: no such flag; did you mean --learning_rate?\n"),
    ({"rank": "many"}, "ERROR[2]: --rank: invalid int value: 'many'"),
]


@pytest.mark.parametrize(("mistake", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_a_wrong_flag_ends_with_exit_code_2_and_names_itself(mistake, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words("m", "d", "o", "c", **mistake))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


IDLE = [  # flags that do nothing, what makes them so, and what lets them do something
    ({"num_train_epochs": 3}, {"max_train_steps": 5}, {"max_train_steps": None}),
    ({"max_bad_share": 0.5}, {}, {"bad_videos": "skip"}),
    ({"dataset_config_name": "x"}, {}, {"dataset_name": "y", "instance_data_root": None}),
    ({"height": 64, "width": 96}, {"bucket": ["32x48"]}, {"bucket": ["9"]}),
    ({"max_num_frames": 17}, {"bucket": ["9"]}, {"bucket": ["32x48"]}),
    ({"revision": "main"}, {"pretrained_model_name_or_path": "."}, {}),
    ({"rank": 8, "lora_alpha": 3, "target_modules": ["to_q"]}, {"training_type": "sft"}, {}),
    ({"lora_alpha": 3}, {"training_type": "sft", "rank": 128}, {"rank": 128}),
    ({"num_validation_videos": 2, "guidance_scale": 7.0, "use_dynamic_cfg": True, "negative_prompt": "z"}, {}, {"validation_prompt": "x"}),
    ({"validation_epochs": 3}, {"validation_prompt": "x", "validation_steps": 5}, {"validation_prompt": "x"}),
    ({"negative_prompt": "z"}, {"validation_prompt": "x", "guidance_scale": 1.0}, {"validation_prompt": "x"}),
    ({"eval_steps": 5, "eval_share": 0.1}, {"eval_clips": 0}, {"eval_clips": 2}),
    ({"allow_tf32": True, "offload": True}, {"cpu": True}, {}),
    ({"tracker_name": "x"}, {"report_to": "none"}, {"report_to": "tensorboard"}),
    ({"hub_model_id": "me/x"}, {}, {"push_to_hub": True}),
]


def test_a_flag_that_an_earlier_version_took_is_told_when_its_run_is_resumed():
    given = words("m", "d", "o", "c", lr_scheduler="cosine", lr_num_cycles=2)
    with pytest.raises(SystemExit):
        script.parse_args(given)
    args = script.parse_args([*given, "--resume_from_checkpoint", "latest"])
    assert any("--lr_num_cycles 2 (only --lr_scheduler cosine_with_restarts has cycles)" in note for note in script.notes_on_flags(args))


@pytest.mark.parametrize(("idle", "beside", "otherwise"), IDLE, ids=[" ".join(case[0]) for case in IDLE])
def test_flags_that_do_nothing_are_told_in_one_line_and_only_where_they_do_nothing(idle, beside, otherwise, monkeypatch):
    monkeypatch.setattr(script, "cpu_is_wanted", lambda wanted: wanted)
    monkeypatch.setattr(script.versions, "misfit", lambda requirement: None)  # each package is there
    plain = {"height": None, "width": None, "max_num_frames": None, "rank": None, "num_inference_steps": None}

    def told(**given):
        args = script.parse_args(words("m", "d", "o", "c", **plain | given))
        return script.notes_on_flags(args)

    [line] = told(**idle | beside)
    assert line.startswith("flags that do nothing here: ")
    for name in idle:
        assert line.count(f"--{name}") == 1
    assert line.count(" (") == len(idle)
    assert told(**idle | otherwise) == []
    assert told(**beside) == []


@pytest.mark.parametrize(("prompts", "told"), [("a mouse:::a bear", True), ("a mouse:::TOY a bear", False), ("TOY", False), (None, False)])
def test_prompts_without_the_trigger_are_told(prompts, told):
    note = "--id_token TOY: no --validation_prompt has it, so the videos show the LoRA without its trigger"
    for token in ("TOY", None):
        args = script.parse_args(words("m", "d", "o", "c", id_token=token, validation_prompt=prompts))
        assert (note in script.notes_on_flags(args)) is (told and token is not None)


def test_a_rate_that_prodigy_cannot_train_at_is_told():
    def told(**flags):
        return script.notes_on_flags(script.parse_args(words("m", "d", "o", "c", num_inference_steps=None, **flags)))

    assert "--learning_rate 0.0001: Prodigy" in told(optimizer="Prodigy", learning_rate=1e-4)[0]
    assert "--learning_rate 100: Prodigy" in told(optimizer="Prodigy", learning_rate=100)[0]
    assert "--scale_lr: Prodigy" in told(optimizer="Prodigy", learning_rate=1, scale_lr=True)[0]
    assert told(optimizer="Prodigy", learning_rate=None) == told(optimizer="Prodigy", learning_rate=0.5) == []
    assert told(optimizer="AdamW", learning_rate=1e-4, scale_lr=True) == []


def test_a_repository_name_that_the_hub_takes_passes():
    for given in ({"hub_model_id": "me/my-lora_2.1"}, {"output_dir": "/tmp/my-lora"}):
        assert script.parse_args(words("m", "d", "o", "c", push_to_hub=True, **given)).push_to_hub
    assert script.parse_args(words("m", "d", "my lora", "c")).output_dir == "my lora"  # not uploaded


def test_a_warm_up_as_long_as_the_run_is_told_before_anything_is_encoded(train, tmp_path, capsys, monkeypatch):
    class Encoding(Exception):
        pass

    def encode(*args):
        raise Encoding

    monkeypatch.setattr(script, "encode_data", encode)
    for steps, warned in ((2, True), (1, False)):
        with pytest.raises(Encoding):
            train(lr_scheduler="constant_with_warmup", lr_warmup_steps=steps)
        assert ("--lr_warmup_steps 2: the run has 2 steps" in capsys.readouterr().err) is warned


def test_all_wrong_flags_are_told_at_once(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", rank=0, learning_rate=-1, fps=-2))
    assert capsys.readouterr().err.count("ERROR[2]") == 3
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", ranks=8, steps=3))
    told = capsys.readouterr().err
    assert "--ranks: no such flag; did you mean --rank?" in told
    assert "--steps: no such flag" in told


def test_a_missing_package_is_told_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: None)
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", report_to="wandb", optimizer="prodigy"))
    told = capsys.readouterr().err
    assert "pip install wandb" in told
    assert "pip install 'prodigyopt>=1.1'" in told


def test_a_wrong_flag_is_told_without_importing_torch():
    code = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = ['x', '--rank', '0']; runpy.run_path('train_cogvideox_lora.py', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment())
    assert run.returncode == 2
    assert "--pretrained_model_name_or_path" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_tilde_expands_in_every_path_and_names_ignore_case(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = {"instance_data_root": "~/a", "cache_dir": "~/b", "output_dir": "~/c", "resume_from_checkpoint": "~/d"}
    args = script.parse_args(words("m", "x", "y", "~/e", **paths))
    assert [getattr(args, name) for name in paths] == [f"/home/somebody/{c}" for c in "abcd"]
    assert args.encoding_cache_dir == "/home/somebody/e"
    assert script.parse_args(words("m", "x", "y", "z", optimizer="ADAMW")).optimizer == "adamw"


def test_defaults_are_the_practice_that_is_known_to_work():
    args = script.parse_args(["--pretrained_model_name_or_path", "m", "--instance_data_root", "d"])
    assert (args.rank, args.lora_alpha, args.optimizer, args.seed, args.gradient_checkpointing) == (128, 128, "adamw", 42, "auto")
    assert (args.report_to, args.mixed_precision, args.enable_tiling, args.enable_slicing) == ("tensorboard", None, True, True)


def test_the_learning_rate_that_is_not_given_fits_what_is_trained():
    def rate(**flags):
        return script.parse_args(words("m", "d", "o", "c", learning_rate=None, **flags)).learning_rate

    assert (rate(), rate(training_type="sft"), rate(optimizer="Prodigy")) == (5e-4, 1e-5, 1.0)
    assert script.parse_args(words("m", "d", "o", "c", learning_rate=0.0)).learning_rate == 0
