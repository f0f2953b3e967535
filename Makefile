# Everything is installed into .venv by the first command that needs it; later
# runs do nothing and need no network. Paths are relative: spaces do no harm.

# The first of these that works and is at least 3.11 makes .venv.
PYTHON := python3.13 python3.12 python3.11 python3
ARGS :=
PEERS :=
VENV := .venv/bin/python
WORKS := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))

help:
	@echo 'make demo             train, emulate decays, compare: 5 minutes on a CPU'
	@echo 'make test [ARGS=...]  the tests; ARGS goes to pytest'
	@echo 'make bench [PEERS=...] speed, as ratios; PEERS has nanodo and nanoGPT'
	@echo 'make lint             ruff: style and format'
	@echo 'make clean            remove .venv and caches, keep runs/'
	@echo 'make ... PYTHON=/path/to/python3   of another Python >= 3.11'

# Shows a command as one types it, then runs it.
define run
	@echo; echo '$$ python -m $(1)'
	@$(VENV) -m $(1)
endef

demo: .venv/installed
	$(call run,launch.train --workdir=runs/quickstart)
	$(call run,launch.train --config=configs/quickstart_cooldown.py --workdir=runs/quickstart-cooldown)
	$(call run,launch.emulate --run=runs/quickstart --against=runs/quickstart-cooldown)
	@echo; echo 'Before commands of your own: source .venv/bin/activate'

test: .venv/installed-test
	@$(VENV) -m pytest -n auto --maxprocesses=4 --dist=loadfile $(ARGS)

# The CPU set, about 20 minutes on 2 cores; add what needs more by hand.
bench: .venv/installed-test
	$(call run,benchmarks.peers --peer_dir='$(PEERS)' --seconds=2)
	$(call run,benchmarks.step_cpu --repetitions=5)
	$(call run,benchmarks.data)
	$(call run,benchmarks.optimizers)
	$(call run,benchmarks.checkpoints)
	$(call run,benchmarks.scaling --layers=2)
	$(call run,benchmarks.schedules)
	$(call run,benchmarks.memory --sizes=124m)
	$(call run,benchmarks.share --size=nano)
	$(call run,benchmarks.merging --layers=2 --parts=warm)
	$(call run,benchmarks.loop --sizes=nano)
	$(call run,benchmarks.sweep --num_steps=20 --turns=2)

lint: .venv/installed-test
	@$(VENV) -m ruff check
	@$(VENV) -m ruff format --check

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

$(VENV):
	@for python in $(PYTHON); do \
	  if "$$python" -c '$(WORKS)' 2>/dev/null; then \
	    echo "Creating .venv with $$("$$python" --version)."; \
	    exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo 'error: no Python >= 3.11 with the venv module found (tried: $(PYTHON)); install one or give its path: make PYTHON=...' >&2; \
	exit 2

# Order-only: the date of .venv/bin/python is that of the system's Python.
.venv/installed: requirements.txt | $(VENV)
	$(call install,requirements.txt)

.venv/installed-test: requirements-test.txt requirements.txt | $(VENV)
	$(call install,requirements-test.txt)

define install
	@echo 'Installing $(1) into .venv, once; this takes about a minute.'
	@$(VENV) -m pip install --quiet --disable-pip-version-check -r $(1)
	@touch $@
endef

.PHONY: help demo test bench lint clean
