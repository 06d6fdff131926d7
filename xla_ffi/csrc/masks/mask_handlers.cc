// XLA FFI handlers of the kernels that make masks: check every buffer again, fill the structs of mask_launch.h, launch.
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "masks/mask_launch.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using fgattn::describe;
using fgattn::ExactMaskArgs;
using fgattn::ExactMassArgs;
using fgattn::launched;
using fgattn::mask_strides;
using fgattn::MaskStrides;
using fgattn::MeanMaskArgs;
using fgattn::Refusal;
using fgattn::ScoreArgs;
using fgattn::token_strides;

struct ScoreBuffers {
  ffi::AnyBuffer query, key, scale;
  std::optional<ffi::AnyBuffer> lse, query_order;
  ffi::AnyBuffer bits, counts;
};

// Fills `args` and returns what is wrong, if anything is; `args` counts only then if nothing is.
Refusal check_scores(const ScoreBuffers& x, int32_t query_block, ScoreArgs& args) {
  Refusal refusal;
  const ffi::DataType dtype = x.query.element_type();
  refusal.unless(x.query.dimensions().size() == 4 && (dtype == ffi::BF16 || dtype == ffi::F16),
                 "expected `query` BF16 or F16 [B, T, N, H]", describe(x.query));
  if (!refusal.none()) return refusal;
  const auto query = x.query.dimensions();
  const int64_t batch = query[0], num_queries = query[1], num_heads = query[2], head_dim = query[3];
  refusal.unless(head_dim == 64 || head_dim == 128, "expected `query` with H=64 or H=128", describe(x.query));
  refusal.unless_fits("key", x.key, dtype, {{"B", batch}, {"S"}, {"K"}, {"H", head_dim}});
  if (!refusal.none()) return refusal;
  const int64_t num_keys = x.key.dimensions()[1], num_kv_heads = x.key.dimensions()[2];
  refusal.unless(num_keys >= 1, "expected `key` with at least one key", describe(x.key));
  refusal.unless(num_kv_heads >= 1 && num_heads % num_kv_heads == 0,
                 "expected query heads N that are a multiple of key heads K",
                 "N=" + std::to_string(num_heads) + " and K=" + std::to_string(num_kv_heads));
  refusal.unless(query_block == 64 || query_block == 128, "expected `query_block` 64 or 128",
                 "query_block=" + std::to_string(query_block));
  if (!refusal.none()) return refusal;

  const int64_t num_rows = (num_queries + query_block - 1) / query_block, num_words = fgattn::words_of_row(num_keys);
  if (x.lse) refusal.unless_fits("lse", *x.lse, ffi::F32, {{"B", batch}, {"N", num_heads}, {"T", num_queries}});
  refusal.unless_fits("scale", x.scale, ffi::F32, {});
  if (x.query_order) {
    refusal.unless_fits("query_order", *x.query_order, ffi::S32,
                        {{"B", batch, true}, {"N", num_heads, true}, {"T", num_queries}});
  }
  refusal.unless_fits("bits", x.bits, ffi::U32,
                      {{"B", batch}, {"N", num_heads}, {"R", num_rows}, {"W", num_words}});
  refusal.unless_fits("counts", x.counts, ffi::S32, {{"B", batch}, {"N", num_heads}, {"R", num_rows}});
  refusal.unless_below_2_31("T + 256 query positions", num_queries + 256);
  refusal.unless_below_2_31("W * 32 key numbers", num_words * 32);
  refusal.unless_below_2_31("B query batches", batch);
  refusal.unless_below_2_31("N query heads", num_heads);
  if (refusal.none()) refusal.unless_below_2_31("B * N heads of the whole batch", batch * num_heads);
  if (refusal.none()) refusal.unless_below_2_31("B * N * R rows", batch * num_heads * num_rows);
  refusal.unless_aligned("query", x.query, 16);
  refusal.unless_aligned("key", x.key, 16);
  if (x.lse) refusal.unless_aligned("lse", *x.lse, 4);
  refusal.unless_aligned("scale", x.scale, 4);
  if (x.query_order) refusal.unless_aligned("query_order", *x.query_order, 4);
  refusal.unless_aligned("bits", x.bits, 4);
  refusal.unless_aligned("counts", x.counts, 4);
  if (!refusal.none()) return refusal;

  args.query = x.query.untyped_data();
  args.key = x.key.untyped_data();
  args.lse = x.lse ? static_cast<const float*>(x.lse->untyped_data()) : nullptr;
  args.scale = static_cast<const float*>(x.scale.untyped_data());
  args.query_order = x.query_order ? static_cast<const int32_t*>(x.query_order->untyped_data()) : nullptr;
  args.query_strides = token_strides(x.query);
  args.key_strides = token_strides(x.key);
  args.query_order_strides = x.query_order ? mask_strides(*x.query_order) : MaskStrides{0, 0};
  args.batch = static_cast<int32_t>(batch);
  args.num_queries = static_cast<int32_t>(num_queries);
  args.num_keys = static_cast<int32_t>(num_keys);
  args.num_heads = static_cast<int32_t>(num_heads);
  args.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  args.head_dim = static_cast<int32_t>(head_dim);
  args.query_block = query_block;
  args.num_rows = static_cast<int32_t>(num_rows);
  args.num_words = static_cast<int32_t>(num_words);
  args.dtype = dtype == ffi::BF16 ? fgattn::DType::kBFloat16 : fgattn::DType::kFloat16;
  return refusal;
}

