// SPDX-License-Identifier: Apache-2.0
// The only file that asks what the CPU can do.
#include "cpu/select.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(PRECAL_X86)
#include <cpuid.h>
#endif

namespace precal::cpu {

namespace {

struct Choice {
  const KernelTable* table;
  bool (*supported)();
};

#if defined(PRECAL_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // not every compiler's __builtin_cpu_supports knows it
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 0x10u) != 0;
}

// Not a constant of isa_avxvnni.cpp: whatever would put it together there could hold AVX instructions.
const KernelTable& avxvnni_kernels() {
  static const KernelTable table = [] {
    KernelTable t = k_avx2_kernels;
    t.name = "avxvnni";
    t.integer = k_avxvnni_kernels;
    return t;
  }();
  return table;
}
#endif
bool always() { return true; }

// The best first.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> list = {
#if defined(PRECAL_X86)
      {&k_avx512_kernels, has_avx512},
      {&avxvnni_kernels(), has_avxvnni},
      {&k_avx2_kernels, has_avx2},
#endif
      {&k_scalar_kernels, always},
  };
  return list;
}

Status find(const char* name, const char* source, const KernelTable** table) {
  for (const Choice& choice : choices()) {
    if (std::strcmp(choice.table->name, name) != 0) continue;
    if (!choice.supported())
      return invalid_value(source, ": this CPU cannot run ", name, "; it can run ", supported_isas());
    *table = choice.table;
    return {};
  }
  return invalid_value(source, ": must be one of ", supported_isas(), ", got ", quoted(name));
}

const KernelTable* automatic() {
  for (const Choice& choice : choices()) {
    if (choice.supported()) return choice.table;
  }
  return &k_scalar_kernels;
}

struct Selection {
  std::atomic<const KernelTable*> table;
  std::atomic<bool> forced{false};  // by force_isa: PRECAL_ISA no longer matters
  Status status;                    // of PRECAL_ISA; written once, so that ops on other threads may read it
  Selection() {
    const KernelTable* chosen = automatic();
    const char* forced = std::getenv("PRECAL_ISA");
    if (forced != nullptr && forced[0] != '\0') status = find(forced, "PRECAL_ISA", &chosen);
    table = chosen;
  }
};

Selection& selection() {
  static Selection s;
  return s;
}

}  // namespace

const KernelTable& kernels() { return *selection().table.load(); }
Status kernels_status() { return selection().forced ? Status() : selection().status; }

Status force_isa(const char* name) {
  const KernelTable* table = automatic();
  if (name[0] != '\0') PRECAL_RETURN_IF_ERROR(find(name, "force_isa", &table));
  selection().table = table;
  selection().forced = true;
  return {};
}

const char* supported_isas() {
  static const std::string names = [] {
    std::string text;
    for (const Choice& choice : choices()) {
      if (choice.supported()) text += (text.empty() ? "" : ",") + std::string(choice.table->name);
    }
    return text;
  }();
  return names.c_str();
}

}  // namespace precal::cpu
