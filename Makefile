# make demo   the whole story on the toy world, from an empty folder to a table and plots
# make test   the test suite          make lint   style
PYTHON ?= python3
SEED ?= 0

.PHONY: demo test lint requirements clean

.venv/done: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	touch .venv/done

# The main job. Each line is a command to copy; `make demo` again starts over.
PY = .venv/bin/python
demo: .venv/done
	$(PY) toy.py --seed $(SEED)
	$(PY) sft.py --init none --tokenizer data/toy --data data/toy/base.jsonl --out out/base --steps 4200 \
	  --batch-size 16 --length 48 --lr 2e-3 --warmup 50 --eval-every 2100 --seed $(SEED) --overwrite
	$(PY) sft.py --seed $(SEED) --overwrite
	$(PY) reward.py --seed $(SEED) --overwrite
	$(PY) ppo.py --seed $(SEED) --overwrite
	$(PY) evaluate.py --models out/sft out/ppo --seed $(SEED)

test: .venv/done
	.venv/bin/python -m pytest

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

requirements:  ## pin every package again, with hashes and without naming a host (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  pyproject.toml --extra plot --group dev -o requirements.txt

clean:
	rm -rf .venv data/toy out
