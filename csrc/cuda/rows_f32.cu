#define FH_ROWS float
#include "cuda/rows.inc"
