// Conversion between float and 16 bits over a type of lanes, which brings the instruction set.
// Included once for each level, in a namespace of its own.

template <class T>
void convert_in(const T* row, int64_t n, float* x) {
  int64_t i = 0;
  for (; i + Lanes::kWidth <= n; i += Lanes::kWidth) Lanes::store(x + i, Lanes::load(row + i));
  for (; i < n; ++i) x[i] = to_float(row[i]);
}

template <class T>
void convert_out(const float* x, int64_t n, T* row) {
  int64_t i = 0;
  for (; i + Lanes::kWidth <= n; i += Lanes::kWidth) Lanes::store(row + i, Lanes::load(x + i));
  for (; i < n; ++i) from_float(x[i], row[i]);
}
