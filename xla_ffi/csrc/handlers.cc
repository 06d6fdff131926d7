// XLA FFI handlers: check every buffer again, fill the structs of launch.h, launch.
//
// Compiles without nvcc. What Python has checked before is checked once more, because a program may be called with other
// buffers than it was traced with; a message names the operand, what was expected and what came.
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "launch.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using fgattn::AttentionArgs;
using fgattn::describe;
using fgattn::launched;
using fgattn::mask_strides;
using fgattn::MaskStrides;
using fgattn::Refusal;
using fgattn::token_strides;
using fgattn::WorkOrderArgs;
using fgattn::words_of_row;

struct AttentionBuffers {
  ffi::AnyBuffer query, key, value, bits, work_order;
  std::optional<ffi::AnyBuffer> query_order;
  ffi::AnyBuffer output, lse, workspace;
};

// Fills `args` and returns what is wrong, if anything is; `args` counts only then if nothing is.
Refusal check_attention(const AttentionBuffers& x, float scale, int32_t query_block, AttentionArgs& args) {
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
                 "expected query heads N that are a multiple of key/value heads K",
                 "N=" + std::to_string(num_heads) + " and K=" + std::to_string(num_kv_heads));
  refusal.unless(query_block == 64 || query_block == 128, "expected `query_block` 64 or 128",
                 "query_block=" + std::to_string(query_block));
  refusal.unless(std::isfinite(scale) && scale >= 0.0f, "expected `scale` finite and not negative",
                 "scale=" + std::to_string(scale));
  if (!refusal.none()) return refusal;

  const int64_t num_rows = (num_queries + query_block - 1) / query_block, num_words = words_of_row(num_keys);
  refusal.unless_fits("bits", x.bits, ffi::U32,
                      {{"B", batch, true}, {"N", num_heads, true}, {"R", num_rows}, {"W", num_words}});
  if (!refusal.none()) return refusal;
  // An order says how many keys a row keeps: rows that differ need orders of their own.
  const auto bits = x.bits.dimensions();
  refusal.unless_fits("work_order", x.work_order, ffi::S32,
                      {{"B", batch, bits[0] == 1}, {"N", num_heads, bits[1] == 1}, {"R", num_rows}, {"2", 2}});
  if (x.query_order) {
    refusal.unless_fits("query_order", *x.query_order, ffi::S32,
                        {{"B", batch, true}, {"N", num_heads, true}, {"T", num_queries}});
  }
  refusal.unless_fits("output", x.output, dtype,
                      {{"B", batch}, {"T", num_queries}, {"N", num_heads}, {"H", head_dim}});
  refusal.unless_fits("lse", x.lse, ffi::F32, {{"B", batch}, {"N", num_heads}, {"T", num_queries}});
  refusal.unless_below_2_31("R * M query positions", num_rows * query_block);
  refusal.unless_below_2_31("2 * W * 32 key numbers", 2 * num_words * 32);  // two bits of an entry say whose it is
  refusal.unless_below_2_31("B query batches", batch);
  refusal.unless_below_2_31("N query heads", num_heads);
  // Each factor is known to be below 2^31 here: no product overflows.
  if (refusal.none()) refusal.unless_below_2_31("B * N heads of the whole batch", batch * num_heads);
  if (refusal.none()) refusal.unless_below_2_31("B * N * R rows", batch * num_heads * num_rows);
  const int64_t workspace = refusal.none() ? fgattn::workspace_size(batch, num_heads, num_rows) : 0;
  refusal.unless_below_2_31("4 + 4 B N R numbers of workspace", workspace);
  refusal.unless_below_2_31("2 K H bytes from key to key", 2 * num_kv_heads * head_dim);
  if (refusal.none()) refusal.unless_fits("workspace", x.workspace, ffi::S32, {{"4 + 4 B N R", workspace}});
  refusal.unless_aligned("query", x.query, 16);
  refusal.unless_aligned("key", x.key, 16);
  refusal.unless_aligned("value", x.value, 16);
  refusal.unless_aligned("bits", x.bits, 16);
  refusal.unless_aligned("output", x.output, 16);
  refusal.unless_aligned("work_order", x.work_order, 8);
  if (x.query_order) refusal.unless_aligned("query_order", *x.query_order, 4);
  refusal.unless_aligned("lse", x.lse, 4);
  refusal.unless_aligned("workspace", x.workspace, 4);
  if (!refusal.none()) return refusal;

  args.query = x.query.untyped_data();
  args.key = x.key.untyped_data();
  args.value = x.value.untyped_data();
  args.bits = static_cast<const uint32_t*>(x.bits.untyped_data());
  args.work_order = static_cast<const int32_t*>(x.work_order.untyped_data());
  args.query_order = x.query_order ? static_cast<const int32_t*>(x.query_order->untyped_data()) : nullptr;
  args.output = x.output.untyped_data();
  args.lse = static_cast<float*>(x.lse.untyped_data());
  args.workspace = static_cast<int32_t*>(x.workspace.untyped_data());
  args.query_strides = token_strides(x.query);
  args.key_strides = token_strides(x.key);
  args.value_strides = token_strides(x.value);
  args.output_strides = token_strides(x.output);
  args.bits_strides = mask_strides(x.bits);
  args.work_order_strides = mask_strides(x.work_order);
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
  return refusal;
}

