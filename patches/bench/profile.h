// A profile for recipes that need one: that of no model, always the same, with what decides what attention costs.
#pragma once

#include "cases.h"
#include "kvq.h"

// The recipe with numbers for layer `layer` of the shape if it names a profile (whose file is not read), else itself.
kvq_recipe * with_profile(kvq_recipe * recipe, const kvq_shape & shape, uint32_t layer);
