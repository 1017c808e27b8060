# make demo    a LoRA on 38 real clips, with a tiny model, on a CPU, from nothing
# make test    all tests (make quick: those under three minutes)
# make chaos   a training under random kills and full disks
# make check   style
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_FLAGS ?=

.PHONY: setup demo-model demo test quick chaos check clean

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt tests/requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt -c constraints.txt
	touch $@

demo-model: demo/model/model_index.json

demo/model/model_index.json: demo/make_model.py $(VENV)/installed
	$(BIN)/python -m demo.make_model demo/model

# The shipped script, with the demo's paths and a size for a CPU.
demo: demo/model/model_index.json
	PATH="$(CURDIR)/$(BIN):$$PATH" MODEL_PATH=demo/model DATASET_PATH=demo/dataset OUTPUT_PATH=demo/output CACHE_PATH=demo/cache \
	bash finetune_single_gpu.sh --height 64 --width 96 --max_num_frames 17 --mixed_precision no --gradient_checkpointing none \
	  --rank 64 --lora_alpha 64 --max_train_steps 300 --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 10 \
	  --train_batch_size 2 --checkpointing_steps 100 --checkpoints_total_limit 2 --logging_steps 5 \
	  --validation_prompt "BUNNYTOON a big white rabbit smiles under a blue sky:::BUNNYTOON a purple bird sings on a branch" \
	  --validation_steps 150 --num_inference_steps 10 --overwrite_output_dir $(DEMO_FLAGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=15

quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

# A real training under sixty random kills and full disks; ends with the weights of an undisturbed one.
chaos: demo/model/model_index.json
	$(BIN)/python -m tools.chaos

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo/model demo/output demo/cache
