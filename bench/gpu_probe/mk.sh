set -e
cd /tmp/kiln/gpuk
W=/tmp/kiln/wt-gpu-kernels
for v in ""; do
O=obj$v; mkdir -p $O
for f in $W/backends/nvidia/ptx.cpp $W/backends/nvidia/*skinny.cpp $W/backends/nvidia/*tile.cpp $W/jit/ops/int4_mm_fragments.cpp emit.cpp; do o=$O/$(basename $f .cpp).o; if [ ! -e $o ] || [ -n "$(find $f $W/backends/nvidia/*.h $W/jit/ops/int4_mm_fragments.h -newer $o | head -1)" ]; then /tmp/kiln/build ccache g++ -std=c++20 -O2 -Wall -Wextra $v -I$W -c $f -o $o; fi; done
g++ $O/*.o -o emit$v $W/build/release/cache/libkiln_cache.a -lsodium
g++ -std=c++20 -O3 -shared -fPIC -static-libstdc++ -static-libgcc $v -I$W packc.cpp $W/jit/ops/int4_mm_fragments.cpp -o /work/main/.gpu/libpack$v.so
done
