// The FFI handlers over a kernel for the host's memory, so that everything around the CUDA kernel is tested without a GPU:
// the checks, the strides and pointers of launch.h, the adapter, dispatch and all transforms.
//
// Plain loops through the same structs, in double precision. Also counts the launches, so that a test can tell a call that
// was refused from one that ran.
#include "handlers.cc"
#include "masks/mask_handlers.cc"
#include "masks/one_pass_handlers.cc"

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

double rounded(double number, fgattn::DType dtype) {
  uint16_t bits;
  store(&bits, 0, dtype, number);
  return load(&bits, 0, dtype);
}

void attend(const AttentionArgs& a, int64_t b, int64_t n, int64_t t, const std::vector<int32_t>& keys) {
  const int64_t kv = n / (a.num_heads / a.num_kv_heads);
  const auto at = [](const fgattn::TokenStrides& s, int64_t batch, int64_t token, int64_t head) {
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

ffi::Error host_exact_mask(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer lse, ffi::AnyBuffer scale,
                           ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                           ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts, int32_t query_block,
                           bool keep_best) {
  return exact_mask(nullptr, query, key, lse, scale, log_threshold, query_order, bits, counts, query_block, keep_best);
}

ffi::Error host_exact_mass(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer lse, ffi::AnyBuffer scale,
                           std::optional<ffi::AnyBuffer> query_order, ffi::Result<ffi::AnyBuffer> bits,
                           ffi::Result<ffi::AnyBuffer> counts, ffi::Result<ffi::AnyBuffer> workspace,
                           int32_t query_block, int32_t workspace_heads, int32_t rule, float value, int32_t top_k,
                           int32_t min_keys, int32_t max_keys, float head_floor) {
  return exact_mass(nullptr, query, key, lse, scale, query_order, bits, counts, workspace, query_block, workspace_heads,
                    rule, value, top_k, min_keys, max_keys, head_floor);
}

ffi::Error host_mean_mask(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer scale, ffi::AnyBuffer log_threshold,
                          std::optional<ffi::AnyBuffer> query_order, ffi::Result<ffi::AnyBuffer> bits,
                          ffi::Result<ffi::AnyBuffer> counts, ffi::Result<ffi::AnyBuffer> workspace,
                          int32_t query_block, int32_t num_means, int32_t workspace_heads, bool ranks, bool keep_best,
                          int32_t rule, float value, int32_t top_k, int32_t min_keys, int32_t max_keys,
                          float head_floor) {
  return mean_mask(nullptr, query, key, scale, log_threshold, query_order, bits, counts, workspace, query_block,
                   num_means, workspace_heads, ranks, keep_best, rule, value, top_k, min_keys, max_keys, head_floor);
}

ffi::Error host_one_pass(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer last_lse,
                         ffi::AnyBuffer log_threshold, std::optional<ffi::AnyBuffer> query_order,
                         ffi::Result<ffi::AnyBuffer> output, ffi::Result<ffi::AnyBuffer> lse,
                         ffi::Result<ffi::AnyBuffer> bits, ffi::Result<ffi::AnyBuffer> counts,
                         ffi::Result<ffi::AnyBuffer> workspace, float scale, int32_t query_block, bool keep_best) {
  return one_pass(nullptr, query, key, value, last_lse, log_threshold, query_order, output, lse, bits, counts, workspace,
                  scale, query_block, keep_best);
}

// One row of a mask: its place, and the queries that stand in it.
struct HostRow {
  int64_t batch, head, row;
  std::vector<int64_t> queries;
};

template <class Visit>
void each_row(const fgattn::ScoreArgs& a, Visit visit) {
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t n = 0; n < a.num_heads; ++n) {
      const int32_t* order = a.query_order;
      if (order != nullptr) order += b * a.query_order_strides.batch + n * a.query_order_strides.head;
      for (int64_t row = 0; row < a.num_rows; ++row) {
        HostRow here{b, n, row, {}};
        const int64_t end = std::min<int64_t>(a.num_queries, (row + 1) * a.query_block);
        for (int64_t p = row * a.query_block; p < end; ++p) here.queries.push_back(order != nullptr ? order[p] : p);
        visit(here);
      }
    }
  }
}

