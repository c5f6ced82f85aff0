// SPDX-License-Identifier: Apache-2.0
// A stack that can be left and entered again, known to AddressSanitizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 << 10;

class Fiber {
 public:
  Fiber() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stack_ = static_cast<char*>(memory);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, kStackBytes); }

  bool on_stack(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= stack_ && p < stack_ + kStackBytes;
  }

  // The next enter() calls `body`, which must end in leave_forever().
  void prepare(void (*body)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);
    fake_ = nullptr;
#endif
    body_ = body;
#if defined(__x86_64__)
    // What switch_stacks pops: six registers and the address to return to, which sees the stack as after a call.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&start);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    sp_ = top - 8;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, &start, 0);
#endif
  }

  // From the host's stack: returns when the fiber leaves.
  void enter() {
    running_ = this;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&host_fake_, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
    switch_stacks(&host_sp_, sp_);
#else
    swapcontext(&host_context_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(host_fake_, nullptr, nullptr);
#endif
  }

  // From the fiber: back to the host until the next enter().
  static void leave() { running_->leave(false); }
  [[noreturn]] static void leave_forever() {
    running_->leave(true);
    std::abort();
  }

 private:
  void leave(bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_, host_bottom_, host_size_);
#endif
    (void)for_ever;
#if defined(__x86_64__)
    switch_stacks(&sp_, host_sp_);
#else
    swapcontext(&context_, &host_context_);
#endif
    finish();
  }

  void finish() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &host_bottom_, &host_size_);
#endif
  }

  static void start() {
    running_->finish();
    running_->body_();
    std::abort();
  }

#if defined(__x86_64__)
  static void switch_stacks(void** save, void* load) __asm__("precal_cuda_on_cpu_switch");
  void* sp_ = nullptr;
  inline static void* host_sp_ = nullptr;
#else
  ucontext_t context_;
  inline static ucontext_t host_context_;
#endif

  char* stack_;
  void (*body_)() = nullptr;
  void* fake_ = nullptr;
  inline static Fiber* running_ = nullptr;
  inline static void* host_fake_ = nullptr;
  inline static const void* host_bottom_ = nullptr;
  inline static size_t host_size_ = 0;
};

}  // namespace cuda_on_cpu

#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".hidden precal_cuda_on_cpu_switch\n"
    ".globl precal_cuda_on_cpu_switch\n"
    ".type precal_cuda_on_cpu_switch, @function\n"
    "precal_cuda_on_cpu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size precal_cuda_on_cpu_switch, .-precal_cuda_on_cpu_switch\n");
#endif
