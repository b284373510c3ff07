#!/usr/bin/env bash
# Builds llama.cpp with the kvq patches: everything a user needs, from a fresh clone.
#
#   patches/build.sh             patched llama.cpp into build/llama/bin
#   patches/build.sh --cuda      for NVIDIA GPUs as well: needs nvcc of CUDA 12.8 or later, but no GPU
#   patches/build.sh --tests     and the programs that patches/integration.sh and patches/programs.py run
#   patches/build.sh --stock     and llama-perplexity of the same tree without patches, into build/stock/llama/bin
#   patches/build.sh --tree      only the patched source tree, build/llama.cpp; with --stock the one without patches instead
#   patches/build.sh --objects   only what the patches and the glue touch, compiled: seconds to minutes, no programs
#   patches/build.sh --newer     with any of these: the llama.cpp of patches/NEWER instead, everything in build/newer
#
#   LLAMA_CPP_DIR=/your/checkout   use that llama.cpp instead of the pinned one; it is copied, never modified
#   KVQ_CUDA_ARCHS="80 90"         compute capabilities of --cuda (default: those of the GPUs here; without a GPU, all)
#   NVCC=FILE, CUDA_PATH=DIR       nvcc, or the folder of its bin/ (default: the one in PATH, or /usr/local/cuda)
#   JOBS=N                         parallel compile jobs (default: all cores)
#   KVQ_BUILD=DIR                  instead of build/
#
# Writes into build/ and target/ of this repository; missing system packages are installed where apt-get and root
# allow it. Status 3: the Python package index cannot be reached.
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/lib.sh"

build=${KVQ_BUILD:-$root/build}
pin_file=$root/patches/UPSTREAM
targets=(llama-perplexity llama-bench llama-completion llama-server llama-cli llama-quantize llama-kvq-calibrate)
want_stock=no want_tests=no want_cuda=no tree_only=no objects_only=no newer=
for arg in "$@"; do
    case $arg in
        --tests) want_tests=yes ;;
        --stock) want_stock=yes ;;
        --cuda) want_cuda=yes ;;
        --tree) tree_only=yes ;;
        --objects) objects_only=yes ;;
        --newer) newer=/newer pin_file=$root/patches/NEWER ;;
        *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
    esac
done

# upstream KEY: the word after KEY in the file that names the pin; `package==version` is the source distribution.
upstream() { tr -s ' \n' '\n' <"$pin_file" | grep -A 1 -x -F -- "$1" | tail -n 1; }

