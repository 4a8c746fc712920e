#include "cpu/kernels/cosine_topk.h"

namespace unike {

const ScoreTile score_tile_avx512 = score_tile;

}  // namespace unike
