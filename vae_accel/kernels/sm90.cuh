// What a Hopper card can do that C++ has no words for: barriers and copies of its engine, products of warpgroups.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// A CUtensorMap: how the copy engine sees a matrix.
struct alignas(64) Map { u64 v[16]; };

__device__ __forceinline__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(arrivals) : "memory");
}

// Arrives, and lets the barrier wait for so many bytes of copies.
__device__ __forceinline__ void expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}

__device__ __forceinline__ void wait(u32 bar, u32 parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  } while (!done);
}

// A box of a matrix to shared memory.
__device__ __forceinline__ void load(u32 to, const Map* map, u32 bar, int column, int row) {
  asm volatile(
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
    :: "r"(to), "l"((u64)map), "r"(bar), "r"(column), "r"(row) : "memory");
}

// A box of frames of a matrix from shared memory; `committed` copies are read once `read_out` returns.
__device__ __forceinline__ void store(const Map* map, u32 from, int column, int row, int frame) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
    :: "l"((u64)map), "r"(from), "r"(column), "r"(row), "r"(frame) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void read_out() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void written_out() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void seen_by_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A K-major matrix for wgmma: rows of 128 or 64 bytes, swizzled as the copy engine does; `at` in units of 16 bytes.
__device__ __forceinline__ u64 desc128(u32 at) {
  u64 d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(at | 1 << 16), "r"(1u << 30 | 64));
  return d;
}
__device__ __forceinline__ u64 desc64(u32 at) {
  u64 d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(at | 1 << 16), "r"(2u << 30 | 32));
  return d;
}

// The threads of a warpgroup wait for each other.
__device__ __forceinline__ void together(int warpgroup) {
  asm volatile("bar.sync %0, 128;" :: "r"(warpgroup + 1) : "memory");
}

__device__ __forceinline__ void put(u32 at, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(at), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ float get(u32 at) {
  float f;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(at) : "memory");
  return f;
}

// Two numbers of a vector that is only read: it stays in the first level cache, which no copy of the engine goes through.
__device__ __forceinline__ float2 columns(const float* at) {
  float2 two;
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "l"(at) : "memory");
  return two;
}

// The sum over the eight lanes that hold the same columns of a product.
__device__ __forceinline__ float over_rows(float v) {
  for (int lanes = 4; lanes < 32; lanes *= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

// Two numbers of 16 bits, bf16 or fp16, in a word: rounded, and read again.
template <bool brain> __device__ __forceinline__ u32 pack(float low, float high) {
  u32 two;
  if (brain) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
template <bool brain> __device__ __forceinline__ float low(u32 two) {
  if (brain) return __uint_as_float(two << 16);
  float f;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(f) : "r"(two));
  return f;
}
template <bool brain> __device__ __forceinline__ float high(u32 two) {
  if (brain) return __uint_as_float(two & 0xffff0000u);
  float f;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(f) : "r"(two));
  return f;
}

// A ring of stages in shared memory: `phase` turns with every round.
struct Ring { u32 slot, phase; };
template <int SIZE> __device__ __forceinline__ void next(Ring& r) {
  if (++r.slot == SIZE) { r.slot = 0; r.phase ^= 1; }
}
