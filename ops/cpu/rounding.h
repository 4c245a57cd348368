// One rounding per operation.  The sources are compiled with -ffp-contract=fast, under which a compiler may fuse a
// product with the addition that follows; a product that went through rounded() stays a number of its own.
// Include it inside of the variant's namespace where there are variants, after BOLTZ_MM_VECTOR_BYTES was defined.

template <typename T>
inline __attribute__((always_inline)) T rounded(T product) {
#if defined(__x86_64__) && !defined(__FMA__) && !(defined(BOLTZ_MM_VECTOR_BYTES) && BOLTZ_MM_VECTOR_BYTES > 16)
  return product;  // without such an instruction
#elif defined(__x86_64__)
  asm("" : "+v"(product));
  return product;
#elif defined(__aarch64__)
  asm("" : "+w"(product));
  return product;
#else
  volatile T kept = product;
  return kept;
#endif
}
