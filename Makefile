# The two targets of a developer. `make check` needs seconds, `make test` runs everything.
PYTHON ?= .venv/bin/python

.PHONY: check test quickstart
check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest tests/policy

test:
	bash tests/run.sh

quickstart:
	bash launch/quickstart.sh