Refusal check_work_order(const ffi::AnyBuffer& bits, const ffi::AnyBuffer& work_order, int32_t num_keys,
                         WorkOrderArgs& args) {
  Refusal refusal;
  refusal.unless(num_keys >= 1, "expected `num_keys` of at least 1", "num_keys=" + std::to_string(num_keys));
  refusal.unless_fits("bits", bits, ffi::U32, {{"B"}, {"N"}, {"R"}, {"W", words_of_row(num_keys)}});
  if (!refusal.none()) return refusal;
  const auto extents = bits.dimensions();
  refusal.unless_fits("work_order", work_order, ffi::S32,
                      {{"B", extents[0]}, {"N", extents[1]}, {"R", extents[2]}, {"2", 2}});
  refusal.unless_below_2_31("W * 32 key numbers", extents[3] * 32);
  for (int i = 0; i < 3; ++i) refusal.unless_below_2_31("each extent of `bits`", extents[i]);
  if (refusal.none()) refusal.unless_below_2_31("B * N heads of the whole batch", extents[0] * extents[1]);
  if (refusal.none()) refusal.unless_below_2_31("B * N * R rows", extents[0] * extents[1] * extents[2]);
  refusal.unless_aligned("bits", bits, 16);
  refusal.unless_aligned("work_order", work_order, 8);
  if (!refusal.none()) return refusal;
  args.bits = static_cast<const uint32_t*>(bits.untyped_data());
  args.work_order = static_cast<int32_t*>(work_order.untyped_data());
  args.num_masks = static_cast<int32_t>(extents[0] * extents[1]);
  args.num_rows = static_cast<int32_t>(extents[2]);
  args.num_words = static_cast<int32_t>(extents[3]);
  args.num_keys = num_keys;
  return refusal;
}

ffi::Error attention(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                     ffi::AnyBuffer bits, ffi::AnyBuffer work_order, std::optional<ffi::AnyBuffer> query_order,
                     ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                     ffi::Result<ffi::AnyBuffer> workspace, float scale, int32_t query_block) {
  AttentionArgs args;
  const Refusal refusal = check_attention(
      {query, key, value, bits, work_order, query_order, *output, *lse, *workspace}, scale, query_block, args);
  if (!refusal.none()) return refusal.error();
  if (args.batch == 0 || args.num_queries == 0 || args.num_heads == 0) return ffi::Error::Success();
  return launched(fgattn::launch_attention(args, stream));
}

ffi::Error check_attention_only(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer bits,
                                ffi::AnyBuffer work_order, std::optional<ffi::AnyBuffer> query_order,
                                ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                                ffi::Result<ffi::AnyBuffer> workspace, float scale, int32_t query_block) {
  AttentionArgs args;
  return check_attention({query, key, value, bits, work_order, query_order, *output, *lse, *workspace}, scale,
                         query_block, args)
      .error();
}

ffi::Error work_order(cudaStream_t stream, ffi::AnyBuffer bits, ffi::Result<ffi::AnyBuffer> work_order,
                      int32_t num_keys) {
  WorkOrderArgs args;
  const Refusal refusal = check_work_order(bits, *work_order, num_keys, args);
  if (!refusal.none()) return refusal.error();
  if (args.num_masks == 0 || args.num_rows == 0) return ffi::Error::Success();
  return launched(fgattn::launch_work_order(args, stream));
}

ffi::Error check_work_order_only(ffi::AnyBuffer bits, ffi::Result<ffi::AnyBuffer> work_order, int32_t num_keys) {
  WorkOrderArgs args;
  return check_work_order(bits, *work_order, num_keys, args).error();
}

}  // namespace

FGATTN_EXPORT XLA_FFI_Error* FgattnAttention(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnWorkOrder(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnCheckAttention(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnCheckWorkOrder(XLA_FFI_CallFrame*);

// Python compares it with what the installed jaxlib speaks before it registers anything: XLA takes down every backend of
// the process over a handler that is newer than itself.
FGATTN_EXPORT int fgattn_ffi_api_minor() { return XLA_FFI_API_MINOR; }

// Raised with every change of targets, operands, results or attributes.
FGATTN_EXPORT int fgattn_abi_version() { return 5; }

// SHA-256 over the sources as the build saw them (tests/gpu_ledger.py says how), empty where the build passed none. A run of
// the GPU tests counts for those sources only.
#ifndef FGATTN_SOURCE_HASH
#define FGATTN_SOURCE_HASH ""
#endif
FGATTN_EXPORT const char* fgattn_source_hash() { return FGATTN_SOURCE_HASH; }

// Both launches allocate nothing and never wait, so that CUDA graphs may record them.
XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnAttention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()          // query
                                  .Arg<ffi::AnyBuffer>()          // key
                                  .Arg<ffi::AnyBuffer>()          // value
                                  .Arg<ffi::AnyBuffer>()          // bits
                                  .Arg<ffi::AnyBuffer>()          // work_order
                                  .OptionalArg<ffi::AnyBuffer>()  // query_order
                                  .Ret<ffi::AnyBuffer>()          // output
                                  .Ret<ffi::AnyBuffer>()          // lse
                                  .Ret<ffi::AnyBuffer>()          // workspace
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("query_block"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnWorkOrder, work_order,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // bits
                                  .Ret<ffi::AnyBuffer>()  // work_order
                                  .Attr<int32_t>("num_keys"),
                              {ffi::Traits::kCmdBufferCompatible});

// The checks alone, for machines without a GPU. The package never registers them.
XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnCheckAttention, check_attention_only,
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
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("query_block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnCheckWorkOrder, check_work_order_only,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int32_t>("num_keys"));
