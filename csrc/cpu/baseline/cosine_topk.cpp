#include "cpu/kernels/cosine_topk.h"

namespace unike {

const ScoreTile score_tile_baseline = score_tile;

}  // namespace unike
