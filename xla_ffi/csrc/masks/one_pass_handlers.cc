// The XLA FFI handler of dense attention that finds a mask on its way: checks every buffer again, fills the struct of
// one_pass_launch.h, launches.
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "masks/one_pass_launch.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using fgattn::AttentionArgs;
using fgattn::describe;
using fgattn::launched;
using fgattn::mask_strides;
using fgattn::MaskStrides;
using fgattn::OnePassArgs;
using fgattn::Refusal;
using fgattn::token_strides;

struct OnePassBuffers {
  ffi::AnyBuffer query, key, value, last_lse, log_threshold;
  std::optional<ffi::AnyBuffer> query_order;
  ffi::AnyBuffer output, lse, bits, counts, workspace;
};

// Fills `call` and returns what is wrong, if anything is; `call` counts only then if nothing is.
Refusal check_one_pass(const OnePassBuffers& x, float scale, int32_t query_block, bool keep_best, OnePassArgs& call) {
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
  refusal.unless_fits("value", x.value, dtype,
                      {{"B", batch}, {"S", num_keys}, {"K", num_kv_heads}, {"H", head_dim}});
  refusal.unless(num_keys >= 1, "expected `key` with at least one key", describe(x.key));
  refusal.unless(num_kv_heads >= 1 && num_heads % num_kv_heads == 0,
                 "expected query heads N that are a multiple of key heads K",
                 "N=" + std::to_string(num_heads) + " and K=" + std::to_string(num_kv_heads));
  refusal.unless(query_block == 64 || query_block == 128, "expected `query_block` 64 or 128",
                 "query_block=" + std::to_string(query_block));
  refusal.unless(std::isfinite(scale) && scale >= 0.0f, "expected `scale` finite and not negative",
                 "scale=" + std::to_string(scale));
  if (!refusal.none()) return refusal;

  const int64_t num_rows = (num_queries + query_block - 1) / query_block, num_words = fgattn::words_of_row(num_keys);
  refusal.unless_fits("last_lse", x.last_lse, ffi::F32, {{"B", batch}, {"N", num_heads}, {"T", num_queries}});
  refusal.unless_fits("log_threshold", x.log_threshold, ffi::F32, {{"N", num_heads}});
  if (x.query_order) {
    refusal.unless_fits("query_order", *x.query_order, ffi::S32,
                        {{"B", batch, true}, {"N", num_heads, true}, {"T", num_queries}});
  }
  refusal.unless_fits("output", x.output, dtype,
                      {{"B", batch}, {"T", num_queries}, {"N", num_heads}, {"H", head_dim}});
  refusal.unless_fits("lse", x.lse, ffi::F32, {{"B", batch}, {"N", num_heads}, {"T", num_queries}});
  refusal.unless_fits("bits", x.bits, ffi::U32,
                      {{"B", batch}, {"N", num_heads}, {"R", num_rows}, {"W", num_words}});
  refusal.unless_fits("counts", x.counts, ffi::S32, {{"B", batch}, {"N", num_heads}, {"R", num_rows}});
  refusal.unless_fits("workspace", x.workspace, ffi::S32, {{"counters", fgattn::kWorkspaceCounters}});
  refusal.unless_below_2_31("T + 128 query positions", num_queries + 128);
  refusal.unless_below_2_31("W * 32 key numbers", num_words * 32);
  refusal.unless_below_2_31("B query batches", batch);
  refusal.unless_below_2_31("N query heads", num_heads);
  // Each factor is known to be below 2^31 here: no product overflows.
  if (refusal.none()) refusal.unless_below_2_31("B * N heads of the whole batch", batch * num_heads);
  if (refusal.none()) refusal.unless_below_2_31("B * N * R rows", batch * num_heads * num_rows);
  refusal.unless_below_2_31("2 K H bytes from key to key", 2 * num_kv_heads * head_dim);
  refusal.unless_aligned("query", x.query, 16);
  refusal.unless_aligned("key", x.key, 16);
  refusal.unless_aligned("value", x.value, 16);
  refusal.unless_aligned("output", x.output, 16);
  refusal.unless_aligned("last_lse", x.last_lse, 4);
  refusal.unless_aligned("log_threshold", x.log_threshold, 4);
  if (x.query_order) refusal.unless_aligned("query_order", *x.query_order, 4);
  refusal.unless_aligned("lse", x.lse, 4);
  refusal.unless_aligned("bits", x.bits, 4);
  refusal.unless_aligned("counts", x.counts, 4);
  refusal.unless_aligned("workspace", x.workspace, 4);
  if (!refusal.none()) return refusal;

  AttentionArgs& args = call.attention;
  args.query = x.query.untyped_data();
  args.key = x.key.untyped_data();
  args.value = x.value.untyped_data();
  args.bits = nullptr;
  args.work_order = nullptr;
  args.query_order = x.query_order ? static_cast<const int32_t*>(x.query_order->untyped_data()) : nullptr;
  args.output = x.output.untyped_data();
  args.lse = static_cast<float*>(x.lse.untyped_data());
  args.workspace = static_cast<int32_t*>(x.workspace.untyped_data());
  args.query_strides = token_strides(x.query);
  args.key_strides = token_strides(x.key);
  args.value_strides = token_strides(x.value);
  args.output_strides = token_strides(x.output);
  args.bits_strides = args.work_order_strides = MaskStrides{0, 0};
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
  args.scale = scale;
  args.dtype = dtype == ffi::BF16 ? fgattn::DType::kBFloat16 : fgattn::DType::kFloat16;
  call.last_lse = static_cast<const float*>(x.last_lse.untyped_data());
  call.log_threshold = static_cast<const float*>(x.log_threshold.untyped_data());
  call.bits = static_cast<uint32_t*>(x.bits.untyped_data());
  call.counts = static_cast<int32_t*>(x.counts.untyped_data());
  call.keep_best = keep_best;
  return refusal;
}

