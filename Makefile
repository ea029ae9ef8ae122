# KEEL trainer. `make` alone lists the targets.

CXX      ?= g++
# No -ffast-math: the order of every sum is the source's. -fno-math-errno only lets square roots be vectorised.
CXXFLAGS ?= -O3 -march=native
FLAGS     = -std=c++20 $(CXXFLAGS) -fno-math-errno -fopenmp -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas

# CBLAS=1 takes the matrix products from OpenBLAS instead: the ceiling that our own is measured against.
ifeq ($(CBLAS),1)
FLAGS    += -DKEEL_CBLAS
LIBRARIES = -lopenblas
endif

.PHONY: help
help:
	@echo "make train                trains the default model on the trainer's own sources, a minute or two, and samples from it"
	@echo "make test                 builds and runs all tests; fetches what they need where it can"
	@echo "make train_keel_cpu       the trainer for the CPU, FP32"
	@echo "make train_keel_cpu_fp64  the same in FP64, the yardstick for gradients"
	@echo "make bench_cpu            training speed and matrix products beside PyTorch and OpenBLAS"
	@echo "make dumps                writes the reference dumps of test/dumps again, with PyTorch"
	@echo "make clean                removes what was built"
	@echo "options: CXX=clang++  CXXFLAGS='-O3 -march=native'  CBLAS=1 (matrix products by OpenBLAS)  PYTHON=/usr/bin/python3"

.PHONY: train
train: train_keel_cpu
	./train_keel_cpu

train_keel_cpu: train_keel_cpu.cpp keel_common.h
	@dev/need.sh g++
	$(CXX) $(FLAGS) -o $@ $< $(LIBRARIES)

train_keel_cpu_fp64: train_keel_cpu.cpp keel_common.h
	@dev/need.sh g++
	$(CXX) $(FLAGS) -DKEEL_FP64 -o $@ $< $(LIBRARIES)

# The tests include the trainer's source without its main, once for each number type.
build/test_cpu_fp32: test/test_cpu.cpp train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN -o $@ $<

build/test_cpu_fp64: test/test_cpu.cpp train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN -DKEEL_FP64 -o $@ $<

# Runs the real binaries: flags, bad input, resume.
build/test_run: test/test_run.cpp keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -O1 -I. -o $@ $<

build/bench_matmul: dev/bench_matmul.cpp train_keel_cpu.cpp keel_common.h | build
	$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN -o $@ $< -ldl

build:
	mkdir -p build

TEST_PROGRAMS = train_keel_cpu train_keel_cpu_fp64 build/test_cpu_fp32 build/test_cpu_fp64 build/test_run

.PHONY: test
test:
	@dev/need.sh g++ doctest-dev
	@$(MAKE) --no-print-directory -j2 $(TEST_PROGRAMS)
	@test/run.sh

.PHONY: bench_cpu
bench_cpu: train_keel_cpu
	-@dev/need.sh libopenblas-dev
	@dev/bench_cpu.sh

.PHONY: dumps
dumps:
	$$(dev/find_python.sh torch numpy) dev/reference/make_dumps.py

.PHONY: clean
clean:
	rm -rf build train_keel_cpu train_keel_cpu_fp64
