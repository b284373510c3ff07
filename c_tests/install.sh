#!/usr/bin/env bash
# Installs kvq into a folder, moves that folder, and uses what lies there as a stranger would: through find_package and
# through pkg-config, with the shared and with the static library, in C and in C++.
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/../patches/lib.sh"

need cmake=cmake ninja=ninja-build g++=g++ pkg-config=pkgconf readelf=binutils
need_rust

work=$root/build/install
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
rm -rf "$work"
mkdir -p "$work"
cd "$work"

cmake -S "$root" -B cmake -G Ninja -DCMAKE_INSTALL_LIBDIR=lib
cmake --build cmake
cmake --install cmake --prefix "$work/first"
mv first prefix
if grep -r "$work" prefix/lib/cmake prefix/lib/pkgconfig; then die "the installed files name the folder they were made in"; fi

# links PROGRAM yes|no: whether the program asks for the shared library.
links() {
    local found=no
    if readelf -d "$1" | grep -q 'NEEDED.*libkvq'; then found=yes; fi
    [ "$found" = "$2" ] || die "$1: linked with the shared library: $found, should be $2"
}

cmake -S "$root/c_tests/install" -B user -G Ninja "-DCMAKE_PREFIX_PATH=$work/prefix" "-DKVQ_VERSION=$version"
cmake --build user
ctest --test-dir user --output-on-failure --no-tests=error
for program in example test_wrapper_handles; do
    links "user/${program}_kvq" yes
    links "user/${program}_static" no
done

export PKG_CONFIG_PATH=$work/prefix/lib/pkgconfig
[ "$(pkg-config --modversion kvq)" = "$version" ] || die "pkg-config: version $(pkg-config --modversion kvq)"
read -r -a shared <<<"$(pkg-config --cflags --libs kvq)"
read -r -a static <<<"$(pkg-config --static --cflags --libs kvq)"
cc "$root/c_tests/example.c" -o shared "${shared[@]}"
cc "$root/c_tests/example.c" -o static -static "${static[@]}"
links shared yes
links static no
LD_LIBRARY_PATH=$work/prefix/lib ./shared
./static
say "kvq $version is found and linked by CMake and by pkg-config"
