// What the library is made of, and the instruction set that it uses.
#include "ffi.h"

namespace aq {

std::atomic<const Kernels*> choice{*available()};

namespace {

std::string list(const Kernels* const* kernels) {
  std::string names;
  for (; *kernels; ++kernels) names += std::string(names.empty() ? "\"" : ", \"") + (*kernels)->isa + "\"";
  return "[" + names + "]";
}

}  // namespace
}  // namespace aq

// What this library is made of, and the instruction set that it uses ("" for none), as JSON; for one thread at a time.
AQ_EXPORT const char* aq_native_info() {
  static std::string info;
  const aq::Kernels* const chosen = aq::choice;
  info = "{\"sources\": \"" AQ_SOURCES "\", \"ffi\": [" + std::to_string(XLA_FFI_API_MAJOR) + ", " +
         std::to_string(XLA_FFI_API_MINOR) + "], \"built\": " + aq::list(aq::built()) + ", \"chosen\": \"" +
         (chosen ? chosen->isa : "") + "\"}";
  return info.c_str();
}

// The instruction sets that this processor has, best first, as JSON.
AQ_EXPORT const char* aq_native_available() {
  static const std::string names = aq::list(aq::available());
  return names.c_str();
}

// Use this instruction set from now on; return 0 if this processor or this library lacks it.
AQ_EXPORT int aq_native_choose(const char* isa) {
  for (auto* kernels = aq::available(); *kernels; ++kernels)
    if (std::string(isa) == (*kernels)->isa) {
      aq::choice = *kernels;
      return 1;
    }
  return 0;
}
