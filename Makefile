# Two commands: `make demo` and `make test`. Each makes a virtual environment if there is none.
PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[cpu,openvino,report,train,dev]'
	touch $(INSTALLED)

.PHONY: demo test check results clean

demo: $(INSTALLED)
	$(VENV)/bin/python examples/demo.py -o demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q

# The tables and plots of docs/results: make results DATA=DIRECTORY of mnist_train.npz and mnist_test.npz. Hours; it can be stopped.
results: $(INSTALLED)
	$(VENV)/bin/python benchmarks/results.py $(DATA) -o docs/results

# Style, the wheel's layout, and types on the unzipped wheel (a run from the root would check nothing).
check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python tests/check_wheel.py

clean:
	rm -rf demo build dist
