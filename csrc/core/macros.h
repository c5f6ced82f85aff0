// SPDX-License-Identifier: Apache-2.0
#pragma once

// Helpers in headers must not become weak symbols: a header is compiled once per instruction set, and the linker
// would keep one copy for all of them, possibly the AVX-512 one. Internal linkage and forced inlining rule that out.
#if defined(__CUDACC__)
#define PRECAL_INLINE static __host__ __device__ __forceinline__
#else
#define PRECAL_INLINE static inline __attribute__((always_inline))
#endif
