# KEEL trainer. `make` alone lists the targets.

CXX      ?= g++
# No -ffast-math: the order of every sum is the source's. -fno-math-errno only lets square roots be vectorised,
# -fno-trapping-math comparisons, and with them exponential().
MARCH     = native
CXXFLAGS ?= -O3 $(MARCH:%=-march=%)
FLAGS     = -std=c++20 $(CXXFLAGS) -fno-math-errno -fno-trapping-math $(OPENMP) -Wall -Wextra -Wno-psabi \
            -Wno-unknown-pragmas
OPENMP    = -fopenmp
ifeq ($(shell uname -s),Darwin)  # Apple's clang aims at Apple's CPUs by itself; OpenMP is Homebrew's
MARCH     = $(filter native,$(subst x86_64,native,$(shell uname -m)))
LIBOMP   := $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
OPENMP    = -Xpreprocessor -fopenmp -I$(LIBOMP)/include -L$(LIBOMP)/lib -lomp
endif
export OPENMP

# Several ranks, where MPI is there; MPI=0 leaves it out. Programs that the sanitizers, valgrind and the fuzzers look at
# are built without.
export MPI MPICC
MPI_FLAGS     = $$(dev/tools/mpi.sh compile)
MPI_LIBRARIES = $$(dev/tools/mpi.sh link)
NCCL_ON_CPU   = $$(dev/tools/mpi.sh compile on_cpu)
# On GPUs tensors travel by NCCL, and MPI, where it is there, only starts the ranks. NCCL=0 leaves it out.
export NCCL NCCL_HOME
NCCL_FLAGS     = $$(dev/tools/cuda.sh nccl compile) $$(dev/tools/mpi.sh compile nvcc)
NCCL_LIBRARIES = $$(dev/tools/cuda.sh nccl link) $$(dev/tools/mpi.sh link nvcc)

# Attention has kernels of its own for Hopper, by wgmma. NO_WGMMA=1 leaves them out.
WGMMA = $(if $(filter-out 0,$(NO_WGMMA)),-DKEEL_NO_WGMMA)

# The CUDA compiler, and code for the GPU that is here or else for sm_80, sm_90a, sm_100 and, as PTX, for later ones.
# --expt-relaxed-constexpr: kernels call the constexpr functions of keel_common.h, such as Philox.
# -O is the host code's alone: the trainer's does little, and at -O1 g++ takes two thirds of the time.
NVCC     ?= nvcc
NVCCFLAGS ?= --threads 0
CUDA      = $$(dev/tools/cuda.sh nvcc) -std=c++20 $(NVCCFLAGS) --expt-relaxed-constexpr $$(dev/tools/cuda.sh arch) \
            -Xcompiler -Wall,-Wextra $(WGMMA)
CUDA_TRAINER = $(CUDA) -O1 $(NCCL_FLAGS)
# The tests and benchmarks have the CPU trainer in them, whose loops want -O3. -Wno-parentheses is for what nvcc makes
# of it for g++.
CUDA_TEST = $(CUDA) -Xcompiler -fopenmp,-march=$(MARCH),-Wno-psabi,-Wno-unknown-pragmas,-Wno-parentheses -O3 \
            -diag-suppress 1675 -I. -DKEEL_NO_MAIN
CUDA_LIBRARIES = -lcublasLt $$(dev/tools/cuda.sh rpath)
export NVCC

