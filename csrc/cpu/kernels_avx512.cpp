#define FH_ISA "avx512"
#define FH_TABLE fh_cpu_avx512
#include "cpu/kernels.inc"
