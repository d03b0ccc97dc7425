# Every target sets up what it needs, so any of them may come first; the second time the set-up is a matter of milliseconds.
# The logic is in scripts/, because make splits paths at spaces.

SHELL := bash
VENV ?= .venv
WORKERS ?= 2
CASES ?= all
export PYTHON GPU VENV WORKERS

python = "$(VENV)/bin/python"

.PHONY: help setup quickstart test test-slow test-all test-reduced lint types format docs docs-check figures notebooks clean

help:
	@echo "make quickstart   train a small FastVim on handwritten digits, then classify held-out images (about 3 minutes)"
	@echo "make test         run the test suite (about 10 minutes on 2 free cores, 40 on old or busy ones)"
	@echo "make test-slow    run the tests that take long each (about 2 minutes on 2 free cores)"
	@echo "make test-all     run both with every case; of the tests marked drawn, the two above run a part, another one each time"
	@echo "make lint types   ruff and mypy;  make format  lets ruff rewrite"
	@echo "make docs         serve the documentation and the API reference at http://127.0.0.1:8000;  make docs-check  builds it strictly"
	@echo "make figures      draw the figures of docs/ and write the model table;  make notebooks  runs notebooks/ and keeps the outputs"
	@echo "make setup        only make $(VENV) and install;  make clean  removes it"
	@echo
	@echo "Options: PYTHON=/path/to/python3.12  (default: the newest of 3.13, 3.12, 3.11 that works)"
	@echo "         GPU=cuda12 or GPU=cuda13    (default: JAX for the CPU; remembered by $(VENV))"
	@echo "         VENV=folder  WORKERS=n      (default: .venv, 2 test processes)"

setup:
	@scripts/setup.sh base

quickstart:
	@scripts/setup.sh base
	@scripts/quickstart.sh

test:
	@scripts/setup.sh test
	@scripts/test.sh test -m "not slow"

test-slow:
	@scripts/setup.sh test,docs,notebooks
	@scripts/test.sh slow -m slow

# Every case, also those of which the other targets draw a part. With CASES=drawn it draws them, too: both kinds of tests in
# the same processes, which import and collect once.
test-all:
	@scripts/setup.sh test,docs,notebooks
	@FASTVIM_TEST_CASES=$(CASES) scripts/test.sh all

# What has to hold on the second set of dependencies, Python 3.11 with JAX 0.10: import, kernels' XLA path, a golden model of every fourth class,
# a training of two tasks, checkpoints, several devices, export, a short quickstart. Cases that no version of JAX or Flax changes are not
# run twice: random shapes, reduced dtypes, and the float64 oracles themselves, which are NumPy. The seed chooses the second task.
SEED := $(or $(FASTVIM_TEST_SEED),$(shell echo $$RANDOM))
TASKS := masked/test_masked_training.py::test_the_loss_falls_and_the_run_is_drawn \
	segmentation/test_train.py::test_a_run_ends_with_scores_a_picture_and_a_table \
	detection/test_train.py::test_a_run_ends_with_scores_a_picture_and_a_table
REDUCED := tests/test_package.py tests/parity/test_fixtures.py $(addprefix tests/pallas_kernels/, \
	test_selective_scan.py::test_reverse_is_forward_of_the_flipped test_selective_scan.py::test_reference_and_choice \
	test_bidirectional_scan.py::test_bidirectional_scan_equals_two_scans[auto] test_compositions.py test_sharded.py) \
	$(addprefix tests/training/, $(word $(shell echo $$(($(SEED) % 3 + 1))),$(TASKS)) $(addprefix classification/test_train.py::, \
	test_the_run_folder_holds_everything test_a_resumed_run_equals_an_uninterrupted_one test_a_loaded_run_scores_what_the_log_says) \
	$(addprefix test_checkpoints.py::, test_a_restored_state_has_the_same_bits test_weights_alone test_nothing_is_pickled \
	test_a_save_goes_on_in_the_background_with_the_bits_it_was_given test_a_save_that_fails_leaves_the_last_good_one \
	test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered test_an_unfinished_checkpoint_is_never_taken) \
	$(addprefix test_steps.py::, test_one_step_of_plain_descent test_keys_differ_by_seed_and_step_and_not_by_history \
	test_counts_by_class_are_those_of_a_loop)) tests/distributed/test_many_devices.py tests/distributed/test_mesh.py \
	$(addprefix tests/inference/test_export.py::, \
	test_a_portable_program_takes_any_batch_and_runs_alone[mean] test_programs_of_other_versions_run_as_the_documentation_says)

test-reduced:
	@scripts/setup.sh test
	@FASTVIM_TEST_SEED=$(SEED) FASTVIM_TEST_ANNOTATIONS=off FASTVIM_PARITY_DTYPES=float64 FASTVIM_PARITY_FIXTURES=representatives scripts/test.sh reduced -m "not slow" $(REDUCED)
	@EPOCHS=4 AT_LEAST=0.85 scripts/quickstart.sh

lint:
	@scripts/setup.sh dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types:
	@scripts/setup.sh dev
	$(python) -m mypy

format:
	@scripts/setup.sh dev
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

docs:
	@scripts/setup.sh docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs serve --strict

docs-check:
	@scripts/setup.sh docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

figures:
	@scripts/setup.sh base
	$(python) -m fastvim_jax plot all --out docs/figures
	$(python) -m fastvim_jax plot throughput --card h200 --out docs/figures/throughput_h200.png
	$(python) docs/model_table.py

notebooks:
	@scripts/setup.sh notebooks
	$(python) scripts/notebooks.py

clean:
	rm -rf "$(VENV)" "$(VENV).lock" build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