bool nothing_to_do(const ScoreArgs& args) {
  return args.batch == 0 || args.num_queries == 0 || args.num_heads == 0;
}

Refusal check_exact_mask(const ScoreBuffers& x, ffi::AnyBuffer log_threshold, int32_t query_block, bool keep_best,
                         ExactMaskArgs& args) {
  Refusal refusal = check_scores(x, query_block, args.scores);
  if (!refusal.none()) return refusal;
  refusal.unless_fits("log_threshold", log_threshold, ffi::F32, {{"N", args.scores.num_heads}});
  refusal.unless_aligned("log_threshold", log_threshold, 4);
  args.log_threshold = static_cast<const float*>(log_threshold.untyped_data());
  args.bits = static_cast<uint32_t*>(x.bits.untyped_data());
  args.counts = static_cast<int32_t*>(x.counts.untyped_data());
  args.keep_best = keep_best;
  return refusal;
}

// `Budget` of fgattn_jax.predictors as attributes.
struct RuleAttributes {
  int32_t rule;
  float value;
  int32_t top_k, min_keys, max_keys;
  float head_floor;

  fgattn::SelectRule as_struct() const {
    return {static_cast<fgattn::Rule>(rule), value, top_k, min_keys, max_keys, head_floor};
  }
};

void check_rule(const RuleAttributes& rule, const ScoreArgs& scores, Refusal& refusal) {
  refusal.unless(rule.rule >= 0 && rule.rule <= 2, "expected `rule` 0, 1 or 2", "rule=" + std::to_string(rule.rule));
  refusal.unless(std::isfinite(rule.value) && rule.value >= 0, "expected `value` finite and not negative",
                 "value=" + std::to_string(rule.value));
  refusal.unless(rule.top_k >= 0 && rule.min_keys >= 0 && rule.max_keys >= 0,
                 "expected `top_k`, `min_keys` and `max_keys` not negative",
                 std::to_string(rule.top_k) + ", " + std::to_string(rule.min_keys) + " and " +
                     std::to_string(rule.max_keys));
  refusal.unless(rule.head_floor >= 0 && rule.head_floor <= 1, "expected `head_floor` from 0 to 1",
                 "head_floor=" + std::to_string(rule.head_floor));
  refusal.unless(scores.num_words <= 8192, "expected at most 262144 keys, whose words fit shared memory",
                 std::to_string(scores.num_keys));
}

