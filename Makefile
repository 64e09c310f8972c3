# Every target sets up what it needs: a virtual environment in .venv, made with plain venv and pip.
PYTHON ?= python3
PY := .venv/bin/python
WORKERS ?= 2

.PHONY: demo test check docs bench versions clean

demo: .venv/ready
	$(PY) examples/demo.py

test: .venv/ready
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

check: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mkdocs build --strict --quiet
	$(PY) -m pytest -q --doctest-modules projgd

docs: .venv/ready
	$(PY) -m mkdocs serve

bench: .venv/ready
	$(PY) -m benchmarks $(ARGS)

versions:
	$(PYTHON) tests/versions.py

.venv/ready: pyproject.toml constraints.txt tests/models.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -r tests/models.txt
	touch $@

clean:
	rm -rf .venv .versions build dist site out *.egg-info