# The tree inside the pinned source distribution: seconds, tools and tests included, no history.
fetch_pinned() {
    local pin package archive inside steps pip=(python3 -m pip)
    pin=$(grep -o -E '[a-z-]+==[0-9.]+' "$pin_file")
    package=${pin%%==*}
    archive=$sdist/${package//-/_}-${pin##*==}.tar.gz
    if [ ! -f "$archive" ]; then
        if ! python3 -m pip --version >/dev/null 2>&1; then
            python3 -m venv "$build/venv" >/dev/null 2>&1 || die "needs pip; install python3-pip and python3-venv"
            pip=("$build/venv/bin/python" -m pip)
        fi
        (run_logged "$build/download.log" "downloading $pin" "${pip[@]}" download --no-deps \
            --no-binary "$package" "$pin" --dest "$sdist") || { say "no package index: $pin cannot be fetched"; exit 3; }
    fi
    echo "$(upstream sha256)  $archive" | sha256sum --check --status ||
        die "$archive is not the pinned one; delete it and retry"
    inside=$(sed -n 's/.*(PyPI sdist, \([^)]*\)).*/\1/p' "$pin_file")
    steps=${inside//[^\/]/}
    mkdir -p "$1"
    tar -xzf "$archive" -C "$1" --strip-components=$((2 + ${#steps})) "$(basename "$archive" .tar.gz)/$inside"
}

ggml_version() {
    sed -n 's/^set(GGML_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\))/\2/p' "$1/ggml/CMakeLists.txt" | paste -sd .
}

commit() {
    if [ -z "${LLAMA_CPP_DIR:-}" ]; then
        upstream llama.cpp
    else
        git -C "$LLAMA_CPP_DIR" rev-parse HEAD 2>/dev/null || echo unknown
    fi
}

copy_checkout() {
    local pinned
    pinned="commit $(upstream llama.cpp), ggml $(upstream ggml)"
    if [ "$(ggml_version "$LLAMA_CPP_DIR")" != "$(upstream ggml)" ] || [[ $(commit) != "$(upstream llama.cpp)"* ]]; then
        say "WARNING: LLAMA_CPP_DIR is commit $(commit), ggml $(ggml_version "$LLAMA_CPP_DIR")"
        say "WARNING: the patches are made for $pinned; they may not apply, or not do what they should"
    fi
    mkdir -p "$1"
    tar -C "$LLAMA_CPP_DIR" --exclude=.git --exclude='./build*' --exclude='./models/*.bin' -cf - . | tar -C "$1" -xf -
}

# prepare DIR [PATCH...]: a tree with these patches, renewed when source or patches change. Unpatched files keep their
# old times, so that a renewed tree recompiles only what depends on a patch.
prepare() {
    local dir=$1 stamp patch
    shift
    stamp=$({ cat "$pin_file" "$@"; checkout_id; } | sha256sum)
    [ "$(cat "$dir/.kvq-stamp" 2>/dev/null)" = "$stamp" ] && return
    rm -rf "$dir"
    if [ -n "${LLAMA_CPP_DIR:-}" ]; then copy_checkout "$dir"; else fetch_pinned "$dir"; fi
    for patch in "$@"; do
        if patch -d "$dir" -p1 --dry-run --batch --reverse --force <"$patch" >/dev/null 2>&1; then
            say "$(basename "$patch") is already in this tree"
        elif ! any_file_of "$patch" "$dir"; then
            say "$(basename "$patch") is left out: this tree has none of the files that it changes"
        elif ! patch -d "$dir" -p1 --batch --forward --no-backup-if-mismatch <"$patch" >"$build/patch.log" 2>&1; then
            "$root/patches/check.sh" "$dir" >&2 || true
            die "$(basename "$patch") does not apply; it is made for $(upstream llama.cpp), ggml $(upstream ggml)"
        fi
    done
    echo "$stamp" >"$dir/.kvq-stamp"
}

# Whether there is anything for a patch to change: a tree without programs has no tools/, one for a crate no common/.
any_file_of() {
    local file
    for file in $(sed -n 's,^--- a/,,p' "$1"); do
        [ -e "$2/$file" ] && return
    done
    return 1
}

# Which state of the user's checkout a prepared tree was made from.
checkout_id() {
    [ -n "${LLAMA_CPP_DIR:-}" ] || return 0
    commit
    find "$LLAMA_CPP_DIR" -name .git -prune -o -path "$LLAMA_CPP_DIR/build*" -prune -o \
        -type f -printf '%p %s %T@\n' | sort
}

# The instruction sets of this machine, but never AMX: ggml's AMX path crashes with Q8_0 weights when gcc 12 builds it.
isa_flags() {
    if [ "$(uname -m)" != x86_64 ] || [ ! -r /proc/cpuinfo ]; then
        echo -DGGML_NATIVE=ON
        return
    fi
    local pair has
    has=" $(grep -m 1 '^flags' /proc/cpuinfo) "
    echo -DGGML_NATIVE=OFF -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF
    for pair in SSE42=sse4_2 AVX=avx AVX2=avx2 FMA=fma F16C=f16c BMI2=bmi2 AVX_VNNI=avx_vnni AVX512=avx512bw \
        AVX512_VBMI=avx512vbmi AVX512_VNNI=avx512_vnni AVX512_BF16=avx512_bf16; do
        if [[ $has == *" ${pair#*=} "* ]]; then echo "-DGGML_${pair%%=*}=ON"; else echo "-DGGML_${pair%%=*}=OFF"; fi
    done
}

# The sources that the patches change and those of the glue, as ninja names what is made of them.
touched_objects() {
    sed -n "s,^+++ b/\(.*\.cpp\)\$,$1/\1^,p" "$root"/patches/[0-9]*.patch
    printf '%s^\n' "$root"/patches/glue/*.cpp
}

# compile SOURCE BINARY LOG TARGETS [CMAKE FLAGS...]. ccache sees both trees at the same relative place, so they share
# objects.
compile() {
    local source=$1 binary=$2 log=$3 flags
    read -r -a targets_of_tree <<<"$4"
    shift 4
    export CCACHE_DIR=${CCACHE_DIR:-${build%"$newer"}/ccache} CCACHE_NOHASHDIR=1 CCACHE_BASEDIR
    CCACHE_BASEDIR=$(dirname "$source")
    # The trees carry no history: without this, llama.cpp's build would take this repository's commit for its own.
    export GIT_CEILING_DIRECTORIES=$CCACHE_BASEDIR
    # Flags as words: every one of them is free of blanks.
    read -r -a flags <<<"$(isa_flags | paste -sd ' ')"
    flags+=(-DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache
        -DGGML_CCACHE=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
        -DLLAMA_BUILD_NUMBER=0 "-DLLAMA_BUILD_COMMIT=$(commit)" "$@")
    run_logged "$log" "configuring $binary" cmake -S "$source" -B "$binary" -G Ninja "${flags[@]}"
    run_logged "$log" "compiling ${targets_of_tree[*]//*\//} (about 5 minutes on 2 cores the first time)" \
        cmake --build "$binary" --parallel "$jobs" --target "${targets_of_tree[@]}"
}

# Sets cargo_flags and cuda_flags for a build with or without CUDA.
cargo_flags=() cuda_flags=(-DGGML_CUDA=OFF)
find_cuda() {
    local nvcc dir archs
    nvcc=${NVCC:-}
    for dir in ${CUDA_PATH:+"$CUDA_PATH/bin"} "$(dirname "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")"; do
        if [ -z "$nvcc" ] && [ -x "$dir/nvcc" ]; then nvcc=$dir/nvcc; fi
    done
    [ -x "$nvcc" ] || die "--cuda needs nvcc: install the CUDA toolkit, or set NVCC or CUDA_PATH"
    if [ -z "${KVQ_CUDA_ARCHS:-}" ]; then
        KVQ_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -un | paste -sd ' ') ||
            KVQ_CUDA_ARCHS=
    fi
    archs=${KVQ_CUDA_ARCHS// /-real;}
    cargo_flags=(--features cuda)
    cuda_flags=(-DGGML_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache
        ${archs:+"-DCMAKE_CUDA_ARCHITECTURES=$archs-real"})
    export NVCC=$nvcc
    if [ -n "$KVQ_CUDA_ARCHS" ]; then export KVQ_CUDA_ARCHS; else unset KVQ_CUDA_ARCHS; fi
    say "nvcc: $nvcc; compute capabilities: ${KVQ_CUDA_ARCHS:-all}"
}

mkdir -p "$build$newer"
sdist=$(cd "$build" && pwd)/sdist
build=$(cd "$build$newer" && pwd)
[ -z "$newer" ] || [ -z "${LLAMA_CPP_DIR:-}" ] || die "--newer names a llama.cpp and LLAMA_CPP_DIR another: choose one"
if [ -n "${LLAMA_CPP_DIR:-}" ]; then
    [ -f "$LLAMA_CPP_DIR/ggml/CMakeLists.txt" ] || die "LLAMA_CPP_DIR=$LLAMA_CPP_DIR is no llama.cpp checkout"
    LLAMA_CPP_DIR=$(cd "$LLAMA_CPP_DIR" && pwd)
    [[ $LLAMA_CPP_DIR/ != "$build"/* ]] || die "LLAMA_CPP_DIR is in $build, which this script renews"
fi
if [ "$tree_only" = yes ]; then
    need patch=patch python3=python3 tar=tar gzip=gzip
    if [ "$want_stock" = yes ]; then
        prepare "$build/stock/llama.cpp"
        say "ready: $build/stock/llama.cpp"
        exit
    fi
    prepare "$build/llama.cpp" "$root"/patches/[0-9]*.patch
    say "ready: $build/llama.cpp"
    exit
fi
need cmake=cmake ninja=ninja-build ccache=ccache g++=g++ patch=patch python3=python3 tar=tar gzip=gzip
if [ -z "${LLAMA_CPP_DIR:-}" ] && ! python3 -m pip --version >/dev/null 2>&1; then need pip3=python3-pip; fi
need_rust
if [ "$want_tests" = yes ]; then
    mapfile -t -O "${#targets[@]}" targets < <("$root/patches/programs.py" --targets)
fi
if [ "$want_cuda" = yes ]; then find_cuda; fi

prepare "$build/llama.cpp" "$root"/patches/[0-9]*.patch
[ -d "$build/llama.cpp/tools" ] && [ -d "$build/llama.cpp/common" ] ||
    die "this llama.cpp has no programs (no tools/ or no common/): $build/llama.cpp has its library, patched, to be built as patches/README.md says"
run_logged "$build/cargo.log" "building libkvq" cargo build --release --manifest-path "$root/Cargo.toml" "${cargo_flags[@]}"
if [ "$objects_only" = yes ]; then
    compile "$build/llama.cpp" "$build/llama" "$build/llama.log" "$(touched_objects "$build/llama.cpp" | paste -sd ' ')" \
        -DGGML_KVQ=ON "-DKVQ_DIR=$root" "-DKVQ_LIB=${CARGO_TARGET_DIR:-$root/target}/release/libkvq.a" -DGGML_CUDA=OFF
    say "compiled: what patches and glue touch"
    exit
fi
compile "$build/llama.cpp" "$build/llama" "$build/llama.log" "${targets[*]}" -DGGML_KVQ=ON "-DKVQ_DIR=$root" \
    "-DKVQ_LIB=${CARGO_TARGET_DIR:-$root/target}/release/libkvq.a" "${cuda_flags[@]}"
if [ "$want_tests" = yes ]; then
    for test in test_llama test_shift test_state; do
        run_logged "$build/tests.log" "compiling patches/tests/$test.cpp" g++ -std=c++17 -O2 -Wall -Wextra \
            -I "$build/llama.cpp/include" -I "$build/llama.cpp/ggml/include" -I "$root/include" \
            "$root/patches/tests/$test.cpp" -o "$build/llama/bin/$test" -L "$build/llama/bin" -lllama -lggml \
            -lggml-base "-Wl,-rpath,\$ORIGIN"
    done
    run_logged "$build/tests.log" "compiling patches/tests/fake_cuda.cpp" g++ -std=c++17 -O2 -Wall -Wextra -shared -fPIC \
        -I "$build/llama.cpp/ggml/include" -I "$build/llama.cpp/ggml/src" -I "$root/include" \
        "$root/patches/tests/fake_cuda.cpp" -o "$build/llama/bin/fake_cuda.so" -L "$build/llama/bin" -lggml -lggml-cpu \
        -lggml-base "-Wl,-rpath,\$ORIGIN"
fi
if [ "$want_stock" = yes ]; then
    prepare "$build/stock/llama.cpp"
    compile "$build/stock/llama.cpp" "$build/stock/llama" "$build/stock.log" llama-perplexity
fi
say "ready: $build/llama/bin"