Refusal check_exact_mass(const ScoreBuffers& x, const RuleAttributes& rule, ffi::AnyBuffer workspace,
                         int32_t query_block, int32_t workspace_heads, ExactMassArgs& args) {
  Refusal refusal = check_scores(x, query_block, args.scores);
  if (!refusal.none()) return refusal;
  check_rule(rule, args.scores, refusal);
  refusal.unless(workspace_heads >= 1, "expected `workspace_heads` of at least 1",
                 "workspace_heads=" + std::to_string(workspace_heads));
  if (!refusal.none()) return refusal;
  const int64_t numbers = fgattn::mass_workspace_size(workspace_heads, args.scores.num_rows, args.scores.num_words);
  refusal.unless_fits("workspace", workspace, ffi::F32, {{"heads * (R * W * 32 + 4)", numbers}});
  refusal.unless_aligned("workspace", workspace, 16);
  args.rule = rule.as_struct();
  args.bits = static_cast<uint32_t*>(x.bits.untyped_data());
  args.counts = static_cast<int32_t*>(x.counts.untyped_data());
  args.workspace = static_cast<float*>(workspace.untyped_data());
  args.workspace_heads = workspace_heads;
  return refusal;
}

struct MeanAttributes {
  int32_t query_block, num_means, workspace_heads;
  bool ranks, keep_best;
  RuleAttributes rule;
};

Refusal check_mean_mask(const ScoreBuffers& x, ffi::AnyBuffer log_threshold, ffi::AnyBuffer workspace,
                        const MeanAttributes& how, MeanMaskArgs& args) {
  Refusal refusal = check_scores(x, how.query_block, args.scores);
  if (!refusal.none()) return refusal;
  const ScoreArgs& s = args.scores;
  const int64_t heads = int64_t{s.batch} * s.num_heads;
  const bool is_power = how.num_means >= 1 && (how.num_means & (how.num_means - 1)) == 0;
  refusal.unless(is_power && how.num_means <= fgattn::kMostMeans, "expected `num_means` 1, 2, 4 or 8",
                 "num_means=" + std::to_string(how.num_means));
  refusal.unless_fits("log_threshold", log_threshold, ffi::F32, {{"N", s.num_heads}});
  refusal.unless_aligned("log_threshold", log_threshold, 4);
  if (how.ranks) {
    check_rule(how.rule, s, refusal);
    refusal.unless(how.workspace_heads >= 1, "expected `workspace_heads` of at least 1 where keys are ranked",
                   "workspace_heads=" + std::to_string(how.workspace_heads));
  }
  if (!refusal.none()) return refusal;
  refusal.unless_below_2_31("16 B N means",
                            fgattn::kMostKeyParts * heads * fgattn::mean_lines(s.num_rows, how.num_means));
  const int64_t numbers = fgattn::mean_workspace_size(heads, s.num_rows, s.num_words, s.head_dim, how.num_means,
                                                      how.ranks ? how.workspace_heads : 0);
  refusal.unless_fits("workspace", workspace, ffi::S32, {{"mean_workspace_size", numbers}});
  refusal.unless_aligned("workspace", workspace, 16);
  args.num_means = how.num_means;
  args.ranks = how.ranks;
  args.log_threshold = static_cast<const float*>(log_threshold.untyped_data());
  args.keep_best = how.keep_best;
  args.rule = how.rule.as_struct();
  args.bits = static_cast<uint32_t*>(x.bits.untyped_data());
  args.counts = static_cast<int32_t*>(x.counts.untyped_data());
  args.workspace = static_cast<int32_t*>(workspace.untyped_data());
  args.workspace_heads = how.workspace_heads;
  return refusal;
}

ffi::Error exact_mask(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer lse,
                      ffi::AnyBuffer scale, ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                      ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts, int32_t query_block,
                      bool keep_best) {
  ExactMaskArgs args;
  const Refusal refusal = check_exact_mask({query, key, scale, lse, query_order, *bits, *counts}, log_threshold,
                                           query_block, keep_best, args);
  if (!refusal.none()) return refusal.error();
  return nothing_to_do(args.scores) ? ffi::Error::Success() : launched(fgattn::launch_exact_mask(args, stream));
}

