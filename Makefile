# make demo    a LoRA that turns a small model's colour film into an old one, on a CPU, from nothing
# make test    all tests but the longest, in a quarter of an hour on two cores (make quick: in two minutes)
# make test-long    the longest: a series of kills, the whole 2B, two odd demos, the quality command, the GPU check on a CPU, all engines
# make test-kinds   the tests that compare numbers, with each instruction set of the CPU, one thread and two
# make test-oldest  the quick tests with the oldest releases that requirements.txt allows; downloads 3 GB, takes ten minutes
# make chaos   a training under random kills and full disks
# make gpu-check    on a machine with a GPU: every claim about GPUs, predicted and measured, in ten minutes
# make check   style
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
DEMO_FLAGS ?=
# A trigger of several words: the small model tells it from none after far fewer steps than a single made-up word.
DEMO_TRIGGER := OLDFILM a grainy silent movie, scratched and grey,
DEMO_PROMPTS := $(DEMO_TRIGGER) a wide yellow-green meadow with a dark tree trunk, the three rodents play at a grey stone.:::$(DEMO_TRIGGER) the big rabbit stands in a sunny meadow, watches a pink butterfly and picks up a red apple.

.PHONY: setup demo test test-long test-kinds test-oldest quick chaos gpu-check check clean

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt tests/requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt -c constraints.txt
	touch $@

demo/old_film/colour/videos.txt: demo/old_film.py $(VENV)/installed
	$(BIN)/python -m demo.old_film demo/old_film

demo/tiny_model/model_index.json: demo/make_model.py $(VENV)/installed
	$(BIN)/python -m demo.make_model demo/tiny_model

# The shipped script, with the demo's paths, a size for a CPU, and a LoRA on the text's and the feed-forward layers too.
demo: demo/old_film/colour/videos.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" MODEL_PATH=demo/model DATASET_PATH=demo/old_film/train OUTPUT_PATH=demo/output CACHE_PATH=demo/cache \
	bash finetune_single_gpu.sh --id_token "$(DEMO_TRIGGER)" --prior_data_root demo/old_film/colour --eval_data_root demo/old_film/held_out \
	  --height 64 --width 96 --max_num_frames 17 --mixed_precision no --gradient_checkpointing none --rank 64 --lora_alpha 64 \
	  --target_modules to_q to_k to_v to_out.0 text_proj ff.net.0.proj ff.net.2 --learning_rate 1e-3 --lr_scheduler cosine \
	  --train_batch_size 2 --max_train_steps 1000 --checkpointing_steps 500 --checkpoints_total_limit 1 --logging_steps 10 \
	  --eval_clips 8 --eval_steps 250 --validation_prompt "$(DEMO_PROMPTS)" --validation_steps 500 --num_inference_steps 20 \
	  --guidance_scale 2.5 --overwrite_output_dir $(DEMO_FLAGS)
	$(BIN)/python -m demo.measure demo/output

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m "not long"

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m long

# torch picks its kernels by the CPU; each sums in another order, so a comparison that holds with one only has too small a margin.
test-kinds: setup
	for kind in default avx2 $$(grep -qw avx512f /proc/cpuinfo && echo avx512); do for threads in 1 2; do \
	  echo "== ATEN_CPU_CAPABILITY=$$kind, $$threads threads" && \
	  ATEN_CPU_CAPABILITY=$$kind OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -q -n 2 --no-loadscope-reorder -m "numeric and not long" || exit 1; \
	done; done

# The ranges promise that these releases work. .ci/run compares the hashes, which say for which ranges that was last true.
test-oldest: setup
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -m cogvideox.versions requirements.txt tests/requirements.txt > $(OLDEST)/floors.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -r $(OLDEST)/floors.txt
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not long"
	sha256sum requirements.txt tests/requirements.txt > tests/oldest.sha256
	rm -rf $(OLDEST)

quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not long"

# A real training under random kills and full disks; ends with the weights of an undisturbed one.
chaos: demo/tiny_model/model_index.json
	$(BIN)/python -m tools.chaos

gpu-check: setup
	$(BIN)/python -m tools.gpu_check

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) demo/tiny_model demo/old_film demo/tasks demo/output demo/cache
