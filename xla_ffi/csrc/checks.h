// How handlers check the buffers of a call, and the words in which they refuse one.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace fgattn {

namespace ffi = xla::ffi;

constexpr int64_t kAny = -1;
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// One axis that a buffer should have: its letter, its extent, and whether 1 will do as well.
struct Axis {
  const char* letter;
  int64_t extent = kAny;
  bool may_be_one = false;
};

using Axes = std::initializer_list<Axis>;

// Words of a mask row: 32 keys each, rounded up to 16 bytes (docs/mask_format.md).
inline int64_t words_of_row(int64_t num_keys) { return 4 * ((num_keys + 127) / 128); }

inline std::string describe(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  text << buffer.element_type() << "[";
  const char* comma = "";
  for (int64_t extent : buffer.dimensions()) {
    text << comma << extent;
    comma = ", ";
  }
  text << "]";
  return text.str();
}

inline std::string describe(ffi::DataType dtype, Axes axes) {
  std::ostringstream text;
  text << dtype << "[";
  const char* comma = "";
  for (const Axis& axis : axes) {
    text << comma << axis.letter;
    if (axis.extent != kAny) text << "=" << axis.extent;
    if (axis.may_be_one && axis.extent != 1) text << "|1";
    comma = ", ";
  }
  text << "]";
  return text.str();
}

inline bool fits(const ffi::AnyBuffer& buffer, ffi::DataType dtype, Axes axes) {
  const auto extents = buffer.dimensions();
  if (buffer.element_type() != dtype || extents.size() != axes.size()) return false;
  size_t i = 0;
  for (const Axis& axis : axes) {
    const int64_t extent = extents[i++];
    if (axis.extent != kAny && extent != axis.extent && !(axis.may_be_one && extent == 1)) return false;
  }
  return true;
}

// Words of what is wrong; empty while nothing is. Keeps the first reason: later checks may rest on what it says is not so.
class Refusal {
 public:
  bool none() const { return words_.empty(); }
  ffi::Error error() const { return none() ? ffi::Error::Success() : ffi::Error::InvalidArgument(words_); }

  void unless(bool right, const std::string& expected, const std::string& got) {
    if (none() && !right) words_ = expected + ", got " + got;
  }

  void unless_fits(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype, Axes axes) {
    if (none() && !fits(buffer, dtype, axes)) {
      unless(false, "expected `" + std::string(name) + "` " + describe(dtype, axes), describe(buffer));
    }
  }

  // The launches load and store several elements at once.
  void unless_aligned(const char* name, const ffi::AnyBuffer& buffer, uintptr_t bytes) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(buffer.untyped_data()) % bytes;
    if (none() && offset != 0) {
      unless(false, "expected the address of `" + std::string(name) + "` to be a multiple of " + std::to_string(bytes),
             "remainder=" + std::to_string(offset));
    }
  }

  void unless_below_2_31(const char* what, int64_t number) {
    if (none() && number > kMaxInt32) {
      unless(false, "expected " + std::string(what) + " below 2^31, which the kernel counts in 32 bits",
             std::to_string(number));
    }
  }

 private:
  std::string words_;
};

inline TokenStrides token_strides(const ffi::AnyBuffer& buffer) {
  const auto extents = buffer.dimensions();  // [B, tokens, heads, H], row-major
  const int64_t token = extents[2] * extents[3];
  return {extents[1] * token, token, extents[3]};
}

inline MaskStrides mask_strides(const ffi::AnyBuffer& buffer) {
  const auto extents = buffer.dimensions();  // [B|1, N|1, ...], row-major
  int64_t head = 1;
  for (size_t i = 2; i < extents.size(); ++i) head *= extents[i];
  return {extents[0] == 1 ? 0 : extents[1] * head, extents[1] == 1 ? 0 : head};
}

inline ffi::Error launched(const char* failure) {
  return failure == nullptr ? ffi::Error::Success() : ffi::Error::Internal(failure);
}

}  // namespace fgattn

// The macro that defines a handler sets no visibility: without this `-fvisibility=hidden` would hide its symbol.
#define FGATTN_EXPORT extern "C" __attribute__((visibility("default")))
