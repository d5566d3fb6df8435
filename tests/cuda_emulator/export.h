// What Python calls by name in a library that is compiled with hidden symbols.
#pragma once

#define HE_EXPORT __attribute__((visibility("default")))
