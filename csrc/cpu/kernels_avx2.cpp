#define FH_ISA "avx2"
#define FH_TABLE fh_cpu_avx2
#include "cpu/kernels.inc"
