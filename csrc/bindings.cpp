// Python bindings: tensors arrive as addresses (0 = None), logits with their shape and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/philox.h"
#include "cpu/ema_update.h"
#include "cpu/ops.h"
#include "cpu/pair_loss.h"
#include "cpu/skinny_linear.h"
#include "cpu/tile_level.h"

namespace py = pybind11;
using namespace nlhf;

namespace {

using Address = uintptr_t;
// data, dtype, rows, steps, vocab, batch stride, step stride
using LogitsArg = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

// data, dtype, rows, columns, row stride
using MatrixArg = std::tuple<Address, int, int64_t, int64_t, int64_t>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Logits view(const LogitsArg& x) {
  const auto& [data, dtype, rows, steps, vocab, batch_stride, step_stride] = x;
  return {at<char>(data), static_cast<DType>(dtype), rows, steps, vocab, batch_stride, step_stride};
}

Matrix view(const MatrixArg& x) {
  const auto& [data, dtype, rows, columns, stride] = x;
  return {at<char>(data), static_cast<DType>(dtype), rows, columns, stride};
}

KlSum kl_sum(const std::string& name) {
  if (name == "reward_to_go") return KlSum::reward_to_go;
  if (name == "exact") return KlSum::exact;
  if (name == "sequence") return KlSum::sequence;
  if (name == "token") return KlSum::token;
  throw std::invalid_argument(
      "pairwise_pg_loss: kl must be \"reward_to_go\", \"exact\", \"sequence\" or \"token\", got "
      "\"" +
      name + "\"; choose one of these");
}

PairForm pair_form(const std::string& name) {
  if (name == "label") return PairForm::label;
  if (name == "difference") return PairForm::difference;
  if (name == "response") return PairForm::response;
  if (name == "logistic") return PairForm::logistic;
  throw std::invalid_argument("pair_loss: there is no form \"" + name + "\"");
}

template <class S>
void bind_pair_loss(py::module_ m) {
  m.def(
      "pair_loss",
      [](Address logprobs, Address other_logprobs, Address anchor_logprobs,
         Address other_anchor_logprobs, Address preference, Address other_preference,
         const std::vector<double>& weights, int64_t pairs, const std::string& form, double scale,
         Address loss, Address margins, Address grad, Address other_grad) {
        pair_loss<S>({at<S>(logprobs), at<S>(other_logprobs), at<S>(anchor_logprobs),
                      at<S>(other_anchor_logprobs), at<S>(preference), at<S>(other_preference),
                      weights.data(), static_cast<int64_t>(weights.size()), pairs, pair_form(form),
                      static_cast<S>(scale)},
                     {at<S>(loss), at<S>(margins), at<S>(grad), at<S>(other_grad)});
      },
      py::call_guard<py::gil_scoped_release>());
}

// ema, param, size, dtypes of both
using EmaArg = std::tuple<Address, Address, int64_t, int, int>;

void bind_ema_update(py::module_ m) {
  m.def(
      "ema_update",
      [](const std::vector<EmaArg>& arguments, double decay, std::optional<int64_t> seed) {
        std::vector<EmaTensor> tensors;
        for (const auto& [ema, param, size, ema_dtype, param_dtype] : arguments) {
          tensors.push_back({at<char>(ema), at<char>(param), size, static_cast<DType>(ema_dtype),
                             static_cast<DType>(param_dtype)});
        }
        ema_update(tensors, decay, seed ? &*seed : nullptr);
      },
      py::call_guard<py::gil_scoped_release>());
}

// One submodule per statistics dtype.
template <class S>
void bind_ops(py::module_ m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;

  m.def(
      "mixture_sample",
      [](const LogitsArg& policy, const LogitsArg& ref, double coef, Address coef_rows,
         double temperature, Address temperature_rows, int64_t top_k, Address top_k_rows,
         double top_p, Address top_p_rows, double min_p, Address min_p_rows, int64_t seed,
         Address seed_rows, int64_t position, Address position_rows, Address tokens,
         Address policy_logprobs, Address ref_logprobs, Address sampling_logprobs,
         Address log_kept_mass) {
        const bool has_ref = std::get<0>(ref) != 0;
        mixture_sample<S>(view(policy), has_ref ? std::optional<Logits>(view(ref)) : std::nullopt,
                          {{static_cast<S>(coef), at<S>(coef_rows)},
                           {static_cast<S>(temperature), at<S>(temperature_rows)},
                           {top_k, at<int64_t>(top_k_rows)},
                           {static_cast<S>(top_p), at<S>(top_p_rows)},
                           {static_cast<S>(min_p), at<S>(min_p_rows)},
                           {seed, at<int64_t>(seed_rows)},
                           {position, at<int64_t>(position_rows)}},
                          {at<int64_t>(tokens), at<S>(policy_logprobs), at<S>(ref_logprobs),
                           at<S>(sampling_logprobs), at<S>(log_kept_mass)});
      },
      unlocked());

  m.def(
      "token_logprobs",
      [](const LogitsArg& logits, Address tokens, Address mask, double temperature, double softcap,
         Address logprobs, Address entropy, Address lse) {
        token_logprobs<S>(view(logits), at<int64_t>(tokens), at<bool>(mask),
                          {static_cast<S>(temperature), static_cast<S>(softcap)},
                          {at<S>(logprobs), at<S>(entropy), at<S>(lse)});
      },
      unlocked());

  m.def(
      "token_logprobs_grad",
      [](const LogitsArg& grad, const LogitsArg& logits, Address tokens, Address mask, Address lse,
         Address entropy, Address grad_logprobs, Address grad_entropy, double temperature,
         double softcap) {
        token_logprobs_grad<S>(
            view(grad), view(logits), at<int64_t>(tokens), at<bool>(mask),
            {at<S>(lse), at<S>(entropy), at<S>(grad_logprobs), at<S>(grad_entropy)},
            {static_cast<S>(temperature), static_cast<S>(softcap)});
      },
      unlocked());

  m.def(
      "token_kl",
      [](const LogitsArg& policy, const LogitsArg& ref, Address tokens, Address mask,
         double temperature, double softcap, Address logprobs, Address ref_logprobs,
         Address entropy, Address kl, Address lse, Address ref_lse) {
        token_kl<S>(view(policy), view(ref), at<int64_t>(tokens), at<bool>(mask),
                    {static_cast<S>(temperature), static_cast<S>(softcap)},
                    {at<S>(logprobs), at<S>(ref_logprobs), at<S>(entropy), at<S>(kl), at<S>(lse),
                     at<S>(ref_lse)});
      },
      unlocked());

  m.def(
      "token_kl_grad",
      [](const LogitsArg& grad, const LogitsArg& policy, const LogitsArg& ref, Address tokens,
         Address mask, Address lse, Address ref_lse, Address entropy, Address kl,
         Address grad_logprobs, Address grad_entropy, Address grad_kl, double temperature,
         double softcap) {
        token_kl_grad<S>(view(grad), view(policy), view(ref), at<int64_t>(tokens), at<bool>(mask),
                         {at<S>(lse), at<S>(ref_lse), at<S>(entropy), at<S>(kl),
                          at<S>(grad_logprobs), at<S>(grad_entropy), at<S>(grad_kl)},
                         {static_cast<S>(temperature), static_cast<S>(softcap)});
      },
      unlocked());

  m.def(
      "pairwise_pg_coef",
      [](Address logprobs, Address cost, Address mask, Address preference, Address cu_seqlens,
         Address later, int64_t tokens, int64_t sequences, const std::string& kl, double baseline,
         Address loss, Address coef, Address sums) {
        pairwise_pg_coef<S>({at<S>(logprobs), at<S>(cost), at<bool>(mask), at<S>(preference),
                             at<int64_t>(cu_seqlens), at<S>(later), tokens, sequences, kl_sum(kl),
                             static_cast<S>(baseline)},
                            {at<S>(loss), at<S>(coef), at<S>(sums)});
      },
      unlocked());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::dict codes;
  codes["float16"] = static_cast<int>(DType::float16);
  codes["bfloat16"] = static_cast<int>(DType::bfloat16);
  codes["float32"] = static_cast<int>(DType::float32);
  codes["float64"] = static_cast<int>(DType::float64);
  m.attr("dtype_codes") = codes;

  bind_ops<float>(m.def_submodule("float32"));
  bind_ops<double>(m.def_submodule("float64"));
  bind_pair_loss<float>(m.attr("float32"));
  bind_pair_loss<double>(m.attr("float64"));
  bind_ema_update(m);

  m.def(
      "skinny_linear",
      [](Address x, Address w, Address y, int64_t M, int64_t N, int64_t D) {
        skinny_linear(at<float>(x), at<float>(w), at<float>(y), M, N, D);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "linear_mixture_sample",
      [](const MatrixArg& policy_hidden, const MatrixArg& policy_weight, Address policy_bias,
         const MatrixArg& ref_hidden, const MatrixArg& ref_weight, Address ref_bias, double softcap,
         double coef, Address coef_rows, double temperature, Address temperature_rows, int64_t seed,
         Address seed_rows, int64_t position, Address position_rows, Address tokens,
         Address policy_logprobs, Address ref_logprobs, Address sampling_logprobs,
         Address log_kept_mass) {
        std::optional<Head> ref;
        if (std::get<0>(ref_hidden)) ref = {view(ref_hidden), view(ref_weight), at<char>(ref_bias)};
        linear_mixture_sample(
            {view(policy_hidden), view(policy_weight), at<char>(policy_bias)}, ref,
            static_cast<float>(softcap),
            {{static_cast<float>(coef), at<float>(coef_rows)},
             {static_cast<float>(temperature), at<float>(temperature_rows)},
             {0, nullptr},
             {1, nullptr},
             {0, nullptr},
             {seed, at<int64_t>(seed_rows)},
             {position, at<int64_t>(position_rows)}},
            {at<int64_t>(tokens), at<float>(policy_logprobs), at<float>(ref_logprobs),
             at<float>(sampling_logprobs), at<float>(log_kept_mass)});
      },
      py::call_guard<py::gil_scoped_release>());

  m.def("tile_levels", &tile_levels);
  m.def("use_tile_level", &use_tile_level);
  m.def("take_tile_levels_run", &take_tile_levels_run);
  m.def("fold_in", &fold_in);
  m.def("philox4x32",
        [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
          const Words out = philox4x32({{c0, c1, c2, c3}}, k0, k1);
          return std::make_tuple(out.w[0], out.w[1], out.w[2], out.w[3]);
        });
}
