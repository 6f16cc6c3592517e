/* Takes away what simd.h and levels.h defined for one instruction set. */

#undef vf
#undef vi
#undef INLINE
#undef LANES
#undef LEVEL
#undef TARGET
#undef NAME
#undef V_MAX
#undef V_MIN
