// A linear layer for a few rows, as decoding has them: its time is that of reading the weights.
#pragma once

#include <cstdint>

namespace nlhf {

// y (M, N) = x (M, D) times the transpose of w (N, D); all dense, none empty. A row of y is the
// same to the bit whatever the other rows, and however many threads there are.
void skinny_linear(const float* x, const float* w, float* y, int64_t M, int64_t N, int64_t D);

// y[m * stride + n] = row m of x (M, D) times row n of w (N, D), by one thread. Bits as above.
void skinny_block(const float* x, const float* w, float* y, int64_t M, int64_t N, int64_t D,
                  int64_t stride);

}  // namespace nlhf
