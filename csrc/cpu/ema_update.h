// The exponential moving averages of many tensors, as the bindings call them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace nlhf {

// Both dense in memory, element by element in the same order.
struct EmaTensor {
  char* ema;
  const char* param;
  int64_t size;
  DType ema_dtype, param_dtype;
};

// ema <- decay * ema + (1 - decay) * param. seed, which may be null, rounds bfloat16 averages
// stochastically; a tensor's words depend on its place in the list.
void ema_update(const std::vector<EmaTensor>& tensors, double decay, const int64_t* seed);

}  // namespace nlhf
