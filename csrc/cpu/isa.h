// The instruction sets that the kernels are compiled for, and the kernels that this process uses.
//
// A new level is a declaration here, a row of the table in isa.cpp, a file in isa/ and its compile flags in setup.py.
#pragma once

#include "cpu/row_kernels.h"
#include "cpu/scan_kernels.h"

namespace unike {

// What the file of a level in isa/ has. Null: as those that it falls back to.
struct Kernels {
  const ScanKernels* scan = nullptr;
  const RowKernels* rows = nullptr;
  const Kernels* fallback = nullptr;
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512vnni, kernels_avx512bf16,
    kernels_amx;                                                   // of x86-64
extern const Kernels kernels_neon, kernels_dotprod, kernels_i8mm;  // of aarch64

// The kernels of the level in use: what unike_set_isa() chose, else what the environment variable UNIKE_ISA named when
// it was first asked for, else the last row of the table that this machine has. Both throw std::invalid_argument where
// UNIKE_ISA names none of these.
const ScanKernels& scan_kernels();
const RowKernels& row_kernels();

}  // namespace unike
