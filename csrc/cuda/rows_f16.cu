#define FH_ROWS __half
#include "cuda/rows.inc"
