"""Flags: all of them described, read and alive; every mistake told at once, in a second, in words."""

import ast
import re
import subprocess
import sys

import pytest

import train_cogvideox_lora as script
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
# These are seen elsewhere: flag -> the test that would fail if nothing read it.
SEEN_BY = {
    "training_type": "test_full_fine_tuning_moves_every_weight_and_ships_a_folder_that_diffusers_loads",
    "ema_decay": "test_an_average_is_what_is_shipped_and_training_does_not_feel_it",
    "pretrained_model_name_or_path": "test_rotary_and_temporal_patch_models_train_and_validate",
    "revision": "test_hub_flags_reach_the_hub_client",
    "variant": "test_a_variant_loads_the_files_of_that_name",
    "cache_dir": "test_a_model_in_the_hubs_cache_is_found_without_a_network",
    "instance_data_root": "test_a_bad_folder_ends_before_any_model_loads_with_every_fault_named",
    "dataset_name": "test_dataset_flags_reach_the_datasets_package",
    "dataset_config_name": "test_dataset_flags_reach_the_datasets_package",
    "caption_column": "test_a_table_names_its_columns",
    "video_column": "test_a_table_names_its_columns",
    "allow_external_paths": "test_a_relative_path_out_of_the_folder_is_refused_unless_allowed",
    "bad_videos": "test_bad_clips_can_be_skipped_up_to_a_share",
    "max_bad_share": "test_bad_clips_can_be_skipped_up_to_a_share",
    "bucket": "test_clips_go_to_the_nearest_bucket_and_every_step_holds_one_shape",
    "enable_slicing": "test_slicing_and_tiling_reach_the_vae",
    "enable_tiling": "test_slicing_and_tiling_reach_the_vae",
    "dataloader_num_workers": "test_the_number_of_loader_workers_changes_nothing",
    "encoding_cache_dir": "test_a_full_cache_needs_neither_t5_nor_the_vae",
    "clip_timeout_seconds": "test_the_time_limit_reaches_the_readers",
    "gradient_checkpointing": "test_gradient_checkpointing_recomputes_as_many_blocks_as_asked_and_changes_no_gradient",
    "offload": "test_offloaded_weights_stay_when_the_model_moves",
    "compile": "test_compiled_blocks_train_the_same_to_rounding_and_are_compiled_once",
    "allow_tf32": "test_tf32_is_as_asked",
    "process_timeout_minutes": "test_the_process_timeout_reaches_the_process_group",
    "validation_prompt": "test_validation_flags_change_the_videos",
    "validation_prompt_separator": "test_validation_flags_change_the_videos",
    "num_validation_videos": "test_validation_flags_change_the_videos",
    "validation_epochs": "test_validation_comes_when_it_is_due",
    "validation_steps": "test_validation_comes_when_it_is_due",
    "validation_height": "test_validation_flags_change_the_videos",
    "validation_width": "test_validation_flags_change_the_videos",
    "validation_frames": "test_validation_flags_change_the_videos",
    "guidance_scale": "test_validation_flags_change_the_videos",
    "use_dynamic_cfg": "test_validation_flags_change_the_videos",
    "num_inference_steps": "test_validation_flags_change_the_videos",
    "negative_prompt": "test_validation_flags_change_the_videos",
    "eval_clips": "test_metrics_hold_one_line_a_step_and_the_scores",
    "eval_steps": "test_a_score_has_both_sets_with_the_lora_on_and_off",
    "eval_share": "test_held_out_clips_are_never_trained_on",
    "eval_data_root": "test_a_second_folder_is_held_out_whole",
    "output_dir": "test_a_run_writes_exactly_these_files",
    "overwrite_output_dir": "test_an_earlier_run_is_not_written_over_unasked",
    "checkpointing_steps": "test_a_run_writes_exactly_these_files",
    "checkpoints_total_limit": "test_old_checkpoints_go_only_after_a_new_one_is_safe",
    "max_skipped_steps": "test_too_many_in_a_row_end_the_run_and_keep_the_last_good_checkpoint",
    "init_lora": "test_a_run_can_start_from_the_lora_of_another",
    "dry_run": "test_a_dry_run_tells_time_memory_and_disk_and_trains_nothing",
    "resume_from_checkpoint": "test_a_resumed_run_ends_with_the_same_bits_as_an_unbroken_one",
    "logging_dir": "test_tensorboard_gets_the_numbers_and_the_videos_but_no_token",
    "logging_steps": "test_logging_steps_average_what_lies_between",
    "report_to": "test_tensorboard_gets_the_numbers_and_the_videos_but_no_token",
    "tracker_name": "test_tensorboard_gets_the_numbers_and_the_videos_but_no_token",
    "push_to_hub": "test_a_push_uploads_the_result_and_nothing_else",
    "hub_token": "test_a_push_uploads_the_result_and_nothing_else",
    "hub_model_id": "test_a_push_uploads_the_result_and_nothing_else",
}


def flags():
    return {a.dest: a for a in script.build_parser()._actions if a.dest != "help"}


def test_every_flag_of_the_trainers_before_is_here():
    assert set(UPSTREAM) <= set(flags())


def test_every_flag_has_a_help_and_is_read_by_the_code():
    source = "\n".join(p.read_text() for p in [ROOT / "train_cogvideox_lora.py", ROOT / "dataset.py", *(ROOT / "cogvideox").glob("*.py")])
    for name, action in flags().items():
        assert action.help, name
        assert len(action.help) <= 140, name
        assert re.search(rf"\bargs\.{name}\b", source), f"nothing reads --{name}"


def test_every_flag_has_a_test_that_changing_it_changes_something():
    assert {name for name, _, _ in CHANGES_THE_LORA} | set(SEEN_BY) == set(flags())
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        defined |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert set(SEEN_BY.values()) <= defined


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value", "others"), CHANGES_THE_LORA, ids=[f"{f}={v}" for f, v, _ in CHANGES_THE_LORA])
def test_changing_a_flag_changes_the_lora(train, flag, value, others):
    before, after = train(**others), train(**(others | {flag: value}))
    assert not same(lora_of(before), lora_of(after))


WRONG = [
    ({"rank": 0}, "--rank 0: at least 1"),
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
    ({"optimizer": "sgd"}, "--optimizer: invalid choice: 'sgd'"),
    ({"lr_scheduler": "cosinus"}, "--lr_scheduler: invalid choice"),
    ({"gradient_checkpointing": "some"}, "--gradient_checkpointing some"),
    ({"use_8bit_adam": True, "optimizer": "Prodigy"}, "not with Prodigy"),
    ({"logging_dir": "../logs"}, "--logging_dir ../logs"),
    ({"logging_dir": "/var/log"}, "--logging_dir /var/log"),
    ({"logging_dir": ".."}, "--logging_dir .."),
    ({"logging_dir": ""}, "--logging_dir"),
    ({"caption_dropout": 2}, "--caption_dropout 2"),
    ({"instance_data_root": None}, "--instance_data_root"),
    ({"no_such_flag": 1}, "--no_such_flag"),
]


@pytest.mark.parametrize(("mistake", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_a_wrong_flag_ends_with_exit_code_2_and_names_itself(mistake, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words("m", "d", "o", "c", **mistake))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_all_wrong_flags_are_told_at_once(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", rank=0, learning_rate=-1, fps=-2))
    assert capsys.readouterr().err.count("ERROR[2]") == 3


def test_a_missing_package_is_told_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        script.parse_args(words("m", "d", "o", "c", report_to="wandb", optimizer="prodigy"))
    told = capsys.readouterr().err
    assert "pip install wandb" in told
    assert "pip install prodigyopt" in told


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
