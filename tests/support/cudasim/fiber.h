// A fiber: a separate call stack, entered and left explicitly. Every CUDA thread is a fiber, and
// all of them take turns on one OS thread. The sanitizers are notified of each switch. For
// ThreadSanitizer a fiber is a thread and a switch orders nothing, so it sees races between
// threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#if !defined(__x86_64__) || defined(FHSIM_UCONTEXT)
#define FHSIM_SWAPCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#define FHSIM_UNWATCHED __attribute__((noinline, no_sanitize("thread", "address", "undefined")))

namespace fhsim {

inline void unwatch([[maybe_unused]] bool on) {
#ifdef __SANITIZE_THREAD__
  on ? AnnotateIgnoreReadsBegin("", 0) : AnnotateIgnoreReadsEnd("", 0);
  on ? AnnotateIgnoreWritesBegin("", 0) : AnnotateIgnoreWritesEnd("", 0);
#endif
}

// While an object of this type exists, ThreadSanitizer ignores all accesses: the simulator shares
// its own data freely.
struct Unwatched {
  Unwatched() { unwatch(true); }
  ~Unwatched() { unwatch(false); }
};

// Orders everything before `publish(tag)` before the return of `observe(tag)`.
inline void publish([[maybe_unused]] void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(tag);
#endif
}
inline void observe([[maybe_unused]] void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(tag);
#endif
}

#ifndef FHSIM_SWAPCONTEXT
// Stores the callee-saved registers on this stack and loads those of the other stack. swapcontext
// would need two system calls per switch.
__attribute__((naked, noinline, no_sanitize("thread", "address", "undefined"))) inline void
switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// A place to switch from and to: a fiber's stack, or the scheduler's.
struct Context {
#ifdef FHSIM_SWAPCONTEXT
  ucontext_t registers;
#else
  void* top = nullptr;  // of the stack, where the registers are
#endif
  void* tsan = nullptr;
  void* asan = nullptr;
  const void* bottom = nullptr;  // with the size, for AddressSanitizer
  size_t size = 0;
};

FHSIM_UNWATCHED inline void switch_to(Context& from, Context& to, [[maybe_unused]] bool last) {
#ifdef __SANITIZE_THREAD__
  constexpr unsigned orders_nothing = 1;
  __tsan_switch_to_fiber(to.tsan, orders_nothing);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan, to.bottom, to.size);
#endif
#ifdef FHSIM_SWAPCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  switch_stacks(&from.top, to.top);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.asan, nullptr, nullptr);
#endif
}

class Fiber {
 public:
  // Makes the next `enter` call main, which must not return; it leaves for the last time instead.
  void prepare(void (*main)()) {
    if (!stack_) stack_.reset(new char[bytes]);
    here_.bottom = stack_.get(), here_.size = bytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_.get(), bytes);  // frames that a deadlock left behind
#endif
#ifdef __SANITIZE_THREAD__
    if (!here_.tsan) here_.tsan = __tsan_create_fiber(0);  // half a millisecond
#endif
#ifdef FHSIM_SWAPCONTEXT
    getcontext(&here_.registers);
    here_.registers.uc_stack.ss_sp = stack_.get(), here_.registers.uc_stack.ss_size = bytes;
    makecontext(&here_.registers, main, 0);
#else
    void** top = (void**)(((uintptr_t)stack_.get() + bytes) & ~(uintptr_t)63);
    *--top = nullptr;  // main's return address: at its entry the stack is 8 off 16, as after a call
    *--top = (void*)main;
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    here_.top = top;
#endif
  }

  void enter() {
#ifdef __SANITIZE_THREAD__
    scheduler_.tsan = __tsan_get_current_fiber();
#endif
    switch_to(scheduler_, here_, false);
  }

  // The first thing that main does.
  static void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_.bottom, &scheduler_.size);
#endif
  }

  // Called while an Unwatched exists, which a fiber that never returns must not keep.
  void leave(bool last = false) {
    unwatch(false);
    switch_to(here_, scheduler_, last);
    unwatch(true);
  }

 private:
  static constexpr size_t bytes = 128 << 10;
  static inline Context scheduler_;
  Context here_;
  std::unique_ptr<char[]> stack_;
};

}  // namespace fhsim
