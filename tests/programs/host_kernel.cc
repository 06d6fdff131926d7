// The FFI handlers over a kernel for the host's memory, so that everything around the CUDA kernel is tested without a GPU:
// the checks, the strides and pointers of launch.h, the adapter, dispatch and all transforms.
//
// Plain loops through the same structs, in double precision. Also counts the launches, so that a test can tell a call that
// was refused from one that ran.
#include "handlers.cc"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace {

int launches = 0;

double load(const void* from, int64_t at, fgattn::DType dtype) {
  if (dtype == fgattn::DType::kFloat16) return static_cast<const _Float16*>(from)[at];
  const uint32_t word = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16;
  float number;
  std::memcpy(&number, &word, sizeof number);
  return number;
}

void store(void* to, int64_t at, fgattn::DType dtype, double number) {
  if (dtype == fgattn::DType::kFloat16) {
    static_cast<_Float16*>(to)[at] = static_cast<_Float16>(number);
    return;
  }
  const float rounded = static_cast<float>(number);
  uint32_t word;
  std::memcpy(&word, &rounded, sizeof word);
  if (rounded == rounded) word += 0x7fff + (word >> 16 & 1);  // to nearest, ties to even
  static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(word >> 16);
}

void attend(const AttentionArgs& a, int64_t b, int64_t n, int64_t t, const std::vector<int32_t>& keys) {
  const int64_t kv = n / (a.num_heads / a.num_kv_heads);
  const auto at = [](const TokenStrides& s, int64_t batch, int64_t token, int64_t head) {
    return batch * s.batch + token * s.token + head * s.head;
  };
  const int64_t query = at(a.query_strides, b, t, n), output = at(a.output_strides, b, t, n);
  std::vector<double> scores(keys.size());
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const int64_t key = at(a.key_strides, b, keys[i], kv);
    for (int h = 0; h < a.head_dim; ++h) scores[i] += load(a.query, query + h, a.dtype) * load(a.key, key + h, a.dtype);
    scores[i] *= a.scale;
    largest = std::max(largest, scores[i]);
  }
  std::vector<double> sum(a.head_dim);
  for (size_t i = 0; i < keys.size(); ++i) {
    const double weight = std::exp(scores[i] - largest);
    const int64_t value = at(a.value_strides, b, keys[i], kv);
    for (int h = 0; h < a.head_dim; ++h) sum[h] += weight * load(a.value, value + h, a.dtype);
    total += weight;
  }
  for (int h = 0; h < a.head_dim; ++h) store(a.output, output + h, a.dtype, keys.empty() ? 0 : sum[h] / total);
  a.lse[(b * a.num_heads + n) * a.num_queries + t] = static_cast<float>(largest + std::log(total));
}

ffi::Error host_attention(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer bits,
                          ffi::AnyBuffer work, std::optional<ffi::AnyBuffer> query_order,
                          ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                          ffi::Result<ffi::AnyBuffer> workspace, float scale, int32_t query_block) {
  return attention(nullptr, query, key, value, bits, work, query_order, output, lse, workspace, scale, query_block);
}

ffi::Error host_work_order(ffi::AnyBuffer bits, ffi::Result<ffi::AnyBuffer> result, int32_t num_keys) {
  return work_order(nullptr, bits, result, num_keys);
}

}  // namespace

namespace fgattn {

const char* launch_attention(const AttentionArgs& a, cudaStream_t) {
  ++launches;
  *a.workspace = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t n = 0; n < a.num_heads; ++n) {
      const uint32_t* bits = a.bits + b * a.bits_strides.batch + n * a.bits_strides.head;
      const int32_t* work = a.work_order + b * a.work_order_strides.batch + n * a.work_order_strides.head;
      const int32_t* order = a.query_order;
      if (order != nullptr) order += b * a.query_order_strides.batch + n * a.query_order_strides.head;
      for (int item = 0; item < a.num_rows; ++item) {
        const int64_t row = work[2 * item];
        std::vector<int32_t> keys;
        for (int32_t key = 0; key < a.num_keys; ++key) {
          if (bits[row * a.num_words + key / 32] >> (key % 32) & 1) keys.push_back(key);
        }
        if (static_cast<int32_t>(keys.size()) != work[2 * item + 1]) return "the work order is of other bits";
        const int64_t end = std::min<int64_t>(a.num_queries, (row + 1) * a.query_block);
        for (int64_t p = row * a.query_block; p < end; ++p) attend(a, b, n, order != nullptr ? order[p] : p, keys);
      }
    }
  }
  return nullptr;
}

const char* launch_work_order(const WorkOrderArgs& a, cudaStream_t) {
  ++launches;
  for (int64_t mask = 0; mask < a.num_masks; ++mask) {
    const uint32_t* bits = a.bits + mask * a.num_rows * a.num_words;
    int32_t* work = a.work_order + mask * a.num_rows * 2;
    int32_t place = 0;
    for (int32_t count = a.num_keys; count >= 0; --count) {
      for (int32_t row = 0; row < a.num_rows; ++row) {
        int32_t kept = 0;
        for (int32_t key = 0; key < a.num_keys; ++key) kept += bits[row * a.num_words + key / 32] >> (key % 32) & 1;
        if (kept != count) continue;
        work[2 * place] = row;
        work[2 * place++ + 1] = kept;
      }
    }
  }
  return nullptr;
}

}  // namespace fgattn

FGATTN_EXPORT int fgattn_host_launches() { return launches; }

// A buffer as a test describes it: the checks look at shapes and addresses and touch no memory, so that shapes beyond 2^31
// and odd addresses can be tried without arrays of that kind.
struct HostBuffer {
  int64_t dtype, rank, extents[4], address;
};

// What the attention handler says of `buffers` (those of AttentionBuffers, in that order); empty if nothing is wrong.
FGATTN_EXPORT const char* fgattn_host_check(HostBuffer* buffers, float scale, int32_t query_block) {
  static std::string words;
  std::vector<XLA_FFI_Buffer> raw(9);
  for (int i = 0; i < 9; ++i) {
    raw[i].struct_size = sizeof(XLA_FFI_Buffer);
    raw[i].dtype = static_cast<XLA_FFI_DataType>(buffers[i].dtype);
    raw[i].data = reinterpret_cast<void*>(buffers[i].address);
    raw[i].rank = buffers[i].rank;
    raw[i].dims = buffers[i].extents;
  }
  const auto at = [&](int i) { return ffi::AnyBuffer(&raw[i]); };
  AttentionArgs args;
  words = check_attention({at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)}, scale, query_block, args)
              .error()
              .message();
  return words.c_str();
}

FGATTN_EXPORT XLA_FFI_Error* FgattnHostAttention(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnHostWorkOrder(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnHostAttention, host_attention,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnHostWorkOrder, host_work_order,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int32_t>("num_keys"));
