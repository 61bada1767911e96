#define FH_ROWS double
#include "cuda/rows.inc"
