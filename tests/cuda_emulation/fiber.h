// Switching between stacks. By hand on x86-64 (a few nanoseconds), with ucontext elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulation {

#if defined(__x86_64__)

extern "C" void fgattn_emulation_switch(void** save, void* load);
asm(R"(
.text
.type fgattn_emulation_switch,@function
fgattn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fgattn_emulation_switch,.-fgattn_emulation_switch
)");

inline void switch_context(void** save, void* load) { fgattn_emulation_switch(save, load); }
inline void* make_context(char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  void** sp = top - 8;  // six registers, the entry, and a return address that nobody takes
  for (int i = 0; i < 8; ++i) sp[i] = nullptr;
  sp[6] = reinterpret_cast<void*>(entry);
  return sp;
}
inline void free_context(void*) {}

#else
}  // namespace emulation
#include <ucontext.h>
namespace emulation {

inline void switch_context(void** save, void* load) {
  if (*save == nullptr) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
inline void* make_context(char* stack, size_t bytes, void (*entry)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
inline void free_context(void* context) { delete static_cast<ucontext_t*>(context); }

#endif

}  // namespace emulation
