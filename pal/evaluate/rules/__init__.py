"""How answers become numbers: one file a rule, as the benchmarks' own scripts do it."""
