# The two commands that matter: `make quickstart` and `make test`. Each does all of its own set-up.
DEVICE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
VENV := .venv/bin

.PHONY: quickstart test test-slow faults soak lint setup lock peers bench bench-run clean

setup:
	@bash requirements/install.sh $(DEVICE)

quickstart: setup
	@$(VENV)/danlu run examples/quickstart.yaml

# Two processes, each with a Ray of its own; a file's tests stay together, for they share what they set up.
test: setup lint
	@$(VENV)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=3 -m "not slow"

test-slow: setup
	@$(VENV)/python -m pytest -q -m slow

# Every fault of docs/faults.md, really done to real processes: kills, full disks, cut cables, outages. About half an hour.
FAULTS := tests/faults tests/operators/test_supervise.py tests/operators/test_corpus.py tests/operators/sources/test_pdf.py \
    tests/operators/tokens/test_pack.py tests/operators/synthesis/test_cache.py tests/operators/synthesis/test_engine.py \
    tests/cluster/test_remote.py tests/pipelines/test_runner.py tests/train/test_pretrain.py tests/train/test_reference.py \
    tests/train/test_session.py
faults: setup
	@$(VENV)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(FAULTS)

# Random faults for twenty minutes; the seed is printed, SOAK="--minutes 5 --seed 7" sets both.
soak: setup
	@$(VENV)/python -u -m tests.faults.soak $(SOAK)

lint: setup
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

# Environments of the tools that benchmarks compare with, under .peers/ (never part of the project).
peers: setup
	@bash requirements/peers.sh

# The table of measured results, each ratio beside its goal.
bench: setup
	@$(VENV)/python -m benchmarks.table

# All benchmarks in full, an hour or so on two cores; each writes benchmarks/results/NAME.json.
BENCHMARKS ?= $(shell grep -lE 'measure import.*arguments|^    arguments,' benchmarks/*/*.py | sed 's|/|.|g; s|\.py$$||')
bench-run: setup peers
	@for name in $(BENCHMARKS); do echo "== $$name"; $(VENV)/python -m $$name || exit 1; done

# Writes the hashed requirement lists again after pyproject.toml changed.
lock:
	@bash requirements/lock.sh

clean:
	rm -rf .venv build dist *.egg-info
