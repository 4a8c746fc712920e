#include "cpu/kernels/cosine_topk.h"

namespace unike {

const ScoreTile score_tile_avx2 = score_tile;

}  // namespace unike
