"""The few headers that generated CUDA includes and no wheel brings beside torch: parts of CUDA's
C++ core libraries (CCCL), cut down to what is used. NVRTC gets them by name, from memory.

cuda_fp16.h and cuda_bf16.h themselves come from NVIDIA's runtime wheel or the toolkit.
"""

from __future__ import annotations

_ARCHES = (53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

_PROVIDES = "\n".join(
    f"#if __CUDA_ARCH__ >= {arch}0\n#define NV_PROVIDES_SM_{arch} 1\n#else\n"
    f"#define NV_PROVIDES_SM_{arch} 0\n#endif"
    for arch in _ARCHES
)

NV_TARGET = f"""#pragma once
#define NV_IS_DEVICE 1
#define NV_IS_HOST 0
#define NV_ANY_TARGET 1
#define NV_NO_TARGET 0
{_PROVIDES}
#define DOP_NV_BODY(...) __VA_ARGS__
#define DOP_NV_PASTE(a, b) a##b
#define DOP_NV_CHOOSE(condition) DOP_NV_PASTE(DOP_NV_IF_, condition)
#define DOP_NV_IF_1(yes, no) DOP_NV_BODY yes
#define DOP_NV_IF_0(yes, no) DOP_NV_BODY no
#define NV_IF_ELSE_TARGET(condition, yes, no) DOP_NV_CHOOSE(condition)(yes, no)
#define NV_IF_TARGET(condition, yes, ...) DOP_NV_CHOOSE(condition)(yes, __VA_ARGS__)
"""

CSTDINT = """#pragma once
namespace cuda { namespace std {
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned long size_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;
} }
"""

TYPE_TRAITS = """#pragma once
namespace cuda { namespace std {
template <bool kValue> struct bool_constant { static constexpr bool value = kValue; };
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> inline constexpr bool is_same_v = is_same<A, B>::value;
template <class T> struct is_floating_point
    : bool_constant<is_same_v<T, float> || is_same_v<T, double>> {};
template <class T> struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T> struct is_integral
    : bool_constant<is_same_v<T, bool> || is_same_v<T, char> || is_same_v<T, signed char> ||
                    is_same_v<T, unsigned char> || is_same_v<T, short> ||
                    is_same_v<T, unsigned short> || is_same_v<T, int> ||
                    is_same_v<T, unsigned int> || is_same_v<T, long> ||
                    is_same_v<T, unsigned long> || is_same_v<T, long long> ||
                    is_same_v<T, unsigned long long>> {};
template <class T> struct is_unsigned : bool_constant<is_integral<T>::value && (T(-1) > T(0))> {};
template <bool kOn, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool kFirst, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
} }
"""

STUBS = {
    "nv/target": NV_TARGET,
    "cuda/std/cstdint": CSTDINT,
    "cuda/std/type_traits": TYPE_TRAITS,
    "mma.h": "#pragma once\n",  # included by generated code that does not use it
}
"""Header by name. Real ones are not used even where they are found: one way for everybody."""
