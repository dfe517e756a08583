// Sixteen floats. Included where the target has AVX-512.

struct Lanes {
  using S = float;
  using F = __m512;
  using M = __mmask16;
  static constexpr int kWidth = 16;
  // whether multiply_add rounds once
  static constexpr bool kFused = true;

  static NLHF_INLINE F all(float x) { return _mm512_set1_ps(x); }
  static NLHF_INLINE F load(const float* x) { return _mm512_loadu_ps(x); }
  static NLHF_INLINE F load(const BFloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static NLHF_INLINE F load(const Float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static NLHF_INLINE void store(float* out, F x) { _mm512_storeu_ps(out, x); }
  static NLHF_INLINE void store(BFloat16* out, F x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const M is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m256i out_bits = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, nan));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), out_bits);
  }
  static NLHF_INLINE void store(Float16* out, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static NLHF_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
  static NLHF_INLINE F subtract(F x, F y) { return _mm512_sub_ps(x, y); }
  static NLHF_INLINE F multiply(F x, F y) { return _mm512_mul_ps(x, y); }
  static NLHF_INLINE F multiply_add(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  // y if x is NaN
  static NLHF_INLINE F larger(F x, F y) { return _mm512_max_ps(x, y); }
  static NLHF_INLINE M at_least(F x, F y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }
  static NLHF_INLINE M equal(F x, F y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
  static NLHF_INLINE M without(M x, M y) { return static_cast<M>(x & ~y); }
  static NLHF_INLINE bool any(M x) { return x != 0; }
  static NLHF_INLINE int count(M x) { return __builtin_popcount(x); }
  static NLHF_INLINE F where(M x, F y, F z) { return _mm512_mask_mov_ps(z, x, y); }
  static NLHF_INLINE float sum(F x) {
    return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(x), upper(x)));
  }
  static NLHF_INLINE float top(F x) {
    return top_of_eight(_mm256_max_ps(_mm512_castps512_ps256(x), upper(x)));
  }
  // writes a whole register: the lanes of x first, whatever they are after
  static NLHF_INLINE void compress(float* out, M x, F y) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(x, y));
  }

  static NLHF_INLINE F power(F x) {
    // x - floor(x), whose power is the significand
    const F fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    F y = all(kPower[4]);
    y = multiply_add(y, fraction, all(kPower[3]));
    y = multiply_add(y, fraction, all(kPower[2]));
    y = multiply_add(y, fraction, all(kPower[1]));
    y = multiply_add(y, fraction, all(kPower[0]));
    y = multiply_add(y, fraction, all(1.0f));
    // times 2^floor(x)
    return _mm512_scalef_ps(y, x);
  }

 private:
  static NLHF_INLINE __m256 upper(F x) { return _mm512_maskz_extractf32x8_ps(0xFF, x, 1); }
};
