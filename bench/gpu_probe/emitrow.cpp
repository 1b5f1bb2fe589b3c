#include <cstdio>
#include <fstream>
#include <string>
#include "backends/nvidia/rows.h"
#include "jit/op.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int8_mm.h"
using namespace kiln;
// reads lines "op k=v ..." from stdin, writes NAME.ptx to argv[1], prints plan lines
int main(int, char** argv) {
  std::string line; int i = 0; char buf[4096];
  Target t; t.arch = Arch::nvptx; t.sm = atoi(argv[2]);
  while (fgets(buf, sizeof buf, stdin)) {
    line = buf; while (!line.empty() && line.back() == '\n') line.pop_back();
    auto d0 = parse_desc(line); if (!d0) { fprintf(stderr, "%s: %s\n", line.c_str(), d0.status().message().c_str()); continue; }
    const OpSpec* op = find_op(d0->op); KernelDesc d = op->canonical(*d0);
    for (auto row : {nvidia::int4_mm_wgmma(), nvidia::int4_mm_mma_sync(), nvidia::int8_mm_wgmma(), nvidia::int8_mm_mma_sync()}) {
      if (row.op != d.op || !row.supports(d, t)) continue;
      auto c = row.compile(d, t, row.pack_layout(d, t));
      if (!c) { fprintf(stderr, "%s: %s\n", line.c_str(), c.status().message().c_str()); break; }
      std::ofstream(std::string(argv[1]) + "/row" + std::to_string(i) + ".ptx") << std::string(c->image.begin(), c->image.end());
      printf("row%d|%s|%s", i, line.c_str(), std::string(name_of(row.isa)).c_str());
      for (auto& [k, v] : c->plan) printf("|%s=%ld", k.c_str(), (long)v);
      printf("\n"); ++i; break;
    }
  }
}
