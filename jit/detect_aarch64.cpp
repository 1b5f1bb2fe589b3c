#ifdef __aarch64__
#include "jit/os.h"
#include "jit/target.h"

namespace kiln {

Machine detect_machine() {
  Machine machine;
  const os::ArmProcessor processor = os::arm_processor();
  machine.target.arch = Arch::aarch64;
  machine.target.features = processor.features;
  machine.target.sve_bits = processor.sve_bits;
  machine.target.sme_bits = processor.sme_bits;
  machine.cpu_name = processor.name;
  machine.cores = os::usable_cores();
  const os::CacheSizes caches = os::cache_sizes();
  if (caches.l1d > 0)
    machine.l1d_bytes = caches.l1d;
  if (caches.l2 > 0)
    machine.l2_bytes = caches.l2;
  machine.l3_bytes = caches.l3;
  return machine;
}

} // namespace kiln
#endif
