// SPDX-License-Identifier: Apache-2.0
// Memory for a call's intermediate values: on cache lines, and not cleared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace precal {

class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;

  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes)
      : data_(static_cast<uint8_t*>(::operator new(size_t(bytes > 0 ? bytes : 1), std::align_val_t(kAlignment)))) {}

  template <typename T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(data_.get() + byte_offset);
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<uint8_t, Free> data_;
};

}  // namespace precal
