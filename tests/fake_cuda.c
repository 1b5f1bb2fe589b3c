/* A driver that has a version and nothing else: libcuda.so.1 for `kiln doctor`. */
__attribute__((visibility("default"))) int cuDriverGetVersion(int* version) {
  *version = 13020;
  return 0;
}
