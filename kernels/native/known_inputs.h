// What a product knows of the inputs of a run of columns before it multiplies them.
#pragma once
#include <type_traits>

#include "bands.h"

namespace {

// What is known of the inputs of a run: their sum, and what a scheme found besides.
struct Known {
    int32_t sum, besides;
};

struct Nothing {
    static constexpr bool FOUND = false;
};

// Where one instruction multiplies and adds, one token's sum is CHAINS sums, so as not to wait for each product.
#if defined(__AVX512F__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int SIDE_BY_SIDE = 2;
#else
constexpr int SIDE_BY_SIDE = 1;
#endif

}  // namespace
