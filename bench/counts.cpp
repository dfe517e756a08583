// Every op on one thread, with callgrind counting each by itself; prints what compiled them.
#include <gnu/libc-version.h>
#include <valgrind/callgrind.h>

#include <cstdio>
#include <string>
#include <vector>

#include "cpu/ema_update.h"
#include "cpu/ops.h"
#include "cpu/pair_loss.h"
#include "cpu/skinny_linear.h"
#include "cpu/tile_level.h"

using namespace nlhf;

namespace {

// three tiles, and a tail that no width of lanes divides
constexpr int64_t kRows = 4, kVocab = 3 * 1024 + 37, kColumns = 64;

std::string level;

template <class Call>
void count(const std::string& name, const Call& call) {
  const std::string what = name + ", " + level;
  // the first call allocates what the thread keeps
  call();
  CALLGRIND_ZERO_STATS;
  call();
  CALLGRIND_DUMP_STATS_AT(what.c_str());
}

template <class T>
T element(double x);
template <>
float element(double x) {
  return static_cast<float>(x);
}
template <>
double element(double x) {
  return x;
}
template <>
BFloat16 element(double x) {
  BFloat16 out;
  from_float(static_cast<float>(x), out);
  return out;
}
template <>
Float16 element(double x) {
  Float16 out;
  from_float(static_cast<float>(x), out);
  return out;
}

// Numbers between -4 and 4, always the same.
template <class T>
std::vector<T> numbers(int64_t size, uint64_t seed) {
  std::vector<T> out(size);
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (T& x : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = element<T>(static_cast<double>(state >> 40) / (1 << 21) - 4);
  }
  return out;
}

template <class T>
char* bytes(std::vector<T>& x) {
  return reinterpret_cast<char*>(x.data());
}

template <class T>
Logits view(std::vector<T>& x, DType dtype) {
  return {bytes(x), dtype, kRows, 1, kVocab, kVocab, 0};
}

template <class S>
MixtureSampleIn<S> settings(Filters<S> filters) {
  return {{S(0.3), nullptr},
          {S(0.9), nullptr},
          {filters.top_k, nullptr},
          {filters.top_p, nullptr},
          {filters.min_p, nullptr},
          {7, nullptr},
          {3, nullptr}};
}

template <class S>
struct Draws {
  std::vector<int64_t> tokens = std::vector<int64_t>(kRows);
  std::vector<S> values = std::vector<S>(4 * kRows);

