# KEEL trainer. `make` alone lists the targets.

CXX      ?= g++
# No -ffast-math: the order of every sum is the source's. -fno-math-errno only lets square roots be vectorised, -fno-trapping-math comparisons, and with them exponential().
CXXFLAGS ?= -O3 -march=native
FLAGS     = -std=c++20 $(CXXFLAGS) -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas

# CBLAS=1 takes the matrix products from OpenBLAS instead: the ceiling that our own is measured against.
ifeq ($(CBLAS),1)
FLAGS    += -DKEEL_CBLAS
LIBRARIES = -lopenblas
endif

# Several ranks, where MPI is there; MPI=0 leaves it out. Programs that the sanitizers, valgrind and the fuzzers look at are built without.
export MPI MPICC
MPI_FLAGS     = $$(dev/mpi.sh compile)
MPI_LIBRARIES = $$(dev/mpi.sh link)
NCCL_ON_CPU   = $$(dev/mpi.sh compile on_cpu)
# On GPUs tensors travel by NCCL, and MPI, where it is there, only starts the ranks. NCCL=0 leaves it out.
export NCCL NCCL_HOME
NCCL_FLAGS     = $$(dev/cuda.sh nccl compile) $$(dev/mpi.sh compile nvcc)
NCCL_LIBRARIES = $$(dev/cuda.sh nccl link) $$(dev/mpi.sh link nvcc)

# The CUDA compiler, and code for the GPU that is here or else for sm_80, sm_90, sm_100 and, as PTX, for later ones.
# --expt-relaxed-constexpr: kernels call the constexpr functions of keel_common.h, such as Philox.
NVCC     ?= nvcc
NVCCFLAGS ?= -O3
CUDA_FLAGS = -std=c++20 $(NVCCFLAGS) --expt-relaxed-constexpr $$(dev/cuda.sh arch) -Xcompiler -Wall,-Wextra
# The tests and benchmarks have the CPU trainer in them; -Wno-parentheses is for what nvcc makes of it for g++.
CUDA_TEST = $(CUDA_FLAGS),-fopenmp,-march=native,-Wno-psabi,-Wno-unknown-pragmas,-Wno-parentheses -diag-suppress 1675 -I. -DKEEL_NO_MAIN
export NVCC

