// Eight floats. Included where the target has AVX2 and FMA.

struct Lanes {
  using S = float;
  using F = __m256;
  using M = __m256;
  static constexpr int kWidth = 8;
  // whether multiply_add rounds once
  static constexpr bool kFused = true;

  static NLHF_INLINE F all(float x) { return _mm256_set1_ps(x); }
  static NLHF_INLINE F load(const float* x) { return _mm256_loadu_ps(x); }
  static NLHF_INLINE F load(const BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static NLHF_INLINE F load(const Float16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static NLHF_INLINE void store(float* out, F x) { _mm256_storeu_ps(out, x); }
  static NLHF_INLINE void store(BFloat16* out, F x) {
    const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i wide = _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(unordered(x)));
    // packing keeps to the two halves of a register
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
  static NLHF_INLINE void store(Float16* out, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static NLHF_INLINE F add(F x, F y) { return _mm256_add_ps(x, y); }
  static NLHF_INLINE F subtract(F x, F y) { return _mm256_sub_ps(x, y); }
  static NLHF_INLINE F multiply(F x, F y) { return _mm256_mul_ps(x, y); }
  static NLHF_INLINE F multiply_add(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }
  // y if x is NaN
  static NLHF_INLINE F larger(F x, F y) { return _mm256_max_ps(x, y); }
  static NLHF_INLINE M at_least(F x, F y) { return _mm256_cmp_ps(x, y, _CMP_GE_OQ); }
  static NLHF_INLINE M equal(F x, F y) { return _mm256_cmp_ps(x, y, _CMP_EQ_OQ); }
  static NLHF_INLINE M without(M x, M y) { return _mm256_andnot_ps(y, x); }
  static NLHF_INLINE bool any(M x) { return _mm256_movemask_ps(x) != 0; }
  static NLHF_INLINE int count(M x) { return __builtin_popcount(_mm256_movemask_ps(x)); }
  static NLHF_INLINE F where(M x, F y, F z) { return _mm256_blendv_ps(z, y, x); }

  static NLHF_INLINE float sum(F x) { return sum_of_eight(x); }
  static NLHF_INLINE float top(F x) { return top_of_eight(x); }

  static NLHF_INLINE void compress(float* out, M x, F y) {
    float lanes[kWidth];
    store(lanes, y);
    for (int rest = _mm256_movemask_ps(x); rest; rest &= rest - 1)
      *out++ = lanes[__builtin_ctz(rest)];
  }

  static NLHF_INLINE F power(F x) {
    // the second operand stays if one is NaN; 2^127 stands for all that overflows
    const F high = _mm256_min_ps(all(127.0f), x);
    const F clipped = _mm256_max_ps(all(-126.0f), high);
    const F whole = _mm256_floor_ps(clipped);
    const F fraction = subtract(clipped, whole);
    F y = all(kPower[4]);
    y = multiply_add(y, fraction, all(kPower[3]));
    y = multiply_add(y, fraction, all(kPower[2]));
    y = multiply_add(y, fraction, all(kPower[1]));
    y = multiply_add(y, fraction, all(kPower[0]));
    y = multiply_add(y, fraction, all(1.0f));
    // the exponent's bits; what was clipped from below is 0, and NaN stays
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
    const F below = _mm256_cmp_ps(x, all(-126.0f), _CMP_LT_OQ);
    return _mm256_or_ps(_mm256_andnot_ps(below, y), unordered(x));
  }

 private:
  // all bits, which is a NaN, where x is one
  static NLHF_INLINE F unordered(F x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
};