# The GPU trainer built by a plain C++ compiler and run on the CPU: test/cuda_on_cpu has headers of the toolkit's names.
# Names of kernels come from the symbol table, hence -rdynamic. Kernels read memory as vectors and as bits, hence
# -fno-strict-aliasing. g++ may round a*b + c once in one use of it and twice in another, so that a kernel that stores a
# number in two types would store two, hence -ffp-contract=off.
ON_CPU    = $(FLAGS) -ffp-contract=off -fno-strict-aliasing -rdynamic -Itest/cuda_on_cpu -I. $(WGMMA) -x c++
ON_CPU_LIBRARIES = -x none -lboost_context -pthread -ldl
CUDA_ON_CPU = $(wildcard test/cuda_on_cpu/*.h)
SANITIZE  = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

# What every trainer, test and benchmark includes.
HEADERS   = keel_common.h $(wildcard keel/*.h)

# What make card builds, for a machine that has a GPU for minutes and perhaps no compiler: for the GPU that is here or
# else Hopper's, for CPUs of the last ten years, on one rank. Its kernels' code is not compressed: dev/card/card.py
# hashes it.
CARD = build/card
CARD_PROGRAMS = $(addprefix $(CARD)/,train_keel train_keel_fp32 train_keel_cpu train_keel_cpu_fp64 \
                                     test_gpu_bf16 test_gpu_fp32 bench_kernels bench_products)
$(CARD)/%: MARCH = x86-64-v3
$(CARD)/%: NVCCFLAGS = --no-compress
$(CARD)/%: CUDA_LIBRARIES += -Xlinker -rpath,/usr/local/cuda/lib64
$(CARD)/%: export MPI = 0
$(CARD)/%: export NCCL = 0
$(CARD)/%: export ARCH = 90

define HELP
learn
  make train                trains the default model on the trainer's own sources, a minute or two, and samples from it
  make lesson               trains seven placements, 11 minutes on 2 cores: build/lesson.html, why Post-LN dies
                            RESULTS=dev/results/lesson: the page from the committed tables, in seconds
  make page                 the CPU trainer in a browser: build/page.html, placements that race; needs emscripten
  make train_keel_cpu       the trainer for the CPU, FP32
  make train_keel_cpu_fp64  the same in FP64, the yardstick for gradients
check
  make test                 builds and runs all tests; fetches what they need where it can; LONG=1: sanitize, fuzz too
  make test_cpu             the CPU trainer's tests, built fast, seconds after an edit; T='Post-LN*' runs those so named
  make test_hf_latest       what stands on PyTorch and Hugging Face, with the newest of both in an environment of its own
  make compare              CPU against GPU, tensor by tensor, both ways; without a GPU its kernels run on the CPU
  make crash_test           kills the CPU trainer 210 times, cuts its power, fills its disk, flips bits in its files
  make sanitize             the CPU trainer's tests under ASan, UBSan and TSan, and a run under valgrind's memcheck
  make fuzz                 libFuzzer on each parser and the command line, 60 s each; FUZZ_SECONDS=600 for longer
  make bench_cpu            a CPU's training steps beside PyTorch's at its best, by layer, and products beside OpenBLAS's
  make bench_page           the page's steps beside the native trainer's on one core, its first step and its memory
GPU
  make train_keel           the trainer for an NVIDIA GPU: branches in BF16, highway in FP32
  make train_keel_fp32      the same all in FP32, for comparing
  make test_gpu             the tests of the GPU trainer, on the GPU that is here
  make card                 what dev/card.sh runs beside a GPU, into build/card; BASELINE=REF: an older trainer too
  make rehearsal            dev/card.sh without a GPU: its kernels run on the CPU
  make bench_gpu            whole steps beside PyTorch's at its best: tokens/s and MFU; dev/bench/bench_gpu.sh --help
  make idle                 how much of a step the GPU waits, and what each kernel takes; dev/bench/idle.sh FLAGS
  make memory_table         what a model takes of a GPU at each level of -r; MODEL='-L 1024 -C 1024 -t 1024' GIB=135
  make ptxas                registers, shared memory and spills of each kernel for sm_80, sm_90a and sm_100
  make deep_run             1024 sub-layers of 1024 channels, 25 minutes: keel and pre at two learning rates
  make state_types          what --moments bf16 and --grads bf16 cost: loss curves beside FP32 states, three seeds
maintain
  make format               formats all C++ and CUDA; make check_format only looks
  make dumps                writes the reference dumps of test/dumps again, with PyTorch
  make figures              draws the figures of dev/results/lesson again, from the tables beside them
  make clean                removes what was built
options
  CXX=clang++  CXXFLAGS='-O3 -march=native'  MPI=0 (one rank)  NCCL=0 (one GPU)
  NO_WGMMA=1 (Hopper's attention by mma.sync, as elsewhere)  NVCC=/path/nvcc  PYTHON=/usr/bin/python3
endef

.PHONY: help
help:
	$(info $(HELP))
	@:

# The recipe of every program, $(call program,PACKAGES,COMPILER AND FLAGS,LIBRARIES): $@ from $<, its first source.
# It builds again also where this or what is found for it has changed: dev/tools/compile.sh knows, FORCE has make ask.
program = +@dev/tools/compile.sh $@ '$(filter-out FORCE,$?)' '$(1)' '$(subst ','\'',$(2) -o $@ $< $(3))'
# $(call on_cpu,FLAGS,LIBRARIES,PACKAGES), what is needed beside ON_CPU's own
on_cpu = $(call program,g++ libboost-context-dev $(3),$(CXX) $(ON_CPU) $(1),$(ON_CPU_LIBRARIES) $(2))
FORCE:
# Its name says what a program computes in.
FP32 = $(if $(findstring fp32,$@),-DKEEL_FP32)
FP64 = $(if $(findstring fp64,$@),-DKEEL_FP64)

.PHONY: train
train:
	@trainer=$$(dev/tools/cuda.sh trainer) && $(MAKE) --no-print-directory $$trainer && ./$$trainer

train_keel train_keel_fp32 $(CARD)/train_keel $(CARD)/train_keel_fp32: train_keel.cu $(HEADERS) FORCE
	$(call program,nvcc,$(CUDA_TRAINER) $(FP32),$(NCCL_LIBRARIES) $(CUDA_LIBRARIES))

train_keel_cpu train_keel_cpu_fp64 build/train_keel_cpu_other $(CARD)/train_keel_cpu $(CARD)/train_keel_cpu_fp64: \
        train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(FLAGS) $(MPI_FLAGS) $(FP64),$(MPI_LIBRARIES))

# The tests include the trainer's source without its main, once for each number type.
# At -O1, as compiling takes longer than running.
build/test_cpu_fp32 build/test_cpu_fp64: test/test_cpu.cpp test/long.h test/numbers.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O1 -I. -DKEEL_NO_MAIN $(FP64))

# Compiled in a third of the time, for one look after an edit.
build/test_cpu_quick: test/test_cpu.cpp test/numbers.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -Og -I. -DKEEL_NO_MAIN)

# Runs the real binaries: flags, bad input, resume.
build/test_run: test/test_run.cpp test/long.h test/files.h $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O0 -I.)

# Several ranks of the real binaries, by mpirun.
build/test_ranks: test/test_ranks.cpp test/long.h test/files.h $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O0 -I.)

# The GPU trainer on the CPU, whose CUDA calls fail.
build/test_device_faults: test/test_device_faults.cpp test/long.h test/files.h $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O1 -I.)

# Text to tokens and back; and the trainers' encoder as a library, for Python to compare and to time.
build/test_tokenizer: test/test_tokenizer.cpp test/long.h test/files.h $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O1 -I.)

build/tokenizer.so: test/tokenizer_library.cpp $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(FLAGS) -I. -shared -fPIC)

# Faults of numbers, files and folders, on the CPU trainer's code.
build/test_faults: test/test_faults.cpp test/long.h test/files.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O1 -I. -DKEEL_NO_MAIN)

# What -y does in every state of a run's folder, by the real binaries.
build/test_folder: test/test_folder.cpp test/files.h $(HEADERS) FORCE
	$(call program,g++ doctest-dev,$(CXX) $(FLAGS) -O0 -I.)

# Both suites of the CPU trainer under the sanitizers. TSan needs an OpenMP runtime that tells it of its barriers:
# LLVM's, with its archer.
CLANG = clang++-14 -Wno-pass-failed
CLANG_PACKAGES = clang-14 libclang-rt-14-dev libomp-14-dev

build/%_asan: test/%.cpp test/long.h test/files.h test/numbers.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,doctest-dev $(CLANG_PACKAGES),$(CLANG) $(FLAGS) $(SANITIZE) -O2 -I. -DKEEL_NO_MAIN)

build/%_tsan: test/%.cpp test/long.h test/files.h test/numbers.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,doctest-dev $(CLANG_PACKAGES),$(CLANG) $(FLAGS) -O1 -g -fsanitize=thread -I. -DKEEL_NO_MAIN)

# Memcheck does not know AVX-512.
build/train_keel_cpu_valgrind: train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++ valgrind,$(CXX) $(FLAGS) -O1 -g $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v3))

SANITIZED = $(foreach suite,cpu faults tokenizer,build/test_$(suite)_asan build/test_$(suite)_tsan) \
            build/train_keel_cpu_valgrind

# The CPU trainer with vectors of 16 bytes and no fused multiply-adds: with addresses of 32 bits, and its tests under
# UBSan; with 64 bits; and at full optimisation, for the page to be timed beside.
SSE2 = $(FLAGS) -march=x86-64 -ffp-contract=off
M32  = -O1 -m32 -mfpmath=sse -D_FILE_OFFSET_BITS=64 -Werror=overflow -Werror=shift-count-overflow
build/test_cpu_32bit: test/test_cpu.cpp test/numbers.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++ g++-multilib doctest-dev,$(CXX) $(SSE2) $(M32) -fsanitize=undefined -fno-sanitize-recover=all -I. -DKEEL_NO_MAIN)

build/train_keel_cpu_32bit: train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++ g++-multilib,$(CXX) $(SSE2) $(M32))

build/train_keel_cpu_64bit: train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(SSE2) -O1)

build/train_keel_cpu_sse2: train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(SSE2))

PROGRAMS_32BIT = build/test_cpu_32bit build/train_keel_cpu_32bit build/train_keel_cpu_64bit

# The CPU trainer for ARM's 64 bits, which qemu runs, on one thread: Debian has no OpenMP of clang's for another CPU, and
# its g++ for ARM does not go with g++-multilib.
ARM64 = $(CLANG) --target=aarch64-linux-gnu $(filter-out -march=% $(OPENMP),$(FLAGS)) -fopenmp-simd -Idev/page -I.
ARM64_PACKAGES = clang-14 libstdc++-12-dev-arm64-cross binutils-aarch64-linux-gnu qemu-user-static
build/test_cpu_arm64: test/test_cpu.cpp test/numbers.h dev/page/omp.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,doctest-dev $(ARM64_PACKAGES),$(ARM64) -O1 -idirafter /usr/include -DKEEL_NO_MAIN)

build/train_keel_cpu_arm64: train_keel_cpu.cpp dev/page/omp.h $(HEADERS) FORCE
	$(call program,$(ARM64_PACKAGES),$(ARM64))

PROGRAMS_ARM64 = build/test_cpu_arm64 build/train_keel_cpu_arm64

# libFuzzer's targets, under ASan and UBSan.
FUZZERS = $(patsubst test/fuzz/%.cpp,build/fuzz_%,$(wildcard test/fuzz/*.cpp))
FUZZ_FLAGS = -std=c++20 -O2 -g -I. -Wall -Wextra -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
             -fsanitize-coverage-ignorelist=test/fuzz/uncovered.txt
build/fuzz_%: test/fuzz/%.cpp test/fuzz/fuzz.h test/fuzz/uncovered.txt $(HEADERS) FORCE
	$(call program,$(CLANG_PACKAGES),$(CLANG) $(FUZZ_FLAGS))

# Kills the real binary, fills its disk, cuts its power. The shim notes what a program's fsync has made certain.
build/crash_test: test/crash_test.cpp test/crash_run.h test/crash_system.h test/crash_folder.h test/crash_disk.h \
                  test/long.h test/files.h $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(FLAGS) -O0 -I.)

build/crash_shim.so: test/crash_shim.cpp test/crash_disk.h test/files.h FORCE
	$(call program,g++,$(CXX) $(FLAGS) -O1 -shared -fPIC,-ldl)

# The GPU trainer and its tests, on the CPU ...
build/train_keel_on_cpu build/train_keel_fp32_on_cpu: train_keel.cu $(HEADERS) $(CUDA_ON_CPU) FORCE
	$(call on_cpu,$(NCCL_ON_CPU) $(FP32),$(MPI_LIBRARIES))

GPU_TEST = test/test_gpu.cu test/long.h test/numbers.h train_keel.cu train_keel_cpu.cpp $(HEADERS)

build/test_gpu_bf16_on_cpu build/test_gpu_fp32_on_cpu: $(GPU_TEST) $(CUDA_ON_CPU) FORCE
	$(call on_cpu,-DKEEL_NO_MAIN $(FP32),,doctest-dev)

build/test_gpu_bf16_sanitized: $(GPU_TEST) $(CUDA_ON_CPU) FORCE
	$(call on_cpu,$(filter-out -g,$(SANITIZE)) -Wno-maybe-uninitialized -DKEEL_NO_MAIN,,doctest-dev)

build/test_cuda_on_cpu build/test_wgmma: build/%: test/cuda_on_cpu/%.cpp $(CUDA_ON_CPU) FORCE
	$(call on_cpu,-O1,,doctest-dev)

# nccl.h over MPI: mpirun -np 3 build/test_nccl
build/test_nccl: test/cuda_on_cpu/test_nccl.cpp $(CUDA_ON_CPU) FORCE
	$(call on_cpu,-O1 $(MPI_FLAGS),$(MPI_LIBRARIES),libopenmpi-dev openmpi-bin)

BENCH_KERNELS  = dev/bench/bench_kernels.cu dev/bench/bench.h train_keel.cu train_keel_cpu.cpp $(HEADERS)
BENCH_PRODUCTS = dev/bench/bench_products.cu dev/bench/bench.h train_keel.cu $(HEADERS)

build/bench_kernels_on_cpu: $(BENCH_KERNELS) $(CUDA_ON_CPU) FORCE
	$(call on_cpu,-O1 -DKEEL_NO_MAIN)

build/bench_products_on_cpu: $(BENCH_PRODUCTS) $(CUDA_ON_CPU) FORCE
	$(call on_cpu,-O1 -DKEEL_NO_MAIN)

build/memory_table: dev/bench/memory_table.cu train_keel.cu $(HEADERS) $(CUDA_ON_CPU) FORCE
	$(call on_cpu,-O1 -DKEEL_NO_MAIN)

# Another compiler's reading of the same source and headers.
CLANG_ON_CPU = clang++ $(filter-out -fopenmp,$(ON_CPU)) -O1 -Wno-pass-failed
build/train_keel_clang_on_cpu: train_keel.cu $(HEADERS) $(CUDA_ON_CPU) FORCE
	$(call program,clang libboost-context-dev,$(CLANG_ON_CPU),$(ON_CPU_LIBRARIES))

# ... and on a GPU.
build/test_gpu_bf16 build/test_gpu_fp32 $(CARD)/test_gpu_bf16 $(CARD)/test_gpu_fp32: $(GPU_TEST) FORCE
	$(call program,nvcc g++ doctest-dev,$(CUDA_TEST) $(FP32),$(CUDA_LIBRARIES))

build/bench_kernels $(CARD)/bench_kernels: $(BENCH_KERNELS) FORCE
	$(call program,nvcc,$(CUDA_TEST),$(CUDA_LIBRARIES))

build/bench_products $(CARD)/bench_products: $(BENCH_PRODUCTS) FORCE
	$(call program,nvcc,$(CUDA_TEST),$(CUDA_LIBRARIES))

# Loaded into train_keel by the driver, it records when each kernel runs; the other stands in for CUPTI in its test.
CUPTI = $(CXX) -std=c++20 -O2 -Wall -Wextra -fPIC -shared
build/cupti_idle.so $(CARD)/cupti_idle.so: dev/bench/cupti_idle.cpp FORCE
	$(call program,cupti,$(CUPTI) -fvisibility=hidden,$$(dev/tools/cuda.sh cupti))

build/fake_cupti.so: test/fake_cupti.cpp FORCE
	$(call program,cupti,$(CUPTI) -fvisibility=default,$$(dev/tools/cuda.sh cupti))

build/bench_matmul: dev/bench/bench_matmul.cpp train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(FLAGS) -I. -DKEEL_NO_MAIN,-ldl)

# The trainer again with line numbers and every caller on the stack, and what is loaded into it to sample where it is.
build/train_keel_cpu_g: train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,g++,$(CXX) $(FLAGS) -g -fno-optimize-sibling-calls)

build/sample_cpu.so: dev/bench/sample_cpu.cpp FORCE
	$(call program,g++,$(CXX) -std=c++20 -O2 -Wall -Wextra -fPIC -shared)

# Those that take longest to build come first.
TEST_PROGRAMS = build/test_gpu_bf16_on_cpu build/test_gpu_fp32_on_cpu build/train_keel_on_cpu build/train_keel_fp32_on_cpu build/test_cuda_on_cpu build/test_wgmma \
                train_keel_cpu train_keel_cpu_fp64 build/test_cpu_fp32 build/test_cpu_fp64 build/test_faults build/test_folder build/test_run build/test_ranks \
                build/test_device_faults \
                build/test_tokenizer build/tokenizer.so \
                build/crash_test build/crash_shim.so
# What LONG=1 adds: other readings of the same sources, and what only some of its test cases run.
LONG_PROGRAMS = build/test_gpu_bf16_sanitized build/train_keel_clang_on_cpu build/memory_table build/bench_kernels_on_cpu build/bench_products_on_cpu
export LONG

.PHONY: test
test:
	@dev/tools/need.sh g++ doctest-dev libboost-context-dev
	@[ "$(MPI)" = 0 ] || [ "$$(dev/tools/mpi.sh compile)" ] || dev/tools/need.sh libopenmpi-dev openmpi-bin || true
	+@test/build.sh $(if $(LONG),$(LONG_PROGRAMS) \
	        $$(dev/tools/need.sh $(CLANG_PACKAGES) valgrind >&2 && echo $(SANITIZED) $(FUZZERS)) \
	        $$(dev/tools/need.sh g++-multilib >&2 && echo $(PROGRAMS_32BIT)) \
	        $$(dev/tools/need.sh $(ARM64_PACKAGES) >&2 && echo $(PROGRAMS_ARM64))) $(TEST_PROGRAMS) \
	    $$([ -z "$$(dev/tools/mpi.sh compile)" ] || echo build/test_nccl) \
	    $$(! command -v em++ >/dev/null || echo build/page/trainer.js build/train_keel_cpu_64bit)
	@$(MAKE) --no-print-directory rehearsal_pack
	@test/run.sh

# Targets that run one command each, once what they need is built; the scripts build the rest themselves.
FUZZ_SECONDS ?= 60
MODEL        ?= -L 1024 -C 1024 -t 1024
GIB          ?= 135

test_cpu:     build/test_cpu_quick
crash_test:   train_keel_cpu build/crash_test build/crash_shim.so
sanitize:     $(SANITIZED)
fuzz:         $(FUZZERS)
bench_cpu:    train_keel_cpu
bench_page:   page build/train_keel_cpu_sse2
test_hf_latest: train_keel_cpu train_keel_cpu_fp64 build/train_keel_on_cpu build/tokenizer.so
test_gpu:     build/test_gpu_bf16 build/test_gpu_fp32
memory_table: build/memory_table
state_types:  train_keel

run.test_cpu     = build/test_cpu_quick -tc="$${T:-*}"
run.test_hf_latest = test/hf_latest.sh
run.compare      = test/compare.sh
run.crash_test   = LONG=1 build/crash_test
run.sanitize     = test/sanitize.sh
run.fuzz         = test/fuzz/run.sh $(FUZZ_SECONDS)
run.bench_cpu    = dev/bench/bench_cpu.sh
run.bench_page   = $$(dev/tools/find_python.sh json) dev/page/bench.py
run.test_gpu     = build/test_gpu_bf16 && build/test_gpu_fp32
run.bench_gpu    = dev/bench/bench_gpu.sh
run.idle         = dev/bench/idle.sh
run.memory_table = build/memory_table $(GIB) $(MODEL)
run.ptxas        = dev/tools/ptxas.sh
run.deep_run     = dev/experiments/deep_run.sh
run.state_types  = dev/experiments/state_types.py
run.format       = dev/tools/format.sh
run.check_format = dev/tools/format.sh --check
run.dumps        = $$(dev/tools/find_python.sh torch numpy) dev/reference/make_dumps.py

RUN = $(patsubst run.%,%,$(filter run.%,$(.VARIABLES)))
.PHONY: $(RUN)
$(RUN):
	@$(run.$@)

.PHONY: card card_programs
card_programs: $(CARD_PROGRAMS)
card: card_programs
	@dev/tools/cuda.sh cupti >/dev/null && $(MAKE) --no-print-directory $(CARD)/cupti_idle.so || \
	    echo "idle time will not be measured"
	@dev/card.sh --pack --baseline '$(BASELINE)'

# The programs under the card's names; and what is measured by CUPTI, where that is here.
REHEARSED = train_keel_cpu train_keel_cpu_fp64 build/train_keel_on_cpu build/train_keel_fp32_on_cpu build/test_gpu_bf16_on_cpu \
            build/test_gpu_fp32_on_cpu build/bench_kernels_on_cpu build/bench_products_on_cpu
.PHONY: rehearsal rehearsal_programs rehearsal_pack
rehearsal_programs: $(REHEARSED)
	@$(MAKE) --no-print-directory rehearsal_pack
rehearsal_pack:  # of those that are there
	@dev/tools/cuda.sh cupti >/dev/null && $(MAKE) --no-print-directory build/cupti_idle.so build/fake_cupti.so || true
	@dev/card.sh --pack --rehearse
rehearsal: rehearsal_programs
	@dev/card.sh --rehearse --seconds 900

# The CPU trainer as WebAssembly, in the registers of 16 bytes and without the threads that a page has, and the page.
PAGE = em++ -std=c++20 -O3 -msimd128 -fwasm-exceptions -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra \
       -Wno-unknown-pragmas -Idev/page -DKEEL_NO_MAIN -sMODULARIZE=1 -sEXPORT_NAME=createTrainer -sENVIRONMENT=worker \
       -sALLOW_MEMORY_GROWTH=1 -sFORCE_FILESYSTEM=1 -sEXPORTED_RUNTIME_METHODS=ccall,FS,HEAPF64
build/page/trainer.js: export NODE_PATH = /usr/share/nodejs
build/page/trainer.js: dev/page/page.cpp dev/page/omp.h train_keel_cpu.cpp $(HEADERS) FORCE
	$(call program,emscripten,$(PAGE))

.PHONY: page
page: build/page/trainer.js
	@$$(dev/tools/find_python.sh json) dev/page/build.py --trainer build/page/trainer --out build/page.html

# The lesson: what is finished in build/experiments is not run again. RESULTS=dev/results/lesson builds the page from
# the committed tables, in seconds.
LESSON_PYTHON = dev/tools/find_python.sh $(if $(RESULTS),,torch) numpy matplotlib plotly
LESSON_PACKAGES = $(if $(RESULTS),,python3-torch) python3-numpy python3-matplotlib python3-plotly
.PHONY: lesson
lesson: $(if $(RESULTS),,train_keel_cpu)
	@$(LESSON_PYTHON) >/dev/null 2>&1 || dev/tools/need.sh $(LESSON_PACKAGES)
ifeq ($(RESULTS),)
	-@dev/tools/need.sh libopenblas0-pthread
	@$$($(LESSON_PYTHON)) dev/experiments/run.py all
	@$$($(LESSON_PYTHON)) dev/experiments/lesson.py --results build/experiments/small --out build/lesson.html
else
	@$$($(LESSON_PYTHON)) dev/experiments/lesson.py --results $(RESULTS) --out build/lesson.html
endif

.PHONY: figures
figures:
	@dev/tools/find_python.sh numpy matplotlib >/dev/null 2>&1 || dev/tools/need.sh python3-matplotlib
	$$(dev/tools/find_python.sh numpy matplotlib) dev/experiments/run.py all --draw --results dev/results/lesson

.PHONY: clean
clean:
	rm -rf build train_keel train_keel_fp32 train_keel_cpu train_keel_cpu_fp64
