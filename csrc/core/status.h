// SPDX-License-Identifier: Apache-2.0
// The result of a check or a kernel. Kernels return it; only bindings throw.
#pragma once

#include <sstream>
#include <string>
#include <utility>

namespace precal {

enum class StatusCode { kOk, kInvalidType, kInvalidValue, kUnavailable };

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A caller's text as a message shows it: printable, and not longer than a line.
inline std::string quoted(const std::string& text) {
  constexpr size_t kLongest = 40;
  std::string shown = text.substr(0, kLongest);
  for (char& c : shown) {
    if (c < ' ' || c > '~') c = '?';
  }
  return shown + (text.size() > kLongest ? "..." : "");
}

template <typename... Parts>
Status invalid_value(const Parts&... parts) {
  return {StatusCode::kInvalidValue, concat(parts...)};
}

template <typename... Parts>
Status invalid_type(const Parts&... parts) {
  return {StatusCode::kInvalidType, concat(parts...)};
}

}  // namespace precal

#define PRECAL_RETURN_IF_ERROR(expression)         \
  do {                                             \
    ::precal::Status precal_status = (expression); \
    if (!precal_status.ok()) return precal_status; \
  } while (0)
