#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <fstream>
#include <string>
#include "backends/nvidia/int4_mm.h"
#include "backends/nvidia/int8_mm.h"
using namespace kiln::nvidia;
// emit skinny SM n k g t r w c d out
int main(int argc, char** argv) {
  if (!strcmp(argv[1], "skinny")) {
    int a[16]; for (int i = 2; i < 11; ++i) a[i] = atoi(argv[i]);
    int4::Shape s{a[3], a[4], a[5]};
    int4::SkinnyConfig c{a[6], a[7], a[8], a[9], a[10]};
    auto t0 = std::chrono::steady_clock::now();
    auto r = int4::emit_skinny({a[2], false}, s, c);
    auto t1 = std::chrono::steady_clock::now();
    if (!r) { fprintf(stderr, "%s\n", r.status().message().c_str()); return 1; }
    std::ofstream(argv[11]) << *r;
    printf("%ld %ld %d %ld %d\n",(long)c.blocks(s),(long)c.tokens(),c.threads(),(long)c.shared_bytes(),0);
    fprintf(stderr, "%s: %zu bytes, %.3f ms, blocks %ld smem %ld\n", c.text().c_str(), r->size(), std::chrono::duration<double>(t1 - t0).count()*1e3, (long)c.blocks(s), (long)c.shared_bytes());
  }
  if (!strcmp(argv[1], "tile")) {
    int a[16]; for (int i = 2; i < 13; ++i) a[i] = atoi(argv[i]);
    int4::Shape s{a[3], a[4], a[5]};
    int4::TileConfig c{a[6], a[7], a[8], a[9], a[10], a[11], a[12], argc > 14 && atoi(argv[14]) > 0, argc > 14 ? atoi(argv[14]) : 1, argc > 15 ? atoi(argv[15]) : 1, argc > 16 ? atoi(argv[16]) : 1};
    auto t0 = std::chrono::steady_clock::now();
    auto r = int4::emit_tile({a[2], c.wgmma}, s, c);
    auto t1 = std::chrono::steady_clock::now();
    if (!r) { fprintf(stderr, "%s\n", r.status().message().c_str()); return 1; }
    std::ofstream(argv[13]) << *r;
    printf("%ld %ld %d %ld\n",(long)((s.n+c.rows()-1)/c.rows()*c.cluster),(long)c.tokens(),c.threads(),(long)c.shared_bytes(s));
    fprintf(stderr, "%s: %zu bytes, %.3f ms\n", c.text().c_str(), r->size(), std::chrono::duration<double>(t1 - t0).count()*1e3);
  }
  if (!strcmp(argv[1], "int8")) { // sm n k out_kind cfg*7
    int a[16]; for (int i = 2; i < 13; ++i) a[i] = atoi(argv[i]);
    int8::Shape s{a[3], a[4], (int8::Output)a[5], a[5] != 0, a[5] != 0};
    int8::TileConfig c{a[6], a[7], a[8], a[9], a[10], a[11], a[12], argc > 14};
    auto r = int8::emit_tile({a[2], argc > 14}, s, c);
    if (!r) { fprintf(stderr, "%s\n", r.status().message().c_str()); return 1; }
    std::ofstream(argv[13]) << *r;
    printf("%ld %ld %d %ld\n",(long)((s.n+c.columns()-1)/c.columns()*c.cluster),(long)c.rows(),c.threads(),(long)c.shared_bytes());
  }
}