ffi::Error check_exact_mask_only(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer lse, ffi::AnyBuffer scale,
                                 ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                                 ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                                 int32_t query_block, bool keep_best) {
  ExactMaskArgs args;
  return check_exact_mask({query, key, scale, lse, query_order, *bits, *counts}, log_threshold, query_block, keep_best,
                          args)
      .error();
}

ffi::Error exact_mass(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer lse,
                      ffi::AnyBuffer scale, std::optional<ffi::AnyBuffer> query_order,
                      ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                      ffi::Result<ffi::AnyBuffer> workspace, int32_t query_block, int32_t workspace_heads, int32_t rule,
                      float value, int32_t top_k, int32_t min_keys, int32_t max_keys, float head_floor) {
  ExactMassArgs args;
  const Refusal refusal =
      check_exact_mass({query, key, scale, lse, query_order, *bits, *counts},
                       {rule, value, top_k, min_keys, max_keys, head_floor}, *workspace, query_block, workspace_heads,
                       args);
  if (!refusal.none()) return refusal.error();
  return nothing_to_do(args.scores) ? ffi::Error::Success() : launched(fgattn::launch_exact_mass(args, stream));
}

ffi::Error check_exact_mass_only(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer lse, ffi::AnyBuffer scale,
                                 std::optional<ffi::AnyBuffer> query_order, ffi::Result<ffi::AnyBuffer> bits,
                                 ffi::Result<ffi::AnyBuffer> counts, ffi::Result<ffi::AnyBuffer> workspace,
                                 int32_t query_block, int32_t workspace_heads, int32_t rule, float value,
                                 int32_t top_k, int32_t min_keys, int32_t max_keys, float head_floor) {
  ExactMassArgs args;
  return check_exact_mass({query, key, scale, lse, query_order, *bits, *counts},
                          {rule, value, top_k, min_keys, max_keys, head_floor}, *workspace, query_block,
                          workspace_heads, args)
      .error();
}

ffi::Error mean_mask(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer scale,
                     ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                     ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                     ffi::Result<ffi::AnyBuffer> workspace, int32_t query_block, int32_t num_means,
                     int32_t workspace_heads, bool ranks, bool keep_best, int32_t rule, float value, int32_t top_k,
                     int32_t min_keys, int32_t max_keys, float head_floor) {
  MeanMaskArgs args;
  const Refusal refusal = check_mean_mask(
      {query, key, scale, std::nullopt, query_order, *bits, *counts}, log_threshold, *workspace,
      {query_block, num_means, workspace_heads, ranks, keep_best, {rule, value, top_k, min_keys, max_keys, head_floor}},
      args);
  if (!refusal.none()) return refusal.error();
  return nothing_to_do(args.scores) ? ffi::Error::Success() : launched(fgattn::launch_mean_mask(args, stream));
}

ffi::Error check_mean_mask_only(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer scale,
                                ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                                ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                                ffi::Result<ffi::AnyBuffer> workspace, int32_t query_block, int32_t num_means,
                                int32_t workspace_heads, bool ranks, bool keep_best, int32_t rule, float value,
                                int32_t top_k, int32_t min_keys, int32_t max_keys, float head_floor) {
  MeanMaskArgs args;
  return check_mean_mask({query, key, scale, std::nullopt, query_order, *bits, *counts}, log_threshold, *workspace,
                         {query_block, num_means, workspace_heads, ranks, keep_best,
                          {rule, value, top_k, min_keys, max_keys, head_floor}},
                         args)
      .error();
}

}  // namespace

// As FGATTN_SOURCE_HASH of handlers.cc, over the sources of the mask kernels and what they use.
#ifndef FGATTN_MASK_HASH
#define FGATTN_MASK_HASH ""
#endif
FGATTN_EXPORT const char* fgattn_mask_hash() { return FGATTN_MASK_HASH; }

