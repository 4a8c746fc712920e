#include "cpu/kernels/patched_ffn.h"

namespace unike {

const AddExtraNeurons add_extra_neurons_avx512 = add_extra_neurons;

}  // namespace unike