ffi::Error one_pass(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                    ffi::AnyBuffer last_lse, ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                    ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                    ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                    ffi::Result<ffi::AnyBuffer> workspace, float scale, int32_t query_block, bool keep_best) {
  OnePassArgs call;
  const Refusal refusal = check_one_pass({query, key, value, last_lse, log_threshold, query_order, *output, *lse, *bits,
                                          *counts, *workspace},
                                         scale, query_block, keep_best, call);
  if (!refusal.none()) return refusal.error();
  const AttentionArgs& args = call.attention;
  if (args.batch == 0 || args.num_queries == 0 || args.num_heads == 0) return ffi::Error::Success();
  return launched(fgattn::launch_one_pass(call, stream));
}

ffi::Error check_one_pass_only(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer last_lse,
                               ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                               ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                               ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                               ffi::Result<ffi::AnyBuffer> workspace, float scale, int32_t query_block,
                               bool keep_best) {
  OnePassArgs call;
  return check_one_pass({query, key, value, last_lse, log_threshold, query_order, *output, *lse, *bits, *counts,
                         *workspace},
                        scale, query_block, keep_best, call)
      .error();
}

}  // namespace

FGATTN_EXPORT XLA_FFI_Error* FgattnOnePass(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnCheckOnePass(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnOnePass, one_pass,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()          // query
                                  .Arg<ffi::AnyBuffer>()          // key
                                  .Arg<ffi::AnyBuffer>()          // value
                                  .Arg<ffi::AnyBuffer>()          // last_lse
                                  .Arg<ffi::AnyBuffer>()          // log_threshold
                                  .OptionalArg<ffi::AnyBuffer>()  // query_order
                                  .Ret<ffi::AnyBuffer>()          // output
                                  .Ret<ffi::AnyBuffer>()          // lse
                                  .Ret<ffi::AnyBuffer>()          // bits
                                  .Ret<ffi::AnyBuffer>()          // counts
                                  .Ret<ffi::AnyBuffer>()          // workspace
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("query_block")
                                  .Attr<bool>("keep_best"),
                              {ffi::Traits::kCmdBufferCompatible});

// The checks alone, for machines without a GPU. The package never registers them.
XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnCheckOnePass, check_one_pass_only,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .OptionalArg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("query_block")
                                  .Attr<bool>("keep_best"));