# The GPU trainer built by a plain C++ compiler and run on the CPU: test/cuda_on_cpu has headers of the toolkit's names.
# Names of kernels come from the symbol table, hence -rdynamic. Kernels read memory as vectors and as bits, hence -fno-strict-aliasing.
ON_CPU    = $(FLAGS) -fno-strict-aliasing -rdynamic -Itest/cuda_on_cpu -I. -x c++
ON_CPU_LIBRARIES = -x none -lboost_context -pthread -ldl
CUDA_ON_CPU = $(wildcard test/cuda_on_cpu/*.h)
SANITIZE  = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: help
help:
	@echo "make train                trains the default model on the trainer's own sources, a minute or two, and samples from it"
	@echo "make test                 builds and runs all tests; fetches what they need where it can. LONG=1 adds make sanitize and make fuzz"
	@echo "make train_keel           the trainer for an NVIDIA GPU: branches in BF16, highway in FP32"
	@echo "make train_keel_fp32      the same all in FP32, for comparing"
	@echo "make train_keel_cpu       the trainer for the CPU, FP32"
	@echo "make train_keel_cpu_fp64  the same in FP64, the yardstick for gradients"
	@echo "make lesson               trains seven placements here, some 11 minutes on 2 cores, and writes build/lesson.html: why Post-LN dies, measured"
	@echo "make figures              draws the figures of dev/results/lesson again, from the tables beside them"
	@echo "make compare              CPU against GPU, tensor by tensor, both ways; without a GPU its kernels run on the CPU"
	@echo "make test_gpu             the tests of the GPU trainer, on the GPU that is here"
	@echo "make crash_test           kills the CPU trainer 210 times, cuts its power, fills its disk, flips bits in its files: each run must end as if nothing had been"
	@echo "make sanitize             the CPU trainer's tests under ASan, UBSan and TSan, and a short run under valgrind's memcheck"
	@echo "make fuzz                 libFuzzer on each parser and the command line, 60 s each, two at a time; FUZZ_SECONDS=600 for longer"
	@echo "make gpu_check            all of it on a machine with a GPU, under 8 minutes, ending with a table"
	@echo "make bench_kernels        each kernel's bandwidth or rate on the GPU that is here, beside a copy, a matrix product and PyTorch's attention"
	@echo "make bench_products       ways of doing a sub-layer's matrix products, side by side, and what each would win of a step: --tune, GELU epilogues, FP8, small C"
	@echo "make idle                 how much of a step the GPU waits, and what each kernel takes, at 1024 sub-layers; dev/idle.sh FLAGS for another model"
	@echo "make bench_gpu            whole steps on the GPU that is here: tokens/s and MFU beside PyTorch's at its best; dev/bench_gpu.sh --help"
	@echo "make memory_table         what a model takes of a GPU at each level of -r and type of states; MODEL='-L 1024 -C 1024 -t 1024' GIB=135"
	@echo "make deep_run             1024 sub-layers of 1024 channels on the GPU that is here: keel and pre at two learning rates, then keel for the rest of 25 minutes"
	@echo "make state_types          what --moments bf16 and --grads bf16 cost: loss curves beside FP32 states, three seeds, L = 64, on the GPU that is here"
	@echo "make ptxas                registers, shared memory and spills of each kernel for sm_80, sm_90 and sm_100"
	@echo "make bench_cpu            training speed and matrix products beside PyTorch and OpenBLAS"
	@echo "make dumps                writes the reference dumps of test/dumps again, with PyTorch"
	@echo "make clean                removes what was built"
	@echo "options: CXX=clang++  CXXFLAGS='-O3 -march=native'  CBLAS=1 (matrix products by OpenBLAS)  MPI=0 (one rank)  NCCL=0 (one GPU)  NVCC=/path/nvcc  PYTHON=/usr/bin/python3"

.PHONY: train
train:
	@trainer=$$(dev/cuda.sh trainer) && $(MAKE) --no-print-directory $$trainer && ./$$trainer

train_keel: train_keel.cu keel_common.h
	@dev/cuda.sh nvcc >/dev/null
	$$(dev/cuda.sh nvcc) $(CUDA_FLAGS) $(NCCL_FLAGS) -o $@ $< -lcublasLt $(NCCL_LIBRARIES) $$(dev/cuda.sh rpath)

train_keel_fp32: train_keel.cu keel_common.h
	@dev/cuda.sh nvcc >/dev/null
	$$(dev/cuda.sh nvcc) $(CUDA_FLAGS) $(NCCL_FLAGS) -DKEEL_FP32 -o $@ $< -lcublasLt $(NCCL_LIBRARIES) $$(dev/cuda.sh rpath)

train_keel_cpu: train_keel_cpu.cpp keel_common.h
	@dev/need.sh g++
	$(CXX) $(FLAGS) $(MPI_FLAGS) -o $@ $< $(LIBRARIES) $(MPI_LIBRARIES)

train_keel_cpu_fp64: train_keel_cpu.cpp keel_common.h
	@dev/need.sh g++
	$(CXX) $(FLAGS) $(MPI_FLAGS) -DKEEL_FP64 -o $@ $< $(LIBRARIES) $(MPI_LIBRARIES)

# The tests include the trainer's source without its main, once for each number type.
build/test_cpu_fp32: test/test_cpu.cpp test/numbers.h train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN -o $@ $<

build/test_cpu_fp64: test/test_cpu.cpp test/numbers.h train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN -DKEEL_FP64 -o $@ $<

# Runs the real binaries: flags, bad input, resume.
build/test_run: test/test_run.cpp test/files.h keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -O1 -I. -o $@ $<

# Several ranks of the real binaries, by mpirun.
build/test_ranks: test/test_ranks.cpp test/files.h keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -O1 -I. -o $@ $<

# Faults of numbers, files and folders, on the CPU trainer's code.
build/test_faults: test/test_faults.cpp test/files.h train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh g++ doctest-dev
	$(CXX) $(FLAGS) -O2 -I. -DKEEL_NO_MAIN -o $@ $<

# Both suites of the CPU trainer under the sanitizers. TSan needs an OpenMP runtime that tells it of its barriers: LLVM's, with its archer.
CLANG = clang++-14
CLANG_PACKAGES = clang-14 libclang-rt-14-dev libomp-14-dev

build/%_asan: test/%.cpp test/files.h test/numbers.h train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh doctest-dev $(CLANG_PACKAGES)
	$(CLANG) $(FLAGS) $(SANITIZE) -O2 -Wno-pass-failed -I. -DKEEL_NO_MAIN -o $@ $<

build/%_tsan: test/%.cpp test/files.h test/numbers.h train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh doctest-dev $(CLANG_PACKAGES)
	$(CLANG) $(FLAGS) -O1 -g -fsanitize=thread -Wno-pass-failed -I. -DKEEL_NO_MAIN -o $@ $<

# Memcheck does not know AVX-512.
build/train_keel_cpu_valgrind: train_keel_cpu.cpp keel_common.h | build
	@dev/need.sh g++ valgrind
	$(CXX) $(FLAGS) -O1 -g $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v3) -o $@ $<

SANITIZED = build/test_cpu_asan build/test_faults_asan build/test_cpu_tsan build/test_faults_tsan build/train_keel_cpu_valgrind

# libFuzzer's targets, under ASan and UBSan.
FUZZERS = $(patsubst test/fuzz/%.cpp,build/fuzz_%,$(wildcard test/fuzz/*.cpp))
build/fuzz_%: test/fuzz/%.cpp test/fuzz/fuzz.h test/fuzz/uncovered.txt keel_common.h | build
	@dev/need.sh $(CLANG_PACKAGES)
	$(CLANG) -std=c++20 -O2 -g -I. -Wall -Wextra -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fsanitize-coverage-ignorelist=test/fuzz/uncovered.txt -o $@ $<

# Kills the real binary, fills its disk, cuts its power. The shim notes what a program's fsync has made certain.
build/crash_test: test/crash_test.cpp test/files.h test/crash_disk.h keel_common.h | build
	@dev/need.sh g++
	$(CXX) $(FLAGS) -O1 -I. -o $@ $<

build/crash_shim.so: test/crash_shim.cpp test/crash_disk.h test/files.h | build
	$(CXX) $(FLAGS) -O1 -shared -fPIC -o $@ $< -ldl

# The GPU trainer and its tests, on the CPU ...
build/train_keel_on_cpu: train_keel.cu keel_common.h $(CUDA_ON_CPU) | build
	@dev/need.sh g++ libboost-context-dev
	$(CXX) $(ON_CPU) $(NCCL_ON_CPU) -o $@ $< $(ON_CPU_LIBRARIES) $(MPI_LIBRARIES)

build/train_keel_fp32_on_cpu: train_keel.cu keel_common.h $(CUDA_ON_CPU) | build
	@dev/need.sh g++ libboost-context-dev
	$(CXX) $(ON_CPU) $(NCCL_ON_CPU) -DKEEL_FP32 -o $@ $< $(ON_CPU_LIBRARIES) $(MPI_LIBRARIES)

GPU_TEST = test/test_gpu.cu test/numbers.h train_keel.cu train_keel_cpu.cpp keel_common.h

build/test_gpu_bf16_on_cpu: $(GPU_TEST) $(CUDA_ON_CPU) | build
	@dev/need.sh g++ doctest-dev libboost-context-dev
	$(CXX) $(ON_CPU) -DKEEL_NO_MAIN -o $@ $< $(ON_CPU_LIBRARIES)

build/test_gpu_fp32_on_cpu: $(GPU_TEST) $(CUDA_ON_CPU) | build
	@dev/need.sh g++ doctest-dev libboost-context-dev
	$(CXX) $(ON_CPU) -DKEEL_NO_MAIN -DKEEL_FP32 -o $@ $< $(ON_CPU_LIBRARIES)

build/test_gpu_bf16_sanitized: $(GPU_TEST) $(CUDA_ON_CPU) | build
	$(CXX) $(ON_CPU) $(filter-out -g,$(SANITIZE)) -Wno-maybe-uninitialized -DKEEL_NO_MAIN -o $@ $< $(ON_CPU_LIBRARIES)

build/test_cuda_on_cpu: test/cuda_on_cpu/test_cuda_on_cpu.cpp $(CUDA_ON_CPU) | build
	@dev/need.sh g++ doctest-dev libboost-context-dev
	$(CXX) $(ON_CPU) -o $@ $< $(ON_CPU_LIBRARIES)

# nccl.h over MPI: mpirun -np 3 build/test_nccl
build/test_nccl: test/cuda_on_cpu/test_nccl.cpp $(CUDA_ON_CPU) | build
	@dev/need.sh g++ libboost-context-dev libopenmpi-dev openmpi-bin
	$(CXX) $(ON_CPU) -O1 $(MPI_FLAGS) -o $@ $< $(ON_CPU_LIBRARIES) $(MPI_LIBRARIES)

build/bench_kernels_on_cpu: dev/bench_kernels.cu dev/bench.h train_keel.cu train_keel_cpu.cpp keel_common.h $(CUDA_ON_CPU) | build
	@dev/need.sh g++ libboost-context-dev
	$(CXX) $(ON_CPU) -O1 -DKEEL_NO_MAIN -o $@ $< $(ON_CPU_LIBRARIES)

build/bench_products_on_cpu: dev/bench_products.cu dev/bench.h train_keel.cu keel_common.h $(CUDA_ON_CPU) | build
	@dev/need.sh g++ libboost-context-dev
	$(CXX) $(ON_CPU) -O1 -DKEEL_NO_MAIN -o $@ $< $(ON_CPU_LIBRARIES)

build/memory_table: dev/memory_table.cu train_keel.cu keel_common.h $(CUDA_ON_CPU) | build
	@dev/need.sh g++ libboost-context-dev
	$(CXX) $(ON_CPU) -O1 -DKEEL_NO_MAIN -o $@ $< $(ON_CPU_LIBRARIES)

# Another compiler's reading of the same source and headers.
build/train_keel_clang_on_cpu: train_keel.cu keel_common.h $(CUDA_ON_CPU) | build
	@dev/need.sh clang libboost-context-dev
	clang++ $(filter-out -fopenmp,$(ON_CPU)) -O1 -Wno-pass-failed -o $@ $< $(ON_CPU_LIBRARIES)

# ... and on a GPU.
build/test_gpu_bf16: $(GPU_TEST) | build
	@dev/cuda.sh nvcc >/dev/null
	@dev/need.sh g++ doctest-dev
	$$(dev/cuda.sh nvcc) $(CUDA_TEST) -o $@ $< -lcublasLt $$(dev/cuda.sh rpath)

build/test_gpu_fp32: $(GPU_TEST) | build
	@dev/cuda.sh nvcc >/dev/null
	@dev/need.sh g++ doctest-dev
	$$(dev/cuda.sh nvcc) $(CUDA_TEST) -DKEEL_FP32 -o $@ $< -lcublasLt $$(dev/cuda.sh rpath)

build/bench_kernels: dev/bench_kernels.cu dev/bench.h train_keel.cu train_keel_cpu.cpp keel_common.h | build
	@dev/cuda.sh nvcc >/dev/null
	$$(dev/cuda.sh nvcc) $(CUDA_TEST) -o $@ $< -lcublasLt $$(dev/cuda.sh rpath)

build/bench_products: dev/bench_products.cu dev/bench.h train_keel.cu keel_common.h | build
	@dev/cuda.sh nvcc >/dev/null
	$$(dev/cuda.sh nvcc) $(CUDA_TEST) -o $@ $< -lcublasLt $$(dev/cuda.sh rpath)

# Loaded into train_keel by the driver, it records when each kernel runs; the other stands in for CUPTI in its test.
CUPTI_LIBRARY = $(CXX) -std=c++20 -O2 -Wall -Wextra -fPIC -shared -fvisibility=$(1) -o $@ $< $$(dev/cuda.sh cupti)
build/cupti_idle.so: dev/cupti_idle.cpp | build
	@dev/cuda.sh cupti >/dev/null
	$(call CUPTI_LIBRARY,hidden)

build/fake_cupti.so: test/fake_cupti.cpp | build
	@dev/cuda.sh cupti >/dev/null
	$(call CUPTI_LIBRARY,default)

build/bench_matmul: dev/bench_matmul.cpp train_keel_cpu.cpp keel_common.h | build
	$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN -o $@ $< -ldl

build:
	mkdir -p build

TEST_PROGRAMS = train_keel_cpu train_keel_cpu_fp64 build/test_cpu_fp32 build/test_cpu_fp64 build/test_run build/test_ranks build/test_faults build/crash_test build/crash_shim.so build/train_keel_on_cpu \
                build/train_keel_fp32_on_cpu build/test_gpu_bf16_on_cpu build/test_gpu_fp32_on_cpu build/test_gpu_bf16_sanitized build/test_cuda_on_cpu \
                build/bench_kernels_on_cpu build/bench_products_on_cpu build/memory_table build/train_keel_clang_on_cpu

.PHONY: test
test:
	@dev/need.sh g++ doctest-dev libboost-context-dev
	@[ "$(MPI)" = 0 ] || [ "$$(dev/mpi.sh compile)" ] || dev/need.sh libopenmpi-dev openmpi-bin || true
	@$(MAKE) --no-print-directory -j2 $(TEST_PROGRAMS) $$([ -z "$$(dev/mpi.sh compile)" ] || echo build/test_nccl)
	@if [ "$(LONG)" ] && dev/need.sh $(CLANG_PACKAGES) valgrind; then $(MAKE) --no-print-directory -j2 $(SANITIZED) $(FUZZERS); fi
	@test/run.sh

.PHONY: test_gpu
test_gpu: build/test_gpu_bf16 build/test_gpu_fp32
	build/test_gpu_bf16
	build/test_gpu_fp32

.PHONY: crash_test
crash_test: train_keel_cpu build/crash_test build/crash_shim.so
	build/crash_test

.PHONY: sanitize
sanitize: $(SANITIZED)
	test/sanitize.sh

FUZZ_SECONDS ?= 60
.PHONY: fuzz
fuzz: $(FUZZERS)
	test/fuzz/run.sh $(FUZZ_SECONDS)

.PHONY: compare
compare:
	@dev/compare.sh

.PHONY: gpu_check
gpu_check:
	@dev/gpu_check.sh

MODEL ?= -L 1024 -C 1024 -t 1024
GIB   ?= 135
.PHONY: memory_table
memory_table: build/memory_table
	@build/memory_table $(GIB) $(MODEL)

.PHONY: deep_run
deep_run:
	@dev/deep_run.sh

.PHONY: state_types
state_types: train_keel
	@dev/state_types.py

.PHONY: bench_kernels
bench_kernels:
	@dev/bench_kernels.sh

.PHONY: bench_products
bench_products:
	@dev/bench_products.sh

.PHONY: idle
idle:
	@dev/idle.sh

.PHONY: bench_gpu
bench_gpu:
	@dev/bench_gpu.sh

.PHONY: ptxas
ptxas:
	@dev/ptxas.sh

.PHONY: bench_cpu
bench_cpu: train_keel_cpu
	-@dev/need.sh libopenblas-dev
	@dev/bench_cpu.sh

# The lesson: what is finished in build/experiments is not run again. RESULTS=dev/results/lesson builds the page from the committed tables, in seconds.
LESSON_PYTHON = dev/find_python.sh torch numpy matplotlib plotly
LESSON_PACKAGES = python3-torch python3-numpy python3-matplotlib python3-plotly
.PHONY: lesson
lesson: $(if $(RESULTS),,train_keel_cpu)
	@$(LESSON_PYTHON) >/dev/null 2>&1 || dev/need.sh $(LESSON_PACKAGES)
ifeq ($(RESULTS),)
	-@dev/need.sh libopenblas0-pthread
	@$$($(LESSON_PYTHON)) dev/experiments/run.py all
	@$$($(LESSON_PYTHON)) dev/experiments/lesson.py --results build/experiments/small --out build/lesson.html
else
	@$$($(LESSON_PYTHON)) dev/experiments/lesson.py --results $(RESULTS) --out build/lesson.html
endif

.PHONY: figures
figures:
	@dev/find_python.sh numpy matplotlib >/dev/null 2>&1 || dev/need.sh python3-matplotlib
	$$(dev/find_python.sh numpy matplotlib) dev/experiments/run.py all --draw --results dev/results/lesson

.PHONY: dumps
dumps:
	$$(dev/find_python.sh torch numpy) dev/reference/make_dumps.py

.PHONY: clean
clean:
	rm -rf build train_keel train_keel_fp32 train_keel_cpu train_keel_cpu_fp64
