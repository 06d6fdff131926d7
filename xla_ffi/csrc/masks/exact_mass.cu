// Starts the exact mass kernel and the selection of the best keys, some heads at a time.
#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "masks/mask_launch.h"
#include "masks/mass_kernel.cuh"
#include "masks/start.cuh"
#include "masks/start_select.cuh"

namespace fgattn {
namespace {

template <class C>
cudaError_t launch(const ExactMassArgs& args, int num_sms, cudaStream_t stream) {
  const ScoreArgs& s = args.scores;
  const int heads = s.batch * s.num_heads;
  SelectArgs selection{};
  selection.scores = args.workspace;
  selection.stride = 32 * static_cast<int64_t>(s.num_words);
  selection.rule = args.rule;
  selection.num_keys = s.num_keys, selection.num_words = s.num_words, selection.num_rows = s.num_rows;
  int32_t* floors = reinterpret_cast<int32_t*>(args.workspace + args.workspace_heads * s.num_rows * selection.stride);
  for (int first = 0; first < heads; first += args.workspace_heads) {
    const int some = std::min(args.workspace_heads, heads - first);
    const int64_t row = static_cast<int64_t>(first) * s.num_rows;
    cudaError_t error = launch_scores<C>(exact_mass_kernel<C>, all_items<C>(s, first, some), num_sms, stream, args);
    if (error != cudaSuccess) return error;
    selection.counts = args.counts + row;
    selection.bits = args.bits + row * s.num_words;
    error = select_rows<WholeScores>(selection, some, s, floors, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class Element, int kHeadDim>
cudaError_t launch_blocks(const ExactMassArgs& args, int num_sms, cudaStream_t stream) {
  return args.scores.query_block == 128 ? launch<ScoreConfig<Element, kHeadDim, 128>>(args, num_sms, stream)
                                        : launch<ScoreConfig<Element, kHeadDim, 64>>(args, num_sms, stream);
}

template <class Element>
cudaError_t launch_widths(const ExactMassArgs& args, int num_sms, cudaStream_t stream) {
  return args.scores.head_dim == 128 ? launch_blocks<Element, 128>(args, num_sms, stream)
                                     : launch_blocks<Element, 64>(args, num_sms, stream);
}

}  // namespace

const char* launch_exact_mass(const ExactMassArgs& args, cudaStream_t stream) {
  int num_sms = 0;
  if (const char* refused = check_scores(args.scores, num_sms)) return refused;
  const cudaError_t error = args.scores.dtype == DType::kBFloat16 ? launch_widths<__nv_bfloat16>(args, num_sms, stream)
                                                                  : launch_widths<__half>(args, num_sms, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fgattn
