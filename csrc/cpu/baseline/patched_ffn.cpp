#include "cpu/kernels/patched_ffn.h"

namespace unike {

const AddExtraNeurons add_extra_neurons_baseline = add_extra_neurons;

}  // namespace unike