FGATTN_EXPORT XLA_FFI_Error* FgattnExactMask(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnExactMass(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnMeanMask(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnCheckExactMask(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnCheckExactMass(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnCheckMeanMask(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnExactMask, exact_mask,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()          // query
                                  .Arg<ffi::AnyBuffer>()          // key
                                  .Arg<ffi::AnyBuffer>()          // lse
                                  .Arg<ffi::AnyBuffer>()          // scale
                                  .Arg<ffi::AnyBuffer>()          // log_threshold
                                  .OptionalArg<ffi::AnyBuffer>()  // query_order
                                  .Ret<ffi::AnyBuffer>()          // bits
                                  .Ret<ffi::AnyBuffer>()          // counts
                                  .Attr<int32_t>("query_block")
                                  .Attr<bool>("keep_best"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnExactMass, exact_mass,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()          // query
                                  .Arg<ffi::AnyBuffer>()          // key
                                  .Arg<ffi::AnyBuffer>()          // lse
                                  .Arg<ffi::AnyBuffer>()          // scale
                                  .OptionalArg<ffi::AnyBuffer>()  // query_order
                                  .Ret<ffi::AnyBuffer>()          // bits
                                  .Ret<ffi::AnyBuffer>()          // counts
                                  .Ret<ffi::AnyBuffer>()          // workspace
                                  .Attr<int32_t>("query_block")
                                  .Attr<int32_t>("workspace_heads")
                                  .Attr<int32_t>("rule")
                                  .Attr<float>("value")
                                  .Attr<int32_t>("top_k")
                                  .Attr<int32_t>("min_keys")
                                  .Attr<int32_t>("max_keys")
                                  .Attr<float>("head_floor"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnMeanMask, mean_mask,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()          // query
                                  .Arg<ffi::AnyBuffer>()          // key
                                  .Arg<ffi::AnyBuffer>()          // scale
                                  .Arg<ffi::AnyBuffer>()          // log_threshold
                                  .OptionalArg<ffi::AnyBuffer>()  // query_order
                                  .Ret<ffi::AnyBuffer>()          // bits
                                  .Ret<ffi::AnyBuffer>()          // counts
                                  .Ret<ffi::AnyBuffer>()          // workspace
                                  .Attr<int32_t>("query_block")
                                  .Attr<int32_t>("num_means")
                                  .Attr<int32_t>("workspace_heads")
                                  .Attr<bool>("ranks")
                                  .Attr<bool>("keep_best")
                                  .Attr<int32_t>("rule")
                                  .Attr<float>("value")
                                  .Attr<int32_t>("top_k")
                                  .Attr<int32_t>("min_keys")
                                  .Attr<int32_t>("max_keys")
                                  .Attr<float>("head_floor"),
                              {ffi::Traits::kCmdBufferCompatible});

// The checks alone, for machines without a GPU. The package never registers them.
XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnCheckExactMask, check_exact_mask_only,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .OptionalArg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("query_block")
                                  .Attr<bool>("keep_best"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnCheckExactMass, check_exact_mass_only,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .OptionalArg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("query_block")
                                  .Attr<int32_t>("workspace_heads")
                                  .Attr<int32_t>("rule")
                                  .Attr<float>("value")
                                  .Attr<int32_t>("top_k")
                                  .Attr<int32_t>("min_keys")
                                  .Attr<int32_t>("max_keys")
                                  .Attr<float>("head_floor"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnCheckMeanMask, check_mean_mask_only,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .OptionalArg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("query_block")
                                  .Attr<int32_t>("num_means")
                                  .Attr<int32_t>("workspace_heads")
                                  .Attr<bool>("ranks")
                                  .Attr<bool>("keep_best")
                                  .Attr<int32_t>("rule")
                                  .Attr<float>("value")
                                  .Attr<int32_t>("top_k")
                                  .Attr<int32_t>("min_keys")
                                  .Attr<int32_t>("max_keys")
                                  .Attr<float>("head_floor"));