std::vector<double> query_of(const fgattn::ScoreArgs& a, const HostRow& at, int64_t token) {
  std::vector<double> numbers(a.head_dim);
  const int64_t first = at.batch * a.query_strides.batch + token * a.query_strides.token + at.head * a.query_strides.head;
  for (int h = 0; h < a.head_dim; ++h) numbers[h] = load(a.query, first + h, a.dtype);
  return numbers;
}

double score_of(const fgattn::ScoreArgs& a, const HostRow& at, const std::vector<double>& query, int64_t key) {
  const int64_t kv = at.head / (a.num_heads / a.num_kv_heads);
  const int64_t first = at.batch * a.key_strides.batch + key * a.key_strides.token + kv * a.key_strides.head;
  double sum = 0;
  for (int h = 0; h < a.head_dim; ++h) sum += query[h] * load(a.key, first + h, a.dtype);
  return sum * *a.scale;
}

// Peak or mass of every key over the queries of a row that count.
std::vector<double> scores_of(const fgattn::ScoreArgs& a, const HostRow& at, bool mass) {
  std::vector<double> result(a.num_keys);
  for (int64_t token : at.queries) {
    const double lse = a.lse[(at.batch * a.num_heads + at.head) * a.num_queries + token];
    if (lse == -std::numeric_limits<double>::infinity()) continue;
    const std::vector<double> query = query_of(a, at, token);
    for (int64_t key = 0; key < a.num_keys; ++key) {
      const double p = std::exp(score_of(a, at, query, key) - lse);
      result[key] = mass ? result[key] + p : std::max(result[key], p);
    }
  }
  return result;
}

void write_row(const fgattn::ScoreArgs& a, const HostRow& at, const std::vector<bool>& kept, uint32_t* bits,
               int32_t* counts) {
  const int64_t row = (at.batch * a.num_heads + at.head) * a.num_rows + at.row;
  std::fill_n(bits + row * a.num_words, a.num_words, 0);
  counts[row] = 0;
  for (int64_t key = 0; key < a.num_keys; ++key) {
    if (kept[key]) bits[row * a.num_words + key / 32] |= 1u << (key % 32), ++counts[row];
  }
}

std::vector<bool> above(const std::vector<double>& scores, double threshold, bool keep_best) {
  std::vector<bool> kept(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) kept[i] = scores[i] > threshold;
  if (keep_best && std::find(kept.begin(), kept.end(), true) == kept.end()) {
    kept[std::max_element(scores.begin(), scores.end()) - scores.begin()] = true;
  }
  return kept;
}

// Top-k and thresholds without floors: what the tests of the adapter ask for.
bool is_plain(const fgattn::SelectRule& rule) { return rule.rule != fgattn::Rule::kTopP && rule.head_floor == 0; }

std::vector<bool> best(const std::vector<double>& scores, const fgattn::SelectRule& rule) {
  std::vector<int> ranked(scores.size());
  for (size_t i = 0; i < ranked.size(); ++i) ranked[i] = static_cast<int>(i);
  std::stable_sort(ranked.begin(), ranked.end(), [&](int x, int y) { return scores[x] > scores[y]; });
  int count = rule.top_k;
  if (rule.rule == fgattn::Rule::kThreshold) {
    count = static_cast<int>(std::count_if(scores.begin(), scores.end(), [&](double x) { return x > rule.value; }));
  }
  count = std::min(std::max(count, rule.min_keys), rule.max_keys);
  std::vector<bool> kept(scores.size());
  for (int i = 0; i < count; ++i) kept[ranked[i]] = true;
  return kept;
}

}  // namespace