  MixtureSampleOut<S> out() {
    S* x = values.data();
    return {tokens.data(), x, x + kRows, x + 2 * kRows, x + 3 * kRows};
  }
};

// T: of the logits, S: of the statistics.
template <class T, class S>
void count_logits(const std::string& type, DType dtype) {
  std::vector<T> policy = numbers<T>(kRows * kVocab, 1), ref = numbers<T>(kRows * kVocab, 2);
  std::vector<T> grad(kRows * kVocab);
  const Logits x = view(policy, dtype), y = view(ref, dtype), g = view(grad, dtype);
  const std::vector<int64_t> tokens{0, 5, kVocab - 1, 1024};
  const std::vector<S> in = numbers<S>(kRows, 3);
  std::vector<S> out(6 * kRows);
  S* o = out.data();
  const ScoreSettings<S> plain{S(0.9), 0}, capped{S(0.9), 30};
  Draws<S> draws;

  const Filters<S> off{0, 1, 0}, top_k{50, 1, 0}, all{50, S(0.9), S(0.01)};
  const auto sample = [&](const std::string& what, const std::optional<Logits>& other,
                          Filters<S> filters) {
    count("mixture_sample " + type + what,
          [&] { mixture_sample<S>(x, other, settings(filters), draws.out()); });
  };
  sample(" alone", std::nullopt, off);
  sample("", y, off);
  sample(" top-k", y, top_k);
  sample(" all filters", y, all);

  const TokenLogprobsOut<S> logprobs{o, o + kRows, o + 2 * kRows};
  const TokenKlOut<S> kl{o, o + kRows, o + 2 * kRows, o + 3 * kRows, o + 4 * kRows, o + 5 * kRows};
  for (const auto& how : {plain, capped}) {
    const std::string name = type + (how.softcap != 0 ? " softcap" : "");
    count("token_logprobs " + name,
          [&] { token_logprobs<S>(x, tokens.data(), nullptr, how, logprobs); });
    count("token_logprobs_grad " + name, [&] {
      token_logprobs_grad<S>(g, x, tokens.data(), nullptr,
                             {logprobs.lse, logprobs.entropy, in.data(), in.data()}, how);
    });
    count("token_kl " + name, [&] { token_kl<S>(x, y, tokens.data(), nullptr, how, kl); });
    count("token_kl_grad " + name, [&] {
      token_kl_grad<S>(g, x, y, tokens.data(), nullptr,
                       {kl.lse, kl.ref_lse, kl.entropy, kl.kl, in.data(), in.data(), in.data()},
                       how);
    });
  }
}

template <class T>
void count_heads(const std::string& type, DType dtype) {
  std::vector<T> hidden = numbers<T>(kRows * kColumns, 1);
  std::vector<T> weight = numbers<T>(kVocab * kColumns, 2);
  std::vector<T> other = numbers<T>(kVocab * kColumns, 3);
  const Matrix rows{bytes(hidden), dtype, kRows, kColumns, kColumns};
  const Head policy{rows, {bytes(weight), dtype, kVocab, kColumns, kColumns}, nullptr};
  const Head ref{rows, {bytes(other), dtype, kVocab, kColumns, kColumns}, nullptr};
  Draws<float> draws;
  const auto in = settings<float>({0, 1, 0});
  count("linear_mixture_sample " + type,
        [&] { linear_mixture_sample(policy, ref, 0, in, draws.out()); });
}

template <class S>
void count_sequences(const std::string& type) {
  constexpr int64_t kPairs = 64, kTokens = 32 * kPairs;
  const std::vector<S> logprobs = numbers<S>(kTokens, 1), cost = numbers<S>(kTokens, 2);
  const std::vector<S> preference = numbers<S>(kPairs, 3);
  std::vector<S> coef(kTokens), sums(kPairs), out(3 * kPairs + 1);
  S* o = out.data();
  for (const KlSum kl : {KlSum::reward_to_go, KlSum::exact, KlSum::sequence, KlSum::token}) {
    count("pairwise_pg_coef " + type + " " + std::to_string(static_cast<int>(kl)), [&] {
      pairwise_pg_coef<S>({logprobs.data(), cost.data(), nullptr, preference.data(), nullptr,
                           nullptr, kTokens, kPairs, kl, S(0.5)},
                          {o, coef.data(), sums.data()});
    });
  }
  const double weights[] = {0.5, 0.5};
  const S* x = logprobs.data();
  for (const PairForm form :
       {PairForm::label, PairForm::difference, PairForm::response, PairForm::logistic}) {
    count("pair_loss " + type + " " + std::to_string(static_cast<int>(form)), [&] {
      pair_loss<S>({x, x + kPairs, x + 2 * kPairs, x + 4 * kPairs, preference.data(),
                    preference.data(), weights, 2, kPairs, form, S(0.7)},
                   {o, o + 1, o + 1 + kPairs, o + 1 + 2 * kPairs});
    });
  }
}

template <class T>
void count_ema(const std::string& type, DType dtype) {
  constexpr int64_t kSize = 10'007;
  std::vector<T> ema = numbers<T>(kSize, 1);
  const std::vector<T> param = numbers<T>(kSize, 2);
  const std::vector<EmaTensor> tensors{
      {bytes(ema), reinterpret_cast<const char*>(param.data()), kSize, dtype, dtype}};
  const int64_t seed = 11;
  count("ema_update " + type, [&] { ema_update(tensors, 0.99, nullptr); });
  if (dtype == DType::bfloat16)
    count("ema_update " + type + " stochastic", [&] { ema_update(tensors, 0.99, &seed); });
}

void count_layer() {
  const std::vector<float> x = numbers<float>(kRows * kColumns, 1);
  const std::vector<float> w = numbers<float>(kVocab * kColumns, 2);
  std::vector<float> y(kRows * kVocab);
  for (const int64_t rows : {int64_t{1}, kRows}) {
    count("skinny_linear float32, rows " + std::to_string(rows),
          [&] { skinny_linear(x.data(), w.data(), y.data(), rows, kVocab, kColumns); });
  }
}

}  // namespace

int main() {
  std::printf("gcc %d, glibc %s\n", __GNUC__, gnu_get_libc_version());
  for (const std::string& name : tile_levels()) {
    level = name;
    use_tile_level(name);
    count_logits<float, float>("float32", DType::float32);
    count_logits<BFloat16, float>("bfloat16", DType::bfloat16);
    count_logits<Float16, float>("float16", DType::float16);
    count_logits<double, double>("float64", DType::float64);
    count_heads<float>("float32", DType::float32);
    count_heads<BFloat16>("bfloat16", DType::bfloat16);
    count_heads<Float16>("float16", DType::float16);
    count_sequences<float>("float32");
    count_sequences<double>("float64");
    count_ema<float>("float32", DType::float32);
    count_ema<BFloat16>("bfloat16", DType::bfloat16);
    count_ema<Float16>("float16", DType::float16);
    count_ema<double>("float64", DType::float64);
    count_layer();
  }
}
