#include "jit/ops/int4_mm_fragments.h"
extern "C" void pack_c(const uint8_t*w,const uint16_t*sz,int64_t n,int64_t k,int64_t g,int64_t nb,int64_t ne,uint8_t*wo,uint8_t*so){ kiln::int4_mm::pack_fragments(w,sz,n,k,g,nb,ne,wo,so);}