namespace fgattn {

const char* launch_exact_mask(const ExactMaskArgs& a, cudaStream_t) {
  ++launches;
  each_row(a.scores, [&](const HostRow& at) {
    const double threshold = std::exp(static_cast<double>(a.log_threshold[at.head]));
    write_row(a.scores, at, above(scores_of(a.scores, at, false), threshold, a.keep_best), a.bits, a.counts);
  });
  return nullptr;
}

const char* launch_exact_mass(const ExactMassArgs& a, cudaStream_t) {
  ++launches;
  if (!is_plain(a.rule)) return "not in these plain loops";
  each_row(a.scores, [&](const HostRow& at) {
    write_row(a.scores, at, best(scores_of(a.scores, at, true), a.rule), a.bits, a.counts);
  });
  return nullptr;
}

const char* launch_mean_mask(const MeanMaskArgs& a, cudaStream_t) {
  ++launches;
  if (a.ranks && !is_plain(a.rule)) return "not in these plain loops";
  const ScoreArgs& s = a.scores;
  each_row(s, [&](const HostRow& at) {
    const size_t of_part = s.query_block / a.num_means, present = (at.queries.size() + of_part - 1) / of_part;
    std::vector<double> scores(s.num_keys);
    for (size_t part = 0; part < present; ++part) {
      const size_t end = std::min(at.queries.size(), (part + 1) * of_part);
      std::vector<double> mean(s.head_dim), weights(s.num_keys);
      for (size_t i = part * of_part; i < end; ++i) {
        const std::vector<double> query = query_of(s, at, at.queries[i]);
        for (int h = 0; h < s.head_dim; ++h) mean[h] += query[h] / static_cast<double>(end - part * of_part);
      }
      for (double& x : mean) x = rounded(x, s.dtype);
      double total = 0;
      for (int64_t key = 0; key < s.num_keys; ++key) total += weights[key] = std::exp(score_of(s, at, mean, key));
      for (int64_t key = 0; key < s.num_keys; ++key) scores[key] += weights[key] / total / static_cast<double>(present);
    }
    const double threshold = std::exp(static_cast<double>(a.log_threshold[at.head]));
    write_row(s, at, a.ranks ? best(scores, a.rule) : above(scores, threshold, a.keep_best), a.bits, a.counts);
  });
  return nullptr;
}

const char* launch_one_pass(const OnePassArgs& call, cudaStream_t) {
  ++launches;
  const AttentionArgs& a = call.attention;
  *a.workspace = 0;
  const ScoreArgs s{a.query, a.key, call.last_lse, &a.scale, a.query_order, a.query_strides, a.key_strides,
                    a.query_order_strides, a.batch, a.num_queries, a.num_keys, a.num_heads, a.num_kv_heads, a.head_dim,
                    a.query_block, a.num_rows, a.num_words, a.dtype};
  std::vector<int32_t> keys(a.num_keys);
  for (int32_t key = 0; key < a.num_keys; ++key) keys[key] = key;
  each_row(s, [&](const HostRow& at) {
    for (int64_t token : at.queries) attend(a, at.batch, at.head, token, keys);
    const double threshold = std::exp(static_cast<double>(call.log_threshold[at.head]));
    write_row(s, at, above(scores_of(s, at, false), threshold, call.keep_best), call.bits, call.counts);
  });
  return nullptr;
}

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

FGATTN_EXPORT XLA_FFI_Error* FgattnHostExactMask(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnHostExactMass(XLA_FFI_CallFrame*);
FGATTN_EXPORT XLA_FFI_Error* FgattnHostMeanMask(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnHostExactMask, host_exact_mask,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnHostExactMass, host_exact_mass,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnHostMeanMask, host_mean_mask,
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

FGATTN_EXPORT XLA_FFI_Error* FgattnHostOnePass(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(FgattnHostOnePass, host_one_pass,
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
