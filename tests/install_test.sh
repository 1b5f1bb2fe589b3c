#!/usr/bin/env bash
# An installation serves CMake and pkg-config users from wherever it lies; the bundle runs from a directory it was moved to, in an
# empty environment, with nothing but glibc from outside. Usage: install_test.sh SOURCE_ROOT BUILD_DIR
set -euo pipefail
source=$1 build=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HOME=$work/home # the cache of the programs run here
mkdir "$HOME"
unset "${!KILN_@}"

expected=$'1 -2 3 -256\n-128 127 5 -512'
# gives PROGRAM…: its output is that of the example
gives() {
  local output
  output=$(${TEST_EMULATOR-} "$@")
  [[ $output == "$expected" ]] || { echo "$* printed: $output" >&2; exit 1; }
}

echo "== installed, then moved"
cmake --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/prefix"
${TEST_EMULATOR-} "$work/prefix/bin/kiln" --version

echo "== find_package"
mkdir "$work/user"
cat >"$work/user/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.25)
project(user C)
find_package(kiln 0.1 REQUIRED)
add_executable(user main.c)
target_link_libraries(user PRIVATE kiln::kiln)
CMAKE
cp "$source/api/examples/minimal.c" "$work/user/main.c"
find=(-DCMAKE_PREFIX_PATH="$work/prefix")
[[ -z ${TEST_EMULATOR-} ]] || find=(-Dkiln_DIR="$work/prefix/lib/cmake/kiln") # the toolchain file searches the sysroot only
cmake -G Ninja -S "$work/user" -B "$work/user/build" "${find[@]}" >/dev/null
cmake --build "$work/user/build" >/dev/null
gives "$work/user/build/user"

echo "== pkg-config"
export PKG_CONFIG_PATH=$work/prefix/lib/pkgconfig
[[ $(pkg-config --modversion kiln) == $(${TEST_EMULATOR-} "$work/prefix/bin/kiln" --version | cut -d' ' -f2) ]]
# shellcheck disable=SC2046,SC2086
${CC:-cc} -std=c11 -o "$work/user/linked" "$work/user/main.c" $(pkg-config --cflags --libs kiln) -Wl,-rpath,"$(pkg-config --variable=libdir kiln)"
gives "$work/user/linked"

[[ -z ${TEST_EMULATOR-} ]] || exit 0 # a bundle is made on the kind of machine that it is for
echo "== bundle, unpacked elsewhere"
"$source/scripts/package" --build "$build" --out "$work/dist"
mkdir "$work/elsewhere"
tar -C "$work/elsewhere" -xzf "$work"/dist/kiln-*.tar.gz
rm -rf "$work/dist" "$work/prefix"
bundle=$(echo "$work"/elsewhere/kiln-*)
for binary in "$bundle"/bin/kiln "$bundle"/lib/*.so*; do
  outside=$(ldd "$binary" | awk -v bundle="$bundle/" '
    $2 == "=>" && index($3, bundle) != 1 && $1 !~ /^(libc|libm|libdl|libpthread|librt|libresolv)\.so/')
  [[ -z $outside ]] || { printf '%s takes from outside:\n%s\n' "$binary" "$outside" >&2; exit 1; }
done
# shellcheck disable=SC2016 # for the loader to expand
cc -std=c11 -I"$bundle/include" -o "$bundle/bin/user" "$work/user/main.c" -L"$bundle/lib" -lkiln -Wl,-rpath,'$ORIGIN/../lib'
clean=(env -i HOME="$HOME" KILN_CACHE=off)
gives "${clean[@]}" "$bundle/bin/user"
"${clean[@]}" "$bundle/bin/kiln" info >/dev/null
# Both generators, the second from its own shared object.
for isa in portable ''; do
  "${clean[@]}" KILN_FORCE=$isa "$bundle/bin/kiln" run int8_mm m=3 n=33 k=65 --check --json >"$work/run.json"
  grep -q '"source": *"compiled"' "$work/run.json" || { cat "$work/run.json" >&2; exit 1; }
done
