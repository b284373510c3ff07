# Shell helpers shared by the scripts of this repository; source it, do not run it.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$script" "$*" >&2; }
die() { say "error: $*"; exit 1; }

script=$(basename "$0")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034  # used by the scripts that source this file
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}

# run_logged LOG WHAT COMMAND...: output into LOG, a line about every 20 s, the end of LOG when the command fails.
run_logged() {
    local log=$1 what=$2 pid start=$SECONDS next=20 rc=0
    shift 2
    say "$what"
    "$@" >"$log" 2>&1 &
    pid=$!
    # The step dies with the script.
    trap 'kill '"$pid"' 2>/dev/null || true' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - start >= next)); then
            say "  $what, $next s: $(tail -n 1 "$log" | cut -c 1-100)"
            next=$((next + 20))
        fi
    done
    wait "$pid" || rc=$?
    trap - EXIT
    if ((rc != 0)); then
        tail -n 25 "$log" >&2
        die "$what: failed with status $rc (whole output: $log)"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# need PROGRAM=PACKAGE...: installs the Debian packages of the programs that are missing, or names them and stops.
need() {
    local pair packages=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
    done
    ((${#packages[@]} == 0)) && return
    command -v apt-get >/dev/null || die "missing programs; install what your system calls: ${packages[*]}"
    as_root true 2>/dev/null || die "missing programs; run: sudo apt-get install ${packages[*]}"
    mkdir -p "$root/build"
    export DEBIAN_FRONTEND=noninteractive
    run_logged "$root/build/apt.log" "installing ${packages[*]}" as_root sh -c \
        "apt-get update -q && apt-get install -q -y --no-install-recommends ${packages[*]}"
}

rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml"; }

rust_is_new_enough() {
    command -v cargo >/dev/null || return 1
    local have
    have=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || return 1
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$(rust_version)" "$have" | sort -V | head -n 1)" = "$(rust_version)" ]
}

# need_rust: a cargo of at least the crate's rust-version, from the system's rustup package where there is none.
need_rust() {
    [ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin
    rust_is_new_enough && return
    if ! command -v rustup >/dev/null && apt-cache show rustup >/dev/null 2>&1 && as_root true 2>/dev/null; then
        need rustup=rustup
    fi
    if command -v rustup >/dev/null; then
        mkdir -p "$root/build"
        run_logged "$root/build/rustup.log" "installing the stable Rust toolchain" \
            rustup toolchain install stable --profile minimal --component rustfmt,clippy
        # The user's default toolchain stays what it is.
        export RUSTUP_TOOLCHAIN=stable
        hash -r
    fi
    rust_is_new_enough ||
        die "needs Rust $(rust_version) or newer (found: $(cargo --version 2>/dev/null || echo none));" \
        "install it from https://rustup.rs or update it with: rustup update stable"
}
